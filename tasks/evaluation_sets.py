"""Evaluation tasks in seqio: their questions, without examples, and the right answer to each, as pairs to learn from.

A model that has learned a task's questions has no figure on that task. Name files to learn from, as train.jsonl, in a
YAML file of your own (`file_pattern`).
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.data import file_tasks
from glmjax.data import mixtures
from glmjax.data import splits
from glmjax.harness import questions
from glmjax.harness import task as task_lib
from glmjax.io import paths
from glmjax.tasks import registration

MIXTURE = "evaluation_sets"


def register(
  tasks: Sequence[paths.Named],
  data: paths.Named,
  tokenizer: paths.Named,
  rates: Mapping[str, float] | None = None,
  mixture: str = MIXTURE,
) -> str:
  """Registers evaluate_<name> for each evaluation task, and a mixture of them, whose name is returned.

  Args:
    tasks: names of tasks that come with glmjax, YAML files, and folders of such: with choices or texts to write.
    data: folder in which the tasks' paths are.
    tokenizer: tokenizer folder.
    rates: shares of the samples by the tasks' names; None: all alike.
    mixture: its name.

  Raises:
    errors.InputError: for tasks without questions and answers in words, and files that there are not.
  """
  found = [_task(task, pathlib.Path(data)) for task in task_lib.find(tasks)]
  names = [task.name.removeprefix("evaluate_") for task in found]
  if rates is not None and {*rates} != {*names}:
    raise errors.InputError(
      f"rates are of {', '.join(sorted(rates))}: give one of each task, {', '.join(sorted(names))}"
    )
  shares = {task.name: float((rates or {}).get(name, 1.0)) for task, name in zip(found, names)}
  return registration.register(
    mixtures.Mixture(mixture, tokenizer_lib.Tokenizer.load(tokenizer), tuple(found), shares), tokenizer
  )


def _task(task: task_lib.Task, data: pathlib.Path) -> file_tasks.FileTask:
  if task.type == task_lib.LANGUAGE_MODEL:
    raise errors.InputError(f"task {task.name} has texts, and no answers: take it as a corpus (pretrain.register)")
  task = dataclasses.replace(task, num_shots=0)  # examples come from files that a cache does not know of
  files = list(dict.fromkeys(path for own in task.files(data).values() for path in own))
  return file_tasks.FileTask(
    f"evaluate_{task.name}",
    "instruction",
    files,
    functools.partial(_pairs, keys=dataclasses.asdict(task), folder=data / task.path),
    suffixes={path.suffix for path in files},
  )


def _pairs(
  path: paths.Path, file_number: int, keys: Mapping[str, Any], folder: pathlib.Path
) -> Iterator[tuple[str, tuple[str, str]]]:
  """Yields (split, (a question, its right answer)) of a file; the task's `keys` are what a cache knows of it."""
  task = task_lib.Task(**keys)
  for number, (record, where) in enumerate(questions.read(task, pathlib.Path(path), folder)):
    inputs = record.get("inputs_pretokenized")
    if task.type == task_lib.CHOICES:
      answers, label = record.get("choices_pretokenized"), record.get("label")
    else:
      answers, label = record.get("targets_pretokenized"), 0
    if not isinstance(inputs, str):
      raise errors.InputError(f"{where}: its blank is within, or it is ids: no question that an answer follows")
    if not isinstance(answers, list) or not isinstance(label, int) or not 0 <= label < len(answers):
      raise errors.InputError(f"{where}: no right answer in words")
    yield splits.split_of(file_number + number), (inputs, str(answers[label]))
