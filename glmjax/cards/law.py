"""The law that a run's loss follows, fitted to its curve.

  L = E + A x^-alpha - C z

x is the learning rate summed over the tokens so far, as a share of its sum at the end; z says how far the learning
rate has come down from its peak, as a share of that, and follows with a lag of m steps. This is the law of Tissue, Wang
and Wang, "Scaling law with learning rate annealing" (arXiv 2408.11029): L = L0 + A S1^-alpha - C S2, S1 the area under
the learning rate, S2 the area of its decay with momentum lambda. S2's geometric series summed, (1 - lambda) S2 is the
decay so far seen with an exponential lag of m = 1 / (1 - lambda) steps: z. Two things differ. Steps are weighted by
their tokens, so that with a constant rate the law is the plain L(D) = E + A D^-alpha of tokens D (Hoffmann et al.,
arXiv 2203.15556), whatever the batch size does. And lambda, 0.999 where the paper is reproduced, is not taken as known:
m is the one of 10, 100 and 1,000 steps that fits best, up to a quarter of the run: a longer lag cannot be told from the
power law.

Why the decay must be accounted for: while the learning rate falls, the loss falls with it, faster and faster. A power
law through that promises that it goes on. Here the drop is C z, which more tokens under the same schedule, stretched
over them, do not bring again.

With alpha and m given the law is linear in E, A and C, none of which is negative: least squares has one solution, so
alpha and m are searched on a grid, and no starting values can mislead. Residuals are shares of the loss, which are
those of log losses, in units of the steps' noise, and Huber's (1964): large ones count by their size and not its
square, as in Hoffmann et al., approach 3. Losses are means over bins that are as wide in log tokens, from a twentieth
of the run on, and behind the warm-up: before that a loss is not on its power law yet.
"""

import dataclasses

import numpy as np

from glmjax.cards import groups as groups_lib

_EXPONENTS_A = np.geomspace(0.02, 2, 128)
_LAGS_L = (10, 100, 1000)  # steps
_LONGEST_LAG = 0.25  # of the run's steps
_STARTS = (0.05, 0.1)  # of the tokens, where fits begin: half of the rounds each
_BINS = 96
_HUBER = 1.345  # standard deviations: 95 % of the precision of squares where all is normal (Huber, 1964)
_WINSOR = 3  # standard deviations: larger residuals are drawn as that
_BLOCK = 4  # neighbouring bins that are drawn together
_LAW_ERROR = 0.005  # share of the loss by which the law itself may be off: no loss follows one exactly
_ROUNDS = 200  # of each start
_PARTS = ((0, 1, 2), (1, 2), (0, 1), (1,))  # which of E, A and C are not 0


@dataclasses.dataclass(frozen=True)
class Bins:
  """B bins of a curve; L lags."""

  tokens_B: np.ndarray
  area_B: np.ndarray  # x
  drop_LB: np.ndarray  # z
  loss_B: np.ndarray
  steps: int  # of the run
  error_B: np.ndarray  # standard error of the mean loss, as a share of it

  def design_LABK(self) -> np.ndarray:
    """Returns what E, A and C are multiplied by, for each lag and exponent."""
    power_AB = self.area_B ** -_EXPONENTS_A[:, None]
    shape = (len(_LAGS_L), *power_AB.shape)
    drop_LAB = np.broadcast_to(self.drop_LB[:, None], shape)
    return np.stack([np.ones(shape), np.broadcast_to(power_AB, shape), -drop_LAB], axis=-1)


@dataclasses.dataclass(frozen=True)
class Law:
  """The law as R rounds of the bootstrap have it."""

  linear_RK: np.ndarray  # E, A, C
  exponent_R: np.ndarray
  lag_R: np.ndarray  # index among the lags
  bins: Bins

  def losses(self, area: float | np.ndarray, drop_L: np.ndarray) -> np.ndarray:
    """Returns each round's loss, [R, ...], at places x, [...], where the drop is drop_L, [L, ...]."""
    shape = (-1, *(1,) * np.ndim(area))
    e, a, c = (column.reshape(shape) for column in self.linear_RK.T)
    return e + a * area ** -self.exponent_R.reshape(shape) - c * drop_L[self.lag_R]

  def slope_R(self) -> np.ndarray:
    """Returns by how many nats the loss falls, at the end, for each doubling of tokens under a stretched schedule."""
    return np.log(2) * self.exponent_R * self.linear_RK[:, 1]


def lagged_LG(drop_G: np.ndarray, spacing: float) -> np.ndarray:
  """Returns how far the rate has come down, with each lag; groups are `spacing` steps long."""
  lagged_LG = np.empty((len(_LAGS_L), len(drop_G)))
  for lag, lagged_G in zip(_LAGS_L, lagged_LG, strict=True):
    kept, last = float(np.exp(-spacing / lag)), 0.0
    for index, drop in enumerate(drop_G.tolist()):
      last = kept * last + (1 - kept) * drop
      lagged_G[index] = last
  return lagged_LG


def fit(groups: groups_lib.Groups, end: int, seed: int) -> Law:
  """Fits the law to a run's first `end` groups, once from each start, and draws each fit's residuals anew.

  The interval that the rounds span holds what is not known: the noise, the lag, where the power law begins, and by how
  much the law itself is off.

  Args:
    groups: of the run.
    end: how many of them; the warm-up must have ended, with bins enough behind it.
    seed: of the draws.
  """
  draw, found = np.random.default_rng(seed), []
  for start in _STARTS:
    bins = _bins(groups, end, start)
    fitted_B, residual_B = _robust(bins)
    found.append((*_rounds(bins, fitted_B, residual_B, draw), bins))
  linear, exponent, lag, bins = zip(*found, strict=True)
  return Law(np.concatenate(linear), np.concatenate(exponent), np.concatenate(lag), bins[0])


def count_bins(groups: groups_lib.Groups, end: int) -> int:
  """Returns into how many bins the curve of a run's first `end` groups falls, the fewest of all fits."""
  return min(len(_starts(groups.tokens_G[:end], groups.first, start)) for start in _STARTS)


def _starts(tokens_G: np.ndarray, first: int, start: float) -> np.ndarray:
  """Returns in which groups bins begin."""
  begin = max(tokens_G[first], start * tokens_G[-1])
  return np.unique(np.searchsorted(tokens_G, np.geomspace(begin, tokens_G[-1], _BINS + 1)[:-1]))


def _bins(groups: groups_lib.Groups, end: int, start: float) -> Bins:
  count_G = groups.count_G[:end]
  starts = _starts(groups.tokens_G[:end], groups.first, start)

  def mean(values_G: np.ndarray) -> np.ndarray:
    return groups_lib.means(starts, values_G[:end], count_G)[0]

  loss_B, count_B = groups_lib.means(starts, groups.loss_G[:end], count_G)
  return Bins(
    tokens_B=mean(groups.tokens_G),
    area_B=mean(groups.area_G) / groups.area_G[end - 1],
    drop_LB=np.stack([mean(lagged_G) for lagged_G in lagged_LG(groups.drop_G[:end], groups.size)]),
    loss_B=loss_B,
    steps=end * groups.size,
    error_B=groups.noise() / np.sqrt(count_B),
  )


def _robust(bins: Bins) -> tuple[np.ndarray, np.ndarray]:
  """Returns the fitted losses, by Huber's weights, and the residuals' spread in the bins' standard errors."""
  weight_B = np.ones_like(bins.loss_B)
  for _ in range(6):
    fitted_B = _losses(bins, *_solve(bins, weight_B, bins.loss_B[None]))[0]
    residual_B = np.log(bins.loss_B / fitted_B) / bins.error_B
    spread = max(float(np.median(np.abs(residual_B))) / 0.6745, 1.0)
    weight_B = np.minimum(1, _HUBER * spread / np.maximum(np.abs(residual_B), 1e-9))
  return fitted_B, residual_B


def _rounds(bins: Bins, fitted_B: np.ndarray, residual_B: np.ndarray, draw: np.random.Generator) -> tuple:
  """Returns what `_solve` finds for curves with residuals drawn in blocks of neighbours (Künsch, 1989)."""
  spread = max(float(np.median(np.abs(residual_B))) / 0.6745, 1.0)
  count = len(residual_B)
  residual_B = np.clip(residual_B, -_WINSOR * spread, _WINSOR * spread) * np.sqrt(count / (count - 4))
  first = draw.integers(0, count, (_ROUNDS, -(-count // _BLOCK), 1))
  drawn_RB = ((first + np.arange(_BLOCK)) % count).reshape(_ROUNDS, -1)[:, :count]
  losses_RB = fitted_B * np.exp(residual_B[drawn_RB] * bins.error_B + _wobble_RB(bins, draw))
  return _solve(bins, np.ones(count), losses_RB)


def _wobble_RB(bins: Bins, draw: np.random.Generator) -> np.ndarray:
  """Returns by what shares the law may be off in each round: normal at every doubling of the tokens, lines between."""
  octaves_B = np.log2(bins.tokens_B / bins.tokens_B[0])
  knots_K = np.arange(int(octaves_B[-1]) + 2)
  at_RK = _LAW_ERROR * draw.standard_normal((_ROUNDS, len(knots_K)))
  return np.stack([np.interp(octaves_B, knots_K, at_K) for at_K in at_RK])


def _losses(bins: Bins, linear_RK: np.ndarray, exponent_R: np.ndarray, lag_R: np.ndarray) -> np.ndarray:
  return Law(linear_RK, exponent_R, lag_R, bins).losses(bins.area_B, bins.drop_LB)


def _solve(bins: Bins, weight_B: np.ndarray, losses_RB: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns E, A and C, the exponent, and the lag's index that fit each of R curves best.

  With none of E, A and C negative, the best fit is that of least squares with some of them left out, as 0: all ways to
  do so are tried, for each lag and exponent.
  """
  design_LABK, rounds_R = bins.design_LABK(), np.arange(len(losses_RB))
  weighted_LAKB = np.swapaxes(design_LABK * (weight_B / (bins.loss_B * bins.error_B) ** 2)[:, None], -1, -2)
  squares_LAKK, sides_LAKR = weighted_LAKB @ design_LABK, weighted_LAKB @ losses_RB.T
  is_long_L = np.array(_LAGS_L) > max(_LONGEST_LAG * bins.steps, _LAGS_L[0])
  decays = bins.drop_LB.max() >= 0.01  # else C could be anything
  best_R, place_R = np.full(len(rounds_R), np.inf), np.zeros(len(rounds_R), np.int64)
  linear_RK = np.zeros((len(rounds_R), 3))
  for part in _PARTS if decays else [part for part in _PARTS if 2 not in part]:
    squares, sides = squares_LAKK[..., np.array(part)[:, None], part], sides_LAKR[..., part, :]
    ridge = 1e-12 * np.trace(squares, axis1=-2, axis2=-1)[..., None, None] * np.eye(len(part))
    values = np.linalg.solve(squares + ridge, sides)
    cost = np.where((values >= 0).all(-2) & ~is_long_L[:, None, None], -(values * sides).sum(-2), np.inf)
    cost, values = cost.reshape(-1, len(rounds_R)), values.reshape(-1, len(part), len(rounds_R))
    at_R = cost.argmin(0)
    better_R = cost[at_R, rounds_R] < best_R
    best_R, place_R = np.where(better_R, cost[at_R, rounds_R], best_R), np.where(better_R, at_R, place_R)
    linear_RK[better_R] = 0
    linear_RK[np.ix_(better_R, part)] = values[at_R, :, rounds_R][better_R]
  lag_R, exponent_R = np.divmod(place_R, len(_EXPONENTS_A))
  return linear_RK, _EXPONENTS_A[exponent_R], lag_R
