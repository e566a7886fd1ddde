"""Items: the questions of a task's files, as tokens.

A record is an object in a line of JSON. Its `inputs`, `choices` and `targets` are ids; where they are not there
`inputs_pretokenized`, `choices_pretokenized` and `targets_pretokenized` are texts, which become ids here. Two texts as
`inputs_pretokenized` are those before and behind the blank. What else a record holds goes along, for the metrics.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glmjax import errors
from glmjax.harness import questions
from glmjax.harness import task as task_lib
from glmjax.infer import vocabulary
from glmjax.io import user_json
from glmjax.io import user_text

_OWN = ("inputs", "inputs_pretokenized", "choices", "choices_pretokenized", "targets", "targets_pretokenized")
_LONGEST = 200  # characters of a text or list in what goes along


@dataclasses.dataclass(frozen=True)
class Question:
  """A context, and what may fill its blank."""

  context: list[int]
  choices: list[list[int]]
  label: int  # the right one
  fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Blank:
  """A context, and texts that are right in its blank, any of them."""

  context: list[int]
  targets: list[str]  # decoded from their ids
  fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Window:
  """A piece of a text, and what stands before it."""

  before: list[int]
  text: list[int]
  fields: Mapping[str, Any]  # of the text: its number in the file, words, bytes


Item = Question | Blank | Window


def read(
  task: task_lib.Task, path: pathlib.Path, folder: pathlib.Path, tokenizer: vocabulary.Tokenizer
) -> Iterator[Item]:
  """Yields the items of a file in the task's folder.

  Raises:
    errors.InputError: for a file without any, and records that are none.
  """
  if task.type == task_lib.LANGUAGE_MODEL:
    for text in _texts(task, path, folder, tokenizer):
      yield from _windows(task, *text)
    return
  make = _question if task.type == task_lib.CHOICES else _blank
  for record, where in questions.read(task, path, folder):
    context = _context(task, record, where, tokenizer)
    item = make(context, record, where, tokenizer)
    _check_fields(task, item, where)
    yield item


def _context(task: task_lib.Task, record: Mapping[str, Any], where: str, tokenizer: vocabulary.Tokenizer) -> list[int]:
  """Returns the ids of a record's inputs; of two texts each by itself, as GLM-130B has them, and a mask between."""
  if "inputs" in record:
    return _checked_ids(record["inputs"], "inputs", where)
  inputs = record.get("inputs_pretokenized")
  if not isinstance(inputs, list):
    return tokenizer.encode(user_json.string(dict(record), "inputs_pretokenized", where))
  if not 1 <= len(inputs) <= 2:
    raise errors.InputError(f"{where}: inputs_pretokenized has {len(inputs)} texts: before the blank, and behind it")
  texts = [tokenizer.encode(user_json.string({"inputs": text}, "inputs", where)) for text in inputs]
  mask = tokenizer.specials.gmask if task.use_task_mask else tokenizer.specials.mask
  return texts[0] if len(texts) == 1 else [*texts[0], mask, *texts[1]]


def _checked_ids(value: Any, name: str, where: str) -> list[int]:
  if not isinstance(value, list) or not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
    raise errors.InputError(f"{where}: the field {name!r} is no list of ids")
  return value


def _lists(record: Mapping[str, Any], name: str, where: str, tokenizer: vocabulary.Tokenizer) -> list[list[int]]:
  """Returns the ids of a field that holds several texts."""
  written = name if name in record else f"{name}_pretokenized"
  if written not in record:
    raise errors.InputError(f"{where}: no field {name!r}, nor {name}_pretokenized")
  values = record[written]
  if not isinstance(values, list):
    raise errors.InputError(f"{where}: the field {written!r} is no list: give a list, of one text too")
  if written == name:
    return [_checked_ids(value, name, where) for value in values]
  return [tokenizer.encode(user_json.string({written: value}, written, where)) for value in values]


def _along(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what else a record holds, but for long things."""
  kept = {name: value for name, value in record.items() if name not in _OWN}
  return {name: value for name, value in kept.items() if len(str(value)) <= _LONGEST}


def _check_fields(task: task_lib.Task, item: Question | Blank, where: str) -> None:
  """Raises InputError where an item lacks what its task's metric will read."""
  for name in task.kind.needs:
    value = item.fields.get(name)
    if name == "goal_label":
      if not isinstance(value, list) or len(value) != len(item.choices) or not {*map(type, value)} <= {str}:
        raise errors.InputError(f"{where}: goal_label is no list of texts, one for each choice")
    elif not isinstance(value, str | int):
      raise errors.InputError(f"{where}: no text or number {name!r} of {_LONGEST} characters at most")


def _question(context: list[int], record: Mapping[str, Any], where: str, tokenizer: vocabulary.Tokenizer) -> Question:
  choices, label = _lists(record, "choices", where, tokenizer), record.get("label")
  if not choices or not all(choices):
    raise errors.InputError(f"{where}: there is no choice, or an empty one: each has a token at least")
  if not isinstance(label, int) or isinstance(label, bool):
    raise errors.InputError(f"{where}: the label is {label!r}: the number of the right choice is needed, from 0")
  return Question(context, choices, label, _along(record))


def _blank(context: list[int], record: Mapping[str, Any], where: str, tokenizer: vocabulary.Tokenizer) -> Blank:
  targets = [tokenizer.decode(ids) for ids in _lists(record, "targets", where, tokenizer)]
  return Blank(context, targets, _along(record))


def _texts(
  task: task_lib.Task, path: pathlib.Path, folder: pathlib.Path, tokenizer: vocabulary.Tokenizer
) -> Iterator[tuple[list[int], dict[str, Any]]]:
  """Yields the texts of a file, each with its number, words and bytes, and where records say so its set."""
  if not task.kind.by_record:
    for _ in user_text.lines(path):  # says what is wrong with it, and where
      pass
    text = path.read_text(encoding="utf-8-sig")
    if not (ids := tokenizer.encode(text)):
      raise errors.InputError(f"{path} is empty: there is nothing to ask")
    # The original's words are what single spaces divide: newlines do not (docs/evaluation.md).
    yield ids, {"text": 0, "words": len(text.strip().split(" ")), "bytes": len(text.encode())}
    return
  for number, (record, where) in enumerate(questions.read(task, path, folder)):
    ids = _checked_ids(record["text"], "text", where) if isinstance(record.get("text"), list) else None
    text = user_json.string(dict(record), "text" if ids is None else "text_pretokenized", where)
    if ids and not text:
      raise errors.InputError(f"{where}: the field 'text_pretokenized' is empty, and 'text' is not: bits are per byte")
    if ids := tokenizer.encode(text) if ids is None else ids:
      meta = record.get("meta")
      about = meta if isinstance(meta, dict) else {}
      yield ids, {"text": number, "bytes": len(text.encode()), "set": str(about.get("pile_set_name", "all"))}


def _windows(task: task_lib.Task, ids: Sequence[int], fields: Mapping[str, Any]) -> Iterator[Window]:
  """Yields a text in windows of max_seq_length - 1 tokens at most, of which all but the first score the last
  generation_length behind the others.
  """
  room, step = task.max_seq_length - 1, task.generation_length
  count = max(math.ceil(max(len(ids) - room, 0) / step) + 1, 1)
  if count > 1 and step > room:
    raise errors.InputError(f"task {task.name}: generation_length {step} is more than max_seq_length {room + 1} holds")
  for i in range(count):
    piece = ids[i * step : i * step + room]
    first = 0 if i == 0 or task.unidirectional else room - step
    if len(piece) > first:
      yield Window(list(piece[:first]), list(piece[first:]), fields)
