"""What would make a plan fit: for each size that can be changed, the first value that does, by arithmetic.

The compiled program's own bytes are scaled: split weights and optimizer state by what they are split into, activations
by the rows of a device, caches by the context; all else is taken to stay as it is. It names what to compile next.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from glmjax.models import config as config_lib
from glmjax.plan import programs
from glmjax.plan import targets

_MOST_DEVICES = 1 << 14


@dataclasses.dataclass(frozen=True)
class _Plan:
  """What does not fit."""

  model: config_lib.GLMConfig
  aim: targets.Target
  mesh: Mapping[str, int]
  memory: Mapping[str, int]
  peak: int
  room: int


def changes(model: config_lib.GLMConfig, workload: programs.Train | programs.Decode, aim: targets.Target,
            result: Mapping[str, Any]) -> dict[str, Any]:
  """The part that takes most, and the changes of which each would make it fit, with the peak expected then."""
  plan = _Plan(model, aim, result["mesh"], result["memory"], result["peak_bytes_per_device"],
               result["usable_memory_bytes"])
  found = _training(plan, workload) if isinstance(workload, programs.Train) else _decoding(plan, workload)
  return {"largest_part": max(plan.memory, key=plan.memory.get),
          "changes": [{"change": text, "peak_bytes_per_device": round(peak)} for text, peak in found]}


def _decoding(plan: _Plan, workload: programs.Decode) -> Iterator[tuple[str, float]]:
  held = plan.memory["parameters"] + plan.memory.get("kv_cache", 0)
  tensor = plan.mesh["tensor"]
  yield from _first(plan, ((f"MeshConfig.tensor={tensor * k}{_devices(plan, k)}", plan.peak - held * (1 - 1 / k))
                           for k in _factors() if _splits(plan.model, tensor=tensor * k)))
  now = workload.bits or (32 if plan.model.dtype == "float32" else 16)
  kernels = plan.model.matmul_parameters() - plan.model.vocab_size * plan.model.embed_dim
  share = kernels / plan.mesh["tensor"] / plan.mesh["fsdp"]
  yield from _first(plan, ((f"Decode.bits={bits}", plan.peak - share * (now - bits) / 8)
                           for bits in (8, 4) if bits < now))
  for name, value in (("batch", workload.batch), ("context", workload.context)):
    yield from _first(plan, ((f"Decode.{name}={value // k}", plan.peak - plan.memory.get("kv_cache", 0) * (1 - 1 / k))
                             for k in _factors() if value // k and value % k == 0))


def _training(plan: _Plan, workload: programs.Train) -> Iterator[tuple[str, float]]:
  model, mesh = plan.model, plan.mesh
  held = plan.memory["parameters"] + plan.memory["optimizer"]
  micro = workload.micro_batch or workload.batch_size
  gradients = plan.memory["parameters"] if micro < workload.batch_size else 0  # their sums, float32
  activations = max(0, plan.memory["temporaries"] - gradients)
  other = plan.peak - held - gradients - activations
  shards = mesh["data"] * mesh["fsdp"]
  spared = (kept(model, model.remat, mesh["tensor"]) - kept(model, "full", mesh["tensor"])) * (
      micro * workload.length / shards / mesh["context"] * model.num_layers / mesh["stage"]
      * (4 if model.dtype == "float32" else 2))

  def peak(split: int = 1, rows: int = 1, less: float = 0.0) -> float:
    return (held + gradients) / split + (activations - less) / rows + other

  remats = [("", 0.0)] + ([("GLMConfig.remat=full", min(spared, activations))] if spared else [])
  fewer = [("", 1)] + [(f"Train.micro_batch={micro // k}", k) for k in _factors() if micro % (shards * k) == 0]
  within = [("", 1)]
  if workload.strategy == "fsdp":
    within += [(f"MeshConfig.fsdp={mesh['fsdp'] * k}, MeshConfig.data={mesh['data'] // k}", k) for k in _factors()
               if mesh["data"] % k == 0 and _splits(model, fsdp=mesh["fsdp"] * k)]
  beyond = [(f"MeshConfig.{'data' if workload.strategy == 'zero1' else 'fsdp'}={_grown(mesh, workload.strategy) * k}"
             f"{_devices(plan, k)}", k) for k in _factors()
            if micro % (shards * k) == 0 and _splits(model, fsdp=shards * k)]
  join = lambda *texts: ", ".join(filter(None, texts))
  alone = []
  for some in ([(text, peak(less=less)) for text, less in remats[1:]], [(t, peak(rows=k)) for t, k in fewer[1:]],
               [(t, peak(split=k)) for t, k in within[1:]],
               [(t, peak(split=k, rows=k)) for t, k in beyond]):  # the micro-batch meets more devices
    alone += _first(plan, some)
  together = ((join(r, f, w), peak(k, rows, less)) for w, k in within for f, rows in fewer for r, less in remats)
  yield from alone or _first(plan, together) or _first(plan, (
      (join(r, b), peak(k, k, less)) for b, k in beyond for r, less in remats))


def _grown(mesh: Mapping[str, int], strategy: str) -> int:
  return mesh["data" if strategy == "zero1" else "fsdp"]


def kept(model: config_lib.GLMConfig, remat: str, tensor: int) -> float:
  """Numbers of a token that a layer keeps for backward: its input, and its products' results if not made again.

  With remat "none" at least so many.
  """
  if remat == "full":
    return model.embed_dim
  return 2 * model.embed_dim + (4 * model.embed_dim + model.mlp_branches * model.mlp_dim) / tensor


def _first(plan: _Plan, found: Iterator[tuple[str, float]] | list[tuple[str, float]]) -> list[tuple[str, float]]:
  return next(([(text, peak)] for text, peak in found if peak <= plan.room), [])


def _factors() -> Iterator[int]:
  return (1 << i for i in range(1, int(math.log2(_MOST_DEVICES)) + 1))


def _splits(model: config_lib.GLMConfig, tensor: int = 1, fsdp: int = 1) -> bool:
  return not any(size % tensor for size in (model.num_heads, model.mlp_dim, model.vocab_size)) and (
      model.embed_dim % fsdp == 0)


def _devices(plan: _Plan, times: int) -> str:
  """Which target has so many times the devices."""
  count = plan.aim.devices * times
  if plan.aim.chip.platform == "tpu":
    return f" on a slice of {count}"
  return f" on {plan.aim.name.split(':')[0]}:{count}"
