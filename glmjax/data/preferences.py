"""Pairs of answers from JSON lines: a question, the answer that is preferred, and the one that is not."""

from collections.abc import Iterator, Mapping, Sequence
import json
from typing import Any

from glmjax import errors
from glmjax import rounds
from glmjax.data import conversations
from glmjax.data import instructions
from glmjax.data import splits
from glmjax.data import text
from glmjax.io import paths

FIELDS = (("prompt", "chosen", "rejected"), ("inputs", "chosen", "rejected"), ("question", "chosen", "rejected"))
_ANSWERS = FIELDS[0][1:]  # of a record that holds two conversations


def file_preferences(
  path: paths.Path, file_number: int, fields: Sequence[Sequence[str]] = FIELDS, history: str = instructions.HISTORY
) -> Iterator[tuple[str, tuple[str, str, str]]]:
  """Yields (split, (inputs, chosen, rejected)) of one JSONL file.

  The first fields that a record has are taken, all of them strings; or "chosen" and "rejected" are lists of messages
  that differ in the last one, with the messages before them in "prompt" where they do not begin with these.

  Raises:
    errors.InputError: for a record that is neither, or whose answers are the same; it names file and line.
  """
  if path.suffix != ".jsonl":
    raise errors.InputError(f"{path}: pairs of answers are read from .jsonl files, one JSON object a line")
  number = -1
  for number, (where, record) in enumerate(text.json_lines(path)):
    yield splits.split_of(file_number + number), _answers(record, fields, history, where)
  if number < 0:
    raise errors.InputError(f"{path} holds no text; remove it or fill it")


def _answers(
  record: Mapping[str, Any], fields: Sequence[Sequence[str]], history: str, where: str
) -> tuple[str, str, str]:
  if all(isinstance(record.get(name), list) for name in _ANSWERS):
    found = _of_messages(record, where)
  else:
    names = next((names for names in fields if all(name in record for name in names)), None)
    if names is None:
      wanted = " or ".join(", ".join(names) for names in fields)
      raise errors.InputError(
        f"{where}: no fields {wanted}; the record has {', '.join(record)[:200] or 'none'}: rename its fields, or write "
        'lists of messages into "chosen" and "rejected"'
      )
    question, *answers = names
    (asked, chosen), (_, rejected) = (
      instructions.pair(record, (question, answer), history, where, answers) for answer in answers
    )
    found = asked, chosen, rejected
  if found[1] == found[2]:
    raise errors.InputError(f"{where}: both answers are the same: give another one, or leave the record out")
  return found


def _of_messages(record: Mapping[str, Any], where: str) -> tuple[str, str, str]:
  """Returns the question and the answers of two conversations."""
  before = record.get("prompt") or []
  if isinstance(before, str):
    before = [{"role": "user", "content": before}]
  if not isinstance(before, list):
    raise errors.InputError(f'{where}: the field "prompt" is {json.dumps(before)[:40]}: give a text, or messages')
  instructions.check_others(record, ("prompt", *_ANSWERS), "one of the messages", where)
  last = [_last_pair(_whole(before, record[name], name, where), f"{where}, {name}") for name in _ANSWERS]
  (asked, chosen), (other, rejected) = last
  if asked != other:
    raise errors.InputError(
      f"{where}: chosen and rejected answer different questions: give two conversations that differ in the last "
      "message alone"
    )
  return asked, chosen, rejected


def _whole(before: list[Any], own: list[Any], name: str, where: str) -> list[Any]:
  """Returns the conversation of the field `name` with the messages of the prompt in front, once.

  Raises:
    errors.InputError: where it asks before it answers, and not what the prompt does: whether both are to be read, or
      are two versions of one question, cannot be told.
  """
  if not before or not own:
    return [*before, *own]
  asked, said = (
    [(role, text.strip()) for role, text, _ in conversations.read(messages, f"{where}, {field}")]
    for field, messages in (("prompt", before), (name, own))
  )
  if said[: len(asked)] == asked:
    return [*before, *own[len(before) :]]
  if asked[-1][0] == "user" and said[0][0] != rounds.ASSISTANT:
    raise errors.InputError(
      f'{where}: {name} begins with a message of the {said[0][0]}, and not with those of "prompt": write the '
      'whole conversation into both lists, or all but its last answer into "prompt" and the answers alone into them'
    )
  return [*before, *own]


def _last_pair(messages: list[Any], where: str) -> tuple[str, str]:
  """Returns the last question and answer of a conversation.

  Raises:
    errors.InputError: where that answer is not to be learned.
  """
  *_, pair = conversations.pairs({conversations.MESSAGES: messages}, where)
  if not messages[-1].get("weight", 1):  # or an answer before it would be compared in its place
    raise errors.InputError(
      f"{where}: the last message has weight 0, and it is the answer that is compared: give it weight 1, or leave the "
      "record out"
    )
  return pair
