"""Records of a data set's own files, in the formats that they are released in.

A task's `reader` says how: `jsonl` (the default), `csv` or `tsv`, `json`, or the name of one of the layouts in
glmjax/harness/datasets.py. As a table it says more: {format: csv, columns: [question, A, B, answer]} for files without
a head line, {format: json, records: data.examples} for a list within, {format: jsonl, without: {label: "-"}} for
records that nobody could answer.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from glmjax import errors
from glmjax.harness import datasets
from glmjax.harness import files
from glmjax.io import user_json

_DELIMITERS = {"csv": ",", "tsv": "\t"}
FORMATS = ("jsonl", "json", *_DELIMITERS)


@dataclasses.dataclass(frozen=True)
class Reader:
  """How a file's records are found."""

  format: str = "jsonl"
  columns: tuple[str, ...] | None = None  # of csv and tsv; None: the file's first line names them
  records: str = ""  # of json: the keys that lead to the list, with dots between; "": the file is the list
  without: Mapping[str, str] = dataclasses.field(default_factory=dict)  # fields, and what leaves their records out

  def __post_init__(self) -> None:
    if self.format not in (*FORMATS, *datasets.LAYOUTS):
      known = ", ".join((*FORMATS, *datasets.LAYOUTS))
      raise errors.InputError(f"reader is {self.format!r}: one of {known} is needed")

  @classmethod
  def of(cls, value: str | Mapping[str, Any]) -> "Reader":
    """Returns what a task's `reader` says."""
    if isinstance(value, str):
      return cls(value)
    if unknown := sorted({*map(str, value)} - {field.name for field in dataclasses.fields(cls)}):
      known = ", ".join(field.name for field in dataclasses.fields(cls))
      raise errors.InputError(f"reader has no key {unknown[0]!r}: {known}")
    columns, without = value.get("columns"), value.get("without", {})
    if not isinstance(without, Mapping):
      raise errors.InputError("reader's without is a table of fields, and what leaves their records out")
    if not isinstance(columns, list | None) or not isinstance(value.get("records", ""), str):
      raise errors.InputError("reader's columns are a list of names, and its records is keys with dots between")
    named = {"columns": None if columns is None else tuple(map(str, columns))}
    return cls(**{**value, **named, "without": {str(name): str(text) for name, text in without.items()}})

  def read(self, path: pathlib.Path) -> files.Records:
    """Yields a file's records, each with its place.

    Raises:
      errors.InputError: for a file without any, and what is no record.
    """
    if self.format in _DELIMITERS:
      found = files.table(path, _DELIMITERS[self.format], self.columns)
    elif self.format == "jsonl":
      found = files.lines(path)
    elif self.format in datasets.OF_FILE:
      found = datasets.OF_FILE[self.format](path)
    else:
      content = user_json.read(path, None)
      found = (
        self._listed(content, path) if self.format == "json" else datasets.OF_JSON[self.format](content, str(path))
      )
    empty = True
    for record, where in found:
      if not any(str(record.get(name)) == value for name, value in self.without.items()):
        empty = False
        yield record, where
    if empty:
      raise errors.InputError(f"{path}: there is nothing to ask: it is empty, or `without` leaves all of it out")

  def _listed(self, content: Any, path: pathlib.Path) -> files.Records:
    for key in filter(None, self.records.split(".")):
      content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, list):
      raise errors.InputError(f"{path}: there is no list {self.records}".rstrip())
    for number, record in enumerate(content, 1):
      if not isinstance(record, dict):
        raise errors.InputError(f"{path}, record {number}: no object")
      yield record, f"{path}, record {number}"
