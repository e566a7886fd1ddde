"""What memory a model takes, by arithmetic: of its sizes, the precision, the context, the mesh; nothing is compiled.

Weights, cache and optimizer state are exact; activations are what layers keep for backward at least. What a program
takes besides, a plan reads from the compiled one (estimate.py).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from glmjax import display
from glmjax import errors
from glmjax.infer import offload
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.plan import picture
from glmjax.plan import programs
from glmjax.plan import targets
from glmjax.train import optimizer as optimizer_lib

_ONE = mesh_lib.MeshConfig(data=1)


@dataclasses.dataclass(frozen=True)
class Memory:
  """What one device holds, by arithmetic."""

  parts: dict[str, float]  # bytes, by what they are for

  @property
  def total(self) -> float:
    """The bytes of all parts."""
    return sum(self.parts.values())

  def plot(self, card: str | None = None) -> display.Picture:
    """Draws the parts in GiB, and what is usable of a card, as "rtx3090"."""
    if card is None:
      return picture.bars(self.parts, self.total, None, "by arithmetic")
    room = targets.room(_chip(card))
    verdict = "room for it" if self.total <= room else "too much for it"
    return picture.bars(self.parts, self.total, room, f"{card}, by arithmetic: {verdict}")

  def _repr_html_(self) -> str:
    sizes = [*self.parts.items(), ("all of it", self.total)]
    return display.table(("of a device", "GiB"), [(name, f"{size / targets.GIB:,.2f}") for name, size in sizes])


def decoding(
  model: config_lib.GLMConfig, work: programs.Decode = programs.Decode(), mesh: mesh_lib.MeshConfig = _ONE
) -> Memory:
  """Returns what a device holds while a model answers: weights, in the model's `dtype` or quantized, and the KV cache.

  Raises:
    errors.InputError: for a model that does not divide over the mesh.
  """
  sizes = _sizes(mesh)
  for name, size, axes in partitioning.uneven(params_lib.sizes(model), sizes):
    raise errors.InputError(f"{name} {size} does not divide over {axes[0]}={sizes[axes[0]]}: choose another size")
  rows = math.prod(sizes[axis] for axis in partitioning.ROW_AXES)
  rows = work.batch // rows if work.batch % rows == 0 else work.batch  # of a device
  cache = 2 * model.num_layers * rows * work.context * model.embed_dim * itemsize(model) // sizes["tensor"]
  weights = _weights(model, work.bits, work.offload_layers, tuple(sizes.items()))
  return Memory({name: size for name, size in weights.items() if size} | {"KV cache": cache})


def training(model: config_lib.GLMConfig, work: programs.Train, mesh: mesh_lib.MeshConfig = _ONE) -> Memory:
  """Returns what a device holds at least in a training step: float32 weights and moments, a gradient (with ZeRO-1 of
  all weights, and their copy), and what layers keep for backward.
  """
  sizes = _sizes(mesh)
  share = params_lib.count(model) / (sizes["fsdp"] * sizes["tensor"] * sizes["stage"])
  whole = gathered(model, work, sizes)
  state = share / sizes["data"] if work.strategy == "zero1" else share
  moments = 2 if isinstance(work.optimizer, optimizer_lib.AdamW) else 1
  return Memory(
    {
      "weights": 4 * state,
      "optimizer": 4 * moments * state,
      "gradients": whole or 4 * share,
      "activations": activations(model, work, sizes),
    }
  )


def smallest(model: config_lib.GLMConfig, work: programs.Decode, card: str) -> int | None:
  """Returns how many of a card, of 1, 2, 4, ... over which the model divides, hold weights and cache; None: none do.

  What a program takes besides is left out: `glmjax plan --fits` compiles, and now and then needs more.
  """
  room = targets.room(_chip(card))
  counts = (n for n in sets(model) if decoding(model, work, mesh_lib.MeshConfig(data=1, tensor=n)).total <= room)
  return next(counts, None)


def sets(model: config_lib.GLMConfig) -> list[int]:
  """Returns the numbers of devices, of 1, 2, 4, ..., that a model's heads, mlp and vocabulary split over."""
  sizes = params_lib.sizes(model)
  return [1 << i for i in range(7) if not partitioning.uneven(sizes, {"tensor": 1 << i})]


def _chip(card: str) -> targets.Chip:
  if card not in targets.CHIPS:
    raise errors.InputError(f"card {card!r} is not known: there are {', '.join(targets.CHIPS)}")
  return targets.CHIPS[card]


def _sizes(mesh: mesh_lib.MeshConfig) -> dict[str, int]:
  return {axis: max(1, size) for axis, size in dataclasses.asdict(mesh).items()}  # -1: of devices unknown here


@functools.lru_cache(maxsize=1024)
def _weights(
  model: config_lib.GLMConfig, bits: int | None, offload_layers: int, mesh: tuple[tuple[str, int], ...]
) -> Mapping[str, int]:
  """Returns a device's bytes of each part of the model (params.PARTS)."""
  offload.check(model.num_layers, offload_layers)
  found = dict.fromkeys(params_lib.PARTS, 0)
  for path, param in params_lib.table(model).items():
    if not path.startswith(f"{params_lib.LAYERS}/"):
      found[param.part] += _stored(param, itemsize(model), None, dict(mesh))
  for param in params_lib.layer(model).values():
    here = model.num_layers - (offload_layers if param.quantizes else 0)
    found[param.part] += here * _stored(param, itemsize(model), bits if param.quantizes else None, dict(mesh))
  return found


def _stored(param: params_lib.Param, size: int, bits: int | None, mesh: Mapping[str, int]) -> int:
  """Returns a device's bytes of a parameter: `size` for each number, or codes and a float16 scale for each output."""
  rules = dict(partitioning.FSDP)

  def elements(places: list[int]) -> int:
    over = [rules.get(param.axes[i]) for i in places]
    axes = [axis for each in over for axis in ((each,) if isinstance(each, str) else each or ())]
    return math.prod(param.shape[i] for i in places) // math.prod(mesh[axis] for axis in axes)

  every = list(range(len(param.shape)))
  if bits is None:
    return size * elements(every)
  return elements(every) * bits // 8 + 2 * elements([i for i in every if i not in param.inputs])


def gathered(model: config_lib.GLMConfig, workload: programs.Train, mesh: Mapping[str, int]) -> float:
  """Returns the bytes of ZeRO-1's copy of the weights and their float32 gradient, which data and fsdp do not split."""
  if workload.strategy != "zero1" or mesh["data"] * mesh["fsdp"] == 1:
    return 0.0
  return (itemsize(model) + 4) * params_lib.count(model) / (mesh["tensor"] * mesh["stage"])


def activations(model: config_lib.GLMConfig, workload: programs.Train, mesh: Mapping[str, int]) -> float:
  """Returns the bytes of a device that wait for backward, at least.

  What `remat` keeps of all rows at a time; with 1F1B of a micro-batch of the pipeline, of the others their stage's
  input, 2 S - 1 at a time, and the ring.
  """
  each = kept(model, workload.strategy, model.remat, mesh["tensor"])
  if not is_1f1b(workload, mesh):
    return (
      _row(model, workload, mesh)
      * (workload.micro_batch or workload.batch_size)
      * each
      * (model.num_layers / mesh["stage"])
    )
  inputs = (2 * mesh["stage"] - 1) * kept(model, workload.strategy, "full", mesh["tensor"])
  group = math.ceil(model.num_layers / mesh["stage"])
  return _row(model, workload, mesh) * _pipelined(workload, mesh)[1] * (group * each + inputs) + ring(
    model, workload, mesh
  )


def kept(model: config_lib.GLMConfig, strategy: str, remat: str, tensor: int) -> float:
  """Counts the numbers of a token that a layer keeps for backward: its input, and its products' results if not made
  again.

  With remat "none" at least so many. Strategy "sequence" splits what is as wide as the layer's input.
  """
  width = model.embed_dim / (tensor if strategy == "sequence" else 1)
  if remat == "full":
    return width
  return 2 * width + (4 * model.embed_dim + model.mlp_branches * model.mlp_dim) / tensor


def is_1f1b(workload: programs.Train, mesh: Mapping[str, int]) -> bool:
  """Tells whether rows flow through the stages forward and backward in turn."""
  return mesh["stage"] > 1 and workload.pipeline.kind == "1f1b"


def _pipelined(workload: programs.Train, mesh: Mapping[str, int]) -> tuple[int, float]:
  """Returns the pipeline's micro-batches, and the rows of each, over all devices."""
  rows = workload.micro_batch or workload.batch_size
  count = workload.pipeline.microbatches or max(1, rows // (mesh["data"] * mesh["fsdp"]))
  return count, rows / count


def ring(model: config_lib.GLMConfig, workload: programs.Train, mesh: Mapping[str, int]) -> float:
  """Returns the bytes of the rows that wait for 1F1B's first stage: a device's share of all of them."""
  return (
    _row(model, workload, mesh)
    * (workload.micro_batch or workload.batch_size)
    / mesh["stage"]
    * kept(model, workload.strategy, "full", mesh["tensor"])
  )


def _row(model: config_lib.GLMConfig, workload: programs.Train, mesh: Mapping[str, int]) -> float:
  """Returns a device's bytes of a number of each token of one row, of as many as all devices have."""
  return itemsize(model) * workload.length / (mesh["data"] * mesh["fsdp"] * mesh["context"])


def kernels(model: config_lib.GLMConfig) -> int:
  """Returns the weights of a layer that are quantized or offloaded."""
  return (params_lib.count_of_matmuls(model) - model.vocab_size * model.embed_dim) // model.num_layers


def itemsize(model: config_lib.GLMConfig) -> int:
  """Returns the bytes of a number that the model computes with."""
  return 4 if model.dtype == "float32" else 2
