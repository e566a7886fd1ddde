"""Files of checkpoints and exports: what is damaged, and what the system refuses, told apart.

Damaged is a file that is not what was written: missing, a folder, a pipe, of another size or content. A refusal (no
permission, no more open files, no memory, a network file system that answers with errors) says nothing about the
file: no step is passed over, set aside or deleted for it.
"""

from collections.abc import Iterable, Iterator
import contextlib
import errno
import json
import os
import pathlib
import re
import stat
from typing import Any, NoReturn

from glmjax import errors
from glmjax.io import bucket_path
from glmjax.io import paths

LARGEST = 1 << 28  # bytes of a file that is read whole: descriptions, records, tokenizers

_LARGEST_READ = 1 << 30  # bytes that one call asks for; the system gives less than 2 GiB
_MISSING = (errno.ENOENT, errno.ENOTDIR)
_NOT_REGULAR = (errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV)
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
# What the user mends; anything else, as a disk's errors, may be gone at the next try.
_MENDABLE = (
  errno.EACCES,
  errno.EPERM,
  errno.EMFILE,
  errno.ENFILE,
  errno.ENOMEM,
  errno.EROFS,
  errno.ENOSPC,
  errno.EDQUOT,
)


class DamagedError(Exception):
  """What was read is not what was written; the message names arrays and files in one line."""


@contextlib.contextmanager
def _opened(path: pathlib.Path, shown: str) -> Iterator[tuple[int, int]]:
  """Yields the descriptor of a regular file, and its bytes. Nothing else is waited for: a pipe would never answer."""
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  try:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
      raise DamagedError(f"{shown} is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}")
    yield descriptor, found.st_size
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def _refusals(path: paths.Path, shown: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise_refusal(error, path, shown)
  except MemoryError as error:
    raise _out_of_memory(error, path) from error


def fill(path: paths.Path, shown: str, buffer: memoryview, offset: int) -> None:
  """Fills a buffer with a file's bytes from `offset` on.

  Args:
    path: of the file.
    shown: its name in the error of a damaged one.
    buffer: bytes.
    offset: place in the file.

  Raises:
    DamagedError: when it is missing, no regular file, or ends before.
    errors.InputError, OSError: when the system refuses.
  """
  with _refusals(path, shown):
    if isinstance(path, bucket_path.BucketPath):
      left = len(buffer) - path.read_into(buffer, offset)
    else:
      left = len(buffer)
      with _opened(path, shown) as (descriptor, _):
        while left and (count := os.preadv(descriptor, [buffer[-left:][:_LARGEST_READ]], offset)):
          left, offset = left - count, offset + count
    if left:
      raise DamagedError(f"{shown} has become shorter while it was read")


def read(path: paths.Path, shown: str, largest: int = LARGEST) -> bytes:
  """Returns a file's bytes.

  Raises:
    DamagedError: when it is missing, no regular file, or has more than `largest` bytes.
    errors.InputError, OSError: when the system refuses.
  """
  with _refusals(path, shown):
    if isinstance(path, bucket_path.BucketPath):
      data = path.read_range(0, largest + 1)
      size = len(data)
    else:
      with _opened(path, shown) as (descriptor, size):
        with open(descriptor, "rb", closefd=False) as stream:
          data = stream.read(size) if size <= largest else b""
    if size > largest:
      raise DamagedError(f"{shown} has {size:,} bytes, where {largest:,} at most are expected")
    return data


def read_json(path: paths.Path, shown: str, largest: int = LARGEST) -> dict[str, Any]:
  """Returns the object in a file that glmjax or Orbax wrote.

  Raises:
    DamagedError: also when it is no JSON object.
  """
  text = read(path, shown, largest)
  try:
    content = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise DamagedError(f"{shown} is damaged: {errors.one_line(error)}") from error
  if not isinstance(content, dict):
    raise DamagedError(f"{shown} is damaged: no JSON object")
  return content


def size_problems(folder: paths.Path, shown: str, names: Iterable[str], size: int) -> Iterator[str]:
  """Says what is wrong with files that must have `size` bytes, from what their folder knows of them.

  Args:
    folder: where they are.
    shown: its name in what is said.
    names: of the files.
    size: of each.

  Raises:
    errors.InputError, OSError: when the system refuses.
  """
  if isinstance(folder, bucket_path.BucketPath):
    with _refusals(folder, shown):
      there = {path.name: found for path, found in folder.sizes().items()}  # one request for all
    for name in names:
      if there.get(name) != size:
        yield (
          f"{shown}/{name} has {there[name]} bytes instead of {size}" if name in there else f"{shown}/{name} is missing"
        )
    return
  for name in names:
    if problem := _size_problem(folder / name, f"{shown}/{name}", size):
      yield problem


def _size_problem(path: pathlib.Path, shown: str, size: int) -> str | None:
  try:
    found = os.stat(path)
  except OSError as error:
    try:
      raise_refusal(error, path, shown)
    except DamagedError as damage:
      return str(damage)
  if not stat.S_ISREG(found.st_mode):
    return f"{shown} is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}"
  return None if found.st_size == size else f"{shown} has {found.st_size} bytes instead of {size}"


def raise_refusal(error: OSError, path: paths.Path, shown: str) -> NoReturn:
  """Raises what an OSError of reading `path` means.

  Raises:
    DamagedError: the file is not there, or is no file.
    errors.InputError: the system refuses, and the user can mend it.
    OSError: the disk or the network fails; it may be gone at the next try.
  """
  if error.errno in _MISSING:
    raise DamagedError(f"{shown} is missing") from error
  if error.errno in _NOT_REGULAR:
    raise DamagedError(f"{shown} is no regular file") from error
  if error.errno in _MENDABLE:
    raise errors.InputError(f"cannot read {path}: {errors.reason(error)}") from error
  raise OSError(error.errno, errors.reason(error), str(path)) from error


def refusal(error: BaseException) -> OSError | MemoryError | None:
  """Says what the system refused, where an error of Python, XLA, TensorStore or Orbax tells of that."""
  text = str(error)
  if isinstance(error, OSError | MemoryError):
    return error
  if code := re.search(r"os_error_code='(\d+)'|OS error (\d+)", text):
    number = int(code[1] or code[2])
    return OSError(number, os.strerror(number))
  if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in text or "bad_alloc" in text:
    return MemoryError(errors.one_line(error))
  return None


@contextlib.contextmanager
def enough_memory(what: str | os.PathLike) -> Iterator[None]:
  """Makes too little memory within it, the host's or a device's, an InputError about reading `what`."""
  try:
    yield
  except (MemoryError, RuntimeError) as error:  # XLA's is a RuntimeError
    if not isinstance(refusal(error), MemoryError):
      raise
    raise _out_of_memory(error, what) from error


def _out_of_memory(error: BaseException, what: str | os.PathLike) -> errors.InputError:
  detail = errors.one_line(error)
  detail = f" ({detail})" if detail != type(error).__name__ else ""
  return errors.InputError(
    f"not enough memory to read {what}{detail}: end other programs, raise the memory limit, or "
    "use more devices or a smaller model"
  )
