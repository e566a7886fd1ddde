"""All items of the tasks that are named, from the files that the user has."""

from collections.abc import Sequence
import dataclasses
import hashlib
import pathlib

from glmjax.harness import asking
from glmjax.harness import items
from glmjax.harness import layouts
from glmjax.harness import task as task_lib
from glmjax.infer import vocabulary
from glmjax.models import config as config_lib


def gather(
  config: config_lib.GLMConfig,
  tokenizer: vocabulary.Tokenizer,
  tasks: Sequence[task_lib.Task],
  data: pathlib.Path,
  limit: int | None = None,
  skip: bool = False,
) -> list[asking.Asked]:
  """Returns the items of all files of all tasks, for a model of this configuration; with `limit`, the first so many of
  each file, which is then read no further.

  A file that belongs to two groups is asked once for each. `skip`: what has no file, and items that the model has no
  room for, are left out, and said.

  Raises:
    errors.InputError: for a group without a file, files that are no such task's, items that do not fit, and searches
      that there are not.
  """
  found = []
  for task in tasks:
    if task.searches:
      asking.search(task)  # what is out of range is said before the model is loaded
    task = dataclasses.replace(task, max_seq_length=min(task.max_seq_length, config.max_length))
    layout, folder = layouts.Layout(task, config, tokenizer.specials), data / task.path
    for group, paths in task.files(data, skip).items():
      for path in paths:
        read = items.read(task, path, folder, tokenizer)
        found += asking.placed(group, path.relative_to(folder).as_posix(), read, layout, limit, skip)
  return found


def fingerprint(asked: Sequence[asking.Asked]) -> str:
  """Returns a checksum of items and their places: records of others are no records of these."""
  digest = hashlib.sha256()
  for each in asked:
    digest.update(repr((each.key, each.item, each.padded)).encode())
  return digest.hexdigest()
