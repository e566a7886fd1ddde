"""What is installed, what it runs on, and which kernel computes what there."""

import os
from typing import Any

import jax

from glmjax import programs
from glmjax import target as target_lib
from glmjax import versions
from glmjax.io import bucket_check
from glmjax.io import memory
from glmjax.kernels import operations
from glmjax.kernels import rows
from glmjax.kernels.cpu import library
from glmjax.kernels.cpu import product

_LEAST_TIMED = 2**28  # bytes that are read to measure a speed: fewer might lie in caches
CACHED = "attention over the cache as it is kept, on one CPU"
_PACKAGES = ("glmjax", "jax", "jaxlib", "flax")


def examine(bucket: str | None = None) -> dict[str, Any]:
  """Describes versions, devices, the host's memory, and for each operation the implementations that it may take.

  Where JAX can start no device, "devices" is empty and "problem" has its words.

  Args:
    bucket: a folder in a bucket to try in place of all that: what it gives of what glmjax needs, and how fast.

  Raises:
    errors.InputError: when the bucket does not give it.
  """
  if bucket is not None:
    return {"bucket": bucket_check.examine(bucket)}
  found = {
    "versions": {name: "not installed" for name in _PACKAGES} | versions.of(_PACKAGES),
    "host_memory": memory.of_host(),
    "programs": programs.describe(),
    "devices": [],
    "compilers": {},
    "kernels": {},
  }
  for name, (compiler, note) in target_lib.COMPILERS.items():
    found["compilers"][name] = f"{'here' if compiler() else 'not in this JAX'}; {note}"
  try:
    devices = jax.devices()
  except (RuntimeError, AssertionError) as error:  # the latter, without words, for a plug-in that is not installed
    words = str(error).strip() or f"JAX can start none of JAX_PLATFORMS={jax.config.jax_platforms}"
    return found | {"problem": words.splitlines()[0]}
  found["devices"] = [_describe(device) for device in devices]
  target = target_lib.Target.of(devices[0])
  of_cpus = target.platform == "cpu"
  found["kernels"] = {
    operation.computes: dict(operation.explain(target))
    for operation in operations.ALL
    if of_cpus or operation is not rows.PRODUCT
  }
  if of_cpus:
    found["cpu"], found["kernels"][CACHED] = _of_cpu()
  return found


def _of_cpu() -> tuple[dict[str, Any], dict[str, str]]:
  """Describes the processor: its cores, what there is of the C++ library, the bytes that they read in a second from
  memory and those of INT4 weights in products with one row (None: not measured); and the ways that attention over a
  cache takes.
  """
  now = library.status()
  ways = {
    "C++ library": "chosen: takes one query, float32 and bfloat16" if now.available else now.words,
    "XLA, dense": f"{'for the rest' if now.available else 'chosen'}: takes all",
  }
  size = min(2**30, (memory.available() or 0) // 4)
  found = {"cores": len(os.sched_getaffinity(0)), "library": now.words, "read_bandwidth": None, "product_speed": None}
  if now.available and size >= _LEAST_TIMED:
    found |= {"read_bandwidth": library.read_bandwidth(size), "product_speed": product.read_speed(size // 4)}
  return found, ways


def _describe(device: Any) -> dict[str, Any]:
  """Describes a device; `memory`: bytes that programs may take, None where the device does not tell."""
  stats = device.memory_stats() or {}
  return {"platform": device.platform, "kind": device.device_kind, "memory": stats.get("bytes_limit")}
