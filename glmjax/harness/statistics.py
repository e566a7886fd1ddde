"""How far a figure can be trusted: intervals of shares and means, and differences between models on the same items."""

from collections.abc import Callable, Sequence
import dataclasses
import math

import numpy as np

_Z = 1.959964  # of 95 %
_LEVEL = 0.95
_ROUNDS = 10_000
_MOST_DRAWN = 1 << 12  # units, or parts of them: an interval's width is known to 1.1 %, as is that of normal values
_AT_ONCE = 1 << 22  # numbers that are drawn at a time
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Sample:
  """A figure that is a function of sums over units, items mostly.

  U units, K sums.
  """

  units_UK: np.ndarray  # float64: what each unit adds to each sum
  figure: Callable[[np.ndarray], np.ndarray]  # of sums, [..., K] to [...]

  @property
  def value(self) -> float:
    """The figure over all units."""
    return float(self.figure(self.units_UK.sum(0)))

  @property
  def is_share(self) -> bool:
    """Whether the figure is a mean of units that are right or wrong, 1 or 0."""
    return self.figure is _mean and bool(np.isin(self.units_UK[:, 0], (0, 1)).all())


def wilson(hits: float, count: int) -> Interval:
  """Returns the 95 % interval of a share, hits of count (Wilson, 1927)."""
  share, spread = hits / count, _Z**2 / count
  middle = (share + spread / 2) / (1 + spread)
  half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
  return max(0.0, middle - half), min(1.0, middle + half)


def mean(values: Sequence[float] | np.ndarray) -> Sample:
  """Returns the mean of values, one a unit, in per cent."""
  values_U = np.asarray(values, np.float64)
  return Sample(np.stack([values_U, np.ones_like(values_U)], axis=-1), _mean)


def _mean(sums: np.ndarray) -> np.ndarray:
  return 100 * sums[..., 0] / sums[..., 1]


def interval(sample: Sample) -> Interval:
  """Returns a figure's 95 % interval: Wilson's of a share, else the bootstrap's."""
  if not sample.is_share:
    return bootstrap(sample)
  low, high = wilson(float(sample.units_UK[:, 0].sum()), len(sample.units_UK))
  return 100 * low, 100 * high


def difference(sample: Sample, first: Sample) -> tuple[float, float, float]:
  """Returns how much larger a figure is than another over the same units, and the 95 % interval of that: units are
  drawn for both together (paired).
  """
  sums = sample.units_UK.shape[1]
  both = Sample(
    np.concatenate([sample.units_UK, first.units_UK], axis=1),
    lambda x: sample.figure(x[..., :sums]) - first.figure(x[..., sums:]),
  )
  return (both.value, *bootstrap(both))


def bootstrap(sample: Sample, seed: int = 0) -> Interval:
  """Returns a figure's 95 % interval, by drawing its units anew (Efron, 1979).

  Of more than 4,096 units so many random parts are drawn, as large as one another: their sums vary as much.
  """
  draw, units_UK, found = np.random.default_rng(seed), sample.units_UK, []
  if len(units_UK) > _MOST_DRAWN:
    starts = np.arange(_MOST_DRAWN) * len(units_UK) // _MOST_DRAWN
    units_UK = np.add.reduceat(units_UK[draw.permutation(len(units_UK))], starts)
  count = len(units_UK)
  size = max(1, min(_ROUNDS, _AT_ONCE // count))
  for first in range(0, _ROUNDS, size):
    drawn = draw.integers(0, count, (min(size, _ROUNDS - first), count))
    sums = np.stack([column_U[drawn].sum(-1) for column_U in units_UK.T], axis=-1)
    found.append(sample.figure(sums))
  low, high = np.quantile(np.concatenate(found), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
  return float(low), float(high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
  """Returns how likely two models, equally good, would differ on the same items as much as these do (exact, two-sided).

  Values are 0 or 1; only items on which the models differ count (McNemar, 1947).
  """
  one, other = int(np.sum(first > second)), int(np.sum(first < second))
  count, least = one + other, min(one, other)
  log_ways = [
    math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
    for k in range(least + 1)
  ]
  return min(1.0, 2 * math.fsum(map(math.exp, log_ways)))
