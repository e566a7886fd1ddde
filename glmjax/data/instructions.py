"""Instruction pairs from JSON lines: which fields make a pair, which may stand beside them, which are refused."""

from collections.abc import Iterator, Mapping, Sequence
import json
from typing import Any

from glmjax.io import paths
from glmjax.io import user_json
from glmjax import errors
from glmjax import rounds
from glmjax.data import conversations
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
  path: paths.Path, file_number: int, fields: Sequence[Sequence[str]] = FIELDS, history: str = HISTORY
) -> Iterator[tuple[str, tuple[str, str]]]:
  """Yields (split, (inputs, targets)) of one JSONL file; the pairs of a conversation are in one split.

  The first pair of fields that a record has is taken; one that has none is a conversation, in the field "messages".
  `history` is the field of the rounds before.
  """
  if path.suffix != ".jsonl":
    raise errors.InputError(f"{path}: instructions are read from .jsonl files, one JSON object a line")
  number = -1
  for number, (where, record) in enumerate(text.json_lines(path)):
    split = splits.split_of(file_number + number)
    yield from ((split, pair) for pair in _pairs(record, fields, history, where))
  if number < 0:
    raise errors.InputError(f"{path} holds no text; remove it or fill it")


def _pairs(
  record: Mapping[str, Any], fields: Sequence[Sequence[str]], history: str, where: str
) -> Iterator[tuple[str, str]]:
  names = next((names for names in fields if all(name in record for name in names)), None)
  if names is not None:
    yield pair(record, names, history, where)
  elif conversations.MESSAGES in record:
    check_others(record, (conversations.MESSAGES,), f"one of the {conversations.MESSAGES}", where)
    yield from conversations.pairs(record, where)
  else:
    wanted = " or ".join(" and ".join(names) for names in fields)
    raise errors.InputError(
      f"{where}: no fields {wanted}; the record has {', '.join(record)[:200] or 'none'}: rename "
      f'its fields, with the whole question in the first and earlier rounds in "{history}", or write "messages"'
    )


def pair(
  record: Mapping[str, Any], names: Sequence[str], history: str, where: str, others: Sequence[str] = ()
) -> tuple[str, str]:
  """Returns (inputs, targets) from the two fields `names` of a record, and the rounds before in the field `history`;
  `others` are read elsewhere.

  Raises:
    errors.InputError: for what is no text, an empty answer, or another field that holds something.
  """
  inputs, targets = (user_json.string(record, name, where) for name in names)
  if not targets.strip():
    raise errors.InputError(f"{where}: the field {names[1]!r} is empty; there is nothing to learn")
  check_others(record, (*names, history, *others), repr(names[0]), where)
  earlier = [] if history in names else _history(record.get(history), history, where)
  return rounds.prompt(earlier, inputs), targets


def check_others(record: Mapping[str, Any], names: Sequence[str], place: str, where: str) -> None:
  """Raises InputError for a field that is not read and holds something; `place` says where to write it instead."""
  for name, value in record.items():
    if name not in names and name.lower() not in IGNORED and value not in (None, "", [], {}):
      raise errors.InputError(
        f"{where}: the field {name[:40]!r} is not read, and might belong to the sample: write it into {place}, "
        'remove it, or move it into a field "metadata", which is passed over'
      )


def _history(value: Any, name: str, where: str) -> list[tuple[str, str]]:
  """Returns the rounds before, from [[question, answer], ...] in the field `name`."""
  earlier = [] if value is None or value == "" else value
  if not isinstance(earlier, list) or not all(
    isinstance(each, list) and len(each) == 2 and all(isinstance(said, str) for said in each) for each in earlier
  ):
    raise errors.InputError(
      f'{where}: the field "{name}" is {json.dumps(value)[:40]}, not a list of [question, answer] pairs'
    )
  return [
    (user_json.string({name: asked}, name, where), user_json.string({name: answered}, name, where))
    for asked, answered in earlier
  ]
