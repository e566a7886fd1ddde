"""The pictures of a study: small ones side by side, a column for each panel."""

from collections.abc import Callable, Iterator, Sequence
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
  panels, lines, cells = _cells(grid, results)
  if len(panels) > _MOST_PICTURES or len(lines) > _MOST_PICTURES:
    return None
  figure = display.figure(1.2 + 3.4 * len(panels), 3.6, dpi=110)
  axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  for axes, (panel, title) in zip(axes_of, panels.items()):
    _frame(axes, grid.over, "last loss, nats per token" if axes is axes_of[0] else "", title)
    axes.set_xscale("log")
    for i, (line, name) in enumerate(lines.items()):
      style = {"color": _COLOURS[i % 8], "linestyle": _LINES[i % 8], "marker": _MARKS[i % 8]}
      runs = cells.get((*line, *panel), [])
      values = sorted({run.point.labels[grid.over] for run in runs})
      of_each = [[run for run in runs if run.point.labels[grid.over] == value] for value in values]
      means = [np.mean([run.last_loss for run in of_one]) for of_one in of_each]
      axes.plot(values, means, **style, markersize=4, linewidth=1.5, label=name)
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

  def curve(run: results_lib.Result) -> tuple[np.ndarray, np.ndarray] | None:
    return (run.steps, run.figures[name]) if np.isfinite(run.figures[name]).any() else None

  return _small(grid, results, curve, "step", name)


def over_layers(grid: grid_lib.Grid, results: Results, name: str) -> display.Picture | None:
  """Draws the last line of layers.jsonl that has a figure of each layer, over the layers; None: no run has it."""

  def curve(run: results_lib.Result) -> tuple[np.ndarray, np.ndarray] | None:
    last = run.layers.get(name)
    return None if last is None else (np.arange(len(last), dtype=np.float64), last)

  return _small(grid, results, curve, "layer", name)


def _small(
  grid: grid_lib.Grid,
  results: Results,
  curve: Callable[[results_lib.Result], tuple[np.ndarray, np.ndarray] | None],
  across: str,
  up: str,
) -> display.Picture | None:
  """Draws curves in small pictures, rows of lines and columns of panels; the darker, the larger `over`."""
  results = [run for run in results if curve(run) is not None]
  panels, lines, cells = _cells(grid, results)
  if not results or len(panels) * len(lines) > _MOST_PICTURES:
    return None
  figure = display.figure(1.4 + _WIDTH * len(panels), 0.6 + _HEIGHT * len(lines), dpi=100)
  all_axes = figure.subplots(len(lines), len(panels), sharex=True, sharey=True, squeeze=False)
  values = sorted(grid.axes[grid.over])
  for i, (line, name) in enumerate(lines.items()):
    for axes, (panel, title) in zip(all_axes[i], panels.items()):
      title = ", ".join(filter(None, [name, title]))
      across_here, up_here = across if i == len(lines) - 1 else "", up if axes is all_axes[i][0] else ""
      _frame(axes, across_here, up_here.replace("_", " ").replace("/", " of "), title)
      axes.set_yscale("log")
      for run in cells.get((*line, *panel), []):
        shade = values.index(run.point.labels[grid.over]) / max(len(values) - 1, 1)
        axes.plot(*_thin(*curve(run)), color=_shade(shade), linewidth=1.1)
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


def _cells(
  grid: grid_lib.Grid, results: Results
) -> tuple[dict[grid_lib.Key, str], dict[grid_lib.Key, str], dict[grid_lib.Key, list[results_lib.Result]]]:
  """Returns the names of panels and of lines, and the runs of each line in each panel, by the keys of both."""
  axes = grid.others[1:]
  panels = {key: grid_lib.described(dict(zip(axes, choice))) for key, choice in grid_lib.choices(grid, axes).items()}
  lines = {key: ", ".join(map(str, choice)) for key, choice in grid_lib.choices(grid, grid.others[:1]).items()}
  return panels, lines, results_lib.grouped(results, grid.others)


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
