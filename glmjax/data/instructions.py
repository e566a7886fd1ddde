"""Instruction pairs from JSON lines: which fields make a pair, which may stand beside them, which are refused."""

from collections.abc import Iterator, Mapping, Sequence
import json
from typing import Any

from glmjax.io import paths
from glmjax.io import user_json
from glmjax import errors
from glmjax import rounds
from glmjax.data import splits
from glmjax.data import text

FIELDS = (("inputs", "targets"), ("prompt", "response"))
HISTORY = "history"  # earlier rounds, as ChatGLM-6B's own training data had them
# What describes a pair and is no part of it. Any other field that holds something might have been meant to be read by
# the model, and dropping it in silence would train on another text.
IGNORED = frozenset(
  (
    "author",
    "category",
    "comment",
    "created",
    "created_at",
    "dataset",
    "dataset_name",
    "date",
    "difficulty",
    "domain",
    "hash",
    "id",
    "idx",
    "index",
    "lang",
    "language",
    "length",
    "license",
    "meta",
    "metadata",
    "num_tokens",
    "quality",
    "rating",
    "score",
    "source",
    "split",
    "subset",
    "tag",
    "tags",
    "task",
    "task_id",
    "task_name",
    "task_type",
    "template_name",
    "timestamp",
    "topic",
    "type",
    "uid",
    "updated",
    "url",
    "uuid",
    "version",
  )
)


def file_instructions(
  path: paths.Path, file_number: int, fields: Sequence[Sequence[str]] = FIELDS
) -> Iterator[tuple[str, tuple[str, str]]]:
  """Yields (split, (inputs, targets)) of one JSONL file; the first pair of fields that a record has is taken."""
  if path.suffix != ".jsonl":
    raise errors.InputError(f"{path}: instructions are read from .jsonl files, one JSON object a line")
  number = -1
  for number, (where, record) in enumerate(text.json_lines(path)):
    yield splits.split_of(file_number + number), _pair(record, fields, where)
  if number < 0:
    raise errors.InputError(f"{path} holds no text; remove it or fill it")


def _pair(record: Mapping[str, Any], fields: Sequence[Sequence[str]], where: str) -> tuple[str, str]:
  names = next((names for names in fields if all(name in record for name in names)), None)
  if names is None:
    wanted = " or ".join(" and ".join(names) for names in fields)
    raise errors.InputError(
      f"{where}: no fields {wanted}; the record has {', '.join(record)[:200] or 'none'}: rename "
      'its fields, with the whole question in the first and earlier rounds in "history"'
    )
  inputs, targets = (user_json.string(record, name, where) for name in names)
  if not targets:
    raise errors.InputError(f"{where}: the field {names[1]!r} is empty; there is nothing to learn")
  for name, value in record.items():
    if name not in (*names, HISTORY) and name.lower() not in IGNORED and value not in (None, "", [], {}):
      raise errors.InputError(
        f"{where}: the field {name[:40]!r} is not read, and might belong to the sample: write it into {names[0]!r}, "
        'remove it, or move it into a field "metadata", which is passed over'
      )
  earlier = [] if HISTORY in names else _history(record.get(HISTORY), where)
  return rounds.prompt(earlier, inputs), targets


def _history(value: Any, where: str) -> list[tuple[str, str]]:
  """Returns the rounds before, from [[question, answer], ...]."""
  earlier = [] if value is None or value == "" else value
  if not isinstance(earlier, list) or not all(
    isinstance(each, list) and len(each) == 2 and all(isinstance(said, str) for said in each) for each in earlier
  ):
    raise errors.InputError(
      f'{where}: the field "history" is {json.dumps(value)[:40]}, not a list of [question, answer] pairs'
    )
  return [
    (user_json.string({HISTORY: asked}, HISTORY, where), user_json.string({HISTORY: answered}, HISTORY, where))
    for asked, answered in earlier
  ]
