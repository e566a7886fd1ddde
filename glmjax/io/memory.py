"""The host's memory, as Linux tells it."""

import bisect
from collections.abc import Iterable
import ctypes
import mmap
import pathlib

_HOST = pathlib.Path("/proc/meminfo")
_MAPS = pathlib.Path("/proc/self/maps")
_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1
_CONTAINER = pathlib.Path("/sys/fs/cgroup")  # of this process, where it is in a container


def of_host() -> dict[str, int]:
  """Returns the bytes of the host's memory, in all and available; nothing where no Linux tells them."""
  try:
    lines = _HOST.read_text(encoding="ascii").splitlines()
  except OSError:
    return {}
  sizes = {name: int(rest.split()[0]) << 10 for name, rest in (line.split(":") for line in lines)}
  return {"total": sizes["MemTotal"], "available": sizes["MemAvailable"]}


def join_pages(address: int, size: int) -> bool:
  """Has Linux move `size` bytes of this process's memory into huge pages, as far as whole ones lie in it.

  They are read faster: fewer addresses are to be looked up. Where the system has none, or the memory is a file's,
  nothing changes.

  Returns:
    whether it did.
  """
  first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
  length = (address + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
  try:
    advise = ctypes.CDLL(None).madvise
  except (OSError, AttributeError):  # no such system
    return False
  advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
  return length > 0 and advise(first, length, _COLLAPSE) == 0


def in_files(pieces: Iterable[tuple[int, int]]) -> int:
  """Returns how many bytes of some pieces of this process's memory, (address, size), are those of files that it has
  mapped; 0 where no Linux tells it. Pieces that begin at one address count once.
  """
  try:
    lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
  except OSError:
    return 0
  starts, is_file = [], []
  for line in lines:  # in the order of their addresses
    addresses, _, _, _, inode = line.split(None, 5)[:5]
    starts.append(int(addresses.partition("-")[0], 16))
    is_file.append(inode != "0")
  found = ((bisect.bisect_right(starts, address) - 1, size) for address, size in dict(pieces).items())
  return sum(size for i, size in found if i >= 0 and is_file[i])


def available(kept: int = 0) -> int | None:
  """Returns the bytes that this process may still take: of the host, or of its container if that has less.

  Args:
    kept: bytes of mapped files that shall stay in memory: the system counts them among those that it can free.
  """
  host = of_host().get("available")
  found = [None if host is None else max(0, host - kept), _of_container(kept)]
  return min((size for size in found if size is not None), default=None)


def _of_container(kept: int) -> int | None:
  """Returns what is left of the container's limit; files that are only kept for who reads them again count as free, but
  for `kept` bytes. (Those of them that were read often count as taken already.)
  """
  try:
    limit, taken, kinds = (
      (_CONTAINER / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current", "memory.stat")
    )
  except OSError:
    return None
  if not limit.strip().isdecimal():  # "max": it has none
    return None
  files = dict(line.split() for line in kinds.splitlines()).get("inactive_file", "0")
  return max(0, int(limit) - int(taken) + max(0, int(files) - kept))
