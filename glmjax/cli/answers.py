"""JSON lines files that answers are added to, batch by batch; what a killed run left is gone on with."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from glmjax import errors
from glmjax.cli import inputs
from glmjax.io import folders, lock, paths, publish, user_json

_LONGEST_LINE = 1 << 26
_OTHER = "choose another file, or --overwrite this one"


@contextlib.contextmanager
def appending(path: str | os.PathLike, what: str) -> Iterator[BinaryIO]:
  """Yields the file, open to be added to; whether that is possible is known at once.

  Raises:
    errors.InputError: when it is not; `what` names the file, as "--out".
  """
  folders.claim_file(path, what, stream=True)
  path = paths.local(path, what)
  try:
    if not path.absolute().parent.is_dir():
      raise errors.InputError(f"cannot write {path}: no such folder")
    file = open(path, "a+b", buffering=0)  # one write a batch, so that what other processes add stays whole
  except OSError as error:
    raise errors.InputError(f"cannot write {path}: {errors.reason(error)}") from None
  with file:
    yield file


@dataclasses.dataclass
class Files:
  """Where a run's answers go: a file for them, and one that takes them as samples; either may be missing."""

  out: BinaryIO | None
  samples: BinaryIO | None
  label: str  # what the model is called in samples
  done: int  # answers that are there already
  begin: Callable[[], None] | None  # to be called before the first is written; None: called, or not needed

  def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends answers to the file of answers, and to that of samples."""
    if self.begin is not None:
      self.begin()
      self.begin = None
    if self.out is not None:
      _write(self.out, rows)
    if self.samples is not None:
      _write(self.samples, [{"model": self.label, "prompt": row["prompt"], "output": row["output"]} for row in rows])


@contextlib.contextmanager
def files(
  out: str | os.PathLike | None,
  samples: str | os.PathLike | None,
  label: str,
  rows: Sequence[Mapping[str, Any]],
  settings: Mapping[str, Any],
  overwrite: bool,
) -> Iterator[Files]:
  """Opens the files for the answers to `rows`; what cannot be written or gone on with is said at once.

  Args:
    out: JSON lines file of the answers, gone on with unless `overwrite`; "-": standard output; None: none.
    samples: JSON lines file that prompts and outputs are added to; None: none.
    label: what the model is called there.
    rows: the prompts, of which the file may answer the first.
    settings: what gives the answers, noted beside the file.
    overwrite: whether answers that are there are dropped.
  """
  with contextlib.ExitStack() as stack:
    out_file, samples_file, done, begin = None, None, 0, None
    if out is not None:
      out_file, done = stack.enter_context(_answering(out, rows, settings, overwrite))
      begin = None if done else functools.partial(_begin, out_file, out, settings)
    if samples is not None:
      samples_file = stack.enter_context(appending(samples, "--samples"))
      if out not in (None, "-") and os.path.samestat(os.fstat(samples_file.fileno()), os.fstat(out_file.fileno())):
        raise errors.InputError(f"--samples and --out are both {samples}: choose another file")
    yield Files(out_file, samples_file, label, done, begin)


@contextlib.contextmanager
def _answering(
  path: str | os.PathLike, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], overwrite: bool
) -> Iterator[tuple[BinaryIO, int]]:
  """Yields the file for the answers to `rows` ("-": standard output), and how many of them it holds already.

  Its lines must answer the first of the rows, with the settings that `_begin` noted; half a line at its end,
  which a kill leaves, is removed. Where it is to be overwritten it holds none; emptying it is left to `_begin`.
  """
  if path == "-":
    if sys.stdout is None:
      raise errors.InputError("standard output is closed: give --out=FILE")
    sys.stdout.flush()
    yield sys.stdout.buffer, 0
    return
  folders.claim_file(path, "--out")  # a regular one, that can be gone on with
  path = paths.local(path, "--out")
  with appending(path, "--out") as file, lock.held(lock.beside(path), f"another process is writing {path}"):
    if overwrite:
      _check_are_answers(path)
    done = 0 if overwrite else _keep_answers(file, path, rows)
    if done:
      _check_settings(path, settings)
    yield file, done


def _begin(file: BinaryIO, path: str | os.PathLike, settings: Mapping[str, Any]) -> None:
  """Empties the file and notes beside it where its answers will come from; nothing for standard output."""
  if path != "-":
    file.truncate(0)  # first: settings never stand beside answers that they did not give
    noted = _settings_path(paths.local(path, "--out"))
    try:
      publish.write_json(noted, settings)
    except OSError as error:
      raise errors.InputError(f"cannot write {noted}: {errors.reason(error)}") from None


def _settings_path(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f"{path.name}.settings.json")


def _check_settings(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
  """The answers that are there must come from the same model and sampling as those to come."""
  try:
    noted = user_json.read(_settings_path(path))
    different = [f"another model, then at {noted['checkpoint']}"] if noted["weights"] != settings["weights"] else []
  except (errors.InputError, KeyError):
    raise errors.InputError(
      f"{path} holds answers, and {_settings_path(path)} does not tell what gave them: {_OTHER}"
    ) from None
  names = dict.fromkeys([*settings, *noted])  # one that is missing had no effect
  different += [
    f"{name} {noted.get(name, 'unset')} there, {settings.get(name, 'unset')} now"
    for name in names
    if name not in ("checkpoint", "weights") and noted.get(name) != settings.get(name)
  ]
  if different:
    raise errors.InputError(
      f"{path} holds answers of other settings ({'; '.join(different)}): {_OTHER}, or go on with "
      "the settings that it was begun with"
    )


def _write(file: BinaryIO, rows: Sequence[Mapping[str, Any]]) -> None:
  """Adds a line for each row."""
  left = memoryview("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())
  while left:  # a full disk takes a part, and says so the next time
    left = left[file.write(left) :]
  file.flush()


def _check_are_answers(path: pathlib.Path) -> None:
  """Raises InputError where a file of another kind would be overwritten."""
  if _settings_path(path).exists():
    return
  with open(path, "rb") as file:
    line = file.readline(_LONGEST_LINE)
  try:
    found = user_json.parse(line, "a line") if line else {"output": ""}
  except errors.InputError:
    found = {}
  if "output" not in found:
    raise errors.InputError(f"{path} holds other things than answers, which would be lost: choose another file")


def _keep_answers(file: BinaryIO, path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> int:
  """How many answers the file holds, now without half a line at its end."""
  count = whole = 0
  with open(path, "rb") as reader:
    for line in reader:
      if not line.endswith(b"\n"):
        file.truncate(whole)
        break
      if count == len(rows) or not _answers(line, rows[count]):
        raise errors.InputError(f"{path}: line {count + 1} is no answer to prompt {count + 1} of this run: {_OTHER}")
      count, whole = count + 1, whole + len(line)
  return count


def _answers(line: bytes, row: Mapping[str, Any]) -> bool:
  """Whether a line has an answer beside the very fields of the row."""
  try:
    found = user_json.parse(line, "a line")
  except errors.InputError:
    return False
  own = {name: value for name, value in found.items() if name not in inputs.GENERATED}
  return "output" in found and json.dumps(own, sort_keys=True) == json.dumps(dict(row), sort_keys=True)
