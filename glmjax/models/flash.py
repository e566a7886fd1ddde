"""Attention over intervals without L x M matrices: chooses the kernel, gives it gradients, splits it over the mesh.

B batch, L query length, M key length, H heads, K head dimension.
"""

from flax import linen as nn
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from glmjax import target
from glmjax.models import flash_gpu
from glmjax.parallel import partitioning

# What remat="dots" keeps besides the projections' outputs, so that backward need not attend again.
NAMES = ("attention", "attention_sums")


def fits(q_BLHK: jax.Array, k_BMHK: jax.Array) -> bool:
  """Whether a kernel takes these: half-precision floats, whole blocks, a head dimension that fills registers."""
  batch, length, heads, width = q_BLHK.shape
  if not target.runs_triton() or q_BLHK.dtype not in (jnp.bfloat16, jnp.float16) or width not in (64, 128):
    return False
  if k_BMHK.shape[1] % (flash_gpu.DECODE_BLOCK if length == 1 else flash_gpu.BLOCK):
    return False
  rows, tokens, parts = map(partitioning.parts, ("batch", "length", "act_heads"))
  if length != 1 and length % (tokens * flash_gpu.BLOCK):
    return False
  return batch % rows == 0 and heads % parts == 0


def attend(q_BLHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, start_BL: jax.Array, end_BL: jax.Array
           ) -> jax.Array:
  """What `attention.dense` gives, up to rounding; each device has its own queries attend to all keys of its heads."""
  mesh = jax.sharding.get_abstract_mesh()
  run = _decode if q_BLHK.shape[1] == 1 else _attend
  if mesh.empty or mesh.size == 1:
    return run(q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL)
  length = None if q_BLHK.shape[1] == 1 else "length"
  queries, keys, places = (nn.logical_to_mesh_axes(names) for names in (
      ("batch", length, "act_heads", None), ("batch", None, "act_heads", None), ("batch", length)))
  return jax.shard_map(run, in_specs=(queries, keys, keys, places, places), out_specs=queries,
                       axis_names={*mesh.axis_names} - {*mesh.manual_axes}, check_vma=False)(
                           q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL)


def _decode(q_B1HK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, start_B1: jax.Array, end_B1: jax.Array
            ) -> jax.Array:
  """Keys and values come out of the cache transposed, and go back as they were: XLA cancels the two."""
  return flash_gpu.decode(q_B1HK, jnp.swapaxes(k_BMHK, 1, 2), jnp.swapaxes(v_BMHK, 1, 2), start_B1, end_B1)


@jax.custom_vjp
def _attend(q_BLHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, start_BL: jax.Array, end_BL: jax.Array
            ) -> jax.Array:
  return flash_gpu.forward(q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL)[0]


def _forward(q_BLHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, start_BL: jax.Array, end_BL: jax.Array
             ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  out_BLHK, sums_BHL = (ad_checkpoint.checkpoint_name(x, name) for x, name in zip(
      flash_gpu.forward(q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL), NAMES))
  return out_BLHK, (q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL, out_BLHK, sums_BHL)


def _backward(residuals: tuple[jax.Array, ...], d_BLHK: jax.Array) -> tuple[jax.Array | None, ...]:
  *inputs, out_BLHK, sums_BHL = residuals
  delta_BLH = (out_BLHK.astype(jnp.float32) * d_BLHK.astype(jnp.float32)).sum(-1)
  return *flash_gpu.backward(*inputs, sums_BHL, jnp.swapaxes(delta_BLH, 1, 2), d_BLHK), None, None


_attend.defvjp(_forward, _backward)
