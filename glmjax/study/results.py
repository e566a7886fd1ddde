"""What the runs of a study came to, read from the files that they left."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glmjax.study import grid as grid_lib

_LAST = 0.05  # the share of a run's steps over which its last loss is the mean
_EPISODE = 16  # steps without a spike that end an episode of them


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
class Table:
  """Figures of some steps, as arrays; T steps."""

  steps: np.ndarray  # float64 [T]
  columns: Mapping[str, np.ndarray]  # by name, float64 [T], or [T, ...] of figures that are lists; NaN: not finite

  def column(self, name: str) -> np.ndarray:
    """Returns a figure; NaN where no step has it."""
    return self.columns.get(name, np.full(len(self.steps), math.nan))


@dataclasses.dataclass(frozen=True)
class Result:
  """One run."""

  point: grid_lib.Point
  has_diverged: bool
  seconds: float
  table: Table  # of metrics.jsonl
  layers: Table  # of layers.jsonl; without steps where the run wrote none
  spiked: Sequence[tuple[int, Sequence[str]]]  # steps with a spike, and what was above its limit

  @property
  def first_loss(self) -> float:
    """The loss of the first step, of the model as it was made; NaN without one."""
    losses = self.table.column("loss")
    return float(losses[0]) if len(losses) else math.nan

  @property
  def last_loss(self) -> float:
    """The mean loss of the last steps, nats a token; that of the first step where the run has diverged, or ended above
    it: such a run has learned nothing.
    """
    losses = self.table.column("loss")
    if self.has_diverged or not len(losses):
      return self.first_loss
    last = float(losses[-max(round(_LAST * len(losses)), 1) :].mean())
    return last if last < self.first_loss else self.first_loss

  @property
  def has_failed(self) -> bool:
    """Whether it has diverged, or learned nothing."""
    return self.last_loss >= self.first_loss

  @functools.cached_property
  def episodes(self) -> list[Episode]:
    """Its spikes, where a guard looked for them, in order."""
    found: list[Episode] = []
    last = -math.inf
    for step, names in self.spiked:
      if step - last > _EPISODE:
        found.append(Episode({}))
      found[-1] = Episode(dict.fromkeys(names, step) | dict(found[-1].first))
      last = step
    return found

  @property
  def line(self) -> str:
    """What it came to, in words."""
    spikes = f", {len(self.episodes)} spike{'s' * (len(self.episodes) != 1)}" if self.episodes else ""
    if self.has_diverged:
      return f"diverged behind step {len(self.table.steps):,}{spikes}"
    return f"loss {self.last_loss:.4f}{' (learned nothing)' if self.has_failed else ''}{spikes}"


def ending(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns what the file of a point says; None where there is none, or none that was written whole."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None


def read(point: grid_lib.Point, result: pathlib.Path, workdir: pathlib.Path) -> Result:
  """Reads a run that has come to its end."""
  ended = ending(result) or {}
  records = [record for record in _records(workdir / "metrics.jsonl") if "diverged" not in record]
  spiked = [(record["step"], record["spiked"]) for record in records if record.get("spiked")]
  layers = _table(_records(workdir / "layers.jsonl"))
  return Result(point, ended.get("status") != 0, ended.get("seconds", math.nan), _table(records), layers, spiked)


def _table(records: Sequence[Mapping[str, Any]]) -> Table:
  """Turns records into arrays; figures within figures are named OUTER/INNER, and what is no number is left out."""
  flat = [dict(_flat(record)) for record in records]
  columns = {}
  for name in dict.fromkeys(name for record in flat for name in record):
    found = [record.get(name) for record in flat]
    size = next((len(value) for value in found if isinstance(value, list)), None)
    missing = math.nan if size is None else [math.nan] * size
    with contextlib.suppress(ValueError, TypeError):  # text, or lists of several lengths
      columns[name] = np.array([missing if value is None else value for value in found], np.float64)
  return Table(np.array([record["step"] for record in records], np.float64), columns)


def _flat(record: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in record.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{outer}{name}/")
    else:
      yield f"{outer}{name}", value


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records of a file; what is none is left out."""
  found = []
  try:
    with open(path, encoding="utf-8", errors="replace") as file:
      for line in file:
        try:
          record = json.loads(line)
        except ValueError:
          continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
          found.append(record)
  except OSError:
    return []
  return found
