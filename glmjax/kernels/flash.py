"""Attention over intervals without L x M matrices: gives the kernels gradients, splits them over the mesh.

B batch, L query length, M key length, H heads, K head dimension.
"""

import functools
from types import ModuleType

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

Prefix = tuple[jax.Array, jax.Array]


def fits_gpu(
  target: target_lib.Target,
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  dropout: dropout_lib.Dropout | None = None,
  prefix: Prefix | None = None,
) -> bool:
  """Whether the GPU's kernel takes these: half precision, whole blocks, a head dimension that fills registers."""
  del v_BMHK, start_BL, end_BL, dropout
  taken = q_BLHK.dtype in (jnp.bfloat16, jnp.float16) and q_BLHK.shape[3] in (64, 128)
  return prefix is None and taken and _divides(target, flash_gpu.BLOCK, q_BLHK, k_BMHK)


def fits_tpu(
  target: target_lib.Target,
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  dropout: dropout_lib.Dropout | None = None,
  prefix: Prefix | None = None,
) -> bool:
  """Whether the TPU's kernel takes these: its dtypes, whole blocks, heads of whole lanes."""
  del v_BMHK, start_BL, end_BL, dropout
  taken = q_BLHK.dtype in (jnp.bfloat16, jnp.float32) and q_BLHK.shape[3] % flash_tpu.BLOCK == 0
  return prefix is None and taken and _divides(target, flash_tpu.BLOCK, q_BLHK, k_BMHK)


def fits_decode(
  target: target_lib.Target,
  q_B1HK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_B1: jax.Array,
  end_B1: jax.Array,
  dropout: dropout_lib.Dropout | None = None,
  prefix: Prefix | None = None,
) -> bool:
  """Whether the GPU's kernel for one query a row takes these: as `fits_gpu`, a cache of whole blocks, no dropout."""
  del v_BMHK, start_B1, end_B1
  taken = q_B1HK.dtype in (jnp.bfloat16, jnp.float16) and q_B1HK.shape[3] in (64, 128)
  whole = k_BMHK.shape[1] % flash_gpu.DECODE_BLOCK == 0 and _divides_over_mesh(target, q_B1HK)
  return prefix is None and dropout is None and taken and whole


def _divides(target: target_lib.Target, block: int, q_BLHK: jax.Array, k_BMHK: jax.Array) -> bool:
  """Whether each device has whole blocks of queries, and keys are whole blocks."""
  whole = k_BMHK.shape[1] % block == 0 and q_BLHK.shape[1] % (target.split("length") * block) == 0
  return whole and _divides_over_mesh(target, q_BLHK)


def _divides_over_mesh(target: target_lib.Target, q_BLHK: jax.Array) -> bool:
  return q_BLHK.shape[0] % target.split("batch") == 0 and q_BLHK.shape[2] % target.split("act_heads") == 0


def attend_gpu(
  target: target_lib.Target,
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  dropout: dropout_lib.Dropout | None = None,
  prefix: Prefix | None = None,
) -> jax.Array:
  """What `attention.dense` gives, up to rounding, by the kernel for GPUs."""
  del prefix
  return _on_mesh(target, flash_gpu, q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL, dropout)


def attend_tpu(
  target: target_lib.Target,
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  dropout: dropout_lib.Dropout | None = None,
  prefix: Prefix | None = None,
) -> jax.Array:
  """What `attention.dense` gives, up to rounding, by the kernel for TPUs."""
  del prefix
  return _on_mesh(target, flash_tpu, q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL, dropout)


def decode(
  target: target_lib.Target,
  q_B1HK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_B1: jax.Array,
  end_B1: jax.Array,
  dropout: dropout_lib.Dropout | None = None,
  prefix: Prefix | None = None,
) -> jax.Array:
  """What `attention.dense` gives of one query a row, up to rounding, by the kernel for GPUs."""
  del target, dropout, prefix
  queries, places = ("batch", None, "act_heads", None), ("batch", None)
  run = partitioning.on_each_device(_decode, (queries, queries, queries, places, places), queries)
  return run(q_B1HK, k_BMHK, v_BMHK, start_B1, end_B1)


def _on_mesh(
  target: target_lib.Target,
  kernels: ModuleType,
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  dropout: dropout_lib.Dropout | None,
) -> jax.Array:
  """Each device has its own queries attend to all keys of its heads."""
  run = functools.partial(_attend, target, kernels, dropout.rate if dropout else 0.0)
  arrays = (q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL) + ((dropout.seeds_BHL,) if dropout else ())
  queries, places = ("batch", "length", "act_heads", None), ("batch", "length")
  keys = ("batch", None, "act_heads", None)
  inputs = (queries, keys, keys, places, places, ("batch", "act_heads", "length"))[: len(arrays)]
  return partitioning.on_each_device(run, inputs, queries)(*arrays)


def _decode(
  q_B1HK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, start_B1: jax.Array, end_B1: jax.Array
) -> jax.Array:
  """Keys and values come out of the cache transposed, and go back as they were: XLA cancels the two."""
  return flash_gpu.decode(q_B1HK, jnp.swapaxes(k_BMHK, 1, 2), jnp.swapaxes(v_BMHK, 1, 2), start_B1, end_B1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
  target: target_lib.Target,
  kernels: ModuleType,
  rate: float,
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  seeds_BHL: jax.Array | None = None,
) -> jax.Array:
  del target
  return kernels.forward(q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL, _dropout(rate, seeds_BHL))[0]


def _dropout(rate: float, seeds_BHL: jax.Array | None) -> dropout_lib.Dropout | None:
  return None if seeds_BHL is None else dropout_lib.Dropout(rate, seeds_BHL)


def _forward(
  target: target_lib.Target,
  kernels: ModuleType,
  rate: float,
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  seeds_BHL: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
  del target
  inputs = q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL
  out_BLHK, sums_BHL = (
    ad_checkpoint.checkpoint_name(x, name)
    for x, name in zip(kernels.forward(*inputs, _dropout(rate, seeds_BHL)), NAMES)
  )
  return out_BLHK, (*inputs, seeds_BHL, out_BLHK, sums_BHL)


def _backward(
  target: target_lib.Target,
  kernels: ModuleType,
  rate: float,
  residuals: tuple[jax.Array | None, ...],
  d_BLHK: jax.Array,
) -> tuple[jax.Array | None, ...]:
  *inputs, seeds_BHL, out_BLHK, sums_BHL = residuals
  delta_BLH = (out_BLHK.astype(jnp.float32) * d_BLHK.astype(jnp.float32)).sum(-1)
  delta_BHL = jnp.swapaxes(delta_BLH, 1, 2)
  gradients = kernels.backward(target, *inputs, sums_BHL, delta_BHL, d_BLHK, _dropout(rate, seeds_BHL))
  return *gradients, None, None, None


_attend.defvjp(_forward, _backward)
