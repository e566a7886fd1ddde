"""Attention over intervals without L x M matrices: chooses the kernel, gives it gradients, splits it over the mesh.

B batch, L query length, M key length, H heads, K head dimension.
"""

import functools
from types import ModuleType

import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from glmjax import target
from glmjax.kernels import dropout as dropout_lib
from glmjax.kernels import flash_gpu
from glmjax.kernels import flash_tpu
from glmjax.parallel import partitioning

# What remat="dots" keeps besides the projections' outputs, so that backward need not attend again.
NAMES = ("attention", "attention_sums")


def fits(q_BLHK: jax.Array, k_BMHK: jax.Array) -> bool:
  """Whether a kernel takes these: its machine's dtypes, whole blocks, a head dimension that fills registers."""
  batch, length, heads, width = q_BLHK.shape
  if target.runs_triton():
    taken = q_BLHK.dtype in (jnp.bfloat16, jnp.float16) and width in (64, 128)
    block = flash_gpu.BLOCK
    key_block = flash_gpu.DECODE_BLOCK if length == 1 else block
  else:  # one query over a cache is dense on TPUs: XLA reads keys as fast as they can be
    taken = target.runs_mosaic() and q_BLHK.dtype in (jnp.bfloat16, jnp.float32) and length > 1
    block = key_block = flash_tpu.BLOCK
    taken = taken and width % block == 0
  rows, tokens, parts = map(partitioning.parts, ("batch", "length", "act_heads"))
  if not taken or k_BMHK.shape[1] % key_block or length != 1 and length % (tokens * block):
    return False
  return batch % rows == 0 and heads % parts == 0


def attend(
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  dropout: dropout_lib.Dropout | None = None,
) -> jax.Array:
  """What `attention.dense` gives, up to rounding; each device has its own queries attend to all keys of its heads."""
  decodes = q_BLHK.shape[1] == 1
  if decodes:
    assert dropout is None
    run = _decode
  else:
    kernels = flash_gpu if target.runs_triton() else flash_tpu
    run = functools.partial(_attend, kernels, dropout.rate if dropout else 0.0)
  arrays = (q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL) + ((dropout.seeds_BHL,) if dropout else ())
  length = None if decodes else "length"
  queries, keys, places = ("batch", length, "act_heads", None), ("batch", None, "act_heads", None), ("batch", length)
  inputs = (queries, keys, keys, places, places, ("batch", "act_heads", length))[: len(arrays)]
  return partitioning.on_each_device(run, inputs, queries)(*arrays)


def _decode(
  q_B1HK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, start_B1: jax.Array, end_B1: jax.Array
) -> jax.Array:
  """Keys and values come out of the cache transposed, and go back as they were: XLA cancels the two."""
  return flash_gpu.decode(q_B1HK, jnp.swapaxes(k_BMHK, 1, 2), jnp.swapaxes(v_BMHK, 1, 2), start_B1, end_B1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
  kernels: ModuleType,
  rate: float,
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  seeds_BHL: jax.Array | None = None,
) -> jax.Array:
  return kernels.forward(q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL, _dropout(rate, seeds_BHL))[0]


def _dropout(rate: float, seeds_BHL: jax.Array | None) -> dropout_lib.Dropout | None:
  return None if seeds_BHL is None else dropout_lib.Dropout(rate, seeds_BHL)


def _forward(
  kernels: ModuleType,
  rate: float,
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  seeds_BHL: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
  inputs = q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL
  out_BLHK, sums_BHL = (
    ad_checkpoint.checkpoint_name(x, name)
    for x, name in zip(kernels.forward(*inputs, _dropout(rate, seeds_BHL)), NAMES)
  )
  return out_BLHK, (*inputs, seeds_BHL, out_BLHK, sums_BHL)


def _backward(
  kernels: ModuleType, rate: float, residuals: tuple[jax.Array | None, ...], d_BLHK: jax.Array
) -> tuple[jax.Array | None, ...]:
  *inputs, seeds_BHL, out_BLHK, sums_BHL = residuals
  delta_BLH = (out_BLHK.astype(jnp.float32) * d_BLHK.astype(jnp.float32)).sum(-1)
  gradients = kernels.backward(*inputs, sums_BHL, jnp.swapaxes(delta_BLH, 1, 2), d_BLHK, _dropout(rate, seeds_BHL))
  return *gradients, None, None, None


_attend.defvjp(_forward, _backward)
