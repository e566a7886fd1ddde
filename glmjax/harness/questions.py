"""The records of a task's files as questions in words, with worked examples before them where the task wants some."""

from collections.abc import Iterator, Mapping, Sequence
import pathlib
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.harness import reading
from glmjax.harness import task as task_lib
from glmjax.harness import template
from glmjax.io import user_json

Question = tuple[dict[str, Any], str]  # a record, and where it is


def read(task: task_lib.Task, path: pathlib.Path, folder: pathlib.Path) -> Iterator[Question]:
  """Yields a file's questions; `folder` is the task's.

  Examples are drawn once, with the task's own seed, so that they are the same for all questions of a file; one that is
  the question itself is passed over. A question's `shots` says which they were.

  Raises:
    errors.InputError: where there are fewer examples than the task wants, or they are ids.
  """
  prompt = None if task.prompt is None else template.Prompt.of(task.prompt)
  examples = _examples(task, path, folder) if task.num_shots else ()
  for record, where in _plain(task, path):
    head = "" if prompt is None else prompt.head_of(record, where)
    chosen = [(text, place) for text, place in examples if place != where][: task.num_shots]
    if head or chosen:
      before = head + "".join(f"{text}{task.shots_separator}" for text, _ in chosen)
      first, *behind = _parts(record, where)
      record = record | {"inputs_pretokenized": [f"{before}{first}", *behind] if behind else f"{before}{first}"}
    if chosen:
      record["shots"] = [place.removeprefix(f"{folder}/") for _, place in chosen]
    yield record, where


def _parts(record: Mapping[str, Any], where: str) -> list[str]:
  """Returns what stands before the blank, and behind it where it is not at the end."""
  inputs = record.get("inputs_pretokenized")
  if isinstance(inputs, list) and all(isinstance(text, str) for text in inputs):
    return inputs
  return [user_json.string(dict(record), "inputs_pretokenized", where)]


def _plain(task: task_lib.Task, path: pathlib.Path) -> Iterator[Question]:
  prompt = None if task.prompt is None else template.Prompt.of(task.prompt)
  for record, where in reading.Reader.of(task.reader).read(path):
    yield (record if prompt is None else prompt.fill(record, where)), where


def _examples(task: task_lib.Task, path: pathlib.Path, folder: pathlib.Path) -> Sequence[tuple[str, str]]:
  """Returns one example more than the task wants, with their answers, and where each is."""
  if isinstance(task.shots_pattern, Mapping):
    name = path.relative_to(folder).as_posix()
    for old, new in task.shots_pattern.items():
      name = name.replace(old, new)
    paths = [folder / name]
  else:
    paths = [path] if task.shots_pattern is None else sorted(folder.glob(task.shots_pattern))
  pool = [question for each in paths for question in _plain(task, each)]
  if len(pool) < task.num_shots + (task.shots_pattern is None):
    raise errors.InputError(f"task {task.name}: {task.num_shots} examples, and there are {len(pool)} for {path}")
  order = np.random.default_rng(task.shots_seed).permutation(len(pool))[: task.num_shots + 1]
  return [(_worked(*pool[i]), pool[i][1]) for i in order]


def _worked(record: Mapping[str, Any], where: str) -> str:
  """Returns an example with its answer."""
  inputs = _parts(record, where)
  answers = record.get("choices_pretokenized") or record.get("targets_pretokenized")
  number = record.get("label", 0) if "choices_pretokenized" in record else 0
  if not isinstance(answers, list) or not isinstance(number, int) or not 0 <= number < len(answers):
    raise errors.InputError(f"{where}: no example: it has no right answer")
  if len(inputs) > 1:
    return str(answers[number]).join(inputs)
  separated = inputs[0].endswith((" ", "\n", "(")) or not inputs[0].isascii()
  return f"{inputs[0]}{'' if separated else ' '}{answers[number]}"
