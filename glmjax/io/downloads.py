"""What a failed download leaves in a file's place, told by its first bytes wherever a file of others is opened."""

import re

from glmjax import errors

HEAD = 512  # bytes to look at
_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_SIZE = re.compile(rb"\nsize (\d{1,18})\n")
_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error", b"<!--")
_ANSWERS = (
  b"entry not found",
  b"repository not found",
  b"not found",
  b"404",
  b"invalid username or password",
  b"access to model",
  b"access denied",
  b"forbidden",
)  # what servers say in a line of plain text


def check(start: bytes, where: str) -> None:
  """Raises InputError where a file whose first HEAD bytes these are is a Git LFS pointer or a server's answer."""
  start = bytes(start[:HEAD])
  check_pointer(start, where)
  text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
  if text.startswith(_PAGE):
    raise errors.InputError(
      f"{where} is a web page, not the file itself: download it again (its address answered "
      "with an error or a log-in page)"
    )
  if text.startswith(_ANSWERS):
    said = start.decode("utf-8", "replace").splitlines()[0][:60]
    raise errors.InputError(f"{where} holds a server's answer ({said!r}), not the file itself: download it again")


def check_pointer(start: bytes, where: str) -> None:
  """Raises InputError for a Git LFS pointer alone: for files of text, which may well be web pages."""
  start = bytes(start[:HEAD])
  if start.startswith(_POINTERS):
    match = _SIZE.search(start)
    size = f" to {int(match[1]):,} bytes" if match else ""
    raise errors.InputError(f"{where} is a Git LFS pointer{size}, not the file itself: fetch it with git lfs pull")
