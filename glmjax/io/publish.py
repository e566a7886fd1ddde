"""Files and folders that appear whole or not at all, whenever the process or the machine dies.

On a disk what is not finished has a hidden name that tells whose it is: .NAME.HOST.PID.tmp; a folder that is being
replaced is .NAME.HOST.PID.old for the instant between two renames. What a killed process has left is removed by the
next writer of the same name on the same machine: whether processes of other machines live cannot be known.

In a bucket nothing can be renamed. An object is there whole or not at all, and a folder is whole once its last file is
there, by which its readers know it (checksums.json of an export, say), and which is written only where there is none;
until then `.unfinished` in it says so. A folder that is replaced is deleted first.
"""

from collections.abc import Iterator
import contextlib
import json
import math
import os
import pathlib
import re
import shutil
from typing import Any, BinaryIO
import uuid

from glmjax import errors
from glmjax.io import bucket
from glmjax.io import bucket_path
from glmjax.io import lease
from glmjax.io import owner
from glmjax.io import paths

_UNFINISHED, _REPLACED = "tmp", "old"
IN_WORK = ".unfinished"  # a note in a folder that is written where it will be, or gone on with


@contextlib.contextmanager
def file(path: str | paths.Path) -> Iterator[BinaryIO]:
  """Yields a file that takes its name once all of it is on the disk; where that fails, what was there stays.

  A link's target is written.

  Raises:
    errors.InputError: at once, when something is there that is no regular file.
  """
  if isinstance(path, bucket_path.BucketPath):
    with path.open("wb") as stream:
      yield stream
    return
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
def folder(path: str | paths.Path, last: str | None = None, overwrite: bool = False) -> Iterator[paths.Path]:
  """Yields an empty folder that takes its name once the block ends; where that fails, what was there stays.

  In a bucket it is the folder itself, and what was there is deleted first. Whoever may write the same name
  at the same time is kept out by a lock (io/lock.py), not here.

  Args:
    path: the name.
    last: the file that the block writes last, with `finish`, by which readers know a whole folder; None: in a bucket
      they must ask `in_work`.
    overwrite: replace the folder that is there.

  Raises:
    errors.InputError: at the end, when a folder that may not be replaced has come to be there.
  """
  if isinstance(path, bucket_path.BucketPath):
    with _folder_in_bucket(path, last, overwrite):
      yield path
    return
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


@contextlib.contextmanager
def _folder_in_bucket(path: bucket_path.BucketPath, last: str | None, overwrite: bool) -> Iterator[None]:
  sweep(path)
  if not overwrite and path.is_dir():
    raise errors.InputError(f"{path} has come to be there meanwhile: choose another folder")
  token = restart(path, last)
  try:
    yield
  except BaseException:
    with bucket.ending(), contextlib.suppress(OSError, errors.InputError):
      lease.check()
      if begun(path).get("token") == token and in_work(path):  # it may be another's by now, or whole
        _clear(path)
    raise
  if last is None:
    lease.check()
  end(path)


def restart(path: paths.Path, last: str | None, **more: Any) -> str:
  """Empties a folder that is to be written, and notes so as `begin`; returns what tells this note from others.

  What a kill in between leaves in a bucket has the note, by which the next writer knows it.
  """
  if isinstance(path, bucket_path.BucketPath):
    token = begin(path, last, **more)
    if last is not None:  # first: what is half deleted never passes for whole
      (path / last).unlink()
    _delete_all_but_note(path)
    return token
  remove(path)
  path.mkdir(parents=True, exist_ok=True)
  return begin(path, last, **more)


def _clear(path: bucket_path.BucketPath) -> None:
  _delete_all_but_note(path)
  end(path)


def _delete_all_but_note(path: bucket_path.BucketPath) -> None:
  note = (path / IN_WORK).key
  path.bucket.delete([found.key for found in path.bucket.below(path.key) if found.key != note])


def begin(path: paths.Path, last: str | None, **more: Any) -> str:
  """Notes in a folder that it is unfinished until the file `last` is in it; what is there may be gone on with.

  `more` is noted besides, for `begun`: by what plan it is written, say. Returns what tells this note from others.
  """
  token = uuid.uuid4().hex
  write_json(path / IN_WORK, owner.here() | {"last": last, "token": token} | more)
  return token


def begun(path: paths.Path) -> dict[str, Any]:
  """Returns what `begin` noted of a folder; {} where there is no such note."""
  try:
    note = json.loads((path / IN_WORK).read_bytes())
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return {}
  return note if isinstance(note, dict) else {}


def end(path: paths.Path) -> None:
  """Removes the note of `begin`."""
  (path / IN_WORK).unlink()


def in_work(path: paths.Path) -> bool:
  """Tells whether a folder in a bucket was begun by a writer that did not come to its end, or has not yet."""
  if not isinstance(path, bucket_path.BucketPath):
    return False
  try:
    last = json.loads((path / IN_WORK).read_bytes())["last"]
  except FileNotFoundError:
    return False
  except (ValueError, KeyError, TypeError):
    return True
  return last is None or not (path / last).is_file()


def finish(path: paths.Path, content: Any) -> None:
  """Writes the JSON file that makes its folder whole; in a bucket only where there is none, and no lock was lost.

  Raises:
    errors.InputError: when another writer was faster.
  """
  if not isinstance(path, bucket_path.BucketPath):
    write_json(path, content)
    return
  lease.check()
  if path.bucket.create(path.key, _as_json(content)) is None:
    raise errors.InputError(f"{path} was written by another process meanwhile: choose another folder")


def replace_json(path: paths.Path, content: Any, version: bucket.Version) -> None:
  """Writes a JSON file in place of another; in a bucket only of the one that `version` tells, and no lock was lost.

  Raises:
    errors.InputError: when it is there no more.
  """
  if not isinstance(path, bucket_path.BucketPath):
    write_json(path, content)
    return
  lease.check()
  if path.bucket.replace(path.key, _as_json(content), version) is None:
    raise errors.InputError(f"{path} was changed by another process meanwhile: try again")


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


def interrupted(path: paths.Path) -> pathlib.Path | None:
  """Returns what stood at `path`, where a process was killed between the two renames of a replacement."""
  if isinstance(path, bucket_path.BucketPath):
    return None
  path = pathlib.Path(os.path.realpath(path))
  if os.path.lexists(path):
    return None
  return next(iter(_left_over(path, _REPLACED, everywhere=True)), None)


def put_back(path: paths.Path) -> None:
  """Undoes a replacement that was killed half-way; for writers, who hold the name's lock."""
  if isinstance(path, pathlib.Path) and not os.path.lexists(path):
    for old in _left_over(path, _REPLACED):
      old.rename(path)
      return


def left_elsewhere(path: paths.Path) -> list[pathlib.Path]:
  """Returns what writers of this name on other machines have left, or are at work on."""
  if isinstance(path, bucket_path.BucketPath):
    return []
  return [
    left
    for suffix in (_UNFINISHED, _REPLACED)
    for left in _left_over(path, suffix, everywhere=True)
    if left not in _left_over(path, suffix)
  ]


@contextlib.contextmanager
def parent(path: paths.Path) -> Iterator[None]:
  """Makes the folder that `path` will be in; where the block fails, what was made for it and is empty goes again.

  Raises:
    errors.InputError: when it cannot be made.
  """
  if isinstance(path, bucket_path.BucketPath):
    yield
    return
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


def sweep(path: paths.Path) -> None:
  """Removes what killed writers of this name have left."""
  if isinstance(path, bucket_path.BucketPath):
    if in_work(path):
      _clear(path)
    return
  for left in [*_left_over(path, _UNFINISHED), *(_left_over(path, _REPLACED) if os.path.lexists(path) else ())]:
    remove(left)


def remove(path: paths.Path) -> None:
  """Deletes a file, a link, or a folder with all that is in it, as far as the system lets us."""
  if isinstance(path, bucket_path.BucketPath):
    with contextlib.suppress(OSError):
      path.remove_tree()
  elif path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    with contextlib.suppress(OSError):
      path.unlink()


def is_unfinished(name: str) -> bool:
  """Tells whether a file or folder of that name is one that was never finished, whoever began it."""
  return name == IN_WORK or re.fullmatch(rf"\..+\.\d+\.({_UNFINISHED}|{_REPLACED})", name) is not None


def _temporary(path: pathlib.Path, suffix: str) -> pathlib.Path:
  return path.with_name(f".{path.name}.{owner.host()}.{os.getpid()}.{suffix}")


def _left_over(path: pathlib.Path, suffix: str, everywhere: bool = False) -> list[pathlib.Path]:
  """Returns what writers of this name whose processes are gone have left; `everywhere`: other machines' as well."""
  name = re.compile(rf"\.{re.escape(path.name)}\.(?:([A-Za-z0-9_-]+)\.)?(\d+)\.{suffix}")
  try:
    matches = [match for entry in os.listdir(path.parent) if (match := name.fullmatch(entry))]
  except OSError:
    return []
  here = owner.host()
  gone = [match for match in matches if (everywhere if match[1] != here else not owner.lives(int(match[2])))]
  return [path.with_name(match[0]) for match in gone]


def write_text(path: str | paths.Path, text: str) -> None:
  """Writes a UTF-8 file, whole or not at all."""
  with file(path) as stream:
    stream.write(text.encode())


def write_json(path: str | paths.Path, content: Any) -> None:
  """Writes indented JSON, Chinese as it is, whole or not at all."""
  write_text(path, _as_json(content).decode())


def finite(value: Any) -> Any:
  """Returns a JSON value with null in place of each number that is not finite: JSON has none for these."""
  if isinstance(value, dict):
    return {name: finite(each) for name, each in value.items()}
  if isinstance(value, (list, tuple)):
    return [finite(each) for each in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_json(content: Any) -> bytes:
  return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


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
