"""The picture of a run's curve: losses, the fit, where longer runs would end, and the learning rate below."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from glmjax import display

_UNITS = ((1e12, "trillion tokens"), (1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"))


@dataclasses.dataclass(frozen=True)
class Shape:
  """What is drawn; losses in nats a token."""

  tokens: Sequence[float]  # of the bins
  losses: Sequence[float]
  fitted: Sequence[float]
  ahead_tokens: Sequence[float]  # lengths of longer runs
  ahead: Sequence[tuple[float, float, float]]  # where each would end: low, median, high
  rate_tokens: Sequence[float]
  rates: Sequence[float]


def draw(shape: Shape) -> display.Picture:
  """Draws the picture; tokens are on a log scale, as each doubling of them counts the same."""
  figure = display.figure(8, 5.5, dpi=120)
  loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
  unit, name = next(((unit, name) for unit, name in _UNITS if shape.tokens[-1] >= unit), (1, "tokens"))
  tokens, ahead = [x / unit for x in shape.tokens], [x / unit for x in shape.ahead_tokens]
  low, middle, high = zip(*shape.ahead, strict=True)
  dots = {"linestyle": "none", "marker": "o", "markersize": 3.5, "markeredgewidth": 0}
  loss_axes.plot(tokens, shape.losses, **dots, color=display.COLOURS[0], alpha=0.55, label="training loss, means")
  loss_axes.plot(tokens, shape.fitted, color=display.INK, linewidth=1.6, label="the law, fitted")
  loss_axes.fill_between(ahead, low, high, color=display.COLOURS[1], alpha=0.25, linewidth=0)
  loss_axes.plot(
    ahead,
    middle,
    color=display.COLOURS[1],
    linewidth=1.8,
    linestyle=display.LINES[1],
    label="where a longer run would end, its schedule stretched (90 %)",
  )
  loss_axes.annotate(
    f"twice the tokens: {middle[-1]:#.3g}",
    (ahead[-1], middle[-1]),
    xytext=(6, 0),
    textcoords="offset points",
    color=display.COLOURS[1],
    fontsize=9,
    va="center",
    annotation_clip=False,
  )
  loss_axes.legend(frameon=False, fontsize=9, labelcolor=display.INK, loc="lower left")
  _frame(loss_axes)
  rate_axes.plot([x / unit for x in shape.rate_tokens], shape.rates, color=display.COLOURS[2], linewidth=1.6)
  rate_axes.set_ylim(0, 1.1 * max(shape.rates))
  rate_axes.set_ylabel("learning rate", color=display.INK)
  rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
  rate_axes.set_xlim(tokens[0], ahead[-1])
  rate_axes.set_xlabel(f"{name} (log scale)", color=display.INK)
  display.plain(rate_axes)
  return display.picture(figure)


def _frame(axes: Any) -> None:
  from matplotlib import ticker

  axes.set_xscale("log")
  axes.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 3, 5)))
  axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_ylabel("nats per token", color=display.INK)
  axes.grid(axis="y", color=display.FAINT, linewidth=0.6, alpha=0.6)
  display.plain(axes)
