"""A run cut into groups of neighbouring steps: few enough for any computing, however long the run is."""

import dataclasses
import math

import numpy as np

from glmjax.cards import steps as steps_lib

_MOST = 4096
_AT_PEAK = 0.999  # of the highest learning rate: the warm-up has ended (rates are float32)


@dataclasses.dataclass(frozen=True)
class Groups:
  """G groups of `size` steps in order, the last one perhaps smaller; a run of up to 4,096 steps has one for each."""

  size: int
  first: int  # group in which the warm-up ends
  tokens_G: np.ndarray  # seen at the group's end
  area_G: np.ndarray  # learning rate times tokens, summed up from the run's beginning
  rate_G: np.ndarray
  loss_G: np.ndarray  # mean over the steps that have one; NaN where none has
  count_G: np.ndarray  # steps that have a loss

  @property
  def drop_G(self) -> np.ndarray:
    """How far the learning rate has come down from its peak, as a share of that; 0 before the peak."""
    drop_G = 1 - self.rate_G / self.rate_G.max()
    drop_G[: self.first] = 0
    return drop_G

  def windows(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean loss and number of steps of so many parts of equal tokens behind the warm-up, those without any
    left out.
    """
    tokens_G, counts_G = self.tokens_G[self.first :], self.count_G[self.first :]
    bounds = np.linspace(tokens_G[0], tokens_G[-1], count + 1)[:-1]
    return means(np.unique(np.searchsorted(tokens_G, bounds)), self.loss_G[self.first :], counts_G)

  def noise(self) -> float:
    """Returns the spread of a step's loss around the curve, as a share of the loss: from how neighbours differ, by
    their median, so that spikes do not count.
    """
    there_G = np.flatnonzero(self.count_G > 0)
    there_G = there_G[there_G >= self.first]
    log_G, count_G = np.log(self.loss_G[there_G]), self.count_G[there_G]
    apart_G = np.abs(np.diff(log_G)) / np.sqrt(1 / count_G[1:] + 1 / count_G[:-1])
    return max(float(np.median(apart_G)) / 0.6745, 1e-6)  # a normal spread's median lies at 0.6745


def of(steps: steps_lib.Steps) -> Groups:
  """Returns a run's groups."""
  size = math.ceil(len(steps.tokens_N) / _MOST)
  starts_G = np.arange(0, len(steps.tokens_N), size)
  in_G = np.diff(np.append(starts_G, len(steps.tokens_N)))
  area_N = np.cumsum(steps.rate_N * np.diff(steps.tokens_N, prepend=0.0))
  has_N = np.isfinite(steps.loss_N)
  count_G = np.add.reduceat(has_N.astype(np.float64), starts_G)
  total_G = np.add.reduceat(np.where(has_N, steps.loss_N, 0.0), starts_G)
  peak = int(np.argmax(steps.rate_N >= _AT_PEAK * steps.rate_N.max()))
  ends_G = starts_G + in_G - 1
  return Groups(
    size=size,
    first=peak // size,
    tokens_G=steps.tokens_N[ends_G],
    area_G=np.add.reduceat(area_N, starts_G) / in_G,
    rate_G=np.add.reduceat(steps.rate_N, starts_G) / in_G,
    loss_G=np.where(count_G > 0, total_G / np.maximum(count_G, 1), np.nan),
    count_G=count_G,
  )


def means(starts: np.ndarray, values_G: np.ndarray, weights_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the weighted mean of each part of the groups, which begin at `starts`, and its weight; parts of weight 0
  are left out.
  """
  weight = np.add.reduceat(weights_G, starts)
  total = np.add.reduceat(np.where(weights_G > 0, values_G, 0.0) * weights_G, starts)
  return (total / np.maximum(weight, 1))[weight > 0], weight[weight > 0]
