"""The one door for JSON that users, or programs of others, wrote."""

import json
import stat
from typing import Any

from glmjax import errors
from glmjax.io import downloads
from glmjax.io import paths

DEEPEST = 100  # levels of lists and objects: far beyond any config, far within Python's recursion limit
LARGEST = 1 << 28  # bytes of a JSON file; Python's objects may take 25 times as many
MOST_DIGITS = 4300  # of the longest integer that Python reads (sys.int_info.default_max_str_digits)
_KINDS = {dict: "an object", list: "a list"}


def parse(text: str | bytes, where: str, kind: type | None = dict, expected: str = "") -> Any:
  """Returns what a JSON text holds; integers beyond Python's 4,300 digits as floats.

  Args:
    text: UTF-8, with or without a byte order mark.
    where: begins the error: a file, or a file and a line.
    kind: the type that the whole must have, dict or list; None: any.
    expected: ends the error, as 'expected {"prompt": "..."}'.

  Raises:
    errors.InputError: in one line.
  """
  advice = f"; {expected}" if expected else ""
  if isinstance(text, bytes):
    text = _decoded(text, where, advice)
  try:
    content = _DECODER.decode(text.removeprefix("\ufeff"))
  except RecursionError:
    raise errors.InputError(f"{where}: JSON nested deeper than {DEEPEST} levels{advice}") from None
  except ValueError as error:
    raise errors.InputError(f"{where}: not JSON ({error}){advice}") from None
  if text.count("[") + text.count("{") > DEEPEST and _depth_exceeds(content, DEEPEST):
    raise errors.InputError(f"{where}: JSON nested deeper than {DEEPEST} levels{advice}")
  if kind is not None and not isinstance(content, kind):
    raise errors.InputError(f"{where}: JSON of {_described(content)}, not {_KINDS[kind]}{advice}")
  return content


def read(path: paths.Named, kind: type | None = dict, expected: str = "", largest: int = LARGEST) -> Any:
  """Returns what a JSON file of at most `largest` bytes holds (`parse`).

  Raises:
    errors.InputError: also when the file is missing, no regular file, too large or cannot be read.
  """
  path = paths.named(path)
  try:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a FIFO would wait for ever
      raise errors.InputError(f"{path} is no regular file{f'; {expected}' if expected else ''}")
    if found.st_size > largest:
      raise errors.InputError(f"{path} has {found.st_size:,} bytes; a JSON file here has {largest:,} at most")
    text = path.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    raise errors.InputError(f"{path}: no such file{f'; {expected}' if expected else ''}") from None
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {errors.reason(error)}") from error
  return parse(text, str(path), kind, expected)


def string(content: dict[str, Any], name: str, where: str) -> str:
  """Returns a field that must be text.

  Raises:
    errors.InputError: when it is missing, no string, or holds half a surrogate pair.
  """
  if name not in content:
    raise errors.InputError(f"{where}: no field {name!r}; the record has {', '.join(content)[:200] or 'none'}")
  value = content[name]
  if not isinstance(value, str):
    raise errors.InputError(f"{where}: the field {name!r} is {json.dumps(value)[:40]}, not a string")
  if not value.isascii() and _has_surrogates(value):
    raise errors.InputError(f"{where}: the field {name!r} holds half a surrogate pair, which is not valid Unicode")
  return value


def _has_surrogates(value: str) -> bool:
  try:  # four times as fast as to search for them
    value.encode()
  except UnicodeEncodeError:
    return True
  return False


def _decoded(text: bytes, where: str, advice: str) -> str:
  downloads.check(text[: downloads.HEAD], where)
  try:
    return text.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise errors.InputError(f"{where}: not UTF-8 at byte {error.start}{advice}") from None


def _integer(digits: str) -> int | float:
  return int(digits) if len(digits) <= MOST_DIGITS else float(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)  # json.loads makes one for every text


def _depth_exceeds(content: Any, limit: int) -> bool:
  level = [content]
  for _ in range(limit):
    level = [
      child
      for each in level
      if isinstance(each, dict | list)
      for child in (each.values() if isinstance(each, dict) else each)
    ]
  return any(isinstance(each, dict | list) for each in level)


def _described(content: Any) -> str:
  kinds = {bool: "true or false", str: "a string", int: "a number", float: "a number", type(None): "null"}
  return _KINDS.get(type(content)) or kinds[type(content)]
