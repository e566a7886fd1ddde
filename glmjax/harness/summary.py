"""What came of a run, task by task: metrics of files and groups, as GLM-130B's evaluation reports them."""

from collections.abc import Iterator, Mapping, Sequence
import statistics
from typing import Any

from glmjax.harness import metrics
from glmjax.harness import task as task_lib

OVERALL = "Overall"
_STEREOSET = ("LMS", "SS", "ICAT")

Record = Mapping[str, Any]


def summarize(task: task_lib.Task, records: Sequence[Record]) -> dict[str, Any]:
  """Returns the metrics of each file and group, from the records of all items of a task in order.

  {"files": {file: {"items", "metrics"}}, "groups": {group: {"files", "stats": {metric: {max, median, average}}}}}; a
  group's average counts each file with its items. Tables of a special metric have no statistics.
  """
  by_group: dict[str, dict[str, list[Record]]] = {}
  for record in records:
    by_group.setdefault(record["group"], {}).setdefault(record["file"], []).append(record)
  files = {file: of for group in by_group.values() for file, of in group.items()}
  found = {
    file: {"items": len(of), "metrics": {name: metrics.of_file(name, of) for name in task.metrics}}
    for file, of in files.items()
  }
  groups = {group: _group(task, list(own), found) for group, own in by_group.items()}
  if task.kind.overall:
    groups[OVERALL] = _group(task, list(files), found)
  return {"files": found, "groups": groups}


def _group(task: task_lib.Task, names: Sequence[str], files: Mapping[str, Any]) -> dict[str, Any]:
  weights = [files[name]["items"] for name in names]
  stats = {}
  for metric in task.metrics:
    values = [files[name]["metrics"][metric] for name in names]
    if all(isinstance(value, float) for value in values):
      average = sum(value * weight for value, weight in zip(values, weights)) / sum(weights)
      stats[metric] = {"max": max(values), "median": statistics.median(values), "average": average}
  return {"files": list(names), "weights": weights, "stats": stats}


def lines(task: task_lib.Task, summary: Mapping[str, Any]) -> Iterator[str]:
  """Yields the lines that the original prints of a task."""
  yield f"Evaluating task {task.name}:"
  files, special = summary["files"], task.metrics[0] in _SPECIAL
  for group, own in _groups(summary):
    yield f"    Evaluating group {group}:"
    if special:
      yield from _SAID.get(task.metrics[0], ())
      continue
    for file in own["files"]:
      values = ", ".join(f"{name} = {value:.3f}" for name, value in files[file]["metrics"].items())
      yield f"        Finish {file}, {values}"
  yield f"Evaluation results of task {task.name}:"
  for group, own in _groups(summary):
    if special:
      yield from _SPECIAL[task.metrics[0]](group, files[own["files"][0]]["metrics"][task.metrics[0]])
    else:
      yield from _statistics(f"    Group {group}", own["stats"])
  if task.kind.overall:
    yield from _statistics(f"Group {OVERALL}", summary["groups"][OVERALL]["stats"])


def _groups(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
  return [(name, group) for name, group in summary["groups"].items() if name != OVERALL]


def _statistics(head: str, stats: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
  told = {
    name: f"max = {each['max']:.3f}, median = {each['median']:.3f}, average = {each['average']:.3f}"
    for name, each in stats.items()
  }
  if len(told) == 1:
    yield from (f"{head} {name}: {text}" for name, text in told.items())
    return
  yield f"  {head}: "
  yield from (f"        Metric {name}: {text}" for name, text in told.items())


def _stereotypes(group: str, tables: Sequence[Mapping[str, float]]) -> Iterator[str]:
  del group
  for name, table in zip(_STEREOSET, tables, strict=True):
    yield name
    yield from (f"cat:{key}        score:{round(value, 2)}" for key, value in table.items())


def _pairs(group: str, table: Mapping[str, float]) -> Iterator[str]:
  del group
  yield from (f"category:{key}        score:{round(value * 100, 2)}" for key, value in table.items())


def _pile(group: str, table: Mapping[str, float]) -> Iterator[str]:
  yield f"    Finish group {group}:"
  yield from (f"        {key} = {value:.3f}" for key, value in table.items())


_SPECIAL = {"SS_ICAT": _stereotypes, "CP": _pairs, "BPB": _pile}
_SAID = {"SS_ICAT": ["Special metric for StereoSet"], "CP": ["Special metric for CrowsPair"]}
