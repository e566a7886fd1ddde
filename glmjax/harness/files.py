"""Records of files in the plain formats: an object a line in JSON, or a row of a table."""

from collections.abc import Iterator, Sequence
import csv
import pathlib
from typing import Any

from glmjax import errors
from glmjax.io import user_json
from glmjax.io import user_text

Records = Iterator[tuple[dict[str, Any], str]]  # each with its place, which begins errors


def lines(path: pathlib.Path) -> Records:
  """Yields the records of a file with an object a line.

  Raises:
    errors.InputError: for a line that is none.
  """
  for number, line in user_text.lines(path):
    where = f"{path}, line {number}"
    if not line.strip():
      raise errors.InputError(f"{where}: empty: every line is one record in JSON")
    yield user_json.parse(line, where), where


def table(path: pathlib.Path, delimiter: str = ",", columns: Sequence[str] | None = None) -> Records:
  """Yields the rows of a table by the names of its columns; None: the first line names them.

  Raises:
    errors.InputError: for a row of another length.
  """
  rows = csv.reader((f"{line}\n" for _, line in user_text.lines(path)), delimiter=delimiter)
  try:
    for row in rows:
      where = f"{path}, line {rows.line_num}"
      if columns is None:
        columns = tuple(row)
      elif len(row) != len(columns):
        raise errors.InputError(f"{where}: {len(row)} columns, and there are {len(columns)} names")
      else:
        yield dict(zip(columns, row)), where
  except csv.Error as error:
    raise errors.InputError(f"{path}, line {rows.line_num}: {error}") from None


def entry(record: Any, name: str, where: str, kind: type = str) -> Any:
  """Returns a field of a record, which must be of a kind.

  Raises:
    errors.InputError: where it is missing, or another's.
  """
  value = record.get(name) if isinstance(record, dict) else None
  if not isinstance(value, kind):
    named = {str: "text", list: "list", dict: "object", int: "number"}[kind]
    raise errors.InputError(f"{where}: no {named} {name!r}: is this the data set's own file?")
  return value
