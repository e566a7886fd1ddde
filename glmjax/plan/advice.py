"""What would make a plan fit: for each size that can be changed, the first value that does, by arithmetic.

The compiled program's own bytes are scaled: split weights and optimizer state by what they are split into, activations
by the rows of a device, caches by the context; all else is taken to stay as it is. It names what to compile next.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import partitioning
from glmjax.plan import memory as memory_lib
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


def changes(
  model: config_lib.GLMConfig,
  workload: programs.Train | programs.Decode,
  aim: targets.Target,
  result: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the part that takes most, and the changes of which each would make it fit, with the peak expected then."""
  plan = _Plan(
    model, aim, result["mesh"], result["memory"], result["peak_bytes_per_device"], result["usable_memory_bytes"]
  )
  found = _training(plan, workload) if isinstance(workload, programs.Train) else _decoding(plan, workload)
  return {
    "largest_part": max(plan.memory, key=plan.memory.get),
    "changes": [{"change": text, "peak_bytes_per_device": round(peak)} for text, peak in found],
  }


def _decoding(plan: _Plan, workload: programs.Decode) -> Iterator[tuple[str, float]]:
  model, mesh = plan.model, plan.mesh
  held = plan.memory["parameters"] + plan.memory.get("kv_cache", 0)
  tensor = mesh["tensor"]
  yield from _first(
    plan,
    (
      (f"MeshConfig.tensor={tensor * k}{_devices(plan, k)}", plan.peak - held * (1 - 1 / k))
      for k in _factors()
      if _splits(model, tensor=tensor * k)
    ),
  )
  now = workload.bits or 8 * memory_lib.itemsize(model)
  share = model.num_layers * memory_lib.count_of_kernels(model) / tensor / mesh["fsdp"]
  yield from _first(
    plan, ((f"Decode.bits={bits}", plan.peak - share * (now - bits) / 8) for bits in (8, 4) if bits < now)
  )
  if plan.aim.chip.platform == "cuda":
    yield from _first(plan, _offloads(plan, workload, now / 8))
  for name, value in (("batch", workload.batch), ("context", workload.context)):
    yield from _first(
      plan,
      (
        (f"Decode.{name}={value // k}", plan.peak - plan.memory.get("kv_cache", 0) * (1 - 1 / k))
        for k in _factors()
        if value // k and value % k == 0
      ),
    )


def _offloads(plan: _Plan, workload: programs.Decode, size: float) -> Iterator[tuple[str, float]]:
  """Counts layers into the host's memory, one after another; the first takes room for the largest kernel's copy too."""
  model, already = plan.model, workload.offload_layers
  parts = plan.mesh["tensor"] * plan.mesh["fsdp"]
  layer = size * memory_lib.count_of_kernels(model) / parts
  copy = 0.0 if already else size * model.mlp_branches * model.embed_dim * model.mlp_dim / parts
  for layers in range(already + 1, model.num_layers + 1):
    yield f"programs.Decode.offload_layers={layers}", plan.peak + copy - (layers - already) * layer


def _training(plan: _Plan, workload: programs.Train) -> Iterator[tuple[str, float]]:
  model, mesh, memory = plan.model, plan.mesh, plan.memory
  held = memory["parameters"] + memory["optimizer"] + memory.get("frozen", 0)
  micro = workload.micro_batch or workload.batch_size
  ticks = memory_lib.is_1f1b(workload, mesh)
  whole = memory_lib.gathered(model, workload, mesh)
  sums = memory["parameters"] if (micro < workload.batch_size or ticks) and not whole else 0  # gradients, float32
  kept_now = max(0, memory["temporaries"] - sums - whole)
  other = plan.peak - held - sums - kept_now
  spared = min(
    kept_now,
    memory_lib.activations(model, workload, mesh)
    - memory_lib.activations(dataclasses.replace(model, remat="full"), workload, mesh),
  )
  ring = (
    min(kept_now - spared, memory_lib.ring(model, workload, mesh))
    if ticks and not workload.pipeline.microbatches
    else None
  )

  def peak(split: int = 1, rows: int = 1, less: float = 0.0) -> float:
    # Where the pipeline's micro-batches are one row each, fewer rows are fewer of them: only the ring is smaller.
    scaled = (kept_now - less) / rows if ring is None else kept_now - less - ring * (1 - 1 / rows)
    return (held + sums) / split + scaled + other

  remats = [("", 0.0)] + ([("GLMConfig.remat=full", spared)] if spared > 0 else [])
  fewer, within, beyond = _fewer_rows(mesh, workload), _within(plan, workload), _beyond(plan, workload)
  alone = []
  for some in (
    [(text, peak(less=less)) for text, less in remats[1:]],
    [(t, peak(rows=k)) for t, k in fewer[1:]],
    [(t, peak(split=k)) for t, k in within[1:]],
    [(t, peak(split=k, rows=k)) for t, k in beyond],
  ):  # the micro-batch meets more devices
    alone += _first(plan, some)
  together = ((_joined(r, f, w), peak(k, rows, less)) for w, k in within for f, rows in fewer for r, less in remats)
  yield from (
    alone
    or _first(plan, together)
    or _first(plan, ((_joined(r, b), peak(k, k, less)) for b, k in beyond for r, less in remats))
  )


def _fewer_rows(mesh: Mapping[str, int], workload: programs.Train) -> list[tuple[str, int]]:
  """Returns micro-batches, the present one first, each with how many times fewer its rows are."""
  micro, shards = workload.micro_batch or workload.batch_size, mesh["data"] * mesh["fsdp"]
  if memory_lib.is_1f1b(workload, mesh):
    return [("", 1)]
  return [("", 1)] + [
    (f"Train.micro_batch={micro // k}", k)
    for k in _factors()
    if micro % (shards * k) == 0 and flows(dataclasses.replace(workload, micro_batch=micro // k), mesh)
  ]


def _within(plan: _Plan, workload: programs.Train) -> list[tuple[str, int]]:
  """Returns meshes of as many devices, the present one first, each with how many times more it splits the state."""
  mesh = plan.mesh
  if workload.strategy == "zero1":
    return [("", 1)]
  return [("", 1)] + [
    (f"MeshConfig.fsdp={mesh['fsdp'] * k}, MeshConfig.data={mesh['data'] // k}", k)
    for k in _factors()
    if mesh["data"] % k == 0 and _splits(plan.model, fsdp=mesh["fsdp"] * k)
  ]


def _beyond(plan: _Plan, workload: programs.Train) -> list[tuple[str, int]]:
  """Returns meshes of more devices, each with how many times more they are, and split state and rows."""
  mesh, grown = plan.mesh, "data" if workload.strategy == "zero1" else "fsdp"
  micro, shards = workload.micro_batch or workload.batch_size, mesh["data"] * mesh["fsdp"]
  return [
    (f"MeshConfig.{grown}={mesh[grown] * k}{_devices(plan, k)}", k)
    for k in _factors()
    if micro % (shards * k) == 0
    and _splits(plan.model, fsdp=shards * k)
    and flows(workload, {**mesh, grown: mesh[grown] * k})
  ]


def _joined(*changes: str) -> str:
  return ", ".join(filter(None, changes))


def flows(workload: programs.Train, mesh: Mapping[str, int]) -> bool:
  """Tells whether the rows at a time divide into the pipeline's micro-batches (train/pipeline)."""
  rows, shards = workload.micro_batch or workload.batch_size, mesh["data"] * mesh["fsdp"]
  count = workload.pipeline.microbatches or rows // shards
  return mesh["stage"] == 1 or (count > 0 and count % mesh["stage"] == 0 and rows % (count * shards) == 0)


def _first(plan: _Plan, found: Iterator[tuple[str, float]] | list[tuple[str, float]]) -> list[tuple[str, float]]:
  return next(([(text, peak)] for text, peak in found if peak <= plan.room), [])


def _factors() -> Iterator[int]:
  return (1 << i for i in range(1, int(math.log2(_MOST_DEVICES)) + 1))


def _splits(model: config_lib.GLMConfig, tensor: int = 1, fsdp: int = 1) -> bool:
  return not partitioning.uneven(params_lib.sizes(model), {"tensor": tensor, "fsdp": fsdp})


def _devices(plan: _Plan, times: int) -> str:
  """Names the target that has so many times the devices."""
  count = plan.aim.devices * times
  if plan.aim.chip.platform == "tpu":
    return f" on a slice of {count}"
  return f" on {plan.aim.name.split(':')[0]}:{count}"
