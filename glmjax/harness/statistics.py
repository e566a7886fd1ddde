"""How far a figure can be trusted: intervals of shares and means, and differences between models on the same items."""

from collections.abc import Sequence
import math

import numpy as np

_Z = 1.959964  # of 95 %
_LEVEL = 0.95
_ROUNDS = 10_000
_AT_ONCE = 1 << 22  # numbers that are drawn at a time
Interval = tuple[float, float]


def wilson(hits: float, count: int) -> Interval:
  """Returns the 95 % interval of a share, hits of count (Wilson, 1927)."""
  share, spread = hits / count, _Z**2 / count
  middle = (share + spread / 2) / (1 + spread)
  half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
  return max(0.0, middle - half), min(1.0, middle + half)


def of_mean(values: Sequence[float]) -> Interval:
  """Returns the 95 % interval of a mean: Wilson's where all values are 0 or 1, else the bootstrap's."""
  if all(value in (0, 1) for value in values):
    return wilson(sum(values), len(values))
  return bootstrap(np.asarray(values, np.float64), np.ones(len(values)))


def bootstrap(sums: np.ndarray, weights: np.ndarray, seed: int = 0) -> Interval:
  """Returns the 95 % interval of sum(sums) / sum(weights), by drawing items anew (Efron, 1979)."""
  count = len(sums)
  draw, found = np.random.default_rng(seed), []
  size = max(1, min(_ROUNDS, _AT_ONCE // count))
  for first in range(0, _ROUNDS, size):
    drawn = draw.integers(0, count, (min(size, _ROUNDS - first), count))
    found.append(sums[drawn].sum(-1) / weights[drawn].sum(-1))
  low, high = np.quantile(np.concatenate(found), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
  return float(low), float(high)


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
  """Returns how likely two models, equally good, would differ on the same items as much as these do (exact, two-sided).

  Values are 0 or 1; only items on which the models differ count (McNemar, 1947).
  """
  one, other = sum(a > b for a, b in zip(first, second)), sum(a < b for a, b in zip(first, second))
  count, least = one + other, min(one, other)
  log_ways = [
    math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
    for k in range(least + 1)
  ]
  return min(1.0, 2 * math.fsum(map(math.exp, log_ways)))
