"""A run's report: figures of each task with their intervals, for machines and for people."""

from collections.abc import Iterable, Mapping, Sequence
import math
from typing import Any

import numpy as np

from glmjax.harness import statistics
from glmjax.harness import summary
from glmjax.harness import task as task_lib

Record = Mapping[str, Any]


def make(tasks: Sequence[task_lib.Task], records: Sequence[Record]) -> dict[str, Any]:
  """Returns of each task its summary, and its figures over all items with their 95 % intervals."""
  found = {}
  for task in tasks:
    if own := [record for record in records if record["task"] == task.name]:
      found[task.name] = {"figures": figures(task, own), **summary.summarize(task, own)}
  return found


def figures(task: task_lib.Task, records: Sequence[Record]) -> dict[str, dict[str, Any]]:
  """Returns of each mean over items its value and interval; of texts their bits per byte."""
  once = {(record["file"], record["item"]): record for record in records}.values()  # a file may be in two groups
  if task.type == task_lib.LANGUAGE_MODEL:
    nats, sizes = by_text(once)
    low, high = statistics.bootstrap(nats, sizes)
    bits = float(nats.sum() / sizes.sum()) / math.log(2)
    return {"bits_per_byte": _figure(bits, low / math.log(2), high / math.log(2), len(nats))}
  found = {}
  for name in next(iter(once))["values"]:
    values = [record["values"][name] for record in once]
    low, high = statistics.of_mean(values)
    found[name] = _figure(*(100 * x for x in (float(np.mean(values)), low, high)), len(values))
  return found


def _figure(value: float, low: float, high: float, items: int) -> dict[str, Any]:
  return {"value": value, "low": low, "high": high, "items": items}


def by_text(records: Iterable[Record]) -> tuple[np.ndarray, np.ndarray]:
  """Returns nats and bytes of each text of a task of language modelling."""
  nats: dict[Any, float] = {}
  sizes: dict[Any, int] = {}
  for record in records:
    text = record["file"], record["text"]
    nats[text] = nats.get(text, 0.0) + record["loss"]
    sizes[text] = record["bytes"]
  return np.array([*nats.values()]), np.array([*sizes.values()], np.float64)


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
