"""A run's records on disk: one JSON line for each item, and beside them what gave them.

A run that was stopped is gone on with: items whose records are there are not asked again. What a kill leaves of a line
counts for nothing.
"""

from collections.abc import Iterable, Mapping
import json
import pathlib
from typing import Any, BinaryIO

from glmjax import errors
from glmjax.io import publish
from glmjax.io import user_json

ITEMS, RUN, REPORT, PAGE = "items.jsonl", "run.json", "report.json", "report.md"
_LONGEST_LINE = 1 << 26  # bytes
Key = tuple[str, str, str, int]


def key(record: Mapping[str, Any]) -> Key:
  """Returns what tells a record from all others of its run."""
  return record["task"], record["group"], record["file"], record["item"]


def begin(folder: pathlib.Path, run: Mapping[str, Any], overwrite: bool) -> dict[Key, dict[str, Any]]:
  """Makes the folder ready for a run's records, and returns those that it has already.

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
    found, whole = _kept(items)
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


def _kept(path: pathlib.Path) -> tuple[dict[Key, dict[str, Any]], int]:
  """Returns the records of a file, and the bytes of its whole lines."""
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
        found[key(record)] = record
      except (KeyError, TypeError):
        raise errors.InputError(f"{path}, byte {whole}: no record of an item: --overwrite it") from None
      whole += len(line)
  return found, whole


def read(folder: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Returns what a run's folder says of itself, and its records.

  Raises:
    errors.InputError: for a folder of anything else.
  """
  run = user_json.read(folder / RUN, expected=f"{folder} is no folder that glmjax evaluate --tasks wrote")
  return run, list(_kept(folder / ITEMS)[0].values())


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
