"""Attention over intervals: query i sees the keys in [start[i], end[i]).

Two int32 per token say what an L x M mask would: bidirectional context, causal spans, packed samples,
left padding. B batch, L query length, M key length, H heads, K head dimension.
"""

import functools

import jax
from jax.experimental import layout
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import dropout as dropout_lib
from glmjax.kernels import flash
from glmjax.kernels import flash_gpu
from glmjax.kernels import flash_tpu
from glmjax.kernels import matmul as matmul_lib
from glmjax.kernels import registry
from glmjax.parallel import partitioning

# In place of hidden scores; finite, so that the softmax of a query that sees nothing stays finite too. (In float16 it
# is -infinity, and that softmax is no number: `dense` hides its weights.)
HIDDEN = -1e30


def interval_mask(start_BL: jax.Array, end_BL: jax.Array, num_keys: int) -> jax.Array:
  """Returns bool [B, L, M], True where the key is visible."""
  keys = jnp.arange(num_keys)
  return (keys >= start_BL[..., None]) & (keys < end_BL[..., None])


def attend(
  target: target_lib.Target,
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  dropout: dropout_lib.Dropout | None = None,
  prefix: tuple[jax.Array, jax.Array] | None = None,
  scores_dtype: str = "float32",
) -> jax.Array:
  """Computes what `dense` gives, by the best way there is for the target and the shapes.

  Where tokens are split over the mesh, each device has its own queries attend to all keys, gathered once.
  """
  k_BMHK, v_BMHK = (partitioning.constrain(x, "batch", None, "act_heads", None) for x in (k_BMHK, v_BMHK))
  operation = DECODE if q_BLHK.shape[1] == 1 else ATTENTION
  return operation.run(target, flash.Inputs(q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL, dropout, prefix, scores_dtype))


def dense(
  target: target_lib.Target,
  q_BLHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  dropout: dropout_lib.Dropout | None = None,
  prefix: tuple[jax.Array, jax.Array] | None = None,
  scores_dtype: str = "float32",
) -> jax.Array:
  """Computes softmax(q k / sqrt(K)) v over each query's interval, [B, L, H, K] in q's dtype.

  A query that sees nothing gets zeros, and gives no gradient.

  `prefix`: keys and values [H, P, K], or of each row [B, H, P, K], that every query sees as well (P-Tuning v2). They
  share the softmax with the others and are multiplied apart, so that no cache is copied for them.

  Scores accumulate and normalise in float32, which is what made GLM-130B's fp16 run converge (paper,
  appendix F) and leaves its query-key layer scaling without a purpose. With `scores_dtype` float16 the scores are
  rounded to it, infinite beyond 65,504, and so is each step of the softmax but the sum; a softmax of infinities is no
  number.
  """
  scale = q_BLHK.shape[-1] ** -0.5
  q_BLHK = q_BLHK * jnp.asarray(scale, q_BLHK.dtype)
  if q_BLHK.shape[1] == 1:  # decoding: keys as the left operand, which XLA's CPU dots read without a copy
    scores_BHML = jnp.einsum("BMHK,BLHK->BHML", k_BMHK, q_BLHK, preferred_element_type=jnp.float32)
    scores_BHLM = jnp.swapaxes(scores_BHML, 2, 3)
  else:
    scores_BHLM = matmul_lib.matmul(target, "BLHK,BMHK->BHLM", q_BLHK, k_BMHK, jnp.float32)
  mask_BLM = interval_mask(start_BL, end_BL, k_BMHK.shape[1])
  scores_BHLM = jnp.where(mask_BLM[:, None], scores_BHLM, HIDDEN)
  if prefix is not None:
    prefix_key, prefix_value = (x.astype(q_BLHK.dtype) for x in prefix)
    axes = "BHPK"[-prefix_key.ndim :]
    prefix_scores_BHLP = jnp.einsum(f"BLHK,{axes}->BHLP", q_BLHK, prefix_key, preferred_element_type=jnp.float32)
    scores_BHLM = jnp.concatenate([prefix_scores_BHLP, scores_BHLM], -1)
  weights_BHLM = jax.nn.softmax(_rounded(scores_BHLM, scores_dtype), axis=-1)
  if dropout is not None:
    weights_BHLM = dropout_lib.apply(dropout, weights_BHLM)
  weights_BHLM = weights_BHLM.astype(v_BMHK.dtype)
  if prefix is not None:
    weights_BHLP, weights_BHLM = jnp.split(weights_BHLM, [prefix_key.shape[-2]], -1)
  if scores_dtype == "float16":
    weights_BHLM = jnp.where(mask_BLM[:, None], weights_BHLM, 0)
  out_BHLK = matmul_lib.matmul(target, "BHLM,BMHK->BHLK", weights_BHLM, v_BMHK)
  if prefix is None:
    sees_BL = jnp.maximum(start_BL, 0) < jnp.minimum(end_BL, k_BMHK.shape[1])
    out_BHLK = jnp.where(sees_BL[:, None, :, None], out_BHLK, 0)
  else:
    out_BHLK += jnp.einsum(f"BHLP,{axes}->BHLK", weights_BHLP, prefix_value)
  return jnp.swapaxes(out_BHLK, 1, 2)


def _rounded(x: jax.Array, dtype: str) -> jax.Array:
  """Rounds float32 to a dtype. XLA may leave out a conversion and the one back (xla_allow_excess_precision), but not
  this.
  """
  if dtype != "float32":
    x = jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
  return x.astype(dtype)


def _dense(target: target_lib.Target, inputs: flash.Inputs) -> jax.Array:
  return dense(target, *inputs)


def _dense_in_place(target: target_lib.Target, inputs: flash.Inputs) -> jax.Array:
  """Computes `dense` of keys and values with slots behind heads, as a cache has them.

  XLA's GPU compilers may choose another layout for a cache while a program adds tokens, and copy all of it before and
  after; it depends on what else is in the program.
  """

  def with_slots_behind_heads(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(layout.with_layout_constraint(x_BMHK, layout.Layout((0, 2, 1, 3))) for x_BMHK in arrays)

  axes = ("batch", None, "act_heads", None)
  run = partitioning.on_each_device(with_slots_behind_heads, (axes, axes), [axes, axes])
  k_BMHK, v_BMHK = run(inputs.k_BMHK, inputs.v_BMHK)
  return dense(target, *inputs._replace(k_BMHK=k_BMHK, v_BMHK=v_BMHK))


_DENSE = registry.Implementation("XLA, dense", "all", _dense)
_HALF_64_128 = "bfloat16 or float16, heads 64 or 128 wide"
_PLAIN = "no prefix, softmax in float32"

# Of (target, flash.Inputs).
ATTENTION = registry.Operation(
  "attention",
  (
    registry.Implementation(
      "Pallas Triton, flash",
      f"{_HALF_64_128}, lengths of whole {flash_gpu.BLOCK}s, {_PLAIN}",
      functools.partial(flash.attend, flash_gpu),
      needs=("triton",),
      fits=flash.fits_gpu,
    ),
    registry.Implementation(
      "Pallas Mosaic, flash",
      f"bfloat16 or float32, heads and lengths of whole {flash_tpu.BLOCK}s, {_PLAIN}",
      functools.partial(flash.attend, flash_tpu),
      needs=("mosaic",),
      fits=flash.fits_tpu,
    ),
    _DENSE,
  ),
)
# On TPUs it is dense: XLA reads keys as fast as they can be.
DECODE = registry.Operation(
  "attention of one query over a cache",
  (
    registry.Implementation(
      "Pallas Triton, parts of the cache",
      f"{_HALF_64_128}, slots of whole {flash_gpu.DECODE_BLOCK}s, {_PLAIN}",
      flash.decode,
      needs=("triton",),
      fits=flash.fits_decode,
    ),
    registry.Implementation(
      "XLA, dense, the cache in its own layout",
      "rows and heads that divide over the mesh",
      _dense_in_place,
      needs=("gpu",),
      fits=flash.divides_over_mesh,
    ),
    _DENSE,
  ),
)
