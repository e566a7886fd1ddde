"""The pictures of a study: small ones side by side, a column for each panel."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from glmjax import display
from glmjax.study import grid as grid_lib
from glmjax.study import results as results_lib

Results = Sequence[results_lib.Result]

_WIDTH, _HEIGHT = 3.0, 2.1  # inches of a small picture
_LONGEST = 400  # points of a line
_MOST_PICTURES = 60  # small ones in one; of more, none
# Each colour has a line and a mark of its own, to be told apart in grey.
_COLOURS = (*display.COLOURS, "#b03a48", "#555555", "#0f8f8f", "#a08a1a")
_LINES = (*display.LINES, (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 2)), (0, (6, 1, 1, 1)))
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "p")


def over_axis(grid: grid_lib.Grid, results: Results) -> display.Picture | None:
  """Draws the last loss over the values of `over`: a line for each value of the first other axis, a panel for each
  choice from the rest; runs that have diverged, or learned nothing, are crosses at their first loss.
  """
  panels, lines = _panels(grid), grid.axes[grid.others[0]] if grid.others else [None]
  if len(panels) > _MOST_PICTURES:
    return None
  figure = display.figure(1.2 + 3.4 * len(panels), 3.6, dpi=110)
  axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  for axes, panel in zip(axes_of, panels):
    _frame(axes, grid.over, "last loss, nats per token" if axes is axes_of[0] else "", grid_lib.described(panel))
    axes.set_xscale("log")
    for i, line in enumerate(lines):
      style = {"color": _COLOURS[i % 8], "linestyle": _LINES[i % 8], "marker": _MARKS[i % 8]}
      runs = [run for run in results if _is_of(run, panel | ({} if line is None else {grid.others[0]: line}))]
      values = sorted({run.point.labels[grid.over] for run in runs})
      of_each = [[run for run in runs if run.point.labels[grid.over] == value] for value in values]
      means = [np.mean([run.last_loss for run in of_one]) for of_one in of_each]
      axes.plot(values, means, **style, markersize=4, linewidth=1.5, label="" if line is None else str(line))
      for value, of_one in zip(values, of_each):
        losses = [run.last_loss for run in of_one]
        axes.plot([value, value], [min(losses), max(losses)], color=style["color"], linewidth=1)
        for run in of_one:
          if run.has_failed:
            axes.plot(value, run.last_loss, "x", color=style["color"], markersize=8, markeredgewidth=1.6)
  if grid.others:
    handles, labels = axes_of[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=8)
  return display.picture(figure)


def over_steps(grid: grid_lib.Grid, results: Results, name: str) -> display.Picture | None:
  """Draws a figure of metrics.jsonl over the steps, in a picture for each line and panel; None: no run has it."""
  curves = [(run, run.steps, run.figures[name]) for run in results]
  return _small(grid, [each for each in curves if np.isfinite(each[2]).any()], "step", name)


def over_layers(grid: grid_lib.Grid, results: Results, name: str) -> display.Picture | None:
  """Draws the last line of layers.jsonl that has a figure of each layer, over the layers; None: no run has it."""
  found = [(run, run.layers[name]) for run in results if name in run.layers]
  return _small(grid, [(run, np.arange(len(last), dtype=np.float64), last) for run, last in found], "layer", name)


def _small(
  grid: grid_lib.Grid, curves: Sequence[tuple[results_lib.Result, np.ndarray, np.ndarray]], across: str, up: str
) -> display.Picture | None:
  """Draws curves in small pictures, rows of lines and columns of panels; the darker, the larger `over`."""
  panels, lines = _panels(grid), grid.axes[grid.others[0]] if grid.others else [None]
  if not curves or len(panels) * len(lines) > _MOST_PICTURES:
    return None
  figure = display.figure(1.4 + _WIDTH * len(panels), 0.6 + _HEIGHT * len(lines), dpi=100)
  all_axes = figure.subplots(len(lines), len(panels), sharex=True, sharey=True, squeeze=False)
  values = sorted(grid.axes[grid.over])
  for i, line in enumerate(lines):
    for axes, panel in zip(all_axes[i], panels):
      title = ", ".join(filter(None, ["" if line is None else str(line), grid_lib.described(panel)]))
      across_here, up_here = across if i == len(lines) - 1 else "", up if axes is all_axes[i][0] else ""
      _frame(axes, across_here, up_here.replace("_", " ").replace("/", " of "), title)
      axes.set_yscale("log")
      for run, x, y in curves:
        if _is_of(run, panel | ({} if line is None else {grid.others[0]: line})):
          shade = values.index(run.point.labels[grid.over]) / max(len(values) - 1, 1)
          axes.plot(*_thin(x, y), color=_shade(shade), linewidth=1.1)
  _label(all_axes[0, 0])
  handles = [all_axes[0, 0].plot([], [], color=_shade(i / max(len(values) - 1, 1)))[0] for i in range(len(values))]
  figure.legend(
    handles,
    [f"{value:g}" for value in values],
    title=grid_lib.short(grid.over),
    loc="outside lower center",
    ncols=min(len(values), 8),
    frameon=False,
    fontsize=8,
    title_fontsize=8,
  )
  return display.picture(figure)


def _panels(grid: grid_lib.Grid) -> list[dict[str, Any]]:
  """Returns what each panel's runs have in common, besides a line's."""
  axes = grid.others[1:]
  return [dict(zip(axes, choice)) for choice in grid_lib.labelled(grid, axes)]


def _is_of(run: results_lib.Result, labels: dict[str, Any]) -> bool:
  return all(run.point.labels[axis] == label for axis, label in labels.items())


def _frame(axes: Any, across: str, up: str, title: str) -> None:
  axes.set_xlabel(grid_lib.short(across), color=display.INK, fontsize=9)
  axes.set_ylabel(up, color=display.INK, fontsize=9)
  axes.set_title(title, color=display.INK, fontsize=9)
  axes.tick_params(labelsize=8)
  axes.grid(axis="y", color=display.FAINT, linewidth=0.6, alpha=0.6)
  display.plain(axes)


def _label(axes: Any) -> None:
  """Has a log axis of less than a decade or so show plain numbers."""
  from matplotlib import ticker

  low, high = axes.get_ylim()
  if high < 20 * low:
    axes.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _shade(share: float) -> tuple[float, float, float]:
  """Returns a colour from light to dark blue."""
  return 0.72 * (1 - share), 0.84 - 0.72 * share, 0.95 - 0.55 * share


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns at most _LONGEST points: of neighbours the largest, so that no spike is lost; what is not finite leaves
  a gap.
  """
  size = -(-len(x) // _LONGEST)
  chosen = list(_largest(y, size))
  return x[chosen], np.where(np.isfinite(y[chosen]) & (y[chosen] > 0), y[chosen], np.nan)


def _largest(y: np.ndarray, size: int) -> Iterator[int]:
  for start in range(0, len(y), size):
    yield start + int(np.argmax(np.nan_to_num(y[start : start + size], nan=-np.inf, posinf=-np.inf)))
