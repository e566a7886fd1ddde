"""Models side by side, on the same items."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from glmjax import errors
from glmjax.harness import report
from glmjax.harness import results
from glmjax.harness import samples
from glmjax.harness import statistics
from glmjax.io import paths

Record = Mapping[str, Any]


def compare(runs: Sequence[paths.Named]) -> dict[str, Any]:
  """Compares runs of `glmjax evaluate --tasks`, each with the first, on the items that all have.

  Args:
    runs: their folders.

  Returns:
    {"models": names, "tasks": {task: {metric: [a figure for each model]}}}; a figure has `value`, `low`, `high` and
    `items` (texts, or pairs of sentences, where these are what counts), and from the second model on `difference` to
    the first with its interval (paired bootstrap) and, where items are right or wrong, `p`, McNemar's.

  Raises:
    errors.InputError: for fewer than two runs, runs without a common item, and items that are not the same.
  """
  if len(runs) < 2:
    raise errors.InputError("one run is not compared with itself: name two folders or more")
  about, records, keys = common(runs)
  of_tasks: dict[str, list[results.Key]] = {}
  for key in keys:
    of_tasks.setdefault(key[0], []).append(key)
  tasks = {task: figures([[each[key] for key in own] for each in records]) for task, own in of_tasks.items()}
  return {"models": names(about, runs), "items": len(keys), "tasks": tasks}


def common(
  runs: Sequence[paths.Named], only_counted: bool = True
) -> tuple[list[Record], list[dict[results.Key, Record]], list[results.Key]]:
  """Returns what runs say of themselves, their records (what counts of them), and the keys of those that all have.

  Raises:
    errors.InputError: where that is none, and for items that are not the same.
  """
  about, read = zip(*(results.read(pathlib.Path(run), only_counted) for run in runs))
  records = [{results.key(record): record for record in own} for own in read]
  # A file that is in two groups has its records twice: its items count once, as in a report.
  places = {(task, file, item): (task, group, file, item) for task, group, file, item in records[0]}
  keys = [key for key in places.values() if all(key in own for own in records[1:])]
  if not keys:
    raise errors.InputError(f"{runs[0]} and the others have no item in common: evaluate them with the same --tasks")
  for key in keys:
    _check_same(runs, [own[key] for own in records])
  return list(about), records, keys


def _check_same(runs: Sequence[paths.Named], records: Sequence[Record]) -> None:
  """Raises InputError where one item is another question for the other model; prompts may be other tokens."""
  for name in ("target", "targets", "bytes"):
    if any(record.get(name) != records[0].get(name) for record in records):
      first = records[0]
      place = f"{first['task']}, {first['file']}, item {first['item']}"
      raise errors.InputError(f"{place}: {name} is not the same in {', '.join(map(str, runs))}: their data differ")


def names(about: Sequence[Record], runs: Sequence[paths.Named]) -> list[str]:
  """Returns what to call models: their names, or the folders of their runs where two have the same."""
  found = [str(run.get("model")) for run in about]
  return found if len({*found}) == len(found) else [str(run) for run in runs]


def figures(records: Sequence[Sequence[Record]]) -> dict[str, list[dict[str, Any]]]:
  """Returns the figures of each model's records, those that all have: a run may have been asked for other metrics."""
  of_models = [samples.of(own) for own in records]
  found = {}
  for name, first in of_models[0].items():
    if not all(name in own for own in of_models):
      continue
    found[name] = [report.figure(first)]
    for sample in (own[name] for own in of_models[1:]):
      figure = report.figure(sample) | {"difference": [*statistics.difference(sample, first)]}
      if sample.is_share and first.is_share:
        figure["p"] = statistics.mcnemar(sample.units_UK[:, 0], first.units_UK[:, 0])
      found[name].append(figure)
  return found


def markdown(found: Mapping[str, Any]) -> str:
  """Returns a comparison as a table: a line for each task and metric, a column for each model."""
  models = found["models"]
  lines = ["| task | metric | items | " + " | ".join(models) + " |", "|---|---|---|" + "---|" * len(models)]
  for task, metrics in found["tasks"].items():
    for metric, figures in metrics.items():
      cells = [_cell(figure) for figure in figures]
      lines.append(f"| {task} | {metric} | {figures[0]['items']:,} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _cell(figure: Mapping[str, Any]) -> str:
  text = f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"
  if "difference" in figure:
    value, low, high = figure["difference"]
    text += f"; {value:+.2f} ({low:+.2f} to {high:+.2f})"
  return text + (f", p {figure['p']:.2g}" if "p" in figure else "")
