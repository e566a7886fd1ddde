"""The one door for paths that users name: in flags, in gin files, in calls of the library; and glmjax's own folders."""

import os
import pathlib
import re

from glmjax import errors

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{1,2}")
_LONGEST_NAME = 255  # bytes of one part of a path (Linux, NAME_MAX)


def local(path: str | os.PathLike, what: str = "the path") -> pathlib.Path:
  """Returns the path with ~ expanded. Nothing is looked at on disk.

  Args:
    path: as the user wrote it.
    what: names it in the error, as "--workdir".

  Raises:
    errors.InputError: when it is empty, a URL, or cannot be a path.
  """
  try:
    text = os.fspath(path)
  except TypeError:
    raise errors.InputError(f"{what} is {path!r}: give a path") from None
  if not isinstance(text, str):
    raise errors.InputError(f"{what} is {text!r}: give a path as text")
  if not text.strip():
    raise errors.InputError(f"{what} is empty: give a path")
  if match := _URL.match(text):
    raise errors.InputError(
      f"{what} is {text}: glmjax reads and writes local paths only; mount the bucket (gcsfuse, "
      f"s3fs) or copy from {match[0].rstrip('/')}// first"
    )
  if "\0" in text:
    raise errors.InputError(f"{what} is {text!r}: a path cannot hold a NUL character")
  try:
    encoded = os.fsencode(text)
  except UnicodeEncodeError as error:
    if "\ud800" <= text[error.start] <= "\udfff":
      raise errors.InputError(f"{what} is {text!r}: a path cannot hold half a surrogate pair") from None
    raise errors.InputError(
      f"{what} is {text!r}: the locale's encoding ({error.encoding}) has no such characters: set "
      "PYTHONUTF8=1, or a UTF-8 locale such as LC_ALL=C.UTF-8"
    ) from None
  if longest := next((part for part in encoded.split(b"/") if len(part) > _LONGEST_NAME), None):
    raise errors.InputError(
      f"{what} has a name of {len(longest)} bytes ({longest[:20].decode(errors='replace')}...): "
      f"a file's name has {_LONGEST_NAME} at most"
    )
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError:
    raise errors.InputError(f"{what} is {text}: there is no user {text.split('/')[0]}; write the folder out") from None


def shipped(installed: str, checkout: str) -> pathlib.Path:
  """Returns a folder that comes with glmjax: inside the installed package, or beside it in a checkout, by its names."""
  package = pathlib.Path(__file__).parent.parent
  inside = package / installed
  return inside if inside.is_dir() else package.parent / checkout
