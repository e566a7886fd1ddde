"""A run's folder: what it says about the run, and whether a new start may use it.

  WORKDIR/  config.json   metrics.jsonl   checkpoints/   tensorboard/   profile/
"""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

from glmjax import errors
from glmjax.checkpoint import manager as manager_lib
from glmjax.models import config as config_lib

# What may change from one start of a run to the next: how it is computed, not what it is.
_FREE = ("dtype", "scan_layers", "remat", "hidden_dropout", "attention_dropout")


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Paths of a run's folder."""

  root: pathlib.Path

  @property
  def config(self) -> pathlib.Path:
    return self.root / "config.json"

  @property
  def metrics(self) -> pathlib.Path:
    return self.root / "metrics.jsonl"

  @property
  def checkpoints(self) -> pathlib.Path:
    return self.root / "checkpoints"

  @property
  def tensorboard(self) -> pathlib.Path:
    return self.root / "tensorboard"

  def open(self, model: config_lib.GLMConfig, data: dict[str, Any], overwrite: bool) -> None:
    """Makes the folder this run's own: writes config.json, or finds that it is this run's already.

    Raises:
      errors.InputError: when another run's checkpoints are there and overwrite is False.
    """
    described = json.loads(json.dumps({"model": dataclasses.asdict(model), "data": data}))
    if overwrite:
      self._clear()
    if manager_lib.steps(self.checkpoints):
      self._check_same(described)
    self.root.mkdir(parents=True, exist_ok=True)
    _write(self.config, json.dumps(described, indent=2) + "\n")

  def _clear(self) -> None:
    """Deletes a run; the checkpoints leave by one rename, so that none is ever half there."""
    doomed = self.root / "checkpoints.deleting"
    shutil.rmtree(doomed, ignore_errors=True)
    if self.checkpoints.exists():
      self.checkpoints.rename(doomed)
      shutil.rmtree(doomed, ignore_errors=True)
    self.metrics.unlink(missing_ok=True)
    self.config.unlink(missing_ok=True)
    shutil.rmtree(self.tensorboard, ignore_errors=True)

  def _check_same(self, described: dict[str, Any]) -> None:
    advice = "choose another workdir, or --overwrite to delete that run"
    try:
      found = json.loads(self.config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      raise errors.InputError(f"{self.root} holds checkpoints, but its config.json cannot be read "
                              f"({type(error).__name__}): {advice}") from error
    for what in ("model", "data"):
      theirs, ours = found.get(what), described[what]
      if what == "model" and isinstance(theirs, dict):
        theirs, ours = ({k: v for k, v in d.items() if k not in _FREE} for d in (theirs, ours))
      difference = _difference(theirs, ours, what)
      if difference:
        raise errors.InputError(f"{self.root} holds a run of another {what}: {difference}; {advice}")


def _difference(theirs: Any, ours: Any, name: str) -> str | None:
  """The first place where two trees of dicts differ, in words."""
  if isinstance(theirs, dict) and isinstance(ours, dict):
    for key in dict.fromkeys([*theirs, *ours]):
      found = _difference(theirs.get(key), ours.get(key), f"{name}.{key}")
      if found:
        return found
    return None
  return None if theirs == ours else f"{name} is {_short(theirs)} there and {_short(ours)} here"


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


def _write(path: pathlib.Path, text: str) -> None:
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  with open(temporary, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
