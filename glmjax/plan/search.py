"""`glmjax plan --search`: meshes, micro-batches and remats for a target, ranked by the time of their compiled steps.

Sizes that do not divide, and weights, optimizer state and layer inputs that do not fit, rule candidates out by
arithmetic. The others are compiled in the order of an estimated time, until as many are as may be. What those compiled
hold beyond the arithmetic says which of the rest to leave for last.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import tqdm

from glmjax import errors
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.plan import advice
from glmjax.plan import devices as devices_lib
from glmjax.plan import estimate
from glmjax.plan import memory
from glmjax.plan import programs
from glmjax.plan import targets

_REMATS = ("none", "dots", "full")  # that which keeps most first
_BIG = "hold more than one that was compiled and does not fit"


@dataclasses.dataclass(frozen=True)
class _Candidate:
  """One way to run a workload."""

  model: config_lib.GLMConfig
  workload: programs.Train | programs.Decode
  mesh: mesh_lib.MeshConfig
  seconds: float = 0.0  # estimated

  @property
  def name(self) -> str:
    """The candidate's name, of what it binds: axes of the mesh, micro-batch, remat."""
    sizes = [f"{axis}={size}" for axis in mesh_lib.AXES if (size := getattr(self.mesh, axis)) > 1]
    if isinstance(self.workload, programs.Train):
      sizes += [f"micro_batch={self.workload.micro_batch or self.workload.batch_size}", f"remat={self.model.remat}"]
    return " ".join(sizes) or "one device"

  def holds_more_than(self, other: "_Candidate") -> bool:
    """Tells whether it holds at least what `other` does: the same mesh, with as many rows at a time and as much kept
    for backward.
    """
    return (
      self.mesh == other.mesh
      and isinstance(self.workload, programs.Train)
      and (self.workload.micro_batch or self.workload.batch_size)
      >= (other.workload.micro_batch or other.workload.batch_size)
      and _REMATS.index(self.model.remat) <= _REMATS.index(other.model.remat)
    )


def rank(
  model: config_lib.GLMConfig,
  workload: programs.Train | programs.Decode,
  aim: targets.Target,
  mesh: mesh_lib.MeshConfig,
  tries: int,
) -> dict[str, Any]:
  """Returns plans of the candidates that were compiled, those that fit, fastest first, and why the others were not.

  `mesh` gives the pipeline's stages, which stay as they are, as do the workload's strategy and schedule. Of decoding,
  the sizes of tensor are tried.
  """
  if tries < 1:
    raise errors.InputError(f"tries is {tries}: give 1 or more")
  left_out: collections.Counter[str] = collections.Counter()
  devices, room = devices_lib.of(aim), targets.room(aim.chip)
  stage = dict(zip(mesh_lib.AXES, mesh.sizes(aim.devices)))["stage"]
  candidates = (
    _training(model, workload, aim, stage)
    if isinstance(workload, programs.Train)
    else (_decoding(model, workload, aim))
  )
  waiting = []
  for candidate in candidates:
    reason = _ruled_out(candidate, aim)
    if reason is None:
      waiting.append(dataclasses.replace(candidate, seconds=_seconds(candidate, aim)))
    else:
      left_out[reason] += 1
  waiting.sort(key=lambda candidate: candidate.seconds)
  found: list[dict[str, Any]] = []
  beyond = 1.0  # what programs hold besides weights and optimizer state, to the least that arithmetic knows of
  with tqdm.tqdm(total=tries, desc="compiled", disable=None) as bar:
    while waiting and len(found) < tries:
      likely = (i for i, (held, kept) in enumerate(map(_bytes, waiting)) if held + beyond * kept <= room)
      candidate = waiting.pop(next(likely, 0))
      try:
        mesh_lib.make_mesh(candidate.mesh, devices)
      except errors.InputError:
        left_out["do not lie on the slice"] += 1
        continue
      result = _compile(candidate, aim)
      found.append(result)
      bar.update()
      held, kept = _bytes(candidate)
      beyond = max(beyond, (result.get("peak_bytes_per_device", 0) - held) / max(kept, 1))
      if not result.get("fits", True):
        left_out[_BIG] += sum(other.holds_more_than(candidate) for other in waiting)
        waiting = [other for other in waiting if not other.holds_more_than(candidate)]
  left_out["are slower by the estimate, or unlikely to fit (more --tries compile them)"] += len(waiting)
  return {
    "target": aim.name,
    "devices": aim.devices,
    "device": aim.chip.kind,
    "candidates": sorted(found, key=_order),
    "left_out": {reason: count for reason, count in left_out.items() if count},
  }


def _order(result: dict[str, Any]) -> tuple[bool, float]:
  """Returns the key that sorts plans: what fits first, and the fastest of it; of the rest, what is nearest to
  fitting.
  """
  fits = result.get("fits", False)
  return not fits, result.get("step_seconds" if fits else "peak_bytes_per_device", math.inf)


def _compile(candidate: _Candidate, aim: targets.Target) -> dict[str, Any]:
  about = {
    "name": candidate.name,
    "estimated_seconds": candidate.seconds,
    "remat": candidate.model.remat,
    "micro_batch": getattr(candidate.workload, "micro_batch", None),
  }
  try:
    return about | estimate.step(candidate.model, candidate.workload, aim, candidate.mesh)
  except (ValueError, jax.errors.JaxRuntimeError) as error:  # what only tracing or the compiler can tell
    return about | {"error": (str(error).strip() or type(error).__name__).splitlines()[0][:300]}
  finally:
    jax.clear_caches()  # programs of thousands of devices add up


def _training(
  model: config_lib.GLMConfig, workload: programs.Train, aim: targets.Target, stage: int
) -> Iterator[_Candidate]:
  for tensor, context in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
    rows, left = divmod(aim.devices, stage * tensor * context)
    if left or not rows:
      continue
    for fsdp in _divisors(rows):
      mesh = mesh_lib.MeshConfig(rows // fsdp, fsdp, stage, tensor, context)
      each = workload.batch_size // rows if workload.batch_size % rows == 0 else 1
      for share, remat in itertools.product(_divisors(each), _REMATS):
        yield _Candidate(
          dataclasses.replace(model, remat=remat),
          dataclasses.replace(workload, micro_batch=None if share == each else share * rows),
          mesh,
        )


def _decoding(model: config_lib.GLMConfig, workload: programs.Decode, aim: targets.Target) -> Iterator[_Candidate]:
  for tensor in _divisors(aim.devices):
    yield _Candidate(model, workload, mesh_lib.MeshConfig(aim.devices // tensor, tensor=tensor))


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def _ruled_out(candidate: _Candidate, aim: targets.Target) -> str | None:
  """Says why arithmetic leaves it aside: exact divisions, and less than it will hold."""
  model, workload, mesh = candidate.model, candidate.workload, candidate.mesh
  rules = partitioning.strategy(workload.strategy) if isinstance(workload, programs.Train) else partitioning.FSDP
  split = dataclasses.asdict(mesh) | {partitioning.STAGE_AXIS: 1}  # stages may hold unlike numbers of layers
  for name, size, axes in partitioning.uneven(params_lib.sizes(model), split, rules):
    return f"split {name} {size:,} unevenly over {' x '.join(axes)}"
  if isinstance(workload, programs.Train) and workload.batch_size % (mesh.data * mesh.fsdp):
    return "split the batch unevenly over data x fsdp"
  if isinstance(workload, programs.Train) and workload.length % mesh.context:
    return "split the rows' tokens unevenly over context"
  if isinstance(workload, programs.Train) and not advice.flows(workload, dataclasses.asdict(mesh)):
    return "cut the rows unevenly into the pipeline's micro-batches"
  held, kept = _bytes(candidate)
  if held > targets.room(aim.chip):
    state = "optimizer state" if isinstance(workload, programs.Train) else "a KV cache"
    return f"hold weights and {state} that do not fit"
  return "keep more for backward than fits" if held + kept > targets.room(aim.chip) else None


def _bytes(candidate: _Candidate) -> tuple[float, float]:
  """Returns the bytes that a device holds at least: weights, cache and optimizer state; gradients and what layers keep
  for backward.
  """
  model, workload, mesh = candidate.model, candidate.workload, candidate.mesh
  if isinstance(workload, programs.Decode):
    return memory.decoding(model, workload, mesh).total, 0.0
  parts = memory.training(model, workload, mesh).parts
  return parts["weights"] + parts["optimizer"] + parts.get("frozen", 0), parts["gradients"] + parts["activations"]


def _seconds(candidate: _Candidate, aim: targets.Target) -> float:
  """Estimates a step's seconds, by textbook formulas of what it computes, reads and exchanges; it orders candidates,
  nothing else.
  """
  model, workload, mesh, chip = candidate.model, candidate.workload, candidate.mesh, aim.chip
  weights = 2 * params_lib.count(model) / (mesh.tensor * mesh.stage)

  def exchange(kind: str, sent: float, group: int, stride: int) -> float:
    return 0.0 if group == 1 else estimate.exchange_seconds(kind, sent * (group - 1) / group, group, stride, aim)

  if isinstance(workload, programs.Decode):
    read = weights * (workload.bits or 16) / 16 / chip.memory_bandwidth
    return read + 2 * model.num_layers * exchange("all-reduce", 4 * model.embed_dim * workload.batch, mesh.tensor, 1)
  again = {"full": 1, "dots": 0.1, "none": 0}[model.remat]  # times that forward runs besides
  micro_batches = workload.batch_size // (workload.micro_batch or workload.batch_size)
  shards = mesh.data * mesh.fsdp * mesh.context
  tokens = workload.batch_size * workload.length / shards  # of a device's rows, in a step
  compute = (
    (1 + again / 3)
    * tokens
    * params_lib.train_flops_per_token(model, workload.length)
    / (mesh.tensor * mesh.stage)
    / chip.peak_flops
  )
  layers = model.num_layers / mesh.stage
  sums = (
    (4 + 2 * (again == 1))
    * layers
    * micro_batches
    * exchange("all-reduce", 4 * tokens / micro_batches * model.embed_dim, mesh.tensor, mesh.context)
  )
  keys = (
    (2 + (again == 1))
    * layers
    * micro_batches
    * exchange("all-gather", 4 * tokens / micro_batches * model.embed_dim / mesh.tensor, mesh.context, 1)
  )
  inner = mesh.stage * mesh.tensor * mesh.context
  gathered = (3 + again) * micro_batches * exchange("all-gather", weights, mesh.fsdp, inner)
  summed = micro_batches * exchange("all-reduce", 4 * weights / mesh.fsdp, mesh.data, inner * mesh.fsdp)
  read = (3 + again) * micro_batches * weights / chip.memory_bandwidth
  return max(max(compute, read) + sums + keys, gathered + summed)
