"""What memory a model takes, by arithmetic: of its sizes, the precision, the context, the mesh; nothing is compiled.

Weights, cache and optimizer state are exact, but for Adam's counter of four bytes; gradients and activations are what
a step holds at least. What a program takes besides, a plan reads from the compiled one (estimate.py).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from glmjax import display
from glmjax import errors
from glmjax import ranges
from glmjax.infer import offload
from glmjax.infer import placement as placement_lib
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.plan import picture
from glmjax.plan import programs
from glmjax.plan import targets
from glmjax.train import feed
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import pipeline as pipeline_lib

_OF_LAYERS = f"{params_lib.LAYERS}/"  # how paths of layers' parameters begin


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
  model: config_lib.GLMConfig,
  workload: programs.Decode = programs.Decode(),
  mesh: mesh_lib.MeshConfig | str | None = None,
) -> Memory:
  """Returns what a device holds while a model answers: weights, in the model's `dtype` or quantized, and the KV cache.

  Args:
    mesh: as "tensor=4"; None: one device. data=-1, "all that are left", counts as 1: there are none here.

  Raises:
    errors.InputError: for what inference would not split over the mesh.
  """
  _check_kinds(model, workload, programs.Decode)
  shape = _shape(mesh)
  placement_lib.Placement(shape).check(model)
  sizes = dict(shape.shape)
  rows = partitioning.batch_shards(shape)
  rows = workload.batch // rows if workload.batch % rows == 0 else workload.batch  # of a device
  cache = 2 * model.num_layers * rows * workload.context * model.embed_dim * itemsize(model) // sizes["tensor"]
  weights = _weights(model, workload.bits, workload.offload_layers, shape)
  return Memory({name: size for name, size in weights.items() if size} | {"KV cache": cache})


def training(
  model: config_lib.GLMConfig, workload: programs.Train, mesh: mesh_lib.MeshConfig | str | None = None
) -> Memory:
  """Returns what a device holds at least in a training step: float32 weights and moments, a gradient (with ZeRO-1 of
  all weights, and their copy), what layers keep for backward, and a model that is frozen beside what trains.

  Args:
    mesh: as "fsdp=8"; None: one device. data=-1, "all that are left", counts as 1: there are none here.

  Raises:
    errors.InputError: for what the trainer would not split over the mesh.
  """
  _check_kinds(model, workload, programs.Train)
  shape = _shape(mesh)
  _check_training(model, workload, shape)
  sizes = dict(shape.shape)
  state = _state(workload.model(model), workload, shape)
  parts = {
    "weights": 4 * state.weights,
    "optimizer": 4 * state.moments,
    "gradients": gathered(model, workload, sizes) or 4 * state.weights,
    "activations": activations(model, workload, sizes),
  }
  return Memory(parts | ({"frozen": state.frozen_bytes} if workload.trainable else {}))


def smallest(model: config_lib.GLMConfig, workload: programs.Decode, card: str) -> int | None:
  """Returns how many of a card, of 1, 2, 4, ... over which the model divides, hold weights and cache; None: none do.

  What a program takes besides is left out: `glmjax plan --fits` compiles, and now and then needs more.
  """
  _check_kinds(model, workload, programs.Decode)
  room = targets.room(_chip(card))
  counts = (n for n in sets(model) if decoding(model, workload, mesh_lib.MeshConfig(data=1, tensor=n)).total <= room)
  return next(counts, None)


def sets(model: config_lib.GLMConfig) -> list[int]:
  """Returns the numbers of devices, of 1, 2, 4, ..., that a model's heads, mlp and vocabulary split over."""
  sizes = params_lib.sizes(model)
  return [1 << i for i in range(7) if not partitioning.uneven(sizes, {"tensor": 1 << i})]


def _chip(card: str) -> targets.Chip:
  ranges.choice("card", card, tuple(targets.CHIPS))
  return targets.CHIPS[card]


def _check_kinds(model: Any, workload: Any, kind: type[programs.Train] | type[programs.Decode]) -> None:
  for name, value, wanted in (("model", model, config_lib.GLMConfig), ("workload", workload, kind)):
    if not isinstance(value, wanted):
      raise errors.InputError(f"{name} is of type {type(value).__name__}: give a {wanted.__module__}.{wanted.__name__}")


def _shape(mesh: mesh_lib.MeshConfig | str | None) -> jax.sharding.AbstractMesh:
  """Returns a mesh of no devices, which checks of sizes take as one of devices."""
  config = mesh_lib.given(mesh) or mesh_lib.MeshConfig(data=1)
  sizes = dataclasses.asdict(config) | ({"data": 1} if config.data == -1 else {})
  for axis, size in sizes.items():
    ranges.whole(f"MeshConfig.{axis}", size, 1)
  return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


def _check_training(model: config_lib.GLMConfig, workload: programs.Train, mesh: jax.sharding.AbstractMesh) -> None:
  """Raises InputError, by the trainer's own checks, where weights, rows or layers do not divide over the mesh."""
  rules = partitioning.strategy(workload.strategy)
  sizes = params_lib.sizes(model)
  sizes.pop(params_lib.LAYERS)  # the stages may hold unlike numbers of them: the pipeline's check
  partitioning.check_divisible(sizes, mesh, rules)
  layout = feed.Layout.make(
    mesh, rules, workload.batch_size, workload.micro_batch, workload.length, model.position_kind, model.vocab_size
  )
  pipeline_lib.make(workload.pipeline, model, mesh, layout.rows)


@dataclasses.dataclass
class _State:
  """What a device holds of a training state, in numbers but for the last."""

  weights: int = 0  # that are trained
  moments: int = 0  # the optimizer's
  frozen_bytes: int = 0


def _state(model: config_lib.GLMConfig, workload: programs.Train, mesh: jax.sharding.AbstractMesh) -> _State:
  """Counts a device's weights, and the optimizer's moments of them: two of each, of the blocks' kernels one in Muon.

  What lies outside of the layers every stage holds; of the layers as many as it has room for.
  """
  rules, stages = partitioning.strategy(workload.strategy), mesh.shape[partitioning.STAGE_AXIS]
  rounds = workload.pipeline.rounds if stages > 1 else 1
  group = math.ceil(model.num_layers / (stages * rounds))
  muon = isinstance(workload.optimizer, optimizer_lib.Muon)
  whole = {path: param for path, param in params_lib.table(model).items() if not path.startswith(_OF_LAYERS)}
  of_layers = {f"{_OF_LAYERS}{path}": param for path, param in params_lib.layer(model).items()}
  state = _State()
  for times, params in ((1, whole), (rounds * group, of_layers)):
    for path, param in params.items():
      if workload.is_trained(path, param):
        found = times * _elements(param.shape, param.axes, mesh, rules)
        state.weights += found
        state.moments += (1 if muon and param.matrix and path.startswith(_OF_LAYERS) else 2) * found
      else:
        size = itemsize(model) if param.is_matrix else 4
        state.frozen_bytes += times * _stored(param, size, workload.base_bits if param.quantizes else None, mesh)
  return state


@functools.lru_cache(maxsize=1024)
def _weights(
  model: config_lib.GLMConfig, bits: int | None, offload_layers: int, mesh: jax.sharding.AbstractMesh
) -> Mapping[str, int]:
  """Returns a device's bytes of each part of the model (params.PARTS)."""
  offload.check(model.num_layers, offload_layers)
  found = dict.fromkeys(params_lib.PARTS, 0)
  for path, param in params_lib.table(model).items():
    if not path.startswith(_OF_LAYERS):
      found[param.part] += _stored(param, itemsize(model), None, mesh)
  for param in params_lib.layer(model).values():
    here = model.num_layers - (offload_layers if param.quantizes else 0)
    found[param.part] += here * _stored(param, itemsize(model), bits if param.quantizes else None, mesh)
  return found


def _stored(param: params_lib.Param, size: int, bits: int | None, mesh: jax.sharding.AbstractMesh) -> int:
  """Returns a device's bytes of a parameter: `size` for each number, or codes and a float16 scale for each output."""
  elements = _elements(param.shape, param.axes, mesh, partitioning.FSDP)
  if bits is None:
    return size * elements
  outputs = [i for i in range(len(param.shape)) if i not in param.inputs]
  scales = _elements(
    tuple(param.shape[i] for i in outputs), tuple(param.axes[i] for i in outputs), mesh, partitioning.FSDP
  )
  return elements * bits // 8 + 2 * scales


@functools.lru_cache(maxsize=4096)
def _elements(
  shape: tuple[int, ...], names: tuple[str, ...], mesh: jax.sharding.AbstractMesh, rules: partitioning.Rules
) -> int:
  """Counts what a device holds of an array whose axes have these logical names."""
  return math.prod(partitioning.named(mesh, rules, *names).shard_shape(shape))


def gathered(model: config_lib.GLMConfig, workload: programs.Train, mesh: Mapping[str, int]) -> float:
  """Returns the bytes of ZeRO-1's copy of the weights and their float32 gradient, which data and fsdp do not split; as
  if stages split all of them, so at least.
  """
  if workload.strategy != "zero1" or mesh["data"] * mesh["fsdp"] == 1:
    return 0.0
  table = params_lib.table(workload.model(model))
  trained = sum(param.size for path, param in table.items() if workload.is_trained(path, param))
  return (itemsize(model) + 4) * trained / (mesh["tensor"] * mesh["stage"])


def activations(model: config_lib.GLMConfig, workload: programs.Train, mesh: Mapping[str, int]) -> float:
  """Returns the bytes of a device that wait for backward, at least.

  What `remat` keeps of all rows at a time; with 1F1B of a micro-batch of the pipeline, of the others their stage's
  input, 2 S - 1 at a time, and the ring. Beside a frozen model the layers' inputs alone: its products ask for no more.
  """
  each = kept(model, workload.strategy, "full" if workload.trainable else model.remat, mesh["tensor"])
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


def count_of_kernels(model: config_lib.GLMConfig) -> int:
  """Counts the weights of a layer that are quantized or offloaded."""
  return (params_lib.count_of_matmuls(model) - model.vocab_size * model.embed_dim) // model.num_layers


def itemsize(model: config_lib.GLMConfig) -> int:
  """Returns the bytes of a number that the model computes with."""
  return 4 if model.dtype == "float32" else 2
