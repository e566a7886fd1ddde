"""What the doctor command prints."""

from collections.abc import Iterator
from typing import Any


def show(found: dict[str, Any]) -> None:
  """Prints a line for each fact, names in a column."""
  rows = list(_rows(found))
  width = max(len(name) for name, _ in rows)
  for name, value in rows:
    print(f"{name:{width}}  {value}".rstrip())


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
  yield from found["versions"].items()
  memory = found["host_memory"]
  yield "host memory", f"{memory['total'] / 2**30:.1f} GiB, {memory['available'] / 2**30:.1f} GiB available"
  for i, device in enumerate(found["devices"]):
    memory = f", {device['memory'] / 2**30:.1f} GiB" if device["memory"] else ""
    yield f"device {i}", f"{device['platform']}, {device['kind']}{memory}"
  if "problem" in found:
    yield "devices", f"none: {found['problem']}"
  yield from found["compilers"].items()
  for operation, ways in found["kernels"].items():
    yield operation, ""
    yield from ((f"  {name}", why) for name, why in ways.items())
