"""Files of checkpoints and exports: what is damaged, and what the system refuses, told apart.

Damaged is a file that is not what was written: missing, a folder, a pipe, of another size or content. A refusal (no
permission, no more open files, no memory, a network file system that answers with errors) says nothing about the
file: no step is passed over, set aside or deleted for it.
"""

from collections.abc import Iterator
import contextlib
import errno
import json
import os
import pathlib
import re
import stat
from typing import Any, NoReturn

from glmjax import errors

LARGEST = 1 << 28  # bytes of a file that is read whole: descriptions, records, tokenizers

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
def opened(path: pathlib.Path, shown: str) -> Iterator[tuple[int, int]]:
  """Yields the descriptor of a regular file, and its bytes. Nothing else is waited for: a pipe would never answer.

  Args:
    path: of the file.
    shown: its name in the error of a damaged one.

  Raises:
    DamagedError: when it is missing or no regular file.
    errors.InputError, OSError: when the system refuses, also within the block.
  """
  try:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
      found = os.fstat(descriptor)
      if not stat.S_ISREG(found.st_mode):
        raise DamagedError(f"{shown} is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}")
      yield descriptor, found.st_size
    finally:
      os.close(descriptor)
  except OSError as error:
    raise_refusal(error, path, shown)
  except MemoryError as error:
    raise _out_of_memory(error, path) from error


def read(path: pathlib.Path, shown: str, largest: int = LARGEST) -> bytes:
  """Returns a file's bytes.

  Raises:
    DamagedError: also when it has more than `largest` bytes.
  """
  with opened(path, shown) as (descriptor, size):
    if size > largest:
      raise DamagedError(f"{shown} has {size:,} bytes, where {largest:,} at most are expected")
    with open(descriptor, "rb", closefd=False) as stream:
      return stream.read(size)


def read_json(path: pathlib.Path, shown: str, largest: int = LARGEST) -> dict[str, Any]:
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


def size_problem(path: str | os.PathLike, shown: str, size: int) -> str | None:
  """Says what is wrong with a file that must have `size` bytes, from what its folder knows of it; None: nothing.

  Raises:
    errors.InputError, OSError: when the system refuses.
  """
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


def raise_refusal(error: OSError, path: str | os.PathLike, shown: str) -> NoReturn:
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
