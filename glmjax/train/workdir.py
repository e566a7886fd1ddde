"""A run's folder: what it says about the run, and whether a new start may use it.

  WORKDIR/  config.json   tokenizer/   metrics.jsonl   checkpoints/   tensorboard/   profile/
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any
import zlib

from glmjax import errors
from glmjax.checkpoint import folder
from glmjax.checkpoint import manager as manager_lib
from glmjax.models import config as config_lib
from glmjax.train import feed

# What may change from one start of a run to the next: how it is computed, not what it is.
_FREE = ("dtype", "scan_layers", "remat", "hidden_dropout", "attention_dropout")

# What flock says on file systems without locks: buckets, some network file systems.
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Paths of a run's folder."""

  root: pathlib.Path

  @property
  def config(self) -> pathlib.Path:
    return self.root / folder.CONFIG

  @property
  def metrics(self) -> pathlib.Path:
    return self.root / "metrics.jsonl"

  @property
  def checkpoints(self) -> pathlib.Path:
    return self.root / folder.CHECKPOINTS

  @property
  def tensorboard(self) -> pathlib.Path:
    return self.root / "tensorboard"

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Within it no other process can have the folder; a killed one leaves no lock behind.

    Raises:
      errors.InputError: when another process trains there, or it is no folder for a run.
    """
    if (self.root / folder.PARAMS).exists():
      raise errors.InputError(f"{self.root} is an exported model's folder: choose another workdir")
    self.root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(self.root, os.O_RDONLY)
    try:
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise errors.InputError(f"{self.root} is in use: another process is training there; wait for it, or choose "
                                "another workdir") from None
      except OSError as error:
        if error.errno not in _NO_LOCKS:
          raise
      yield
    finally:
      os.close(descriptor)

  def open(self, model: config_lib.GLMConfig, data: feed.DataSource, overwrite: bool) -> None:
    """Makes the folder this run's own: writes config.json, or finds that it is this run's already.

    Raises:
      errors.InputError: when another run's checkpoints are there and overwrite is False.
    """
    config = folder.FolderConfig(model, json.loads(json.dumps(data.describe())))
    with tempfile.TemporaryDirectory() as scratch:
      tokenizer = {}
      if hasattr(data, "save_tokenizer"):
        data.save_tokenizer(scratch)
        tokenizer = folder.read_tokenizer(scratch)
      if tokenizer.get("vocab_size", 0) > model.vocab_size:  # before anything is deleted
        raise errors.InputError(f"the data's tokenizer has {tokenizer['vocab_size']} ids, the model's vocab_size is "
                                f"{model.vocab_size}: give the model as many or more")
      if overwrite:
        self._clear()
      elif manager_lib.steps(self.checkpoints):  # without: killed before its first checkpoint, nothing to lose
        self._check_same(config)
      self.root.mkdir(parents=True, exist_ok=True)
      if tokenizer:
        folder.copy_tokenizer(scratch, self.root)
    folder.write_config(self.root, dataclasses.replace(config, tokenizer=tokenizer))

  def seen(self) -> int:
    """A sum of what a run begins with: config.json and the names of the checkpoints."""
    text = self.config.read_bytes() if self.config.exists() else b""
    return zlib.crc32(text + repr(manager_lib.steps(self.checkpoints)).encode())

  def _clear(self) -> None:
    """Deletes a run, its config.json last; the checkpoints leave by one rename, so that none is half there.

    A folder that holds no run keeps what it has: a tokenizer/ there is somebody's only one.
    """
    if not self.config.exists() and not manager_lib.steps(self.checkpoints):
      return
    doomed = self.root / "checkpoints.deleting"
    shutil.rmtree(doomed, ignore_errors=True)
    if self.checkpoints.exists():
      self.checkpoints.rename(doomed)
      shutil.rmtree(doomed, ignore_errors=True)
    self.metrics.unlink(missing_ok=True)
    for child in (folder.TOKENIZER, "tensorboard", "profile"):
      shutil.rmtree(self.root / child, ignore_errors=True)
    self.config.unlink(missing_ok=True)

  def _check_same(self, config: folder.FolderConfig) -> None:
    advice = "choose another workdir, or --overwrite to delete that run"
    try:
      found = folder.read_config(self.root)
    except errors.InputError as error:
      raise errors.InputError(f"{self.root} holds checkpoints of a run that cannot be told: {error}; "
                              f"{advice}") from error
    theirs, ours = (dataclasses.asdict(c.model) for c in (found, config))
    for name in _FREE:
      theirs[name] = ours[name]
    _, seen = manager_lib.read_newest(
        self.checkpoints, lambda step: manager_lib.read_record(step)["metadata"]["samples_seen"])
    difference = (_difference(theirs, ours, "model")
                  or _difference(_before(found.data, seen), _before(config.data, seen), "data"))
    if difference:
      raise errors.InputError(f"{self.root} holds another run: {difference}; {advice}")


def _before(data: dict[str, Any], samples: int) -> dict[str, Any]:
  """A data description without the changes of rates still to come: those may be made anew."""
  return data | {"changes": [change for change in data.get("changes", ()) if change["first_sample"] < samples]}


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
