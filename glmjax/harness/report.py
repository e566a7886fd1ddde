"""A run's report: figures of each task with their intervals, for machines and for people."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glmjax.harness import samples
from glmjax.harness import statistics
from glmjax.harness import summary
from glmjax.harness import task as task_lib

Record = Mapping[str, Any]


def make(tasks: Sequence[task_lib.Task], records: Iterable[Record]) -> dict[str, Any]:
  """Returns of each task its summary, and its figures over all items with their 95 % intervals."""
  found, of_tasks = {}, {}
  for record in records:
    of_tasks.setdefault(record["task"], []).append(record)
  for task in tasks:
    if own := of_tasks.get(task.name):
      found[task.name] = {"figures": figures(own), **summary.summarize(task, own)}
  return found


def figures(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
  """Returns of each figure over a task's items its value, interval and number of units."""
  once = {(record["file"], record["item"]): record for record in records}.values()  # a file may be in two groups
  return {name: figure(sample) for name, sample in samples.of([*once]).items()}


def figure(sample: statistics.Sample) -> dict[str, Any]:
  """Returns a figure as reports and comparisons have it."""
  low, high = statistics.interval(sample)
  return {"value": sample.value, "low": low, "high": high, "items": len(sample.units_UK)}


def markdown(run: Mapping[str, Any], report: Mapping[str, Any], tasks: Sequence[task_lib.Task]) -> str:
  """Returns the report as a page."""
  lines = [f"# Evaluation of {run['model']}", ""]
  lines += [f"- {name}: {value}" for name, value in run.items() if name not in ("tasks", "model") and value is not None]
  lines += ["", "| task | metric | value | 95 % interval | items |", "|---|---|---|---|---|"]
  for name, own in report.items():
    for metric, figure in own["figures"].items():
      interval = f"{figure['low']:.2f} to {figure['high']:.2f}"
      lines.append(f"| {name} | {metric} | {figure['value']:.2f} | {interval} | {figure['items']:,} |")
  lines += ["", "Means over all items of a task; shares in per cent. As GLM-130B's evaluation reports them:", "", "```"]
  for task in tasks:
    if task.name in report:
      lines += summary.lines(task, report[task.name])
  return "\n".join([*lines, "```", ""])
