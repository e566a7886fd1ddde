"""Paths into buckets, with the names that pathlib has for what a bucket can do.

They are no os.PathLike: `open` and `os.stat` would take gs://b/run for a folder called "gs:" here.
"""

from collections.abc import Iterator
import errno
import fnmatch
import functools
import io
import pathlib
import stat as stat_lib
from typing import Any, NamedTuple

from glmjax.io import bucket as bucket_lib

_TRIES = 100  # of adding to an object that others add to
_READ_AHEAD = 1 << 22  # bytes that a stream asks for at once


class Stat(NamedTuple):
  """What is known of an object or a folder; named as in os.stat_result."""

  st_size: int
  st_mtime_ns: int  # by the server's clock
  st_mode: int


@functools.total_ordering
class BucketPath:
  """gs://BUCKET/KEY or s3://BUCKET/KEY. A folder is there as long as an object is below it.

  What asks the bucket raises as bucket.Bucket.
  """

  __slots__ = ("_scheme", "_name", "_key")

  def __init__(self, scheme: str, name: str, key: str = ""):
    self._scheme, self._name, self._key = scheme, name, pathlib.PurePosixPath("/", key)

  @property
  def root(self) -> tuple[str, str]:
    """The scheme, and the bucket's name."""
    return self._scheme, self._name

  @property
  def bucket(self) -> bucket_lib.Bucket:
    """The bucket, opened at the first use."""
    return bucket_lib.named(self._scheme, self._name)

  @property
  def key(self) -> str:
    """The object's key; "" for the bucket itself."""
    return str(self._key)[1:]

  def _at(self, key: pathlib.PurePosixPath) -> "BucketPath":
    return BucketPath(self._scheme, self._name, str(key))

  def __str__(self) -> str:
    return f"{self._scheme}://{self._name}/{self.key}".rstrip("/")

  def __repr__(self) -> str:
    return f"BucketPath({str(self)!r})"

  def __truediv__(self, part: Any) -> "BucketPath":
    return self._at(self._key / str(part).lstrip("/"))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, BucketPath) and str(self) == str(other)

  def __lt__(self, other: "BucketPath") -> bool:
    return (self._scheme, self._name, self._key) < (other._scheme, other._name, other._key)  # by parts, as pathlib

  def __hash__(self) -> int:
    return hash(str(self))

  @property
  def name(self) -> str:
    return self._key.name

  @property
  def suffix(self) -> str:
    return self._key.suffix

  @property
  def stem(self) -> str:
    return self._key.stem

  @property
  def parent(self) -> "BucketPath":
    return self._at(self._key.parent)

  @property
  def parents(self) -> tuple["BucketPath", ...]:
    """The folders above, the bucket itself last."""
    return tuple(map(self._at, self._key.parents))

  def joinpath(self, *parts: Any) -> "BucketPath":
    return functools.reduce(BucketPath.__truediv__, parts, self)

  def with_name(self, name: str) -> "BucketPath":
    return self._at(self._key.with_name(name))

  def relative_to(self, other: "BucketPath") -> pathlib.PurePosixPath:
    """Returns the rest of the path below another; raises ValueError where it does not lie there."""
    if not self.is_relative_to(other):
      raise ValueError(f"{self} does not lie in {other}")
    return self._key.relative_to(other._key)

  def is_relative_to(self, other: object) -> bool:
    same = isinstance(other, BucketPath) and (self._scheme, self._name) == (other._scheme, other._name)
    return same and self._key.is_relative_to(other._key)

  def absolute(self) -> "BucketPath":
    return self

  def is_symlink(self) -> bool:
    return False

  def is_file(self) -> bool:
    return bool(self.key) and self.bucket.find(self.key) is not None

  def is_dir(self) -> bool:
    return any(True for _ in self.bucket.below(self.key))

  def exists(self) -> bool:
    return self.is_file() or self.is_dir()

  def stat(self) -> Stat:
    """Describes an object, or a folder; raises FileNotFoundError where neither is."""
    if self.key and (found := self.bucket.find(self.key)) is not None:
      return Stat(found.size, int(found.modified * 1e9), stat_lib.S_IFREG)
    if self.is_dir():
      return Stat(0, 0, stat_lib.S_IFDIR)
    raise FileNotFoundError(2, "no such object", str(self))

  def iterdir(self) -> Iterator["BucketPath"]:
    """Yields what lies directly in the folder, folders first; raises FileNotFoundError where it is none."""
    folders, objects = self.bucket.children(self.key)
    if not folders and not objects:
      raise FileNotFoundError(2, "no such folder", str(self))
    yield from (self._at(pathlib.PurePosixPath("/", key)) for key in [*folders, *(found.key for found in objects)])

  def rglob(self, pattern: str) -> Iterator["BucketPath"]:
    """Yields the objects below whose names fit; no folders."""
    for found in self.bucket.below(self.key):
      path = self._at(pathlib.PurePosixPath("/", found.key))
      if fnmatch.fnmatchcase(path.name, pattern):
        yield path

  def sizes(self) -> dict["BucketPath", int]:
    """Returns all objects below, with their bytes, from one listing."""
    return {self._at(pathlib.PurePosixPath("/", found.key)): found.size for found in self.bucket.below(self.key)}

  def read_bytes(self) -> bytes:
    return self.bucket.get(self.key)

  def read_text(self, encoding: str = "utf-8") -> str:
    return self.read_bytes().decode(encoding)

  def read_range(self, start: int, stop: int) -> bytes:
    """Returns bytes [start, stop), as many as there are."""
    return self.bucket.get(self.key, start, stop)

  def read_into(self, buffer: memoryview, offset: int) -> int:
    """Fills a buffer with the bytes from `offset` on, a part at a time; returns how many there were."""
    filled = 0
    while filled < len(buffer):
      first, last = offset + filled, offset + min(filled + bucket_lib.PART, len(buffer))
      data = self.read_range(first, last)
      buffer[filled : filled + len(data)] = data
      filled += len(data)
      if len(data) < last - first:
        break
    return filled

  def write_bytes(self, data: Any) -> None:
    self.bucket.put(self.key, data)

  def append(self, data: bytes) -> None:
    """Adds to the object, which is written anew: for small ones, of lines that differ. What others add at the same
    time stays.

    Raises:
      OSError: also where others write it all the time.
    """
    for _ in range(_TRIES):
      found = self.bucket.find(self.key)
      if found is None:
        whole = data
        done = self.bucket.create(self.key, whole)
      else:
        whole = self.bucket.get(self.key) + data
        done = self.bucket.replace(self.key, whole, found.version)
      if done is not None or self._begins_with(whole):  # the answer was lost, and others have added to it since
        return
    raise OSError(errno.EBUSY, "others write it all the time", str(self))

  def _begins_with(self, data: bytes) -> bool:
    try:
      return self.read_range(0, len(data)) == data
    except FileNotFoundError:
      return False

  def write_text(self, text: str, encoding: str = "utf-8") -> None:
    self.write_bytes(text.encode(encoding))

  def mkdir(self, *args: Any, **kwargs: Any) -> None:
    """Does nothing: folders are there once something is in them."""

  def unlink(self, missing_ok: bool = True) -> None:
    """Deletes the object."""
    self.bucket.delete([self.key])

  def remove_tree(self, first: str | None = None) -> None:
    """Deletes all objects at and below the path; `first` names one that goes before the others."""
    if first is not None:
      self.bucket.delete([(self / first).key])
    self.bucket.delete([found.key for found in self.bucket.below(self.key)])
    self.bucket.delete([self.key])

  def open(self, mode: str = "rb", encoding: str | None = None) -> Any:
    """Opens the object to be read, from any place, or to be written in order, whole or not at all."""
    if mode == "wb":
      return self.bucket.upload(self.key)
    if mode not in ("rb", "r"):
      raise ValueError(f"objects are read or written whole; there is no mode {mode!r}")
    stream = _Buffered(_Reader(self), _READ_AHEAD)
    return stream if mode == "rb" else io.TextIOWrapper(stream, encoding or "utf-8")


class _Buffered(io.BufferedReader):
  """A reader whose every request is for a whole buffer."""

  def read1(self, size: int = -1) -> bytes:
    """Returns what is buffered, up to so much: with nothing there it would ask for `size` alone, 8 KiB of a text."""
    self.peek(1)
    return super().read1(size)


class _Reader(io.RawIOBase):
  """The bytes of an object, fetched as they are asked for: all of one version."""

  def __init__(self, path: BucketPath):
    found = path.bucket.find(path.key)
    if found is None:
      raise FileNotFoundError(2, "no such object", str(path))
    self._path, self._size, self._version, self._place = path, found.size, found.version, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
    if start + offset < 0:
      raise ValueError(f"there is no place {start + offset}")
    self._place = start + offset
    return self._place

  def readinto(self, buffer: Any) -> int:
    stop = min(self._place + len(buffer), self._size)
    data = self._path.bucket.get(self._path.key, self._place, stop, self._version)
    buffer[: len(data)] = data
    self._place += len(data)
    return len(data)
