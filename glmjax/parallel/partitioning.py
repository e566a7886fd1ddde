"""Logical axis names to mesh axes: the rule tables, and what applies them.

The model names the axes of its weights and activations in t5x's words; one table per strategy says
which mesh axis each is split over. A strategy is changed by naming another table in gin, never in the
model.

| logical axis | of | meaning |
|---|---|---|
| batch, length | activations | rows, tokens of a row |
| act_embed, act_heads, act_mlp, act_vocab | activations | model width, heads, mlp width, vocabulary |
| embed, heads, kv, mlp, vocab | weights | the same sizes of a weight |
| layers | weights | the stacked layers |
| qkv, branches | weights | the query, key, value and GeGLU halves; never split |
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from flax import linen as nn
import jax

from glmjax import errors

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# Rows over data and fsdp, tensor parallelism over heads, mlp and vocabulary, tokens over context.
_ACTIVATIONS: Rules = (
    ("batch", ("data", "fsdp")),
    ("length", "context"),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
)
_TENSOR: Rules = (("heads", "tensor"), ("mlp", "tensor"), ("vocab", "tensor"),
                  ("kv", None), ("qkv", None), ("branches", None), ("layers", "stage"))

# Fully sharded: every weight, with its optimizer state, is also split over fsdp along its embed axis.
FSDP: Rules = _ACTIVATIONS + _TENSOR + (("embed", "fsdp"),)


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh, rules: Rules = FSDP) -> Iterator[None]:
  """Within it, `constrain` and jit see this mesh and these rules."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    yield


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Splits an activation by its logical axis names; outside `use` it does nothing."""
  assert x.ndim == len(names), (x.shape, names)
  return nn.with_logical_constraint(x, names)


def shardings(boxed: Any, mesh: jax.sharding.Mesh, rules: Rules = FSDP) -> Any:
  """NamedShardings for a tree whose leaves carry logical names (Linen boxes); others are replicated."""
  return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)


def unbox(boxed: Any) -> Any:
  """The tree without its boxes; unlike nn.unbox it constrains nothing under a mesh."""
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return jax.tree.map(lambda x: x.value if is_box(x) else x, boxed, is_leaf=is_box)


def batch_shards(mesh: jax.sharding.Mesh, axes: Sequence[str] = ("data", "fsdp")) -> int:
  """Into how many parts the rows of a batch are split."""
  size = 1
  for axis in axes:
    size *= mesh.shape[axis]
  return size


def named(mesh: jax.sharding.Mesh, rules: Rules, *names: str | None) -> jax.sharding.NamedSharding:
  """The sharding of an array whose axes have these logical names."""
  return nn.logical_to_mesh_sharding(jax.sharding.PartitionSpec(*names), mesh, rules)


# What a user calls the size of a logical axis.
_FIELDS = {"heads": "num_heads", "mlp": "mlp_dim", "vocab": "vocab_size", "embed": "embed_dim",
           "layers": "num_layers", "kv": "head dimension", "length_table": "max_length + 1"}


def check_divisible(boxed: Any, mesh: jax.sharding.Mesh, rules: Rules = FSDP) -> None:
  """Raises InputError, in the model's words, where a weight's axis cannot be split evenly over the mesh."""
  for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
    if not isinstance(leaf, nn.LogicallyPartitioned):
      continue
    spec = nn.logical_to_mesh_axes(leaf.names, rules)
    for name, size, axes in zip(leaf.names, leaf.value.shape, spec):
      axes = (axes,) if isinstance(axes, str) else axes or ()
      parts = math.prod(mesh.shape[axis] for axis in axes)
      if size % parts:
        shown = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        raise errors.InputError(f"{_FIELDS.get(name, name)} {size} does not divide over {shown}: "
                                f"make it a multiple of {parts}, or the mesh's {'/'.join(axes)} smaller")
