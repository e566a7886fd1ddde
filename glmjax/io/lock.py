"""Locks between processes and machines: a lock file that names its holder; in buckets as lease.py has it.

A file, opened for writing, because NFS gives flock to such files and not to folders. The kernel frees the lock of a
process that dies; the file is removed by who releases it.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
import pathlib

from glmjax import errors
from glmjax.io import bucket_path
from glmjax.io import lease
from glmjax.io import owner
from glmjax.io import paths

# What flock says on file systems without locks (buckets, some network file systems): nothing can be held there.
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def held(path: str | paths.Path, taken: str) -> Iterator[None]:
  """Holds the lock file at `path`, in a folder that is there.

  Args:
    path: of the lock file.
    taken: begins the error of who comes second, as "runs/mine is in use: another process trains there". The holder
      and the advice to wait, or to choose another, follow.

  Raises:
    errors.InputError: when another process holds it, or the file cannot be written.
  """
  if isinstance(path, bucket_path.BucketPath):
    with lease.held(path, taken):
      yield
    return
  path = pathlib.Path(path)
  try:
    descriptor = _acquire(path, taken)
  except OSError as error:
    raise errors.InputError(f"cannot lock {path}: {errors.reason(error)}") from error
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      path.unlink()  # while it is held, so that it is ours
    os.close(descriptor)


def beside(path: paths.Path) -> paths.Path:
  """Returns the lock file for a file or folder that will be replaced: beside it."""
  return path.with_name(f".{path.name}.lock")


def _acquire(path: pathlib.Path, taken: str) -> int:
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if _is_at(descriptor, path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner.here()).encode(), 0)
        return descriptor
    except BlockingIOError:
      holder = _holder(descriptor)
      os.close(descriptor)
      raise errors.InputError(f"{taken}{holder}: wait for it, or choose another") from None
    except OSError as error:
      if error.errno in _NO_LOCKS:
        return descriptor
      os.close(descriptor)
      raise
    os.close(descriptor)  # its last holder has removed it meanwhile


def _is_at(descriptor: int, path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
  except FileNotFoundError:
    return False


def _holder(descriptor: int) -> str:
  try:
    holder = json.loads(os.pread(descriptor, 1000, 0))
    return f" (process {holder['process']} on {holder['host']})"
  except (OSError, ValueError, KeyError, TypeError):
    return ""
