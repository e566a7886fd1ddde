"""What the runs of a study came to, read from the files that they left."""

import array
import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glmjax.study import grid as grid_lib

_LAST = 0.05  # the share of a run's steps over which its last loss is the mean: of 300, 15
_ALIKE = 0.01  # nats: log Z's largest less its mean, where a model's outputs are the same at all positions
_EPISODE = 16  # steps without a spike that end an episode of them: half of what a guard needs for a limit
_FIGURES = ("loss", "grad_norm", "grad_norm_embedding", "seconds")  # of metrics.jsonl, that are kept of every step


@dataclasses.dataclass(frozen=True)
class Episode:
  """Spikes that follow one another: of each of spikes.watched that was above its limit, the first step of it."""

  first: Mapping[str, int]

  @property
  def began(self) -> int:
    """The step of the first of all."""
    return min(self.first.values())

  @property
  def leaders(self) -> list[str]:
    """What was above its limit first."""
    return [name for name, step in self.first.items() if step == self.began]


@dataclasses.dataclass(frozen=True)
class Result:
  """What one run came to."""

  point: grid_lib.Point
  versions: Sequence[str]  # of glmjax, that have had a part in it; none where an older one did not say
  has_diverged: bool
  steps: np.ndarray  # those that were done, float64 [T]
  figures: Mapping[str, np.ndarray]  # of each step, float64 [T]; NaN: a step lacks it, or it was not finite
  episodes: Sequence[Episode]  # its spikes, where a guard looked for them, in order; that which has ended it as well
  layers: Mapping[str, np.ndarray]  # of each layer, float64 [N]: the last line of layers.jsonl in which all are finite
  is_uniform: bool = False  # whether its outputs are the same at all positions, as layers.jsonl has it last

  @property
  def seconds(self) -> float:
    """What its steps took."""
    return float(np.nansum(self.figures["seconds"]))

  @property
  def first_loss(self) -> float:
    """The loss of the first step, of the model as it was made; NaN without one."""
    losses = self.figures["loss"]
    return float(losses[0]) if len(losses) else math.nan

  @property
  def last_loss(self) -> float:
    """The mean loss of the last steps, nats a token; that of the first step where the run has diverged, or ended above
    it: such a run has learned nothing.
    """
    losses = self.figures["loss"]
    last = losses[-max(round(_LAST * len(losses)), 1) :]
    last = last[np.isfinite(last)]  # float16's loss scale passes over others
    if self.has_diverged or not len(last):
      return self.first_loss
    mean = float(last.mean())
    return mean if mean < self.first_loss else self.first_loss

  @property
  def has_failed(self) -> bool:
    """Whether it has diverged, or learned nothing."""
    return self.has_diverged or not self.last_loss < self.first_loss

  @property
  def overflows(self) -> int:
    """How many of its steps have no finite gradient: a loss scale passes over these."""
    return int(np.count_nonzero(~np.isfinite(self.figures["grad_norm"])))

  @property
  def line(self) -> str:
    """What it came to, in words."""
    spikes = f", {len(self.episodes)} spike{'s' * (len(self.episodes) != 1)}" if self.episodes else ""
    if self.has_diverged:
      return f"diverged behind step {int(self.steps[-1]) if len(self.steps) else 0:,}{spikes}"
    return f"loss {self.last_loss:.4f}{' (learned nothing)' if self.has_failed else ''}{spikes}"


def grouped(results: Sequence[Result], axes: Sequence[str]) -> dict[grid_lib.Key, list[Result]]:
  """Returns the results that have the same of some axes, by its key."""
  found: dict[grid_lib.Key, list[Result]] = {}
  for result in results:
    found.setdefault(grid_lib.key(result.point, axes), []).append(result)
  return found


def ending(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns what the file of a point says; None where there is none, or none that was written whole."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None


def versions(said: Mapping[str, Any]) -> list[str]:
  """Returns the versions of glmjax that the file of a point names."""
  found = said.get("glmjax")
  return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def read(point: grid_lib.Point, result: pathlib.Path, workdir: pathlib.Path) -> Result:
  """Reads a run that has come to its end; a file is read line by line, and of a line what a report has use for."""
  steps, spikes = array.array("d"), [*_records(workdir / "interventions.jsonl")]
  figures = {name: array.array("d") for name in _FIGURES}
  for record in _records(workdir / "metrics.jsonl"):
    if "diverged" in record:  # the last line
      spikes.append(record)
      continue
    steps.append(record["step"])
    for name, found in figures.items():
      found.append(_number(record.get(name)))
  layers: dict[str, np.ndarray] = {}
  is_uniform = False
  for record in _records(workdir / "layers.jsonl"):
    layers |= dict(_of_layers(record))
    is_uniform = _number(record.get("log_z_max")) - _number(record.get("log_z_mean")) < _ALIKE
  columns = {name: np.array(found, np.float64) for name, found in figures.items()}
  said = ending(result) or {}
  has_diverged = said.get("status") != 0
  step = np.array(steps, np.float64)
  return Result(point, versions(said), has_diverged, step, columns, _episodes(spikes), layers, is_uniform)


def _episodes(spikes: Sequence[Mapping[str, Any]]) -> list[Episode]:
  """Divides spikes, in the order in which they were found, into episodes. A way back ends one: behind it the model is
  that of before, and has other rows.
  """
  found: list[Episode] = []
  last = -math.inf
  for spike in spikes:
    step, above = spike["step"], spike.get("above")
    if not isinstance(above, dict) or not above:
      continue
    if step - last > _EPISODE:
      found.append(Episode({}))
    found[-1] = Episode(dict.fromkeys(above, step) | dict(found[-1].first))
    last = -math.inf if spike.get("action") == "roll_back" else step
  return found


def _number(value: Any) -> float:
  return float(value) if isinstance(value, (int, float)) else math.nan


def _of_layers(record: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, np.ndarray]]:
  """Yields the figures of a line that are lists of finite numbers; those within others are named OUTER/INNER."""
  for name, value in record.items():
    if isinstance(value, dict):
      yield from _of_layers(value, f"{outer}{name}/")
    elif isinstance(value, list) and value and all(math.isfinite(_number(each)) for each in value):
      yield f"{outer}{name}", np.array(value, np.float64)


def _records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the records of a file; what is none is left out."""
  with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
    for line in file:
      try:
        record = json.loads(line)
      except (ValueError, RecursionError):
        continue
      if isinstance(record, dict) and isinstance(record.get("step"), int):
        yield record
