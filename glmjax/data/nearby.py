"""Bytes of files in buckets, kept on the local disk: in a folder of bounded size, which processes share.

A file is kept in segments, each a sparse file with what was fetched of it. Which of its blocks are there is written
nowhere: whoever reads compares every block with its checksum in any case (`verified`), so that a hole, a torn write
and a damaged disk are all the same, bytes to be fetched. A segment's name holds the address, the size and the
checksum of the whole file: one that took another's place never meets the other's bytes.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import re
import tempfile
import threading

from glmjax import errors
from glmjax.io import paths

FOLDER = "GLMJAX_CACHE_DIR"  # the variable: where the folder is
SEGMENT = 1 << 26  # bytes of a file that are kept, and dropped, together
_NAME = re.compile(r"[0-9a-f]{32}-\d+")

_log = logging.getLogger("glmjax")
_here = threading.local()  # .alone: this thread fetches nothing


class Lacking(Exception):
  """Something is not nearby, and was to be read `alone`."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
  """Lets this thread fetch nothing from buckets: what is not nearby raises Lacking, at once."""
  _here.alone = True
  try:
    yield
  finally:
    _here.alone = False


def check_may_fetch() -> None:
  """Raises Lacking within `alone`."""
  if getattr(_here, "alone", False):
    raise Lacking


@dataclasses.dataclass
class Folder:
  """The folder, and how many bytes of the disk it may take. A copy of this object in another process shares it."""

  path: pathlib.Path
  limit: int
  writes: bool = True
  _unseen: int | None = None  # bytes written since all of the folder was looked at

  @classmethod
  def usual(cls, limit: int) -> "Folder":
    """Returns that of the user; says so where it cannot be written to."""
    root = os.environ.get(FOLDER) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "glmjax")
    folder = cls(paths.local(root, FOLDER) / "buckets", limit)
    try:
      folder.path.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=folder.path) as probe:
        probe.write(b"\0")
    except OSError as error:
      folder._stop(error)
    return folder

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Returns what is there of bytes [start, stop) of a file, zeros for the rest."""
    found = bytearray(stop - start)
    for path, place, first, last in self._segments(name, start, stop):
      try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
      except OSError:
        continue
      try:
        data = os.pread(descriptor, last - first, place)
        found[first - start : first - start + len(data)] = data
        os.utime(descriptor)  # segments that nobody asks for go first
      except OSError:  # of a disk that fails, or is read-only
        pass
      finally:
        os.close(descriptor)
    return bytes(found)

  def write(self, name: str, start: int, data: bytes) -> None:
    """Keeps bytes of a file, if the disk takes them."""
    if not self.writes or len(data) > self.limit // 8:
      return
    self._unseen = self.limit if self._unseen is None else self._unseen + len(data)
    try:
      if self._unseen > self.limit // 64:
        self._unseen = 0
        self._make_room()
      for path, place, first, last in self._segments(name, start, start + len(data)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
          os.pwrite(descriptor, memoryview(data)[first - start : last - start], place)
        finally:
          os.close(descriptor)
    except OSError as error:
      self._stop(error)

  def _segments(self, name: str, start: int, stop: int) -> list[tuple[pathlib.Path, int, int, int]]:
    """Returns the path of each segment that bytes [start, stop) are in, their place there, their first and end."""
    found = []
    while start < stop:
      number, place = divmod(start, SEGMENT)
      end = min((number + 1) * SEGMENT, stop)
      found.append((self.path / f"{name}-{number}", place, start, end))
      start = end
    return found

  def _make_room(self) -> None:
    """Drops the segments that were not asked for longest, where all take more than three fourths of the limit.

    The last fourth is for what all the processes write until they look again. On a disk that is nearly full the limit
    is lower: what is there and half of what is free, so that others find room.
    """
    segments = []
    with os.scandir(self.path) as entries:
      for entry in entries:
        with contextlib.suppress(FileNotFoundError):  # another process drops it
          if _NAME.fullmatch(entry.name):
            about = entry.stat(follow_symlinks=False)
            segments.append((about.st_mtime_ns, about.st_blocks * 512, entry.path))
    taken = sum(size for _, size, _ in segments)
    disk = os.statvfs(self.path)
    limit = min(self.limit, taken + disk.f_bavail * disk.f_frsize // 2)
    for _, size, path in sorted(segments):
      if taken <= limit * 3 // 4:
        return
      with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
      taken -= size

  def _stop(self, error: OSError) -> None:
    if self.writes:
      self.writes = False
      _log.warning(
        "%s takes no more bytes (%s): what is read from buckets is not kept on this disk; %s names another folder",
        self.path,
        errors.reason(error),
        FOLDER,
      )


def name_of(address: str, size: int, sha256: str) -> str:
  """Returns the name of a file's segments."""
  return hashlib.sha256(f"{address}\n{size}\n{sha256}".encode()).hexdigest()[:32]
