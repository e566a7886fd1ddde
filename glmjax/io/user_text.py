"""The one door for text files that users wrote: UTF-8, line by line, in bounded memory."""

import codecs
from collections.abc import Iterator
import functools
import io
from typing import BinaryIO

from glmjax import errors
from glmjax.io import downloads
from glmjax.io import paths

LONGEST = 1 << 30  # characters of a line: of a corpus, say; they are in memory
_BLOCK = 1 << 20


def lines(path: paths.Named, longest: int = LONGEST) -> Iterator[tuple[int, str]]:
  """Yields (line number from 1, line without its end); LF, CR LF and CR end a line.

  One line at a time is in memory. A byte order mark is passed over.

  Raises:
    errors.InputError: naming byte and line where the file is not UTF-8 text; for a line of more than `longest`
      characters; when it cannot be read.
  """
  path = paths.named(path)
  check_regular(path)
  try:
    with path.open("rb") as stream:
      yield from _lines(stream, str(path), longest)
  except UnicodeDecodeError:
    raise errors.InputError(_not_utf8(path)) from None
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {errors.reason(error)}") from error


def lines_of(stream: BinaryIO, where: str, longest: int = LONGEST) -> Iterator[tuple[int, str]]:
  """Yields as `lines` from a pipe or standard input, which `where` names; the stream stays open.

  Raises:
    errors.InputError: as `lines`.
  """
  number = 0
  try:
    for number, line in _lines(stream, where, longest):
      yield number, line
  except UnicodeDecodeError:
    raise errors.InputError(f"{where}: not UTF-8 behind line {number}; convert it, say with iconv -t UTF-8") from None
  except OSError as error:
    raise errors.InputError(f"cannot read {where}: {errors.reason(error)}") from error


def _lines(stream: BinaryIO, where: str, longest: int) -> Iterator[tuple[int, str]]:
  text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline=None)  # None: all three line ends
  try:
    for number, line in enumerate(iter(functools.partial(text.readline, longest + 1), ""), 1):
      if len(line) > longest and not line.endswith("\n"):
        raise errors.InputError(f"{where}: line {number} has more than {longest:,} characters: cut it, or leave it out")
      if number == 1:
        downloads.check_pointer(line[: downloads.HEAD].encode(), where)
      if "\0" in line:
        raise errors.InputError(
          f"{where}: line {number} holds NUL characters: no text, or UTF-16; convert it, say "
          "with iconv -f UTF-16 -t UTF-8"
        )
      yield number, line.removesuffix("\n")
  finally:
    text.detach()


def read(path: paths.Named, largest: int = 1 << 24) -> str:
  """Returns a text file of at most `largest` bytes, its line ends as LF.

  Raises:
    errors.InputError: as `lines`, and when it is larger.
  """
  path = paths.named(path)
  check_regular(path)
  if (size := path.stat().st_size) > largest:
    raise errors.InputError(
      f"{path} has {size:,} bytes, where {largest:,} at most are expected: no such file as is wanted here"
    )
  return "".join(f"{line}\n" for _, line in lines(path))


def check_regular(path: paths.Path) -> None:
  """Raises InputError unless `path` is a file: a folder cannot be read, and a FIFO would wait for ever."""
  try:
    if path.is_file():
      return
    reason = "it is no regular file" if path.exists() else "it does not exist"
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {errors.reason(error)}") from error
  raise errors.InputError(f"cannot read {path}: {reason}")


def _not_utf8(path: paths.Path) -> str:
  """Says where, by a second reading: text mode counts from the beginning of its buffer."""
  decoder = codecs.getincrementaldecoder("utf-8")()
  read, line = 0, 1
  with path.open("rb") as stream:
    while block := stream.read(_BLOCK):
      if not read and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"{path}: UTF-16, not UTF-8; convert it, say with iconv -f UTF-16 -t UTF-8"
      read += len(block)
      try:
        decoder.decode(block)
      except UnicodeDecodeError as error:
        before = error.object[: error.start]
        byte = read - len(error.object) + error.start
        return (
          f"{path}: not UTF-8 at byte {byte} (line {line + _line_ends(before)}); convert it, say with iconv -t UTF-8"
        )
      line += _line_ends(block)
  return f"{path}: not UTF-8: it ends within a character; convert it, say with iconv -t UTF-8"


def _line_ends(block: bytes) -> int:
  return block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
