"""JSON lines files that answers are added to, batch by batch; what a killed run left is gone on with.

In a bucket such a file grows as io/growing.py has it: what a kill loses of it is answered again. The file of answers is
what is gone on with. An answer is written as a sample once it is where it belongs, so that a kill leaves no sample of
an answer that will be given again; the samples that are missing are added then.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from glmjax import errors
from glmjax.cli import inputs
from glmjax.io import bucket_path, folders, growing, lease, lock, paths, publish, user_json

_LONGEST_LINE = 1 << 26  # bytes
_OTHER = "choose another file, or --overwrite this one"


@contextlib.contextmanager
def appending(path: paths.Named, what: str) -> Iterator[tuple[BinaryIO, growing.File]]:
  """Yields the file, open to be added to, and what puts it where it belongs; whether that is possible is known at once.

  One in a bucket is a local copy, which is put there again and again, and when the block ends.

  Raises:
    errors.InputError: when it is not; `what` names the file, as "--out". At the end, when it could not be put.
  """
  target = folders.claim_file(path, what, stream=True)
  if isinstance(target, bucket_path.BucketPath):
    yield from _growing(target)
    return
  try:
    if not (parent := target.absolute().parent).is_dir():
      raise errors.InputError(f"cannot write {path}: no such folder as {parent}")
    file = open(target, "a+b", buffering=0)  # one write a batch, so that what other processes add stays whole
  except OSError as error:
    raise errors.InputError(f"cannot write {path}: {errors.reason(error)}") from error
  with file:
    yield file, growing.File(target)


def _growing(target: bucket_path.BucketPath) -> Iterator[tuple[BinaryIO, growing.File]]:
  """Yields the local copy of a file in a bucket, which no other process adds to meanwhile."""
  with lock.held(lock.beside(target), f"another process is writing {target}"):
    copy = growing.File(target)
    try:
      with open(copy.local, "a+b", buffering=0) as file:
        yield file, copy
    finally:
      whole = copy.close()
    if not whole:
      raise errors.InputError(
        f"cannot write {target}: the last answers are not there; the same command goes on"
      ) from copy.failure


@dataclasses.dataclass
class Files:
  """Where a run's answers go: a file for them, and one that takes them as samples; either may be missing."""

  out: BinaryIO | None
  samples: BinaryIO | None
  label: str  # what the model is called in samples
  done: int  # answers that are there already
  begin: Callable[[], None] | None  # to be called before the first is written; None: called, or not needed
  place: growing.File | None = None  # of `out` in a bucket; None: what is written is there at once
  _waiting: list[tuple[int, list[bytes]]] = dataclasses.field(default_factory=list)  # samples, and the end in `out`

  def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends answers to the file of answers, and to that of samples.

    Raises:
      errors.InputError: when a lock in a bucket was lost: what is written may meet another's.
    """
    lease.check()
    if self.begin is not None:
      self.begin()
      self.begin = None
    if self.out is not None:
      _write(self.out, map(_line, rows))
    if self.samples is not None:
      end = os.fstat(self.out.fileno()).st_size if self.place is not None else 0
      self._waiting.append((end, [_sample(self.label, row) for row in rows]))
      self._write_samples()

  def _write_samples(self) -> None:
    """Writes the samples whose answers are where they belong."""
    there = self.place.put_bytes if self.place is not None else 0
    while self._waiting and self._waiting[0][0] <= there:
      _end_line(self.samples)
      _write(self.samples, self._waiting.pop(0)[1])

  def close(self) -> None:
    """Puts the answers where they belong, and writes the samples that have waited for that."""
    if self._waiting:
      self.place.put()
      self._write_samples()


@contextlib.contextmanager
def files(
  out: paths.Named | None,
  samples: paths.Named | None,
  label: str,
  rows: Sequence[Mapping[str, Any]],
  settings: Mapping[str, Any],
  overwrite: bool,
) -> Iterator[Files]:
  """Opens the files for the answers to `rows`; what cannot be written or gone on with is said at once.

  Args:
    out: JSON lines file of the answers, gone on with unless `overwrite`; "-": standard output; None: none.
    samples: JSON lines file that prompts and outputs are added to, those that a killed run did not come to write
      among them; None: none.
    label: what the model is called there.
    rows: the prompts, of which the file may answer the first.
    settings: what gives the answers, noted beside the file.
    overwrite: whether answers that are there are dropped.
  """
  with contextlib.ExitStack() as stack:
    out_file, place, samples_file, kept, begin = None, None, None, [], None
    if out is not None:
      out_file, place, kept, begin = stack.enter_context(_answering(out, rows, settings, overwrite))
    if samples is not None:
      both = errors.InputError(f"--samples and --out are both {samples}: choose another file")
      if out is not None and paths.named(samples, "--samples") == paths.named(out, "--out"):
        raise both
      samples_file, _ = stack.enter_context(appending(samples, "--samples"))
      if out not in (None, "-") and os.path.samestat(os.fstat(samples_file.fileno()), os.fstat(out_file.fileno())):
        raise both
      _add_missing(samples_file, [_sample(label, row) for row in kept])
    with contextlib.closing(Files(out_file, samples_file, label, len(kept), begin, place)) as opened:
      yield opened


@contextlib.contextmanager
def _answering(
  path: paths.Named, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], overwrite: bool
) -> Iterator[tuple[BinaryIO, growing.File | None, list[dict[str, Any]], Callable[[], None] | None]]:
  """Yields as `appending` the file for the answers to `rows` ("-": standard output), those that it holds, and what
  begins it.

  Its lines must answer the first of the rows, with the settings that `_begin` noted; half a line at its end, which a
  kill leaves, counts for nothing. Until what begins it is called nothing in the file is changed.
  """
  if path == "-":
    if sys.stdout is None:
      raise errors.InputError("standard output is closed: give --out=FILE")
    sys.stdout.flush()
    yield sys.stdout.buffer, None, [], None
    return
  target = folders.claim_file(path, "--out")  # a regular one, that can be gone on with
  with contextlib.ExitStack() as stack:
    file, place = stack.enter_context(appending(path, "--out"))
    if not isinstance(target, bucket_path.BucketPath):  # where it is held already
      stack.enter_context(lock.held(lock.beside(target), f"another process is writing {path}"))
    kept, whole = [], 0
    if overwrite:
      _check_are_answers(file, target)
    elif os.fstat(file.fileno()).st_size:
      kept, whole = _kept_answers(file, target, rows)
      _check_settings(target, settings)
    copy = place if isinstance(target, bucket_path.BucketPath) else None
    yield file, copy, kept, functools.partial(_begin, file, place, target, settings, whole)


def _begin(file: BinaryIO, place: growing.File, path: paths.Path, settings: Mapping[str, Any], whole: int) -> None:
  """Cuts the file to the bytes of its whole answers; where there are none, notes beside it what will give them."""
  file.truncate(whole)  # first: settings never stand beside answers that they did not give
  if not whole:
    noted = _settings_path(path)
    if not place.put():
      raise errors.InputError(f"cannot write {path}: what was there before cannot be removed") from place.failure
    try:
      publish.write_json(noted, settings)
    except OSError as error:
      raise errors.InputError(f"cannot write {noted}: {errors.reason(error)}") from error


def _settings_path(path: paths.Path) -> paths.Path:
  return path.with_name(f"{path.name}.settings.json")


def _check_settings(path: paths.Path, settings: Mapping[str, Any]) -> None:
  """Checks that the answers that are there come from the same model and sampling as those to come."""
  try:
    noted = user_json.read(_settings_path(path))
    different = [f"another model, then at {noted['checkpoint']}"] if noted["weights"] != settings["weights"] else []
  except (errors.InputError, KeyError) as error:
    if errors.may_pass(error):
      raise
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


def _line(row: Mapping[str, Any]) -> bytes:
  return f"{json.dumps(row, ensure_ascii=False)}\n".encode()


def _sample(label: str, row: Mapping[str, Any]) -> bytes:
  return _line({"model": label, "prompt": row["prompt"], "output": row["output"]})


def _write(file: BinaryIO, lines: Iterable[bytes]) -> None:
  left = memoryview(b"".join(lines))
  while left:  # a full disk takes a part, and says so the next time
    left = left[file.write(left) :]
  file.flush()


def _check_are_answers(file: BinaryIO, path: paths.Path) -> None:
  """Raises InputError where a file of another kind would be overwritten."""
  if _settings_path(path).exists():
    return
  line = next(_lines(file), b"")
  try:
    found = user_json.parse(line, "a line") if line else {"output": ""}
  except errors.InputError:
    found = {}
  if "output" not in found:
    raise errors.InputError(f"{path} holds other things than answers, which would be lost: choose another file")


def _lines(file: BinaryIO) -> Iterator[bytes]:
  """Yields all lines of an open file, their ends included, and one that is longer than any of ours in pieces."""
  file.seek(0)
  with open(file.fileno(), "rb", closefd=False) as reader:
    yield from iter(functools.partial(reader.readline, _LONGEST_LINE), b"")


def _kept_answers(
  file: BinaryIO, path: paths.Path, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], int]:
  """Returns the answers that the file holds and their bytes: all of it, but for half an answer at its end.

  Raises:
    errors.InputError: when it holds anything else.
  """
  kept: list[dict[str, Any]] = []
  whole = 0
  for line in _lines(file):
    row = rows[len(kept)] if len(kept) < len(rows) else None
    if row is not None and not line.endswith(b"\n") and _begins_answer(line, row):
      break
    if row is None or not line.endswith(b"\n") or (answer := _answer(line, row)) is None:
      number = len(kept) + 1
      raise errors.InputError(f"{path}: line {number} is no answer to prompt {number} of this run: {_OTHER}")
    kept.append(answer)
    whole += len(line)
  return kept, whole


def _begins_answer(part: bytes, row: Mapping[str, Any]) -> bool:
  """Tells whether a kill may have left this part of a line that answers the row."""
  own = _line(row).removesuffix(b"}\n")
  return len(part) < _LONGEST_LINE and (own.startswith(part) or part.startswith(own))


def _answer(line: bytes, row: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns what a line holds where that is an answer beside the very fields of the row."""
  try:
    found = user_json.parse(line, "a line")
  except errors.InputError:
    return None
  own = {name: value for name, value in found.items() if name not in inputs.GENERATED}
  answers = "output" in found and json.dumps(own, sort_keys=True) == json.dumps(dict(row), sort_keys=True)
  return found if answers else None


def _add_missing(samples: BinaryIO, lines: Sequence[bytes]) -> None:
  """Adds those of the lines that the file lacks, as the run was killed before it wrote them; half of one is completed.

  What is no regular file keeps nothing that could be looked at: to that nothing is added.
  """
  if not lines or not _is_regular(samples):
    return
  missing, last = collections.Counter(lines), b""
  for last in _lines(samples):
    if missing[last]:
      missing[last] -= 1
  left = list(missing.elements())
  half = next((line for line in left if not last.endswith(b"\n") and last and line.startswith(last)), None)
  if half is not None:
    left.remove(half)
    _write(samples, [half[len(last) :]])
  if left:
    _end_line(samples)
    _write(samples, left)


def _end_line(file: BinaryIO) -> None:
  """Ends the last line of a regular file where a kill or an editor left it without an end."""
  if _is_regular(file) and (size := file.seek(0, os.SEEK_END)):
    file.seek(size - 1)
    if file.read(1) != b"\n":
      _write(file, [b"\n"])


def _is_regular(file: BinaryIO) -> bool:
  return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
