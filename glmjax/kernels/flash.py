"""Attention over intervals without L x M matrices: gives the kernels gradients, splits them over the mesh.

B batch, L query length, M key length, H heads, K head dimension.
"""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import dropout as dropout_lib
from glmjax.kernels import flash_gpu
from glmjax.kernels import flash_tpu
from glmjax.parallel import partitioning

# What remat="dots" keeps besides the projections' outputs, so that backward need not attend again.
NAMES = ("attention", "attention_sums")


class Inputs(NamedTuple):
  """What attends to what, and by what rule."""

  q_BLHK: jax.Array
  k_BMHK: jax.Array
  v_BMHK: jax.Array
  start_BL: jax.Array  # int32: query i sees the keys in [start[i], end[i])
  end_BL: jax.Array
  dropout: dropout_lib.Dropout | None = None
  prefix: tuple[jax.Array, jax.Array] | None = None  # keys and values [(B,) H, P, K] that every query sees as well
  scores_dtype: str = "float32"  # in which q k / sqrt(K) and the softmax are computed


def fits_gpu(target: target_lib.Target, inputs: Inputs) -> bool:
  """Tells whether the GPU's kernel takes these: half precision, whole blocks, a head dimension that fills registers."""
  return _half_64_128(inputs) and _divides(target, flash_gpu.BLOCK, inputs)


def fits_tpu(target: target_lib.Target, inputs: Inputs) -> bool:
  """Tells whether the TPU's kernel takes these: its dtypes, whole blocks, heads of whole lanes."""
  q_BLHK = inputs.q_BLHK
  taken = q_BLHK.dtype in (jnp.bfloat16, jnp.float32) and q_BLHK.shape[3] % flash_tpu.BLOCK == 0
  return _is_plain(inputs) and taken and _divides(target, flash_tpu.BLOCK, inputs)


def fits_decode(target: target_lib.Target, inputs: Inputs) -> bool:
  """Tells whether the GPU's kernel for one query a row takes these: as `fits_gpu`, with a cache of whole blocks, no
  dropout.
  """
  whole = inputs.k_BMHK.shape[1] % flash_gpu.DECODE_BLOCK == 0 and divides_over_mesh(target, inputs)
  return inputs.dropout is None and _half_64_128(inputs) and whole


def _half_64_128(inputs: Inputs) -> bool:
  q_BLHK = inputs.q_BLHK
  return _is_plain(inputs) and q_BLHK.dtype in (jnp.bfloat16, jnp.float16) and q_BLHK.shape[3] in (64, 128)


def _is_plain(inputs: Inputs) -> bool:
  """Tells whether there is no prefix, and scores and softmax are float32, as all the kernels have them."""
  return inputs.prefix is None and inputs.scores_dtype == "float32"


def _divides(target: target_lib.Target, block: int, inputs: Inputs) -> bool:
  """Tells whether each device has whole blocks of queries, and keys are whole blocks."""
  whole_queries = inputs.q_BLHK.shape[1] % (target.split("length") * block) == 0
  return inputs.k_BMHK.shape[1] % block == 0 and whole_queries and divides_over_mesh(target, inputs)


def divides_over_mesh(target: target_lib.Target, inputs: Inputs) -> bool:
  """Tells whether each device has as many rows and heads as the others."""
  rows, _, heads, _ = inputs.q_BLHK.shape
  return rows % target.split("batch") == 0 and heads % target.split("act_heads") == 0


def attend(kernels: ModuleType, target: target_lib.Target, inputs: Inputs) -> jax.Array:
  """Computes what `attention.dense` gives, up to rounding, by the kernels of flash_gpu or flash_tpu.

  Each device has its own queries attend to all keys of its heads.
  """
  dropout = inputs.dropout
  run = functools.partial(_attend, target, kernels, dropout.rate if dropout else 0.0)
  arrays = inputs[:5] + ((dropout.seeds,) if dropout else ())
  queries, places = ("batch", "length", "act_heads", None), ("batch", "length")
  keys = ("batch", None, "act_heads", None)
  axes = (queries, keys, keys, places, places, ("batch", "act_heads", "length"))[: len(arrays)]
  return partitioning.on_each_device(run, axes, queries)(*arrays)


def decode(target: target_lib.Target, inputs: Inputs) -> jax.Array:
  """Computes what `attention.dense` gives of one query a row, up to rounding, by the kernel for GPUs."""
  del target
  queries, places = ("batch", None, "act_heads", None), ("batch", None)
  run = partitioning.on_each_device(_decode, (queries, queries, queries, places, places), queries)
  return run(*inputs[:5])


def _decode(
  q_B1HK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, start_B1: jax.Array, end_B1: jax.Array
) -> jax.Array:
  """Computes `decode`; keys and values come out of the cache transposed, and go back so: XLA cancels the two."""
  return flash_gpu.decode(q_B1HK, jnp.swapaxes(k_BMHK, 1, 2), jnp.swapaxes(v_BMHK, 1, 2), start_B1, end_B1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(target: target_lib.Target, kernels: ModuleType, rate: float, *arrays: jax.Array) -> jax.Array:
  """Attends to `arrays`: q, k, v, start, end and, where weights are dropped at this rate, seeds [B, H, L]."""
  return _forward(target, kernels, rate, *arrays)[0]


def _dropout(rate: float, arrays: tuple[jax.Array, ...]) -> dropout_lib.Dropout | None:
  return dropout_lib.Dropout(rate, arrays[5]) if rate else None


def _forward(
  target: target_lib.Target, kernels: ModuleType, rate: float, *arrays: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  del target
  out_BLHK, sums_BHL = (
    ad_checkpoint.checkpoint_name(x, name)
    for x, name in zip(kernels.forward(*arrays[:5], _dropout(rate, arrays)), NAMES)
  )
  return out_BLHK, (*arrays, out_BLHK, sums_BHL)


def _backward(
  target: target_lib.Target, kernels: ModuleType, rate: float, residuals: tuple[jax.Array, ...], d_BLHK: jax.Array
) -> tuple[jax.Array | None, ...]:
  *arrays, out_BLHK, sums_BHL = residuals
  delta_BLH = (out_BLHK.astype(jnp.float32) * d_BLHK.astype(jnp.float32)).sum(-1)
  delta_BHL = jnp.swapaxes(delta_BLH, 1, 2)
  gradients = kernels.backward(target, *arrays[:5], sums_BHL, delta_BHL, d_BLHK, _dropout(rate, tuple(arrays)))
  return *gradients, *[None] * (len(arrays) - 3)


_attend.defvjp(_forward, _backward)
