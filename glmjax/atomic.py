"""Files that appear whole or not at all, whenever the process or the machine dies."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import re
from typing import Any, BinaryIO


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """A file that takes its name once all of it is on the disk; where that fails, what was there stays."""
  path = pathlib.Path(path)
  _sweep(path)
  temporary = path.with_name(f".{path.name}.{_here()}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise
  sync(path.parent)


def _here() -> str:
  """The machine's name, as a part of a file name."""
  return re.sub("[^A-Za-z0-9_-]", "-", os.uname().nodename) or "-"


def _sweep(path: pathlib.Path) -> None:
  """Removes what killed writers of this file have left; whether those of other machines live cannot be known."""
  ours = re.compile(re.escape(f".{path.name}.{_here()}.") + r"(\d+)\.tmp")
  with contextlib.suppress(OSError):
    left = [name for name in os.listdir(path.parent) if (match := ours.fullmatch(name)) and not _lives(int(match[1]))]
    for name in left:
      (path.parent / name).unlink(missing_ok=True)


def _lives(process: int) -> bool:
  try:
    os.kill(process, 0)  # sends nothing
  except (ProcessLookupError, OverflowError):
    return False
  except OSError:  # another user's
    pass
  return True


def write_text(path: str | os.PathLike, text: str) -> None:
  """UTF-8."""
  with writing(path) as file:
    file.write(text.encode())


def write_json(path: str | os.PathLike, content: Any) -> None:
  """Indented, Chinese as it is."""
  write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync(path: str | os.PathLike) -> None:
  """Makes a file's content or a folder's entries survive a power cut."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
