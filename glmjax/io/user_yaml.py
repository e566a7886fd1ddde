"""The one door for YAML that users wrote: a table of keys and values, without aliases, of limited size."""

import pathlib
from typing import Any

import yaml

from glmjax import errors

LARGEST = 1 << 20  # bytes


def read(path: pathlib.Path, what: str, example: str) -> dict[Any, Any]:
  """Returns the table that a YAML file holds.

  Args:
    path: the file.
    what: names it in errors, as "the task".
    example: a line of such a file.

  Raises:
    errors.InputError: in one line, where it cannot be read, is too large, or holds something else.
  """
  try:
    size = path.stat().st_size
    data = path.read_bytes() if size <= LARGEST else b""
  except OSError as error:
    raise errors.InputError(f"cannot read {what} {path}: {errors.reason(error)}") from error
  if size > LARGEST:
    raise errors.InputError(f"{path} has {size:,} bytes; {what} has {LARGEST:,} at most")
  try:
    text = data.decode("utf-8-sig")
    aliases = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
    content = None if aliases else yaml.safe_load(text)
  except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: no UTF-8, or the 32nd of a month
    raise errors.InputError(f"{path}: not YAML ({errors.one_line(error)})") from None
  if aliases:  # a few lines of them can mean gigabytes
    raise errors.InputError(f"{path}: aliases (*name) are not read: write out what they stand for")
  if not isinstance(content, dict):
    raise errors.InputError(f"{path}: {what} is a table of keys and values, as {example}")
  return content
