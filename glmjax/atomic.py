"""Files that appear whole or not at all, whenever the process or the machine dies."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
from typing import Any, BinaryIO


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """A file that takes its name once all of it is on the disk; where that fails, what was there stays."""
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
