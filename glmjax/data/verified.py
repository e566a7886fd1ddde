"""Files whose every byte is compared with a checksum before it is used, read by position.

A shard has the CRC-32 of each block of 32 KiB. A read checks the blocks that it touches (8 µs each), so that no run
waits until terabytes have been hashed, and what has changed since the file was opened, in place or by another file of
its name, is an error and never data. Files of older caches have one SHA-256 alone: they are read whole at first use.
"""

import collections
import hashlib
import os
import pathlib
import resource
import stat
import threading
from typing import Any
import zlib

import numpy as np

BLOCK = 1 << 15  # bytes; every read takes whole blocks, every block costs 4 bytes of sums
_CHUNK = 64 * BLOCK
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

  def __init__(self, folder: pathlib.Path, record: dict[str, Any], sums: np.ndarray | None = None) -> None:
    """Takes `sums`, those of its blocks; None: all of it is read at first, and compared with the SHA-256."""
    self.path = folder / record["file"]
    self._size, self._sha256, self._sums = record["bytes"], record["sha256"], sums

  def blocks(self, first: int, last: int) -> bytes:
    """Reads blocks [first, last), the file's last one possibly short.

    Raises:
      Damaged: when they are not what was written.
      OSError: when the system does not let them be read.
    """
    if self._sums is None:
      self._sums = self._read_whole()[1]
    data = self._pread(first * BLOCK, min(last * BLOCK, self._size))
    view = memoryview(data)
    for i in range(first, last):
      if zlib.crc32(view[(i - first) * BLOCK : (i - first + 1) * BLOCK]) != self._sums[i]:
        end = min((i + 1) * BLOCK, self._size)
        raise Damaged(f"{self.path}: bytes {i * BLOCK} to {end - 1} differ from their checksum")
    return data

  def whole(self) -> bytes:
    """Reads all of a small file, compared with its SHA-256."""
    return b"".join(self._read_whole(keep=True)[0])

  def close(self) -> None:
    """Closes the file; the next read opens it again."""
    with _lock:
      if (descriptor := _open.pop(self, None)) is not None:
        os.close(descriptor)

  def _read_whole(self, keep: bool = False) -> tuple[list[bytes], np.ndarray]:
    sums, digest, chunks = Sums(), hashlib.sha256(), []
    for start in range(0, self._size, _CHUNK):
      data = self._pread(start, min(start + _CHUNK, self._size))
      digest.update(data)
      sums.add(data)
      chunks += [data] if keep else []
    if digest.hexdigest() != self._sha256:
      raise Damaged(f"{self.path}: contents differ from the checksum in the manifest")
    return chunks, sums.array()

  def _pread(self, start: int, stop: int) -> bytes:
    with _lock:  # nobody closes it meanwhile
      descriptor = self._descriptor()
      data = os.pread(descriptor, stop - start, start)
      while len(data) < stop - start and (more := os.pread(descriptor, stop - start - len(data), start + len(data))):
        data += more
    if len(data) < stop - start:
      raise Damaged(f"{self.path}: ends too early")
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


def _most_open() -> int:
  """Says how many files may stay open in this process: a fourth of its limit, 256 at most."""
  limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
  return _MOST_OPEN if limit == resource.RLIM_INFINITY else max(min(limit // 4, _MOST_OPEN), 4)
