"""The picture of a run's loss, one line per objective."""

from collections.abc import Sequence

import numpy as np

from glmjax import display
from glmjax import errors

_MOST_POINTS = 2000
_LEAST = 1e-6  # nats: a log scale has no place for 0
_DOT = {"linestyle": "none", "marker": "o", "markersize": 4.5}
_NAMES = {
  "mask": "[MASK]: short blanks",
  "gmask": "[gMASK]: continuation",
  "instruction": "instructions",
  "sentence": "[sMASK]: sentences",
}


Curve = tuple[np.ndarray, np.ndarray]  # steps, losses


def draw(series: dict[str, Curve], held_out: dict[str, Curve], resumed_at: Sequence[int]) -> display.Picture:
  """Draws the curves.

  Args:
    series: training loss of each objective, nats a token.
    held_out: the periodic evaluation's, of the objectives that it covers.
    resumed_at: steps at which the run was taken up again.
  """
  if not series:
    raise errors.InputError("no training step has the loss of an objective: there is nothing to draw; train first")
  figure = display.figure(8, 4.5, dpi=120)
  axes = figure.add_subplot()
  ends = []
  series = {name: _thin(*points) for name, points in series.items()}
  for (name, (steps, losses)), colour, line in zip(series.items(), display.COLOURS, display.LINES):
    smooth = _smooth(losses)
    axes.plot(steps, losses, color=colour, alpha=0.18, linewidth=0.8)
    axes.plot(steps, smooth, color=colour, linewidth=1.8, linestyle=line)
    if name in held_out:
      axes.plot(*_thin(*held_out[name]), **_DOT, color=colour, markeredgecolor="white", clip_on=False)
    ends.append((float(smooth[-1]), f"{_NAMES[name]}  {smooth[-1]:#.3g}", colour))
  last = max(steps[-1] for steps, _ in series.values())
  first = min(steps[0] for steps, _ in series.values())
  _frame(axes, first, last, np.concatenate([losses for _, losses in series.values()]))
  _label(axes, ends, last)
  for step in resumed_at:
    axes.axvline(step, color=display.INK, linewidth=1, linestyle=(0, (4, 3)))
    label = f"stopped and\nresumed at {step:,}" if len(resumed_at) < 4 else ""
    axes.annotate(
      label,
      (step, 0.97),
      xycoords=("data", "axes fraction"),
      xytext=(5, 0),
      textcoords="offset points",
      color=display.INK,
      fontsize=9,
      va="top",
    )
  if held_out:
    axes.plot([], [], **_DOT, color=display.INK, label="on held-out text")
    axes.legend(frameon=False, loc="lower left", fontsize=9, labelcolor=display.INK, handletextpad=0.2)
  return display.picture(figure)


def _thin(steps: np.ndarray, losses: np.ndarray) -> Curve:
  """Returns at most _MOST_POINTS points: means over neighbours, those below _LEAST as that."""
  size = -(-len(steps) // _MOST_POINTS)
  starts = np.arange(0, len(steps), size)
  counts = np.diff(np.append(starts, len(steps)))
  return np.add.reduceat(steps, starts) / counts, np.maximum(np.add.reduceat(losses, starts) / counts, _LEAST)


def _smooth(losses: np.ndarray) -> np.ndarray:
  """Returns a running mean over a fortieth of the run, centred."""
  half = max(len(losses) // 80, 1)
  total = np.concatenate([[0.0], np.cumsum(losses)])
  low, high = np.arange(len(losses)) - half, np.arange(len(losses)) + half + 1
  low, high = np.clip(low, 0, None), np.clip(high, None, len(losses))
  return (total[high] - total[low]) / (high - low)


def _frame(axes: object, first: float, last: float, losses: np.ndarray) -> None:
  """Draws axes, grid and limits; the loss axis is logarithmic, as losses fall by ever smaller steps."""
  from matplotlib import ticker

  low, high = np.quantile(losses, 0.002) * 0.97, losses.max() * 1.03
  axes.set_yscale("log")
  axes.set_ylim(low, high)
  ticks = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10) if high < 30 * low else (1, 2, 5)  # as many as have room
  axes.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=ticks))
  axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
  axes.set_xlim(first, max(last, first + 1))
  axes.set_xlabel("step", color=display.INK)
  axes.set_ylabel("training loss, nats per token (log scale)", color=display.INK)
  axes.grid(axis="y", color=display.FAINT, linewidth=0.6, alpha=0.6)
  display.plain(axes)


def _label(axes: object, ends: list[tuple[float, str, str]], last: float) -> None:
  """Names the lines at their right ends, pushed apart where they would overlap."""
  low, high = np.log(axes.get_ylim())
  gap, below = 0.05 * (high - low), -np.inf
  for value, text, colour in sorted(ends):
    place = max(np.log(value), below + gap)
    below = place
    axes.annotate(
      text,
      (last, np.exp(place)),
      xytext=(6, 0),
      textcoords="offset points",
      color=colour,
      va="center",
      fontsize=9,
      annotation_clip=False,
    )
