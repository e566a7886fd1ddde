"""Files and folders that appear whole or not at all, whenever the process or the machine dies.

What is not finished has a hidden name that tells whose it is: .NAME.HOST.PID.tmp; a folder that is being replaced
is .NAME.HOST.PID.old for the instant between two renames. What a killed process has left is removed by the next
writer of the same name on the same machine: whether processes of other machines live cannot be known.
"""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import re
import shutil
from typing import Any, BinaryIO

from glmjax import errors

_UNFINISHED, _REPLACED = "tmp", "old"


@contextlib.contextmanager
def file(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """Yields a file that takes its name once all of it is on the disk; where that fails, what was there stays.

  A link's target is written.

  Raises:
    errors.InputError: at once, when something is there that is no regular file.
  """
  path = pathlib.Path(os.path.realpath(path))
  if path.exists() and not path.is_file():
    raise errors.InputError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'no regular file'}")
  sweep(path)
  temporary = _temporary(path, _UNFINISHED)
  try:
    with open(temporary, "wb") as stream:
      yield stream
      stream.flush()
      os.fsync(stream.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise
  sync(path.parent)


@contextlib.contextmanager
def folder(path: str | os.PathLike, overwrite: bool = False) -> Iterator[pathlib.Path]:
  """Yields an empty folder that takes its name once the block ends; where that fails, what was there stays.

  Whoever may write the same name at the same time is kept out by a lock (io/lock.py), not here.

  Args:
    path: the name.
    overwrite: replace the folder that is there.

  Raises:
    errors.InputError: at the end, when a folder that may not be replaced has come to be there.
  """
  path = pathlib.Path(os.path.realpath(path))
  put_back(path)
  sweep(path)
  temporary = _temporary(path, _UNFINISHED)
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    temporary.mkdir(parents=True)
    yield temporary
    put_in_place(temporary, path, overwrite)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: pathlib.Path, path: pathlib.Path, overwrite: bool = False) -> None:
  """Renames a finished folder to `path`, in the same folder or below it; the old one leaves by a rename, too.

  Raises:
    errors.InputError: when a folder with content is there and is not to be replaced.
  """
  sync_tree(temporary)
  old = _temporary(path, _REPLACED)
  replaces = overwrite and path.exists()
  if replaces:
    path.rename(old)
  try:
    temporary.rename(path)  # refuses where a folder with content is
  except OSError as error:
    if replaces and not os.path.lexists(path):
      old.rename(path)
    elif os.path.lexists(path):
      raise errors.InputError(f"{path} has come to be there meanwhile: choose another folder") from error
    raise
  sync(path.parent)
  shutil.rmtree(old, ignore_errors=True)


def interrupted(path: pathlib.Path) -> pathlib.Path | None:
  """Returns what stood at `path`, where a process was killed between the two renames of a replacement."""
  path = pathlib.Path(os.path.realpath(path))
  if os.path.lexists(path):
    return None
  return next(iter(_left_over(path, _REPLACED, everywhere=True)), None)


def put_back(path: pathlib.Path) -> None:
  """Undoes a replacement that was killed half-way; for writers, who hold the name's lock."""
  if not os.path.lexists(path):
    for old in _left_over(path, _REPLACED):
      old.rename(path)
      return


def left_elsewhere(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns what writers of this name on other machines have left, or are at work on."""
  return [
    left
    for suffix in (_UNFINISHED, _REPLACED)
    for left in _left_over(path, suffix, everywhere=True)
    if left not in _left_over(path, suffix)
  ]


@contextlib.contextmanager
def parent(path: pathlib.Path) -> Iterator[None]:
  """Makes the folder that `path` will be in; where the block fails, what was made for it and is empty goes again.

  Raises:
    errors.InputError: when it cannot be made.
  """
  missing = [above for above in path.parents if not above.exists()]
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.InputError(f"{path} cannot be made: {errors.reason(error)}; choose another place") from error
  try:
    yield
  except BaseException:
    for above in missing:
      with contextlib.suppress(OSError):
        above.rmdir()
    raise


def sweep(path: pathlib.Path) -> None:
  """Removes what killed writers of this name have left."""
  for left in [*_left_over(path, _UNFINISHED), *(_left_over(path, _REPLACED) if os.path.lexists(path) else ())]:
    remove(left)


def remove(path: pathlib.Path) -> None:
  """Deletes a file, a link, or a folder with all that is in it, as far as the system lets us."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    with contextlib.suppress(OSError):
      path.unlink()


def is_unfinished(name: str) -> bool:
  """Tells whether a file or folder of that name is one that was never finished, whoever began it."""
  return re.fullmatch(rf"\..+\.\d+\.({_UNFINISHED}|{_REPLACED})", name) is not None


def _temporary(path: pathlib.Path, suffix: str) -> pathlib.Path:
  return path.with_name(f".{path.name}.{host()}.{os.getpid()}.{suffix}")


def _left_over(path: pathlib.Path, suffix: str, everywhere: bool = False) -> list[pathlib.Path]:
  """Returns what writers of this name whose processes are gone have left; `everywhere`: other machines' as well."""
  name = re.compile(rf"\.{re.escape(path.name)}\.(?:([A-Za-z0-9_-]+)\.)?(\d+)\.{suffix}")
  try:
    matches = [match for entry in os.listdir(path.parent) if (match := name.fullmatch(entry))]
  except OSError:
    return []
  gone = [
    match for match in matches if match[1] == host() and not _lives(int(match[2])) or everywhere and match[1] != host()
  ]
  return [path.with_name(match[0]) for match in gone]


def host() -> str:
  """Returns the machine's name, as a part of a file name."""
  return re.sub("[^A-Za-z0-9_-]", "-", os.uname().nodename) or "-"


def _lives(process: int) -> bool:
  """Tells whether another process may be at work; in a container the one that was killed often had our own number."""
  if process == os.getpid():
    return False
  try:
    os.kill(process, 0)  # sends nothing
  except (ProcessLookupError, OverflowError):
    return False
  except OSError:  # another user's
    pass
  return True


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a UTF-8 file, whole or not at all."""
  with file(path) as stream:
    stream.write(text.encode())


def write_json(path: str | os.PathLike, content: Any) -> None:
  """Writes indented JSON, Chinese as it is, whole or not at all."""
  write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync(path: str | os.PathLike) -> None:
  """Makes a file's content or a folder's entries survive a power cut."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sync_tree(path: pathlib.Path) -> None:
  """Makes all files and folders below a folder survive a power cut."""
  for parent, _, files in os.walk(path):
    for name in files:
      sync(os.path.join(parent, name))
    sync(parent)
