"""The picture of models' weights: how each kind of kernel is spread, and what rounding them changes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from glmjax import display
from glmjax.study import kernels

MOST = len(display.COLOURS)  # models in one picture
_NAMES = {
  "attention/qkv": "attention: queries, keys, values",
  "attention/out": "attention: output",
  "mlp/wi": "MLP: input",
  "mlp/wo": "MLP: output",
  "embedding/table": "embedding",
  "head": "head",
}
_LEAST_REACH = 4.5  # of a histogram, in rms: as far as normal values can be seen
_NORMAL = {"color": display.INK, "linewidth": 1, "linestyle": (0, (1, 1.5)), "alpha": 0.7}
_DOT = {"marker": "o", "markersize": 5.5, "markeredgecolor": "white"}


def draw(result: Mapping[str, Any]) -> display.Picture:
  """Draws what `weights.measure` found: histograms above, errors of the schemes and what they add to the loss below."""
  checkpoints = result["checkpoints"]
  kinds = [kind for kind in kernels.KINDS if any(kind in each["kinds"] for each in checkpoints.values())]
  figure = display.figure(10, 8.6, dpi=110)
  above, below = figure.subfigures(2, 1, height_ratios=(1.75, 1))
  grid = above.subplots(2, 3, sharey=True, squeeze=False)
  for axes, kind in zip(grid.flat, kinds):
    _histograms(axes, kind, {name: each["kinds"][kind] for name, each in checkpoints.items() if kind in each["kinds"]})
  for axes in grid[:, 0]:
    axes.set_ylabel("density (log scale)", color=display.INK)
  for axes in list(grid.flat)[len(kinds) :]:
    axes.set_axis_off()
  _legend(grid.flat[-1] if len(kinds) < grid.size else grid.flat[0], list(checkpoints), len(kinds) < grid.size)
  panels = below.subplots(1, 1 + len(result.get("held_out", ())), squeeze=False)[0]
  _errors(panels[0], result)
  for axes, (language, models) in zip(panels[1:], result.get("held_out", {}).items()):
    _changes(axes, result["schemes"], language, models)
  return display.picture(figure)


def _histograms(axes: Any, kind: str, models: Mapping[str, Mapping[str, Any]]) -> None:
  """Draws the density of one kind's weights for each model, and that of normal values."""
  reach, low = _LEAST_REACH, np.inf
  for own, colour, line in zip(models.values(), display.COLOURS, display.LINES):
    histogram = own["histogram"]
    counts = np.array(histogram["counts"], np.float64)
    edges = histogram["from"] + histogram["width"] * np.arange(len(counts) + 1)
    density = counts / counts.sum() / histogram["width"]
    density[density == 0] = np.nan
    axes.stairs(density, edges, color=colour, linewidth=1.6, linestyle=line, baseline=None)
    reach, low = max(reach, np.abs(edges[[0, -1]]).max()), min(low, np.nanmin(density))
  x = np.linspace(-reach, reach, 201)
  normal = np.exp(-np.square(x) / 2) / np.sqrt(2 * np.pi)
  axes.plot(x, np.where(normal > low / 2, normal, np.nan), **_NORMAL)
  axes.set_yscale("log")
  axes.set_xlim(-reach, reach)
  axes.set_title(_NAMES[kind], fontsize=10, color=display.INK, loc="left")
  axes.set_xlabel("weight / rms", color=display.INK, fontsize=9)
  axes.grid(axis="y", color=display.FAINT, linewidth=0.6, alpha=0.6)
  display.plain(axes)


def _legend(axes: Any, names: list[str], free: bool) -> None:
  """Names the lines: in a panel that has nothing else, or in the corner of one that has."""
  for name, colour, line in zip(names, display.COLOURS, display.LINES):
    axes.plot([], [], color=colour, linewidth=1.6, linestyle=line, label=name)
  axes.plot([], [], **_NORMAL, label="normal distribution")
  axes.legend(
    frameon=False, loc="center" if free else "upper right", fontsize=10 if free else 8, labelcolor=display.INK
  )


def _errors(axes: Any, result: Mapping[str, Any]) -> None:
  """Draws the error of each scheme, a dot for each of the kinds of a block's kernels."""
  models = result["checkpoints"]
  for i, (each, colour) in enumerate(zip(models.values(), display.COLOURS)):
    for j, scheme in enumerate(result["schemes"]):
      errors = [own["errors"][scheme] for kind, own in each["kinds"].items() if kind in kernels.KINDS[:4]]
      place = np.full(len(errors), _place(i, j, len(models)))
      axes.plot(place, errors, **_DOT, linestyle="-", color=colour)
  axes.set_yscale("log")
  axes.yaxis.set_major_formatter(_percent)
  axes.yaxis.set_minor_formatter(_percent)
  axes.tick_params(which="both", colors=display.INK, labelsize=9)
  axes.set_title("‖w − rounded‖ / ‖w‖, by kind of kernel", fontsize=10, color=display.INK, loc="left")
  _schemes(axes, result["schemes"])


def _changes(axes: Any, schemes: Mapping[str, str], language: str, models: Mapping[str, Any]) -> None:
  """Draws how many bits per byte each scheme adds on one language's text, with the intervals."""
  for i, (each, colour) in enumerate(zip(models.values(), display.COLOURS)):
    for j, scheme in enumerate(schemes):
      value, low, high = (1000 * figure for figure in each[scheme]["change"])
      place = _place(i, j, len(models))
      axes.plot([place, place], [low, high], color=colour, linewidth=1.6)
      axes.plot([place], [value], **_DOT, color=colour)
  axes.axhline(0, color=display.FAINT, linewidth=0.8)
  axes.set_title(f"added to bits per byte, {language} (thousandths)", fontsize=10, color=display.INK, loc="left")
  _schemes(axes, schemes)


def _place(model: int, scheme: int, models: int) -> float:
  """Returns where on the x axis a model's figure of a scheme is."""
  return scheme + 0.16 * (model - (models - 1) / 2)


def _percent(value: float, _: int) -> str:
  """Writes a tick's share: 1, 2 and 5 of each ten have room."""
  digit = round(value / 10 ** np.floor(np.log10(value) + 1e-9))
  return f"{100 * value:g} %" if digit in (1, 2, 5) else ""


def _schemes(axes: Any, schemes: Mapping[str, str]) -> None:
  names = [label.replace(" ", "\n", 1) for label in schemes.values()]
  axes.set_xticks(range(len(schemes)), [name.replace("groups of", "by") for name in names], fontsize=9)
  axes.set_xlim(-0.5, len(schemes) - 0.5)
  axes.grid(axis="y", color=display.FAINT, linewidth=0.6, alpha=0.6)
  display.plain(axes)
