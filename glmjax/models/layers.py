"""Parameter-owning layers: einsum with bias, LayerNorm, embedding. Each names its axes for sharding.

B batch, L length, D model, V vocabulary.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import dropout as dropout_lib
from glmjax.kernels import layer_norm
from glmjax.models import config as config_lib
from glmjax.models import lowrank
from glmjax.models import params as params_lib
from glmjax.models import weights
from glmjax.parallel import partitioning

Initializer = Callable[..., jax.Array]


def initializer(param: params_lib.Param) -> Initializer:
  """Returns a function that makes a parameter as it begins: normal with its spread, zeros or ones."""

  def init(key: jax.Array, shape: Sequence[int], dtype: str) -> jax.Array:
    if param.init != "normal":
      return jnp.full(shape, {"zeros": 0, "ones": 1}[param.init], dtype)
    std = param.std
    if param.gains:
      std = std * jnp.array(param.gains).reshape(-1, *[1] * (len(shape) - param.gains_axis - 1))
    return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)

  return init


def unstack(x: jax.Array, axis: int) -> list[jax.Array]:
  """Returns the slices along an axis; unlike indexing, backward stacks their gradients instead of padding and
  adding.
  """
  return [part.squeeze(axis) for part in jnp.split(x, x.shape[axis], axis)]


def declare(module: nn.Module, name: str, param: params_lib.Param, dtype: str) -> Any:
  """Declares the parameter `name` of a module: a float array, or the weight that stands in its place."""
  if module.has_variable("params", name):
    value = module.get_variable("params", name)
    if isinstance(value, weights.Weight):  # Linen would compare its packed shape with ours
      return value
  return module.param(name, nn.with_logical_partitioning(initializer(param), param.axes), param.shape, jnp.dtype(dtype))


def fold_in(keys_B: jax.Array | None, number: jax.Array | int) -> jax.Array | None:
  """Returns each row's key for the part of the model with this number; None stays None: no dropout."""
  return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


def dropout(rate: float, keys_B: jax.Array | None, x: jax.Array) -> jax.Array:
  """Returns x [B, ...] with a share of its entries 0 and the others scaled up; each row draws from its own key."""
  if keys_B is None or rate == 0.0:
    return x
  return dropout_lib.apply(dropout_lib.make(rate, keys_B, *x.shape[1:-1]), x)


@jax.custom_vjp
def scale_gradient(x: jax.Array, alpha: jax.Array | float) -> jax.Array:
  """Returns x, whose gradient is multiplied by alpha: alpha x + (1 - alpha) stop_gradient(x), exactly.

  The embedding gradient shrink of the GLM-130B paper, section 3.
  """
  del alpha
  return x


def _scale_gradient_forward(x: jax.Array, alpha: jax.Array | float) -> tuple[jax.Array, jax.Array | float]:
  return x, alpha


def _scale_gradient_backward(alpha: jax.Array | float, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  return g * jnp.asarray(alpha, g.dtype), jnp.zeros_like(alpha)


scale_gradient.defvjp(_scale_gradient_forward, _scale_gradient_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds a bias in x's dtype; the bias's gradient is summed in float32."""
  return x + bias.astype(x.dtype)


def _add_bias_forward(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
  return add_bias(x, bias), bias


def _add_bias_backward(bias: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  return g, g.astype(jnp.float32).sum(range(g.ndim - bias.ndim)).astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class Adapter(NamedTuple):
  """What stands beside a kernel (models/lowrank.py)."""

  a: params_lib.Param
  b: params_lib.Param
  scale: float
  dropout: float  # the rate


class Einsum(nn.Module):
  """einsum(spec, x, kernel) + bias, the kernel declared in its final shape."""

  spec: str
  kernel: params_lib.Param
  bias: params_lib.Param
  dtype: str
  param_dtype: str
  target: target_lib.Target
  adapter: Adapter | None = None  # beside the kernel

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    product: Callable[..., jax.Array] | None = None,
    bias_apart: bool = False,
    keys_B: jax.Array | None = None,
  ) -> "jax.Array | tuple[jax.Array, jax.Array]":
    """Adds the bias to the product. `product`: of x and the kernel, in place of the einsum. `bias_apart`: returns
    (product, bias), not their sum. `keys_B`: of dropout in the adapter.
    """
    kernel = weights.of(declare(self, "kernel", self.kernel, self.param_dtype))
    if self.adapter is not None:
      kernel = self._adapted(kernel, self.adapter, x, keys_B)
    bias = declare(self, "bias", self.bias, self.param_dtype)
    x = x.astype(self.dtype)
    out = product(x, kernel) if product else kernel.product(self.target, self.spec, x, self.kernel.axes)
    return (out, bias) if bias_apart else add_bias(out, bias)

  def _adapted(
    self, kernel: weights.Weight, adapter: Adapter, x: jax.Array, keys_B: jax.Array | None
  ) -> lowrank.LowRank:
    a, b = (
      declare(self, name, param, self.param_dtype) for name, param in (("lora_a", adapter.a), ("lora_b", adapter.b))
    )
    seeds = None
    if keys_B is not None and adapter.dropout:
      tokens, heads = x.shape[1], adapter.a.shape[:-2]  # of what the product reads, axes but the last
      seeds = dropout_lib.make(adapter.dropout, keys_B, tokens, *heads).seeds
    return lowrank.LowRank(kernel, a, b, adapter.scale, adapter.dropout, seeds)


class LayerNorm(nn.Module):
  """LayerNorm over the last axis, with scale and bias; statistics in float32."""

  width: int
  epsilon: float
  dtype: str
  param_dtype: str
  target: target_lib.Target

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    table = params_lib.norm(self.width)
    scale, bias = (declare(self, name, table[name], self.param_dtype) for name in ("scale", "bias"))
    return layer_norm.layer_norm(self.target, self.epsilon, self.dtype, x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def whole(axes: tuple[str, ...], weight: jax.Array) -> jax.Array:
  """Gathers a weight with these logical axes along embed; its gradient is split as the weight is."""
  return partitioning.constrain(weight, *({"embed": "act_embed", "vocab": "act_vocab"}.get(axis) for axis in axes))


def _whole_forward(axes: tuple[str, ...], weight: jax.Array) -> tuple[jax.Array, None]:
  return whole(axes, weight), None


def _whole_backward(axes: tuple[str, ...], _: None, g: jax.Array) -> tuple[jax.Array]:
  return (partitioning.constrain(g, *axes),)


whole.defvjp(_whole_forward, _whole_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def rows_of(dtype: str, axis: str, table: jax.Array, index: jax.Array) -> jax.Array:
  """Returns table[index] in `dtype`, for a table [`axis`, "embed"]; the gradients of equal indices are summed in
  float32.

  An index outside of the table has no row: zeros, and no gradient, on one device as on many. A table may be the bits of
  one in `dtype`, uint16 (infer/placement.py).
  Where the table is split over the mesh, the step gathers it along embed, in `dtype`, as the head does.
  """
  if table.dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(_rows(table, index), dtype)
  if not partitioning.is_split():
    return _rows(table, index).astype(dtype)
  if index.size > 1:  # else decoding, which gathers nothing
    table = whole((axis, "embed"), table.astype(dtype))
  return _look_up(axis, table, index).astype(dtype)


def _look_up(axis: str, table: jax.Array, index: jax.Array) -> jax.Array:
  """Returns table[index], each device finding the rows that it has.

  Left to XLA, a split table is gathered for one token, and jax 0.11's partitioner ends the process where tokens are
  split over stages within a shard_map.
  """
  axes = partitioning.mesh_axes(axis)
  if partitioning.parts(axis) == 1:
    return _rows(table, index)

  def own(table: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.psum(_rows(table, index - jax.lax.axis_index(axes) * len(table)), axes)

  split, nothing = jax.sharding.PartitionSpec(axes), jax.sharding.PartitionSpec()
  return jax.shard_map(own, in_specs=(split, nothing), out_specs=nothing, axis_names={*axes}, check_vma=False)(
    table, index
  )


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
  """Returns table[index], zeros where the table has no such row."""
  there = (index >= 0) & (index < len(table))
  return jnp.where(there[..., None], table[jnp.clip(index, 0, len(table) - 1)], 0)


def _rows_of_forward(
  dtype: str, axis: str, table: jax.Array, index: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return rows_of(dtype, axis, table, index), (table, index)


def _rows_of_backward(
  dtype: str, axis: str, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, None]:
  del dtype
  table, index = residuals
  index = jnp.where(index < 0, len(table), index)  # as those above: dropped, not counted from the end
  d_table = jnp.zeros(table.shape, jnp.float32).at[index].add(g.astype(jnp.float32), mode="drop")
  d_table = whole((axis, "embed"), d_table)
  return partitioning.constrain(d_table, axis, "embed").astype(table.dtype), None


rows_of.defvjp(_rows_of_forward, _rows_of_backward)


class Embedding(nn.Module):
  """Token table, learned position tables where the model has them, and the tied head."""

  config: config_lib.GLMConfig
  target: target_lib.Target

  def setup(self) -> None:
    table, dtype = params_lib.table(self.config), self.config.param_dtype
    self.table = declare(self, "table", table["embedding/table"], dtype)
    if not self.config.position_kind.rotary_parts:
      self.position, self.block_position = (
        declare(self, name, table[f"embedding/{name}"], dtype) for name in ("position", "block_position")
      )

  def __call__(self, tokens_BL: jax.Array, positions: jax.Array, gradient_alpha: jax.Array | float) -> jax.Array:
    """Returns the sum of the token's and its positions' rows, [B, L, D]."""
    x_BLD = rows_of(self.config.dtype, "vocab", self.table, tokens_BL)
    x_BLD = scale_gradient(x_BLD, gradient_alpha)
    if not self.config.position_kind.rotary_parts:
      chex.assert_rank(positions, 3)
      for i, table in enumerate((self.position, self.block_position)):
        x_BLD += rows_of(self.config.dtype, "length_table", table, positions[:, i])
    return x_BLD

  def attend(self, x_BLD: jax.Array, gradient_alpha: jax.Array | float) -> jax.Array:
    """Returns logits over the table's rows, float32 [B, L, V]; the shrink reaches the table here as well."""
    return _logits(self.target, "BLD,VD->BLV", x_BLD.astype(self.config.dtype), self._shrunk_table(gradient_alpha))

  def kernel(self, gradient_alpha: jax.Array | float) -> jax.Array:
    """Returns the table as the head's kernel, [D, V] in the compute dtype."""
    return self._shrunk_table(gradient_alpha).T

  def _shrunk_table(self, gradient_alpha: jax.Array | float) -> jax.Array:
    return scale_gradient(whole(("vocab", "embed"), self.table.astype(self.config.dtype)), gradient_alpha)


def _logits(target: target_lib.Target, spec: str, x_BLD: jax.Array, kernel: jax.Array) -> jax.Array:
  """Computes float32 products with the head; a single row is multiplied eight times on GPUs, where XLA would make a
  float32 copy of the kernel for one.
  """
  if x_BLD.shape[0] * x_BLD.shape[1] > 1 or target.platform != "gpu":
    return jnp.einsum(spec, x_BLD, kernel, preferred_element_type=jnp.float32)
  x_BLD = jnp.broadcast_to(x_BLD, (1, 8, x_BLD.shape[2]))
  return jnp.einsum(spec, x_BLD, kernel, preferred_element_type=jnp.float32)[:, :1]


class Head(nn.Module):
  """The head of an untied model (ChatGLM-6B), without bias."""

  config: config_lib.GLMConfig
  target: target_lib.Target

  def setup(self) -> None:
    self.kernel = declare(self, "kernel", params_lib.table(self.config)["head/kernel"], self.config.param_dtype)

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    x_BLD, spec = x_BLD.astype(self.config.dtype), "BLD,DV->BLV"
    if isinstance(self.kernel, weights.Weight):
      return self.kernel.product(self.target, spec, x_BLD, dtype=jnp.float32)
    return _logits(self.target, spec, x_BLD, self.kernel.astype(self.config.dtype))


def constrain_logits(logits_BLV: jax.Array) -> jax.Array:
  """Splits logits' rows, tokens and vocabulary over their mesh axes."""
  return partitioning.constrain(logits_BLV, "batch", "length", "act_vocab")
