"""The host's memory, as Linux tells it."""

import ctypes
import mmap
import pathlib

_HOST = pathlib.Path("/proc/meminfo")
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


def available() -> int | None:
  """Returns the bytes that this process may still take: of the host, or of its container if that has less."""
  found = [of_host().get("available"), _of_container()]
  return min((size for size in found if size is not None), default=None)


def _of_container() -> int | None:
  """Returns what is left of the container's limit; files that are only kept for who reads them again count as free."""
  try:
    limit, taken, kinds = (
      (_CONTAINER / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current", "memory.stat")
    )
  except OSError:
    return None
  if not limit.strip().isdecimal():  # "max": it has none
    return None
  files = dict(line.split() for line in kinds.splitlines()).get("inactive_file", "0")
  return max(0, int(limit) - int(taken) + int(files))
