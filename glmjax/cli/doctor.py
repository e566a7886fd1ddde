"""What the doctor and launch commands print."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def show(found: dict[str, Any]) -> None:
  """Prints what glmjax.doctor found, a line for each fact."""
  _print(list(_rows(found)))


def show_scripts(scripts: Mapping[str, str]) -> None:
  """Prints what each launch script does, by its path."""
  _print(list(scripts.items()))


def _print(facts: Sequence[tuple[str, str]]) -> None:
  """Prints a line for each fact, names in a column."""
  width = max(len(name) for name, _ in facts)
  for name, fact in facts:
    print(f"{name:{width}}  {fact}".rstrip())


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
  if "bucket" in found:
    yield from found["bucket"].items()
    return
  yield from found["versions"].items()
  memory = found["host_memory"]
  if memory:
    yield "host memory", f"{memory['total'] / 2**30:.1f} GiB, {memory['available'] / 2**30:.1f} GiB available"
  kept = found["programs"]
  size = f"{kept['folder']}: {kept['programs']} of this machine's, {kept['bytes'] / 1e6:.1f} MB in all"
  problem = f"none is kept: {kept['problem']}" if kept["problem"] else None
  yield "programs", "; ".join(part for part in (size if kept["folder"] else None, problem) if part)
  for i, device in enumerate(found["devices"]):
    memory = f", {device['memory'] / 2**30:.1f} GiB" if device["memory"] else ""
    yield f"device {i}", f"{device['platform']}, {device['kind']}{memory}"
  if cpu := found.get("cpu"):
    speed = f", {cpu['read_bandwidth'] / 1e9:.0f} GB/s when they read memory" if cpu["read_bandwidth"] else ""
    yield "processor", f"{cpu['cores']} cores{speed}; C++ library: {cpu['library']}"
    if cpu["product_speed"]:
      share = cpu["product_speed"] / cpu["read_bandwidth"]
      yield "decoding INT4", f"products read {cpu['product_speed'] / 1e9:.0f} GB/s of weights, {share:.0%} of that"
  if "problem" in found:
    yield "devices", f"none: {found['problem']}"
  yield from found["compilers"].items()
  for operation, ways in found["kernels"].items():
    yield operation, ""
    yield from ((f"  {name}", why) for name, why in ways.items())
