"""The one door for paths that users name: in flags, in gin files, in calls of the library; and glmjax's own folders."""

import os
import pathlib
import re

from glmjax import errors
from glmjax.io import bucket
from glmjax.io import bucket_path

Path = pathlib.Path | bucket_path.BucketPath
Named = str | os.PathLike | bucket_path.BucketPath  # as a user writes it, or as a door has returned it

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/{1,2}")
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")  # of both clouds; Google's with dots are the longest
_LONGEST_KEY = 1024  # bytes, of both clouds
_LONGEST_NAME = 255  # bytes of one part of a path (Linux, NAME_MAX)


def named(path: Named, what: str = "the path") -> Path:
  """Returns a path on the disk, with ~ expanded, or into a bucket (gs://, s3://). Nothing is looked at.

  Args:
    path: as the user wrote it.
    what: names it in the error, as "--workdir".

  Raises:
    errors.InputError: when it is empty, another kind of URL, or cannot be a path.
  """
  if isinstance(path, bucket_path.BucketPath):
    return path
  match = _URL.match(path) if isinstance(path, str) else None
  if match is None or match[1] not in bucket.SCHEMES:
    return local(path, what)
  scheme, (name, _, key) = match[1], path.partition("://")[2].partition("/")
  if not _BUCKET_NAME.fullmatch(name):
    raise errors.InputError(f"{what} is {path}: a bucket is named as {scheme}://BUCKET/FOLDER")
  parts = key.strip("/").split("/")
  if key.strip("/") and ({"", ".", ".."} & set(parts) or re.search(r"[\0-\x1f\x7f]", key)):
    raise errors.InputError(
      f"{what} is {path!r}: in a bucket there are no empty parts, no . or .., no control characters"
    )
  if len(key.encode("utf-8", "surrogatepass")) > _LONGEST_KEY:
    raise errors.InputError(f"{what} is longer than the {_LONGEST_KEY} bytes that a bucket takes: {path[:60]}...")
  return bucket_path.BucketPath(scheme, name, key.strip("/"))


def local(path: Named, what: str = "the path") -> pathlib.Path:
  """Returns a path that must be on the disk, with ~ expanded. Nothing is looked at.

  Args:
    path: as the user wrote it.
    what: names it in the error, as "--workdir".

  Raises:
    errors.InputError: when it is empty, a URL, or cannot be a path.
  """
  try:
    text = str(path) if isinstance(path, bucket_path.BucketPath) else os.fspath(path)
  except TypeError:
    raise errors.InputError(f"{what} is {path!r}: give a path") from None
  if not isinstance(text, str):
    raise errors.InputError(f"{what} is {text!r}: give a path as text")
  if not text.strip():
    raise errors.InputError(f"{what} is empty: give a path")
  if match := _URL.match(text):
    if match[1] in bucket.SCHEMES:
      raise errors.InputError(
        f"{what} is {text}: this must be a path on this machine, not in a bucket; name one, and first copy there what "
        "is to be read"
      )
    raise errors.InputError(f"{what} is {text}: glmjax knows local paths, gs://BUCKET/... and s3://BUCKET/...")
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
