"""`glmjax plan`: does it fit, how much of what, and how fast at best, from the program that would run."""

import math
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from glmjax.models import config as config_lib
from glmjax.parallel import collectives
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import cost
from glmjax.plan import devices as devices_lib
from glmjax.plan import programs
from glmjax.plan import targets

DAY = 86_400


def plan(model: config_lib.GLMConfig, workload: programs.Train | programs.Decode, target: str,
         mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig(), token_budget: int | None = None) -> dict[str, Any]:
  """Compiles a step for devices that are not there, and says what it takes (docs/hardware.md explains each field).

  Args:
    workload: a training step, a token of decoding, or the reading of a prompt.
    target: the devices, as "a100-40:768" or "v5p:4x8x8".
    token_budget: tokens of the whole training; gives days and energy.

  Raises:
    errors.InputError: for a target or mesh that does not exist, and when a compiler is missing.
  """
  began = time.perf_counter()
  aim = targets.parse(target)
  device_mesh = mesh_lib.make_mesh(mesh, devices_lib.of(aim))
  program = workload.program(model, device_mesh)
  compiled = program.traced.lower().compile()
  seconds = time.perf_counter() - began
  memory = peak_memory(compiled, program.parts, aim.chip)
  text = compiled.as_text()
  exchanged = [_describe(c, program.trips, aim) for c in collectives.of(text, device_mesh)]
  hardware_flops = cost.flops(program.traced.jaxpr.jaxpr, program.trips)
  rates = roofline(hardware_flops / aim.devices, cost.traffic(text, program.trips), exchanged, aim.chip)
  per_device = aim.devices * rates["step_seconds"] * aim.chip.peak_flops
  result = {
      "target": aim.name, "devices": aim.devices, "device": aim.chip.kind, "mesh": dict(device_mesh.shape),
      **memory, "parameters": model.num_parameters(), **rates,
      "tokens_per_second": program.tokens / rates["step_seconds"], "model_flops": program.model_flops,
      "hardware_flops": hardware_flops, "mfu": program.model_flops / per_device, "hfu": hardware_flops / per_device,
      "collectives": _total(exchanged), "compile_seconds": round(seconds, 1),
      "compile_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
  return result | _whole_run(result, aim, token_budget)


def peak_memory(compiled: Any, parts: Mapping[str, Any], chip: targets.Chip) -> dict[str, Any]:
  """Bytes of one device at the program's peak, by what they are for, and whether they fit."""
  analysis = compiled.memory_analysis()
  peak = (analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
          + analysis.temp_size_in_bytes)
  by_part = {name: sum(map(shard_bytes, jax.tree.leaves(arrays))) for name, arrays in parts.items()}
  room = math.floor(chip.memory_bytes * (1 - targets.RESERVED if chip.platform == "cuda" else 1))
  return {"fits": peak <= room, "peak_bytes_per_device": peak, "device_memory_bytes": chip.memory_bytes,
          "usable_memory_bytes": room, "headroom_bytes": room - peak,
          "memory": by_part | {"temporaries": analysis.temp_size_in_bytes,
                               "other": peak - analysis.temp_size_in_bytes - sum(by_part.values())}}


def shard_bytes(x: jax.ShapeDtypeStruct) -> int:
  """Of the part of an array that a device holds."""
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def roofline(flops: float, moved: float, exchanged: Sequence[Mapping[str, Any]], chip: targets.Chip
             ) -> dict[str, float]:
  """Seconds of a step at the chip's peak rates.

  A bound from below: products and memory traffic hide one another, exchanges over tensor, context and stage come on
  top, and those of weights and gradients over data and fsdp run beside all.
  """
  compute, memory = flops / chip.peak_flops, moved / chip.memory_bandwidth
  waited = sum(c["seconds"] for c in exchanged if not set(c["axes"]) <= {"data", "fsdp"})
  beside = sum(c["seconds"] for c in exchanged if set(c["axes"]) <= {"data", "fsdp"})
  return {"compute_seconds": compute, "memory_seconds": memory, "waited_exchange_seconds": waited,
          "overlapped_exchange_seconds": beside, "step_seconds": max(max(compute, memory) + waited, beside)}


def model_flops_megatron(batch: int, length: int, layers: int, width: int, vocabulary: int, passes: int = 4) -> float:
  """FLOPs of an iteration by the formula of GLM-130B's own log: 24 c B s L h^2 (1 + s / 6h + V / 16 L h).

  c is 4 with activations recomputed, 3 without (Megatron's training.py, used by the original).
  """
  h, s = width, length
  return 24.0 * passes * batch * s * layers * h * h * (1 + s / (6 * h) + vocabulary / (16 * layers * h))


def _describe(c: collectives.Collective, trips: Mapping[str, int], aim: targets.Target) -> dict[str, Any]:
  times = c.times() * (math.prod(n for loop, n in trips.items() if loop in c.source) if None in c.loops else 1)
  inside = c.group <= aim.chip.node or aim.chip.platform == "tpu"
  rate = aim.chip.inner_links if inside else aim.chip.outer_links
  return {"kind": c.kind, "axes": list(c.axes), "bytes": c.sent * times, "times": times,
          "seconds": c.sent * times / rate}


def _total(exchanged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """By kind and axes, most bytes first."""
  sums: dict[tuple[str, ...], dict[str, Any]] = {}
  for c in exchanged:
    into = sums.setdefault((c["kind"], *c["axes"]), {"kind": c["kind"], "axes": c["axes"], "bytes": 0.0, "times": 0,
                                                      "seconds": 0.0})
    for name in ("bytes", "times", "seconds"):
      into[name] += c[name]
  return sorted(sums.values(), key=lambda c: -c["bytes"])


def _whole_run(result: Mapping[str, Any], aim: targets.Target, budget: int | None) -> dict[str, Any]:
  tokens = result["tokens_per_second"] * DAY
  if budget is None:
    return {"tokens_per_day": tokens}
  days = budget / tokens
  energy = None if aim.chip.watts is None else days * 24 * aim.devices * aim.chip.watts / 1e6
  return {"tokens_per_day": tokens, "days": days, "megawatt_hours": energy}
