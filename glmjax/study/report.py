"""The report of a study: report.md, report.json and the pictures, out of what its runs came to."""

import collections
import importlib.util
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from glmjax.evaluate import markdown
from glmjax.io import publish
from glmjax.study import differences
from glmjax.study import grid as grid_lib
from glmjax.study import pictures
from glmjax.study import results as results_lib

Results = Sequence[results_lib.Result]

# The name of each picture's file, the figure that it has over the steps, and what is said of that.
_OVER_STEPS = (
  ("curves", "loss", "Training loss"),
  ("embedding", "grad_norm_embedding", "Norm of the embedding's gradient"),
  ("gradient", "grad_norm", "Norm of the whole gradient"),
)
_OVER_LAYERS = (
  ("logits", "attention_logit_max", "Largest attention logit of each layer, last looked at"),
  ("residual", "residual_rms", "Root mean square of what each layer reads, last looked at"),
  ("sublayers", "mlp_rms", "Root mean square of what each layer's MLP adds, last looked at"),
  ("gradients", "grad_norm/layers", "Norm of each layer's gradient, last looked at"),
)


def write(folder: pathlib.Path, grid: grid_lib.Grid, results: Results) -> None:
  """Writes the report of the runs that are done; pictures only where matplotlib is installed."""
  found, choices = results_lib.grouped(results, grid.others), grid_lib.choices(grid, grid.others)
  groups = [_group(grid, choice, found[key]) for key, choice in choices.items() if key in found]
  content = {
    "axes": {axis: [*values] for axis, values in grid.axes.items()},
    "over": grid.over,
    "repeats": grid.repeats,
    "groups": groups,
    "differences": differences.between(grid, results),
    "spikes": _leaders(results),
    "glmjax": dict(collections.Counter(" and ".join(result.versions) or "unknown" for result in results)),
    "runs": [_run(result) for result in results],
  }
  publish.write_json(folder / "report.json", publish.finite(content))
  publish.write_text(folder / "report.md", _markdown(grid, content, {}))
  publish.write_text(folder / "report.md", _markdown(grid, content, _draw(folder, grid, results)))


def _run(result: results_lib.Result) -> dict[str, Any]:
  return {
    "labels": dict(result.point.labels),
    "diverged": result.has_diverged,
    "uniform": result.is_uniform,
    "steps": len(result.steps),
    "first_loss": result.first_loss,
    "last_loss": result.last_loss,
    "spikes": [dict(episode.first) for episode in result.episodes],
    "overflows": result.overflows,
    "seconds": result.seconds,
  }


def _group(grid: grid_lib.Grid, choice: Sequence[Any], runs: Results) -> dict[str, Any]:
  """Sums up the runs of one choice from the other axes, which differ in `over` and `repeats` alone."""
  sensitivities = [value for value in map(sensitivity, _by_repeat(grid, runs)) if value is not None]
  return {
    "labels": dict(zip(grid.others, choice)),
    "runs": len(runs),
    "diverged": sum(run.has_diverged for run in runs),
    "learned_nothing": sum(run.has_failed and not run.has_diverged for run in runs),
    "uniform": sum(run.is_uniform and not run.has_failed for run in runs),
    "spikes": sum(len(run.episodes) for run in runs),
    "overflows": sum(run.overflows for run in runs),
    "sensitivity": _spread(sensitivities),
    **_best(grid, runs),
  }


def _by_repeat(grid: grid_lib.Grid, runs: Results) -> list[Results]:
  """Returns the runs of each repeat that has all values of `over`."""
  found = results_lib.grouped(runs, () if grid.repeats is None else (grid.repeats,))
  return [of_one for of_one in found.values() if len(of_one) == len(grid.axes[grid.over])]


def sensitivity(runs: Results) -> float | None:
  """Returns how much is lost, nats a token, where `over` is not the best: the mean over its values of the last loss,
  that of the first step at most, less the lowest (Wortsman et al. 2023, arXiv 2309.14322, section 2.2). None: no run
  has a loss.
  """
  losses = [run.last_loss for run in runs if not math.isnan(run.last_loss)]
  return statistics.fmean(losses) - min(losses) if losses else None


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
  """Returns mean and range over repeats."""
  if not values:
    return None
  return {"mean": statistics.fmean(values), "low": min(values), "high": max(values), "repeats": len(values)}


def _best(grid: grid_lib.Grid, runs: Results) -> dict[str, Any]:
  """Returns the value of `over` with the lowest mean loss, that loss, and the largest value at which all have
  learned.
  """
  losses: dict[Any, list[results_lib.Result]] = {}
  for run in runs:
    losses.setdefault(run.point.labels[grid.over], []).append(run)
  means = {value: statistics.fmean(run.last_loss for run in of_one) for value, of_one in losses.items()}
  means = {value: mean for value, mean in means.items() if not math.isnan(mean)}
  sound = [value for value, of_one in losses.items() if not any(run.has_failed for run in of_one)]
  best = min(means, key=means.__getitem__, default=None)
  spread = None if best is None else _spread([run.last_loss for run in losses[best]])
  return {"best": best, "best_loss": spread, "largest_that_learns": max(sound, default=None)}


def _leaders(results: Results) -> dict[str, Any]:
  """Counts what was above its limit first, over all episodes of spikes; several may be, at one step."""
  episodes = [episode for result in results for episode in result.episodes]
  names = dict.fromkeys(name for episode in episodes for name in episode.first)
  return {
    "episodes": len(episodes),
    "parts": {
      name: {
        "in": sum(name in episode.first for episode in episodes),
        "first": sum(name in episode.leaders for episode in episodes),
        "alone": sum(episode.leaders == [name] for episode in episodes),
      }
      for name in sorted(names)
    },
  }


def _draw(folder: pathlib.Path, grid: grid_lib.Grid, results: Results) -> dict[str, str]:
  """Draws the pictures, where matplotlib is installed; returns their files with what is said of each."""
  if importlib.util.find_spec("matplotlib") is None:
    return {}
  drawn = [("sensitivity", f"Last loss over {grid_lib.short(grid.over)}", pictures.over_axis(grid, results))]
  drawn += [(name, title, pictures.over_steps(grid, results, figure)) for name, figure, title in _OVER_STEPS]
  drawn += [(name, title, pictures.over_layers(grid, results, figure)) for name, figure, title in _OVER_LAYERS]
  found = {}
  for name, title, picture in drawn:
    if picture is not None:
      picture.save(folder / f"{name}.png")
      found[f"{name}.png"] = title
  return found


def _markdown(grid: grid_lib.Grid, found: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
  runs = found["runs"]
  axes = "; ".join(f"{grid_lib.short(axis)}: {', '.join(map(str, values))}" for axis, values in found["axes"].items())
  hours = sum(run["seconds"] for run in runs) / 3600
  parts = [
    "# Study",
    f"{len(runs):,} runs of {len(grid):,}; {axes}. {hours:.2f} hours of steps.",
    _versions(found["glmjax"]),
    _groups_table(grid, found["groups"]),
    f"Sensitivity: mean over {grid_lib.short(grid.over)} of the last loss, that of the first step at most, less the "
    "lowest (Wortsman et al. 2023), nats a token; its range over repeats in brackets. A run that has diverged, or "
    "ended above its first loss, counts with its first loss. Uniform: runs whose outputs are, at their end, the same "
    "at all positions. Overflows: steps without a finite gradient, which float16's loss scale passes over.",
    _differences_table(grid, found["differences"]),
    _leaders_table(found["spikes"]),
    *(f"## {title}\n\n![{title}]({file})" for file, title in drawn.items()),
  ]
  return "\n\n".join(part for part in parts if part) + "\n"


def _versions(counts: Mapping[str, int]) -> str:
  """Says which versions of glmjax the runs were made with, where they differ."""
  if len(counts) < 2 and not any(" and " in versions for versions in counts):
    return ""
  told = ", ".join(f"{version} ({count:,})" for version, count in sorted(counts.items()))
  return f"The runs were made with several versions of glmjax: {told}."


def _groups_table(grid: grid_lib.Grid, groups: Sequence[Mapping[str, Any]]) -> str:
  over = grid_lib.short(grid.over)
  counted = ("runs", "diverged", "learned_nothing", "uniform", "spikes", "overflows")
  header = [*map(grid_lib.short, grid.others), *(name.replace("_", " ") for name in counted), "sensitivity"]
  header += [f"best {over}", "its loss", f"largest {over} at which all learn"]
  rows = []
  for group in groups:
    cells = [*group["labels"].values(), *(group[name] for name in counted), _ranged(group["sensitivity"], 3)]
    largest = group["largest_that_learns"]
    cells += [_number(group["best"]), _ranged(group["best_loss"], 4), "none" if largest is None else _number(largest)]
    rows.append([str(cell).replace("|", "\\|") for cell in cells])
  return markdown.table(header, rows)


def _differences_table(grid: grid_lib.Grid, found: Sequence[Mapping[str, Any]]) -> str:
  if not found:
    return ""
  over = grid_lib.short(grid.over)
  header = ["", "against", "pairs", "all", *(f"{over} {_number(value)}" for value in grid.axes[grid.over])]
  rows = []
  for each in found:
    at = {point["value"]: point for point in each["at"]}
    cells = [f"{grid_lib.short(each['axis'])} {each['value']}", each["against"], f"{each['pairs']:,}", _signed(each)]
    cells += [_signed(at[value]) if value in at else "-" for value in grid.axes[grid.over]]
    rows.append([str(cell).replace("|", "\\|") for cell in cells])
  told = (
    "How much larger the last loss is, nats a token: the mean over pairs of runs that are alike but for this and have "
    "both learned, ± half of its 95 % interval (Student's t over the pairs)."
  )
  return f"## Differences\n\n{told}\n\n" + markdown.table(header, rows)


def _leaders_table(spikes: Mapping[str, Any]) -> str:
  if not spikes["episodes"]:
    return ""
  rows = [[name, *(f"{counts[key]:,}" for key in ("in", "first", "alone"))] for name, counts in spikes["parts"].items()]
  counted = (
    f"{spikes['episodes']:,} episodes of spikes in all runs: in how many each figure was above its limit at all, among "
    "the first, and first alone."
  )
  return f"## What spikes first\n\n{counted}\n\n" + markdown.table(["figure", "at all", "first", "alone"], rows)


def _ranged(spread: Mapping[str, Any] | None, digits: int) -> str:
  if spread is None:
    return "-"
  several = f" [{spread['low']:.{digits}f}, {spread['high']:.{digits}f}]" if spread["repeats"] > 1 else ""
  return f"{spread['mean']:.{digits}f}{several}"


def _signed(estimate: Mapping[str, Any]) -> str:
  half = "" if estimate["half"] is None else f" ± {estimate['half']:.3f}"
  return f"{estimate['mean']:+.3f}{half}"


def _number(value: Any) -> str:
  return "-" if value is None else f"{value:g}"
