"""Logical axis names to mesh axes: the rule tables, and what applies them.

The model names the axes of its weights and activations in t5x's words; one table per strategy says
which mesh axis each is split over. A strategy is changed by naming another table in gin, never in the
model.

| logical axis | of | meaning |
|---|---|---|
| batch, length | activations | rows, tokens of a row |
| norm_length | activations | tokens of a row, in norms and residuals |
| groups | activations | parts of a batch that share no rows and no tokens: batch x length |
| act_embed, act_heads, act_mlp, act_vocab | activations | model width, heads, mlp width, vocabulary |
| embed, heads, kv, mlp, vocab | weights | the same sizes of a weight |
| step_embed | weights | embed of the copy that a step computes with, in tables that want one |
| layers | weights | the stacked layers |
| qkv, branches | weights | the query, key, value and GeGLU halves; never split |
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flax import linen as nn
import jax

from glmjax import errors
from glmjax import target as target_lib

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

ROW_AXES = ("data", "fsdp")  # of the mesh: those over which rows are split
STAGE_AXIS = "stage"  # of the mesh: that over which layers are split

# Tensor parallelism over heads, mlp and vocabulary, tokens over context.
_ACTIVATIONS: Rules = (
  ("batch", ROW_AXES),
  ("length", "context"),
  ("norm_length", "context"),
  ("groups", (*ROW_AXES, "context")),
  ("act_embed", None),
  ("act_heads", "tensor"),
  ("act_mlp", "tensor"),
  ("act_vocab", "tensor"),
)
_TENSOR: Rules = (
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
  ("kv", None),
  ("qkv", None),
  ("branches", None),
  ("layers", STAGE_AXIS),
)


# Fully sharded: weights, gradients and optimizer state are split over fsdp, along their embed axis. Layers are gathered
# as they are needed, again and again.
FSDP: Rules = _ACTIVATIONS + _TENSOR + (("embed", "fsdp"),)

# Float32 weights and optimizer state are split over data and fsdp (ZeRO, arXiv 1910.02054, stage 1; GLM-130B's). A step
# begins with a gathered copy in the compute dtype and ends with its gradients' sums, once each.
ZERO1: Rules = _ACTIVATIONS + _TENSOR + (("embed", ROW_AXES), ("step_embed", None))

# As FSDP, and what norms and residuals work on, which backward keeps of every layer, is split over tensor too, by
# tokens (sequence parallelism, arXiv 2205.05198): sums over tensor become a reduce-scatter and, before the next
# product, a gather.
SEQUENCE: Rules = tuple((name, ("context", "tensor") if name == "norm_length" else axes) for name, axes in FSDP)

STRATEGIES = {"fsdp": FSDP, "zero1": ZERO1, "sequence": SEQUENCE}


def strategy(name: str) -> Rules:
  """Returns the table of one of STRATEGIES."""
  if name not in STRATEGIES:
    raise errors.InputError(f"strategy is {name!r}: use one of {', '.join(STRATEGIES)}")
  return STRATEGIES[name]


def gathers_once() -> bool:
  """Tells whether a step is to compute with a copy of all weights, gathered over ROW_AXES: rules and mesh in scope
  say so.
  """
  return "step_embed" in dict(nn.get_logical_axis_rules()) and parts("batch") > 1


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh, rules: Rules = FSDP) -> Iterator[None]:
  """Enters a scope in which `constrain` and jit see this mesh and these rules."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    yield


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Splits an activation by its logical axis names; outside `use` it does nothing."""
  assert x.ndim == len(names), (x.shape, names)
  return nn.with_logical_constraint(x, names)


def parts(name: str) -> int:
  """Says into how many parts the mesh and rules in scope split a logical axis of activations."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in mesh_axes(name))


def target_of(mesh: jax.sharding.AbstractMesh, rules: Rules) -> target_lib.Target:
  """Returns what programs on the mesh's devices are for, their arrays split by these rules."""
  device = mesh.abstract_device or jax.devices()[0]
  if mesh.empty:
    return target_lib.Target.of(device)
  counts = {name: math.prod(mesh.shape[axis] for axis in _mesh_axes(name, rules)) for name, _ in rules}
  return target_lib.Target.of(device, mesh.size, {name: n for name, n in counts.items() if n > 1})


def target() -> target_lib.Target:
  """Returns what the program being traced is for: the mesh and rules in scope, without a mesh JAX's first device."""
  return target_of(jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules())


def on_each_device(
  run: Callable[..., Any], inputs: Sequence[Sequence[str | None]], outputs: Sequence[Any]
) -> Callable[..., Any]:
  """Returns `run` as it is called on each device with its own part of every array, as the logical axes of inputs and
  outputs say.

  For kernels, which XLA cannot split. `outputs`: axes of the result, or a list of axes for several.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not is_split():
    return run
  return jax.shard_map(
    run,
    in_specs=tuple(map(_spec, inputs)),
    out_specs=tuple(map(_spec, outputs)) if isinstance(outputs, list) else _spec(outputs),
    check_vma=False,
    axis_names={*mesh.axis_names} - {*mesh.manual_axes},
  )


def _spec(axes: Sequence[str | None]) -> jax.sharding.PartitionSpec:
  """Says how the rules in scope split an array whose axes have these logical names."""
  return nn.logical_to_mesh_axes(tuple(axes))


def is_split() -> bool:
  """Tells whether there is a mesh of several devices in scope."""
  return jax.sharding.get_abstract_mesh().size > 1


def replicated() -> jax.sharding.PartitionSpec | None:
  """Returns the sharding of results that every process reads: whole on each device of the mesh in scope."""
  return None if jax.sharding.get_abstract_mesh().empty else jax.sharding.PartitionSpec()


def mesh_axes(name: str) -> tuple[str, ...]:
  """Returns the mesh axes over which the rules in scope split a logical axis."""
  return _mesh_axes(name, nn.get_logical_axis_rules())


def _mesh_axes(name: str, rules: Rules) -> tuple[str, ...]:
  axes = nn.logical_to_mesh_axes((name,), rules)[0]
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


@contextlib.contextmanager
def rows_apart() -> Iterator[None]:
  """Enters a scope, in a shard_map over ROW_AXES, in which rules speak of one shard's rows."""
  rules = []
  for name, axes in nn.get_logical_axis_rules():
    left = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis not in ROW_AXES)
    rules.append((name, left or None))
  with nn.logical_axis_rules(rules):
    yield


@contextlib.contextmanager
def rows_over_stages() -> Iterator[None]:
  """Enters a scope in which rows are split over the stages too."""
  rules = []
  for name, axes in nn.get_logical_axis_rules():
    if name in ("batch", "groups"):
      axes = (STAGE_AXIS, *((axes,) if isinstance(axes, str) else axes or ()))
    rules.append((name, axes))
  with nn.logical_axis_rules(rules):
    yield


def largest(number: jax.Array) -> jax.Array:
  """Returns the largest number over all shards of rows: devices must agree on how often a loop runs."""
  return jax.lax.pmax(number, ROW_AXES) if _are_rows_apart() else number


def _are_rows_apart() -> bool:
  return ROW_AXES[0] in jax.sharding.get_abstract_mesh().manual_axes


def shardings(boxed: Any, mesh: jax.sharding.Mesh, rules: Rules = FSDP) -> Any:
  """Returns NamedShardings for a tree whose leaves carry logical names (Linen boxes); others are replicated."""
  return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)


def unsplit(sharding: jax.sharding.NamedSharding, axes: Collection[int], rank: int) -> jax.sharding.NamedSharding:
  """Returns a sharding of arrays of this rank that leaves some axes whole: of scales, which have a place or a few for
  all inputs of a kernel.
  """
  if not axes:
    return sharding
  spec = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
  split = jax.sharding.PartitionSpec(*(None if i in axes else axis for i, axis in enumerate(spec)))
  return jax.sharding.NamedSharding(sharding.mesh, split, memory_kind=sharding.memory_kind)


def unbox(boxed: Any) -> Any:
  """Returns the tree without its boxes; unlike nn.unbox it constrains nothing under a mesh."""
  return jax.tree.map(lambda x: x.value if _is_box(x) else x, boxed, is_leaf=_is_box)


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.LogicallyPartitioned)


def batch_shards(mesh: jax.sharding.Mesh) -> int:
  """Says into how many parts the rows of a batch are split."""
  return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def named(mesh: jax.sharding.Mesh, rules: Rules, *names: str | None) -> jax.sharding.NamedSharding:
  """Returns the sharding of an array whose axes have these logical names."""
  return nn.logical_to_mesh_sharding(jax.sharding.PartitionSpec(*names), mesh, rules)


# What a user calls the size of a logical axis of weights.
_FIELDS = {
  "heads": "num_heads",
  "mlp": "mlp_dim",
  "vocab": "vocab_size",
  "embed": "embed_dim",
  "layers": "num_layers",
  "kv": "head dimension",
  "length_table": "max_length + 1",
}


class Uneven(NamedTuple):
  """A size that cannot be split evenly."""

  name: str  # what a user calls it
  size: int
  axes: tuple[str, ...]  # of the mesh


def uneven(sizes: Mapping[str, int], mesh: Mapping[str, int], rules: Rules = FSDP) -> list[Uneven]:
  """Returns the logical axes' sizes that do not divide over a mesh's axes, of which those not given are 1."""
  found = []
  for axis, name in _FIELDS.items():
    over = _mesh_axes(axis, rules)
    if sizes.get(axis, 0) % math.prod(mesh.get(each, 1) for each in over):
      found.append(Uneven(name, sizes[axis], over))
  return found


def check_divisible(sizes: Mapping[str, int], mesh: jax.sharding.Mesh, rules: Rules = FSDP) -> None:
  """Raises InputError, in the model's words, where a weight's axis cannot be split evenly over the mesh."""
  for name, size, axes in uneven(sizes, mesh.shape, rules):
    shown = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
    raise errors.InputError(
      f"{name} {size} does not divide over {shown}: make it a multiple of "
      f"{math.prod(mesh.shape[axis] for axis in axes)}, or the mesh's {'/'.join(axes)} smaller"
    )
