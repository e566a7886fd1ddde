"""The host's memory, as Linux tells it."""

import pathlib

_HOST = pathlib.Path("/proc/meminfo")
_CONTAINER = pathlib.Path("/sys/fs/cgroup")  # of this process, where it is in a container


def of_host() -> dict[str, int]:
  """Returns the bytes of the host's memory, in all and available; nothing where no Linux tells them."""
  try:
    lines = _HOST.read_text(encoding="ascii").splitlines()
  except OSError:
    return {}
  sizes = {name: int(rest.split()[0]) << 10 for name, rest in (line.split(":") for line in lines)}
  return {"total": sizes["MemTotal"], "available": sizes["MemAvailable"]}


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
