"""What one compiled step takes: its memory by part, and the time below which the hardware cannot run it."""

import dataclasses
import math
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from glmjax import errors
from glmjax.infer import offload
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import collectives
from glmjax.parallel import hlo
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import cost
from glmjax.plan import devices as devices_lib
from glmjax.plan import programs
from glmjax.plan import targets


def step(
  model: config_lib.GLMConfig,
  workload: programs.Train | programs.Decode,
  aim: targets.Target,
  mesh: mesh_lib.MeshConfig,
) -> dict[str, Any]:
  """Compiles a workload for a target, and reads the result (docs/hardware.md explains each field).

  Raises:
    errors.InputError: for a mesh that does not fit the target or the model, and when a compiler is missing.
  """
  began = time.perf_counter()
  device_mesh = mesh_lib.make_mesh(mesh, devices_lib.of(aim))
  program = workload.program(model, device_mesh)
  try:
    options = program.gpu_options if aim.chip.platform == "cuda" else {}
    compiled = program.traced.lower().compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    line = str(error).splitlines()[0][:300]
    raise errors.InputError(
      f"target {aim.name}: its compiler gives up for want of memory ({line}): split more, or "
      "compute fewer rows at a time"
    ) from error
  seconds = time.perf_counter() - began
  costs = cost_of(program, compiled, aim, device_mesh)
  rates = roofline(costs.flops / aim.devices, costs.moved, costs.exchanged, aim.chip, costs.fetched)
  peak_flops = aim.devices * rates["step_seconds"] * aim.chip.peak_flops
  return {
    "target": aim.name,
    "devices": aim.devices,
    "device": aim.chip.kind,
    "mesh": dict(device_mesh.shape),
    **peak_memory(compiled, program.parts, aim.chip),
    "parameters": params_lib.count(model),
    **rates,
    "tokens_per_second": program.tokens / rates["step_seconds"],
    "model_flops": program.model_flops,
    "hardware_flops": costs.flops,
    "mfu": program.model_flops / peak_flops,
    "hfu": costs.flops / peak_flops,
    "host_bytes_moved": costs.fetched,
    "collectives": _total(costs.exchanged),
    "compile_seconds": round(seconds, 1),
    "compile_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a compiled program computes, moves and exchanges."""

  flops: float  # of all devices
  moved: float  # bytes in and out of a device's memory
  fetched: float  # bytes that a device fetches from the host
  exchanged: Sequence[Mapping[str, Any]]  # collectives: kind, axes, bytes, times, seconds


def cost_of(program: programs.Program, compiled: Any, aim: targets.Target, mesh: jax.sharding.Mesh) -> Cost:
  """Reads a program's costs from its jaxpr and its compiled text."""
  read = hlo.read(compiled.as_text())
  exchanged = [_describe(c, program.trips, aim, mesh.shape) for c in collectives.of(read, mesh)]
  flops = cost.flops(program.traced.jaxpr.jaxpr, program.trips)
  return Cost(flops, cost.traffic(read, program.trips), cost.fetched(read, program.trips), exchanged)


def _is_on_host(x: Any) -> bool:
  return x.sharding.memory_kind == offload.HOST


def peak_memory(compiled: Any, parts: Mapping[str, Any], chip: targets.Chip) -> dict[str, Any]:
  """Returns the bytes of one device at the program's peak, by what they are for, and whether they fit.

  Arrays of `parts` count where the program leaves them aside, as a prompt's does the last layer's mlp: they are there.
  """
  analysis = compiled.memory_analysis()
  by_part = {
    name: sum(shard_bytes(x) for x in jax.tree.leaves(arrays) if not _is_on_host(x)) for name, arrays in parts.items()
  }
  arguments = max(analysis.argument_size_in_bytes, sum(by_part.values()))
  peak = arguments + analysis.output_size_in_bytes - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes
  room = targets.room(chip)
  return {
    "fits": peak <= room,
    "peak_bytes_per_device": peak,
    "device_memory_bytes": chip.memory_bytes,
    "usable_memory_bytes": room,
    "headroom_bytes": room - peak,
    "host_bytes_per_device": sum(shard_bytes(x) for x in jax.tree.leaves(dict(parts)) if _is_on_host(x)),
    "memory": by_part
    | {"temporaries": analysis.temp_size_in_bytes, "other": peak - analysis.temp_size_in_bytes - sum(by_part.values())},
  }


def shard_bytes(x: jax.ShapeDtypeStruct) -> int:
  """Returns the bytes of the part of an array that a device holds."""
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def roofline(
  flops: float, moved: float, exchanged: Sequence[Mapping[str, Any]], chip: targets.Chip, fetched: float = 0.0
) -> dict[str, float]:
  """Returns the seconds of a step at the chip's peak rates.

  A bound from below: products and memory traffic hide one another, exchanges over tensor, context and stage come on
  top, and those of weights and gradients over data and fsdp run beside all, as does what is fetched from the host.
  """
  compute, memory = flops / chip.peak_flops, moved / chip.memory_bandwidth
  waited = sum(c["seconds"] for c in exchanged if not set(c["axes"]) <= {"data", "fsdp"})
  beside = sum(c["seconds"] for c in exchanged if set(c["axes"]) <= {"data", "fsdp"})
  host = fetched / chip.host_link
  return {
    "compute_seconds": compute,
    "memory_seconds": memory,
    "waited_exchange_seconds": waited,
    "overlapped_exchange_seconds": beside,
    "host_seconds": host,
    "step_seconds": max(max(compute, memory) + waited, beside, host),
  }


def exchange_seconds(kind: str, sent: float, group: int, stride: int, aim: targets.Target) -> float:
  """Returns the seconds of one collective around a ring: what a device sends, at its link's rate, and its messages'
  way.

  Args:
    sent: bytes that a device sends.
    group: devices that exchange.
    stride: devices from one of them to the next, in the target's order.
  """
  chip = aim.chip
  together = group if chip.platform == "tpu" else min(group, max(1, chip.node // stride))  # of the group on a node
  nodes = math.ceil(group / together)
  rounds = {"all-reduce": 2}.get(kind, 1)
  within, between = (0, 1) if nodes > 1 else (1, 0)
  if kind != "collective-permute":
    within, between = rounds * (group - nodes), rounds * (nodes - 1)
  return (
    sent / (chip.outer_links if nodes > 1 else chip.inner_links)
    + chip.start
    + within * chip.inner_hop
    + between * chip.outer_hop
  )


def times(c: collectives.Collective, trips: Mapping[str, int]) -> int:
  """Says how often a collective runs; `trips`: of the loops that the compiler cannot count, by their scopes."""
  return c.times() * (math.prod(n for loop, n in trips.items() if loop in c.source) if None in c.loops else 1)


def _describe(
  c: collectives.Collective, trips: Mapping[str, int], aim: targets.Target, mesh: Mapping[str, int]
) -> dict[str, Any]:
  count, names = times(c, trips), tuple(mesh)
  behind = names[max(map(names.index, c.axes)) + 1 :] if c.axes else ()
  stride = math.prod(mesh[axis] for axis in behind)
  return {
    "kind": c.kind,
    "axes": list(c.axes),
    "bytes": c.sent * count,
    "times": count,
    "seconds": count * exchange_seconds(c.kind, c.sent, c.group, stride, aim),
  }


def _total(exchanged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Sums bytes by kind and axes, most bytes first."""
  sums: dict[tuple[str, ...], dict[str, Any]] = {}
  for c in exchanged:
    into = sums.setdefault(
      (c["kind"], *c["axes"]), {"kind": c["kind"], "axes": c["axes"], "bytes": 0.0, "times": 0, "seconds": 0.0}
    )
    for name in ("bytes", "times", "seconds"):
      into[name] += c[name]
  return sorted(sums.values(), key=lambda c: -c["bytes"])
