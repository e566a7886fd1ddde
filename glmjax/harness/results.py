"""A run's records on disk: one JSON line for each item, and beside them what gave them.

A run that was stopped is gone on with: items whose records are there are not asked again. What a kill leaves of a line
counts for nothing.
"""

from collections.abc import Callable, Iterable, Mapping
import json
import pathlib
import sys
from typing import Any, BinaryIO

from glmjax import errors
from glmjax.io import publish
from glmjax.io import user_json

ITEMS, RUN, REPORT, PAGE = "items.jsonl", "run.json", "report.json", "report.md"
_LONGEST_LINE = 1 << 26  # bytes
_PLACE = ("task", "group", "file")
# What figures are made of (summary.py, samples.py), and what compare looks at; of stereotypes, whose figures are no
# means of values, more.
_COUNTED = (*_PLACE, "item", "values", "target", "targets", "loss", "text", "words", "bytes", "set")
_OF_STEREOTYPES = ("prediction", "scores", "goal_label", "bias_type", "pair_ID", "sent_ID")
Key = tuple[str, str, str, int]


def key(record: Mapping[str, Any]) -> Key:
  """Returns what tells a record from all others of its run."""
  return record["task"], record["group"], record["file"], record["item"]


def counted(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what counts of a record: a million of them are kept in memory."""
  names = _COUNTED if record.get("values") != {} else (*_COUNTED, *_OF_STEREOTYPES)
  found = {name: record[name] for name in names if name in record}
  return found | {name: sys.intern(found[name]) for name in _PLACE}


def begin(folder: pathlib.Path, run: Mapping[str, Any], overwrite: bool) -> dict[Key, dict[str, Any]]:
  """Makes the folder ready for a run's records, and returns what counts of those that it has already.

  Raises:
    errors.InputError: where the folder holds another run's records, or other things.
  """
  items, noted = folder / ITEMS, folder / RUN
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
      for name in (REPORT, PAGE, ITEMS):
        (folder / name).unlink(missing_ok=True)
    elif noted.exists():
      _check_same(noted, run)
    elif any(folder.iterdir()):
      raise errors.InputError(f"{folder} holds other things than an evaluation: name another --out")
    found, whole = _kept(items, counted)
    if not found:
      publish.write_json(noted, dict(run))
    if items.exists():
      with items.open("rb+") as file:
        file.truncate(whole)
  except OSError as error:
    raise errors.InputError(f"cannot write {folder}: {errors.reason(error)}; write --out elsewhere") from error
  return found


def _check_same(noted: pathlib.Path, run: Mapping[str, Any]) -> None:
  """Raises InputError where the records that are there come from another model, other tasks or other items."""
  before = user_json.read(noted)
  plain = json.loads(json.dumps(run))
  different = [name for name in {**before, **plain} if before.get(name) != plain.get(name) and name != "checkpoint"]
  if {*different} - {"skip"}:  # what was left out shows in the data
    told = "; ".join(
      f"{name}: {str(before.get(name))[:60]} there, {str(plain.get(name))[:60]} now" for name in different
    )
    raise errors.InputError(
      f"{noted.parent} holds records of other settings ({told[:500]}): choose another --out, or --overwrite this one"
    )


def _kept(
  path: pathlib.Path, kept: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> tuple[dict[Key, dict[str, Any]], int]:
  """Returns what is kept of the records of a file, and the bytes of its whole lines."""
  found: dict[Key, dict[str, Any]] = {}
  whole = 0
  if not path.exists():
    return found, 0
  with path.open("rb") as file:
    while line := file.readline(_LONGEST_LINE):
      if len(line) == _LONGEST_LINE:  # no kill's doing: what follows is not to be cut off
        raise errors.InputError(f"{path}, byte {whole}: no record of an item: --overwrite it")
      if not line.endswith(b"\n"):
        break
      record = user_json.parse(line, f"{path}, byte {whole}", expected="name another --out, or --overwrite this one")
      try:
        record = kept(record)
        found[key(record)] = record
      except (KeyError, TypeError):
        raise errors.InputError(f"{path}, byte {whole}: no record of an item: --overwrite it") from None
      whole += len(line)
  return found, whole


def read(folder: pathlib.Path, only_counted: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Returns what a run's folder says of itself, and its records, or what counts of them.

  Raises:
    errors.InputError: for a folder of anything else.
  """
  run = user_json.read(folder / RUN, expected=f"{folder} is no folder that glmjax evaluate --tasks wrote")
  return run, list(_kept(folder / ITEMS, counted if only_counted else dict)[0].values())


def append(file: BinaryIO, records: Iterable[Mapping[str, Any]]) -> None:
  """Adds records to an open file, all or, where the process dies, some of them whole."""
  left = memoryview(b"".join(map(_line, records)))
  while left:
    left = left[file.write(left) :]
  file.flush()


def _line(record: Mapping[str, Any]) -> bytes:
  try:
    return f"{json.dumps(record, ensure_ascii=False)}\n".encode()
  except UnicodeEncodeError:  # a data set's own field holds half a surrogate pair, which JSON can escape
    return f"{json.dumps(record)}\n".encode()
