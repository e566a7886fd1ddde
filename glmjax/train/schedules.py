"""Schedules: plain functions of samples seen, counted absolutely, and the plan of batches.

`samples_seen` is the number of the next sample of the data, skipped ones included. One integer says where
a run stands: restarting changes no schedule, and resuming at any step costs nothing. (GLM-130B lost days
to a schedule counted from the last restart: its training log.)

A schedule is called with samples seen: an int, or a scalar under jit.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from glmjax import errors
from glmjax import ranges

Samples = int | jax.Array


@dataclasses.dataclass(frozen=True)
class LearningRate:
  """Linear warmup, cosine decay, then flat. The defaults are GLM-130B's (paper, table 11)."""

  peak: float = 8e-5
  minimum: float = 8e-6  # after the decay
  initial: float = 1e-7  # at sample 0
  warmup_samples: int = 1_098_632
  decay_samples: int = 197_753_905  # where the minimum is reached; the warmup counts

  def __post_init__(self) -> None:
    for name in ("peak", "minimum", "initial"):
      ranges.number(f"LearningRate.{name}", getattr(self, name), 0)
    for name in ("warmup_samples", "decay_samples"):
      ranges.whole(f"LearningRate.{name}", getattr(self, name), 0, ranges.MOST_SAMPLES)
    if self.minimum > self.peak:
      raise errors.InputError(
        f"LearningRate: minimum {self.minimum!r} is above peak {self.peak!r}, which it decays "
        "from: give a smaller minimum, or a larger peak"
      )
    if self.initial > self.peak and self.warmup_samples:
      raise errors.InputError(
        f"LearningRate: initial {self.initial!r} is above peak {self.peak!r}, which it warms up "
        "to: give a smaller initial, or a larger peak"
      )
    if not self.warmup_samples < self.decay_samples:
      raise errors.InputError(
        f"LearningRate: warmup_samples {self.warmup_samples} must be less than decay_samples {self.decay_samples}"
      )

  def __call__(self, samples: Samples) -> jax.Array:
    """Returns the rate, float32."""
    samples = jnp.asarray(samples, jnp.uint32).astype(jnp.float32)
    warmup, decay = float(self.warmup_samples), float(self.decay_samples)  # JAX takes no int above 2^31 - 1
    warm = self.initial + (self.peak - self.initial) * samples / max(warmup, 1.0)
    progress = (samples - warmup) / (decay - warmup)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    return jnp.where(samples < warmup, warm, self.minimum + (self.peak - self.minimum) * cosine)


@dataclasses.dataclass(frozen=True)
class Constant:
  """The same value always."""

  value: float = 1.0

  def __post_init__(self) -> None:
    ranges.number("Constant.value", self.value, 0)

  def __call__(self, samples: Samples) -> jax.Array:
    """Returns the value, float32."""
    return jnp.full_like(jnp.asarray(samples, jnp.uint32), self.value, jnp.float32)


@dataclasses.dataclass(frozen=True)
class PiecewiseLinear:
  """Straight lines between (samples[i], values[i]); flat before the first and after the last.

  The original's "hold alpha for x samples, then rise to 1 over y" is samples (0, x, x + y), values (a, a, 1).
  The same sample twice is a jump: the second value holds from that sample on.
  """

  samples: Sequence[int]
  values: Sequence[float]

  def __post_init__(self) -> None:
    for i, samples in enumerate(ranges.several("PiecewiseLinear.samples", self.samples)):
      ranges.whole(f"PiecewiseLinear.samples[{i}]", samples, 0, ranges.MOST_SAMPLES)
    for i, value in enumerate(ranges.several("PiecewiseLinear.values", self.values)):
      ranges.number(f"PiecewiseLinear.values[{i}]", value, 0)
    if len(self.samples) != len(self.values) or not self.samples or list(self.samples) != sorted(self.samples):
      raise errors.InputError(
        f"PiecewiseLinear: samples {self.samples} must rise and be as many as values {self.values}"
      )

  def __call__(self, samples: Samples) -> jax.Array:
    """Returns the value, float32. Compares integers: a float32 cannot tell the samples of a large run apart."""
    samples, at = jnp.asarray(samples, jnp.uint32), jnp.asarray(self.samples, jnp.uint32)
    values = jnp.asarray(self.values, jnp.float32)
    following = jnp.searchsorted(at, samples, side="right")
    left, right = jnp.maximum(following - 1, 0), jnp.minimum(following, len(self.samples) - 1)
    part = (samples - at[left]).astype(jnp.float32) / jnp.maximum(at[right] - at[left], 1).astype(jnp.float32)
    return values[left] + (values[right] - values[left]) * jnp.where(left == right, 0.0, part)


@dataclasses.dataclass(frozen=True)
class Joined:
  """One schedule after another: schedules[i + 1] from boundaries[i] on. Each counts samples from 0, not from there.

  A run restarted with another learning rate is the schedule of each start, and where each start began.
  """

  schedules: Sequence["Schedule"]
  boundaries: Sequence[int]

  def __post_init__(self) -> None:
    _check_schedules("Joined.schedules", self.schedules)
    for i, boundary in enumerate(ranges.several("Joined.boundaries", self.boundaries)):
      ranges.whole(f"Joined.boundaries[{i}]", boundary, 0, ranges.MOST_SAMPLES)
    if len(self.schedules) != len(self.boundaries) + 1 or list(self.boundaries) != sorted(self.boundaries):
      raise errors.InputError(
        f"Joined: boundaries {self.boundaries} must rise and be one fewer than the {len(self.schedules)} schedules"
      )

  def __call__(self, samples: Samples) -> jax.Array:
    """Returns the value, float32."""
    number = sum(jnp.asarray(samples, jnp.uint32) >= jnp.uint32(boundary) for boundary in self.boundaries)
    return jnp.choose(number, [schedule(samples) for schedule in self.schedules], mode="clip")


@dataclasses.dataclass(frozen=True)
class Product:
  """Schedules multiplied: a learning rate and a second warmup of it, say."""

  schedules: Sequence["Schedule"]

  def __post_init__(self) -> None:
    _check_schedules("Product.schedules", self.schedules)
    if not self.schedules:
      raise errors.InputError("Product: give one schedule or more")

  def __call__(self, samples: Samples) -> jax.Array:
    """Returns the value, float32."""
    return math.prod((schedule(samples) for schedule in self.schedules), start=jnp.float32(1.0))


Schedule = LearningRate | Constant | PiecewiseLinear | Joined | Product


def _check_schedules(name: str, schedules: Any) -> None:
  for i, schedule in enumerate(ranges.several(name, schedules)):
    if not callable(schedule):
      raise errors.InputError(
        f"{name}[{i}] is {schedule!r}: give a schedule, in gin @schedules.LearningRate() or the like"
      )


@dataclasses.dataclass(frozen=True)
class Batches:
  """Which samples each step trains on: batch size, its ramp, and the samples that are left out.

  GLM-130B: Batches(4_224, ramp_start=192, ramp_increment=24, ramp_samples=5_493_164).
  """

  size: int  # rows of a step
  ramp_start: int | None = None  # rows of the first steps; None: no ramp
  ramp_increment: int = 1  # rows added at a time
  ramp_samples: int = 0  # samples until `size` is reached
  skip: Sequence[tuple[int, int]] = ()  # (first, last) sample numbers left out, both included

  def __post_init__(self) -> None:
    ranges.whole("Batches.size", self.size, 1)
    ranges.whole("Batches.ramp_increment", self.ramp_increment, 1)
    ranges.whole("Batches.ramp_samples", self.ramp_samples, 0, ranges.MOST_SAMPLES)
    if self.ramp_start is not None:
      ranges.whole("Batches.ramp_start", self.ramp_start, 1)
      grows = self.size - self.ramp_start
      if grows < 0 or grows % self.ramp_increment:
        raise errors.InputError(
          f"Batches: cannot go from ramp_start {self.ramp_start} to size {self.size} in steps "
          f"of ramp_increment {self.ramp_increment}"
        )
    ranges.pairs("Batches.skip", self.skip)

  def size_at(self, samples: int) -> int:
    """Returns the rows of the step that begins with that many samples seen (Megatron's rule)."""
    if self.ramp_start is None or samples >= self.ramp_samples:
      return self.size
    increments = (self.size - self.ramp_start) // self.ramp_increment
    return self.ramp_start + samples * increments // self.ramp_samples * self.ramp_increment

  def next(self, samples: int) -> tuple[int, int]:
    """Returns (first sample, size) of the step that begins with that many samples seen.

    A batch that would touch a skipped range begins behind it; its step leaves first + size samples seen.
    """
    size = self.size_at(samples)
    for first, last in sorted(self.skip):
      if first < samples + size and samples <= last:
        samples = last + 1
        size = self.size_at(samples)
    return samples, size

  def plan(self, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yields (first sample, size) of every step from `start` samples seen on, without end."""
    while True:
      first, size = self.next(start)
      yield first, size
      start = first + size
