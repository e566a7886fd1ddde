"""Whether a run is trained to its end, told from its loss curve: what more tokens would bring, and how sure that is.

law.py says by what law the curve is continued, and where it comes from. Figures are medians over the rounds of a
bootstrap, with 90 % intervals; the same file gives the same figures.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from glmjax import display
from glmjax import errors
from glmjax.cards import curve_plot
from glmjax.cards import groups as groups_lib
from glmjax.cards import law as law_lib
from glmjax.cards import published
from glmjax.cards import steps as steps_lib
from glmjax.io import paths

_LEVEL = 0.9
_LEAST_STEPS = 500  # behind the warm-up: of 310 a run foretold a quarter of what came (docs/cards.md)
_LEAST_SPAN = 4  # times as many tokens as at the warm-up's end: over less no exponent can be told
_LEAST_BINS = 32
_WINDOWS = 20  # parts of a run whose means are compared
_CLEAR = 4  # standard errors: a difference that is no noise
_RISE = 0.05  # of the lowest loss: a run that ends so far above it has diverged
_MISFIT = 0.1  # of the fall of the loss: a curve that lies so far off the law follows another
_LITTLE = 0.02  # nats, 2 % of the perplexity: what twice the tokens must bring to count
_FEW = 2  # tokens for each parameter: so short runs have gained more than was foretold (docs/cards.md)
_WIDE = 0.1  # of the loss: an asymptote known no better is called not determined
_AHEAD = np.geomspace(1, 2, 9)  # lengths of the run for which the picture shows the end


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A figure and its 90 % interval."""

  value: float
  low: float
  high: float

  def __str__(self) -> str:
    """Writes it with two digits of the interval's width, two decimals at least and four at most."""
    digits = min(max(1 - math.floor(math.log10(max(self.high - self.low, 1e-9))), 2), 4)
    return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclasses.dataclass(frozen=True)
class Found:
  """What the curve tells; nats a token."""

  loss: Estimate  # at the end
  slope: Estimate  # fall for each doubling of the tokens, at the end, under the same schedule stretched
  twice: Estimate  # loss at the end of a run of twice the tokens, under the same schedule stretched
  gain: Estimate  # `loss` less `twice`
  asymptote: Estimate  # loss after endless tokens, under the same schedule stretched
  is_asymptote_determined: bool
  rate_left: float  # learning rate at the end, as a share of its peak
  from_half: Estimate | None  # loss at the end as the first half of the tokens foretold it; None: the half is too short


@dataclasses.dataclass(frozen=True)
class Curve:
  """A run's curve. `found` is None where `refusal` says why nothing can be told."""

  steps: int
  tokens: int
  parameters: int | None
  refusal: str | None
  found: Found | None
  shape: curve_plot.Shape | None

  @property
  def tokens_per_parameter(self) -> float | None:
    """Tokens seen for each parameter; None where the parameters are not known."""
    return self.tokens / self.parameters if self.parameters else None

  def to_dict(self) -> dict[str, Any]:
    """Returns all of it as JSON values."""
    return dataclasses.asdict(self) | {"tokens_per_parameter": self.tokens_per_parameter}

  def sentences(self) -> list[str]:
    """Returns in plain English what a card says."""
    found = self.found
    seen = f"The run saw {_count(self.tokens)} tokens in {self.steps:,} steps."
    if found is None:
      return [seen, f"Whether it is trained to its end cannot be told: {self.refusal}.", *self._ratio()]
    said = [
      f"{_verdict(found.gain)} {seen} Figures are the curve's, in nats a token, with 90 % intervals.",
      f"The training loss ends at {found.loss}. There it falls by {found.slope} for each doubling of the tokens; what "
      "the decay of the learning rate brings is not counted.",
      f"Twice the tokens, with the same schedule stretched over them, would end at {found.twice}, which is "
      f"{found.gain} less.",
    ]
    if found.is_asymptote_determined:
      said.append(f"With endless tokens it would come to {found.asymptote}.")
    else:
      low, high = found.asymptote.low, found.asymptote.high
      said.append(f"What endless tokens would come to is not determined (anything from {low:.2f} to {high:.2f}).")
    if found.rate_left > 0.5:
      said.append(
        f"The learning rate still stood at {found.rate_left:.0%} of its peak: what its decay would bring this run "
        "cannot tell."
      )
    if (half := found.from_half) is not None:
      told = "within" if half.low <= found.loss.value <= half.high else "outside"
      said.append(f"From the first half of its tokens the end was foretold as {half}; what came lies {told} that.")
    if (ratio := self.tokens_per_parameter) is not None and ratio < _FEW:
      said.append(
        "Of so short a run take the gain for the least: two of less than a token for each parameter gained more than "
        "was foretold of them (glmjax's docs/cards.md)."
      )
    return said + self._ratio()

  def _ratio(self) -> list[str]:
    return [] if self.parameters is None else [published.sentence(self.tokens, self.parameters)]


def fit(metrics: paths.Named | Iterable[Mapping[str, Any]], parameters: int | None = None, seed: int = 0) -> Curve:
  """Fits a run's curve.

  Args:
    metrics: path of its metrics.jsonl, or the records in it.
    parameters: of the model; None: nothing is said of tokens per parameter.
    seed: of the bootstrap.

  Raises:
    errors.InputError: when the file cannot be read, or has no step. A run of which nothing can be told is no error.
  """
  steps = steps_lib.read(metrics)
  groups = groups_lib.of(steps)
  about = (len(steps.tokens_N), int(steps.tokens_N[-1]), parameters)
  refusal = _refusal(groups, len(groups.tokens_G)) or _refusal_by_loss(groups)
  if refusal is not None:
    return Curve(*about, refusal, None, None)
  law = law_lib.fit(groups, len(groups.tokens_G), seed)
  fitted_B = np.median(law.losses(law.bins.area_B, law.bins.drop_LB), axis=0)
  fall = fitted_B.max() - fitted_B[-1]
  if np.median(np.abs(fitted_B - law.bins.loss_B)) > _MISFIT * fall:
    return Curve(*about, "the loss follows no power law, its learning rate's decay counted", None, None)
  ahead = [_stretched(groups, law, length) for length in _AHEAD]
  shape = curve_plot.Shape(
    tokens=law.bins.tokens_B.tolist(),
    losses=law.bins.loss_B.tolist(),
    fitted=fitted_B.tolist(),
    ahead_tokens=(groups.tokens_G[-1] * _AHEAD).tolist(),
    ahead=[tuple(np.quantile(losses_R, _quantiles())) for losses_R in ahead],
    **_rates(groups),
  )
  return Curve(*about, None, _found(groups, law, ahead[0], ahead[-1], seed), shape)


def picture(curve: Curve, path: str | os.PathLike) -> None:
  """Draws loss, fit, and the ends of runs of up to twice the tokens, above the learning rate; writes a PNG.

  Raises:
    errors.InputError: where nothing could be told, or matplotlib is not installed.
  """
  drawn(curve).save(path)


def drawn(curve: Curve) -> display.Picture:
  """Returns the picture that `picture` writes."""
  if curve.shape is None:
    raise errors.InputError(f"there is no curve to draw: {curve.refusal}")
  return curve_plot.draw(curve.shape)


def _found(groups: groups_lib.Groups, law: law_lib.Law, end_R: np.ndarray, twice_R: np.ndarray, seed: int) -> Found:
  loss = _estimate(end_R)
  asymptote = _estimate(np.maximum(0, law.linear_RK[:, 0] - law.linear_RK[:, 2] * groups.drop_G[-1]))
  return Found(
    loss=loss,
    slope=_estimate(law.slope_R()),
    twice=_estimate(twice_R),
    gain=_estimate(end_R - twice_R),
    asymptote=asymptote,
    is_asymptote_determined=asymptote.high - asymptote.low < _WIDE * loss.value,
    rate_left=float(groups.rate_G[-1] / groups.rate_G.max()),
    from_half=_from_half(groups, seed),
  )


def _stretched(groups: groups_lib.Groups, law: law_lib.Law, length: float) -> np.ndarray:
  """Returns each round's loss at the end of a run so many times as long, its schedule stretched over it."""
  drop_LG = law_lib.lagged_LG(groups.drop_G, groups.size * length)
  return law.losses(length, drop_LG[:, -1])


def _from_half(groups: groups_lib.Groups, seed: int) -> Estimate | None:
  """Returns what the first half of the tokens foretells of the end, under the learning rates that followed."""
  end = int(np.searchsorted(groups.tokens_G, groups.tokens_G[-1] / 2)) + 1
  if _refusal(groups, end) is not None:
    return None
  law = law_lib.fit(groups, end, seed)
  drop_L = law_lib.lagged_LG(groups.drop_G, groups.size)[:, -1]
  return _estimate(law.losses(groups.area_G[-1] / groups.area_G[end - 1], drop_L))


def _refusal(groups: groups_lib.Groups, end: int) -> str | None:
  """Says why a run's first `end` groups are too little for a fit; None where they are enough."""
  if groups.rate_G.max() == 0:
    return "its learning rate is 0"
  if groups.first >= end - 1:
    return "it ended in the warm-up of its learning rate"
  count = int(groups.count_G[groups.first : end].sum())
  if count < _LEAST_STEPS:
    return f"{count:,} steps behind the warm-up of the learning rate are too few; it takes {_LEAST_STEPS}"
  if groups.tokens_G[end - 1] < _LEAST_SPAN * groups.tokens_G[groups.first]:
    return "the warm-up of its learning rate took more than a quarter of the tokens"
  if law_lib.count_bins(groups, end) < _LEAST_BINS:
    return "its tokens do not grow from step to step"
  return None


def _refusal_by_loss(groups: groups_lib.Groups) -> str | None:
  """Says how a run went wrong; None where its loss fell."""
  last_G = groups.count_G[-max(1, len(groups.count_G) // 100) :]
  if not last_G.any() or groups.count_G.sum() < 0.95 * groups.size * (len(groups.count_G) - 1):
    return "steps without a finite loss: it diverged"
  loss_W, count_W = groups.windows(_WINDOWS)
  error_W = loss_W * groups.noise() / np.sqrt(count_W)
  lowest = int(loss_W.argmin())
  if loss_W[-1] - loss_W[lowest] > max(_RISE * loss_W[lowest], _CLEAR * np.hypot(error_W[-1], error_W[lowest])):
    return f"its loss had risen again at the end, from {loss_W[lowest]:#.3g} to {loss_W[-1]:#.3g}"
  if loss_W[0] - loss_W[-1] < _CLEAR * np.hypot(error_W[0], error_W[-1]):
    return "its loss did not fall by more than its noise behind the warm-up"
  return None


def _rates(groups: groups_lib.Groups) -> dict[str, list[float]]:
  """Returns the learning rate over tokens in at most 256 places."""
  places = np.unique(np.linspace(0, len(groups.tokens_G) - 1, 256).astype(int))
  return {"rate_tokens": groups.tokens_G[places].tolist(), "rates": groups.rate_G[places].tolist()}


def _quantiles() -> tuple[float, float, float]:
  return (1 - _LEVEL) / 2, 0.5, (1 + _LEVEL) / 2


def _estimate(values_R: np.ndarray) -> Estimate:
  low, value, high = np.quantile(values_R, _quantiles())
  return Estimate(float(value), float(low), float(high))


def _verdict(gain: Estimate) -> str:
  if gain.low > _LITTLE:
    return "Not trained to its end: more tokens would lower the loss further."
  if gain.high < _LITTLE:
    return f"Trained to its end, nearly: twice the tokens would bring less than {_LITTLE} nats."
  return f"Whether it is trained to its end is open: twice the tokens may bring less than {_LITTLE} nats, or more."


def _count(number: float) -> str:
  """Writes a large number in words: 3.93 million."""
  for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
    if number >= unit:
      return f"{number / unit:.3g} {name}"
  return f"{number:,.0f}"
