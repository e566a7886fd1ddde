"""Files whose every byte is compared with a checksum before it is used, read by position.

A shard has the CRC-32 of each block of 32 KiB. A read checks the blocks that it touches (8 µs each), so that no run
waits until terabytes have been hashed, and what has changed since the file was opened, in place or by another file of
its name, is an error and never data. Files of older caches have one SHA-256 alone: they are read whole at first use.

Of a file in a bucket those blocks are fetched that are not on the local disk (`nearby`); what comes is verified alike.
"""

import collections
import hashlib
import os
import resource
import stat
import threading
from typing import Any
import zlib

import numpy as np

from glmjax.data import nearby
from glmjax.io import bucket
from glmjax.io import bucket_path
from glmjax.io import paths

BLOCK = 1 << 15  # bytes; every read takes whole blocks, every block costs 4 bytes of sums
_CHUNK = 64 * BLOCK  # of a file on a disk that is read whole
_MOST_OPEN = 256

_lock = threading.Lock()
_open: collections.OrderedDict["File", int] = collections.OrderedDict()  # descriptors, the last used last


class Damaged(Exception):
  """A file is not what its checksum says; the message tells what is wrong with which."""


class Sums:
  """The checksums of the blocks of a stream of bytes, as they come."""

  def __init__(self) -> None:
    self._done: list[int] = []
    self._last = self._filled = 0

  def add(self, data: bytes) -> None:
    """Takes the next bytes."""
    view = memoryview(data)
    while len(view):
      part = view[: BLOCK - self._filled]
      self._last = zlib.crc32(part, self._last)
      self._filled += len(part)
      if self._filled == BLOCK:
        self._done.append(self._last)
        self._last = self._filled = 0
      view = view[len(part) :]

  def array(self) -> np.ndarray:
    """Returns uint32 [blocks], little endian; the last block may be short."""
    return np.array([*self._done, *([self._last] if self._filled else [])], "<u4")


class File:
  """One file that a record describes: "file" (its name), "bytes", "sha256"."""

  def __init__(
    self, folder: paths.Path, record: dict[str, Any], sums: np.ndarray | None = None, near: nearby.Folder | None = None
  ) -> None:
    """Takes the file's description.

    Args:
      folder: where it is.
      record: of it.
      sums: those of its blocks; None: all of it is read at first, and compared with the SHA-256.
      near: where what is read of a file in a bucket is kept; None: nowhere.
    """
    self.path = folder / record["file"]
    self._size, self._sha256, self._sums = record["bytes"], record["sha256"], sums
    self._near = near if isinstance(self.path, bucket_path.BucketPath) else None
    self._near_name = nearby.name_of(str(self.path), self._size, self._sha256)

  def blocks(self, first: int, last: int) -> bytes:
    """Reads blocks [first, last), the file's last one possibly short.

    Raises:
      Damaged: when they are not what was written.
      OSError: when the system does not let them be read.
    """
    if self._sums is None:
      self._sums = self._read_whole()[1]
    if self._near is not None:
      return self._nearby_blocks(self._near, first, last)
    data = self._read(first * BLOCK, min(last * BLOCK, self._size))
    self._check(data, first)
    return data

  def _nearby_blocks(self, near: nearby.Folder, first: int, last: int) -> bytes:
    """Reads blocks from the local disk, and fetches those that are not there: neighbours by one request."""
    start = first * BLOCK
    data = bytearray(near.read(self._near_name, start, min(last * BLOCK, self._size)))
    lacking = [first + i for i in _wrong(data, self._sums[first:last])]
    while lacking:
      count = next((i for i, block in enumerate(lacking) if block != lacking[0] + i), len(lacking))
      begin, end = lacking[0] * BLOCK, min((lacking[0] + count) * BLOCK, self._size)
      fetched = self._read(begin, end)
      self._check(fetched, lacking[0])
      data[begin - start : end - start] = fetched
      near.write(self._near_name, begin, fetched)
      del lacking[:count]
    return bytes(data)

  def _check(self, data: bytes, first: int) -> None:
    """Raises Damaged where blocks, read from block `first` on, are not what was written."""
    for i in _wrong(data, self._sums[first : first - (-len(data) // BLOCK)]):
      begin = (first + i) * BLOCK
      end = min(begin + BLOCK, self._size)
      raise Damaged(f"{self.path}: bytes {begin} to {end - 1} differ from their checksum")

  def whole(self) -> bytes:
    """Reads all of a small file, compared with its SHA-256."""
    if self._near is None:
      return b"".join(self._read_whole(keep=True)[0])
    data = self._near.read(self._near_name, 0, self._size)
    if hashlib.sha256(data).hexdigest() != self._sha256:
      data = b"".join(self._read_whole(keep=True)[0])
      self._near.write(self._near_name, 0, data)
    return data

  def close(self) -> None:
    """Closes the file; the next read opens it again."""
    with _lock:
      if (descriptor := _open.pop(self, None)) is not None:
        os.close(descriptor)

  def _read_whole(self, keep: bool = False) -> tuple[list[bytes], np.ndarray]:
    sums, digest, chunks = Sums(), hashlib.sha256(), []
    chunk = bucket.PART if isinstance(self.path, bucket_path.BucketPath) else _CHUNK
    for start in range(0, self._size, chunk):
      data = self._read(start, min(start + chunk, self._size))
      digest.update(data)
      sums.add(data)
      chunks += [data] if keep else []
    if digest.hexdigest() != self._sha256:
      raise Damaged(f"{self.path}: contents differ from the checksum in the manifest")
    return chunks, sums.array()

  def _read(self, start: int, stop: int) -> bytes:
    """Reads bytes [start, stop) from where the file is; raises Damaged where it has not so many."""
    if isinstance(self.path, bucket_path.BucketPath):  # by many threads at once
      nearby.check_may_fetch()
      try:
        data = self.path.read_range(start, stop)
      except FileNotFoundError:
        raise Damaged(f"{self.path}: missing") from None
    else:
      data = self._pread(start, stop)
    if len(data) < stop - start:
      raise Damaged(f"{self.path}: ends too early")
    return data

  def _pread(self, start: int, stop: int) -> bytes:
    with _lock:  # nobody closes it meanwhile
      descriptor = self._descriptor()
      data = os.pread(descriptor, stop - start, start)
      while len(data) < stop - start and (more := os.pread(descriptor, stop - start - len(data), start + len(data))):
        data += more
    return data

  def _descriptor(self) -> int:
    """Returns the open file's descriptor; under the lock."""
    if self in _open:
      _open.move_to_end(self)
      return _open[self]
    while len(_open) >= _most_open():
      os.close(_open.popitem(last=False)[1])
    try:
      descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # of a FIFO: do not wait
    except FileNotFoundError:
      raise Damaged(f"{self.path}: missing") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
      os.close(descriptor)
      raise Damaged(f"{self.path}: no regular file")
    _open[self] = descriptor
    return descriptor


def _wrong(data: bytes | bytearray, sums: np.ndarray) -> list[int]:
  """Returns the numbers of the blocks, of those that `data` is, that have other checksums than `sums`."""
  view = memoryview(data)
  return [i for i, wanted in enumerate(sums) if zlib.crc32(view[i * BLOCK : (i + 1) * BLOCK]) != wanted]


def _most_open() -> int:
  """Says how many files may stay open in this process: a fourth of its limit, 256 at most."""
  limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
  return _MOST_OPEN if limit == resource.RLIM_INFINITY else max(min(limit // 4, _MOST_OPEN), 4)
