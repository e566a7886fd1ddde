"""Spikes: steps whose loss, gradient or update is far above those before, and what is done about them.

What a value may be follows from the same value of the steps before: the median of its logarithm and as many times the
median distance from that. A median does not move for a few large values, and the logarithm knows no scale. Limits are
for above alone.

The limits of a step are a function of the figures of the steps up to the second before it, always: a step is sent to
the device before the last one's figures are read. So a run that was broken off and gone on with, which reads them from
metrics.jsonl, has the limits of the unbroken one, and with them its bits. All processes read the same figures and have
the same limits, and whether an update is applied is decided on the devices, in one program with the step (step.py).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from glmjax import errors
from glmjax import ranges
from glmjax.io import paths
from glmjax.train import divergence
from glmjax.train import feed as feed_lib
from glmjax.train import step as step_lib

ACTIONS = ("log", "skip", "clip", "roll_back")
_TO_SIGMA = 1.4826  # of a normal distribution's median distance from the median
_LARGEST_LOG = math.log(ranges.LARGEST)
_EVERYTHING = np.float32(-1)  # a limit that all values are above


@dataclasses.dataclass(frozen=True)
class Guard:
  """What counts as a spike, and what is done at one.

  - "log": it is said and recorded
  - "skip": the step's update is not applied; its samples are seen
  - "clip": a gradient whose norm is above its limit is scaled down to the limit, beside the optimizer's own clip_norm
  - "roll_back": the run goes back to its newest checkpoint, and leaves the step's samples out

  A spike is above exp(median + sigmas * spread) of a value's logarithms; the spread is 1.4826 times the median distance
  from the median, or the floor where that is larger. 128 steps and six sigmas are OLMo-core's, and MaxText's after it.
  The floors are chosen so that sound runs raise no alarm: in two runs of the quickstart (1,280 steps each) the gradient
  norm once was 4.4 times its median for a single step, to no effect, the loss never more than 1.12 times, and the norms
  of updates (711 steps of a third run) 1.22 times; so that no loss below 1.35, no gradient below 6 and no update below
  1.8 times its median is a spike. The explosions of GLM-130B's log, and those of others, are far above; that the
  update's norm doubles before the rest shows anything is what was seen of a run of 32 billion parameters (Marin, issue
  1368).

  A spike counts among the steps before it like any other, so that what has come to stay is no spike any more after half
  a window.
  """

  action: str = "log"  # one of ACTIONS
  window: int = 128  # steps before, of which the limits are made
  least: int = 32  # of them that must be there for a limit
  sigmas: float = 6.0
  loss_floor: float = 0.05  # the least spread of the logarithm of the loss,
  gradient_floor: float = 0.3  # of norms of the gradient
  update_floor: float = 0.1  # and of norms of the update
  most: int = 10  # updates skipped, or ways back, within a window; more are a run that diverges
  skip: Sequence[tuple[int, int]] = ()  # (first, last) sample numbers; a finite step with any of them is not applied

  def __post_init__(self) -> None:
    ranges.choice("Guard.action", self.action, ACTIONS)
    ranges.whole("Guard.window", self.window, 2, 100_000)
    ranges.whole("Guard.least", self.least, 2, self.window)
    for name in ("sigmas", "loss_floor", "gradient_floor", "update_floor"):
      ranges.number(f"Guard.{name}", getattr(self, name), above=0)
    ranges.whole("Guard.most", self.most, 0)
    ranges.pairs("Guard.skip", self.skip)

  def floor(self, name: str) -> float:
    """Returns the least spread of one of step.watched."""
    if name == "loss":
      return self.loss_floor
    return self.gradient_floor if name.startswith("grad_norm") else self.update_floor

  def limit(self, values: np.ndarray, floor: float) -> float:
    """Returns what the next of some values may be, at most; infinity where they are too few.

    Args:
      values: of the steps before; what is not finite, or not above 0, does not count.
      floor: the least spread of their logarithms.
    """
    logs = np.log(values[np.isfinite(values) & (values > 0)])
    if len(logs) < self.least:
      return math.inf
    middle = float(np.median(logs))
    spread = max(_TO_SIGMA * float(np.median(np.abs(logs - middle))), floor)
    highest = middle + self.sigmas * spread
    return math.exp(highest) if highest < _LARGEST_LOG else math.inf

  def holds(self, first: int, last: int) -> bool:
    """Tells whether the update of a step on these samples is left out, whatever its figures."""
    return any(low <= last and first <= high for low, high in self.skip)


@dataclasses.dataclass(frozen=True)
class Spike:
  """A step that was above its limits."""

  step: int
  first: int  # its samples
  last: int
  above: Mapping[str, tuple[float, float]]  # value and limit of each that was
  action: str  # what was done, one of ACTIONS

  def __str__(self) -> str:
    name, (value, limit) = max(self.above.items(), key=lambda each: each[1][0] / max(each[1][1], ranges.SMALLEST))
    others = f" ({len(self.above) - 1} more)" if len(self.above) > 1 else ""
    where = f"step {self.step:,} (samples {self.first} to {self.last})"
    return f"spike at {where}: {name} {value:.4g}, limit {limit:.4g}{others}"

  @property
  def figures(self) -> dict[str, dict[str, float]]:
    """Value and limit of each that was above it, as files of lines have them."""
    return {name: {"value": value, "limit": limit} for name, (value, limit) in self.above.items()}

  @property
  def done(self) -> str:
    """What was done, in words; a run that goes back says so itself."""
    if self.action == "skip":
      return "its update is not applied"
    if self.action == "clip" and any(name.startswith("grad_norm") for name in self.above):
      return "its gradient is scaled down"
    return "recorded"


class GoBack(Exception):
  """The run is to go back to its newest checkpoint: nothing of the spike's step was written or saved."""

  def __init__(self, spike: Spike):
    """Says at which spike."""
    super().__init__(str(spike))
    self.spike = spike


class Detector:
  """The figures of one run's last steps, and the limits that follow from them; the same in every process."""

  def __init__(
    self, guard: Guard, params: Any, replicated: jax.sharding.NamedSharding, records: Sequence[Mapping[str, Any]] = ()
  ):
    """Begins with what metrics.jsonl has of the steps before.

    Args:
      guard: what a spike is.
      params: what is trained; their shapes do.
      replicated: the sharding of what lies whole on every device.
      records: of at least guard.window + 1 steps, where there are so many; steps before a guard have fewer figures.
    """
    self.guard, self._replicated = guard, replicated
    self._names = step_lib.watched(params)
    self._rows: dict[int, np.ndarray] = {}  # float64 [K]
    self._limits: dict[int, np.ndarray] = {}  # of steps whose figures are not read yet; float32 [K]
    for record in records:
      self._add(record)

  def abstract(self) -> step_lib.Limits:
    """Returns shape and sharding of what `limits` returns."""
    each = jax.ShapeDtypeStruct((len(self._names),), np.float32, sharding=self._replicated)
    return step_lib.Limits(each, each)

  def limits(self, step: int, first: int, size: int) -> step_lib.Limits:
    """Returns the limits of a step that is about to be sent to the device, on that many samples from the first on."""
    self._limits[step] = limits = self._of(step)
    none = np.full_like(limits, np.inf)
    apply = limits if self.guard.action == "skip" else none
    if self.guard.holds(first, first + size - 1):
      apply = np.full_like(limits, _EVERYTHING)
    clip = limits if self.guard.action == "clip" else none
    return step_lib.Limits(*(feed_lib.everywhere(each, self._replicated) for each in (apply, clip)))

  def find(self, record: Mapping[str, Any], first: int, last: int, held: bool) -> Spike | None:
    """Takes the figures of a step, and returns its spike.

    Args:
      record: its figures, by their names in metrics.jsonl.
      first, last: its samples.
      held: its update was not applied for its limits.
    """
    step, values = record["step"], self._add(record)
    limits = self._limits.pop(step)
    if held and self.guard.holds(first, last):
      return None  # as it was asked for
    if not held and (self.guard.action == "skip" or not np.isfinite(values).all()):
      return None  # the device decides; what is not finite is the loss scale's to mend, or the end
    over = values / np.maximum(limits, ranges.SMALLEST)
    above = over > 1
    if held and not above.any():
      above = over == np.nanmax(over)  # the device has rounded otherwise
    above = {
      name: (float(value), float(limit))
      for name, value, limit, is_above in zip(self._names, values, limits, above)
      if is_above
    }
    return Spike(step, first, last, above, "skip" if held else self.guard.action) if above else None

  def _of(self, step: int) -> np.ndarray:
    """Computes a step's limits; float32 [K]."""
    for old in [each for each in self._rows if each < step - 1 - self.guard.window]:
      del self._rows[old]
    rows = np.array([row for each, row in self._rows.items() if each <= step - 2])
    rows = rows.reshape(-1, len(self._names))
    limits = [self.guard.limit(values, self.guard.floor(name)) for name, values in zip(self._names, rows.T)]
    return np.array(limits, np.float32)

  def _add(self, record: Mapping[str, Any]) -> np.ndarray:
    """Keeps a step's figures; those that it does not have, or that are null, are not finite."""
    found = [record.get(name) for name in self._names]
    row = np.array([value if isinstance(value, int | float) else math.nan for value in found], np.float64)
    self._rows[record["step"]] = row
    return row


def diverged(spike: Spike, guard: Guard, can_go_back: bool, checkpoints: paths.Path) -> errors.Diverged:
  """Returns the end of a run that has a spike about which nothing is left to be done: it is one too many, or there is
  no checkpoint that the run can go back to.
  """
  reason = (
    f"more than {guard.most} (Guard.most) within {guard.window} steps"
    if can_go_back
    else "with no checkpoint yet to go back to (Intervals.save)"
  )
  return errors.Diverged(
    f"{spike}; {reason}; {divergence.going_back(checkpoints)}; lower the learning rate, or leave these samples out "
    f"with Batches.skip = [({spike.first}, {spike.last})]",
    spike.step,
    (spike.first, spike.last),
    next(iter(spike.above)),
    spike.figures,
  )
