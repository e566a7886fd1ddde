"""Which process wrote a lock or an unfinished file, and whether it is gone."""

from collections.abc import Mapping
import os
import re
from typing import Any


def host() -> str:
  """Returns the machine's name, as a part of a file name."""
  return re.sub("[^A-Za-z0-9_-]", "-", os.uname().nodename) or "-"


def here() -> dict[str, Any]:
  """Describes this process: its machine, its number, and among which processes that number counts."""
  return {"host": host(), "process": os.getpid(), "numbers": _numbers()}


def is_gone(holder: Mapping[str, Any]) -> bool:
  """Tells whether a process that `here` described surely runs no more; of other machines that cannot be known."""
  ours = here()
  if any(holder.get(name) != ours[name] for name in ("host", "numbers")) or not isinstance(holder.get("process"), int):
    return False
  return holder["process"] != os.getpid() and not lives(holder["process"])


def lives(process: int) -> bool:
  """Tells whether another process may be at work; in a container the one that was killed often had our own number."""
  if process == os.getpid():
    return False
  try:
    os.kill(process, 0)  # sends nothing
  except (ProcessLookupError, OverflowError):
    return False
  except OSError:  # another user's
    pass
  return True


def _numbers() -> str:
  """Names the machine's start and the container, in which process numbers have their meaning."""
  try:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
      return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""
