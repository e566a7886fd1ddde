"""A step of attention over a cache of keys and values by the C++ library (library.py), for `jax.jit`.

It reads the slots before each row's end and no others, as they are kept: no copy is made. What a row reads is the same,
bit for bit, whatever rows are computed with it, and however many slots there are.

B rows, H heads, M slots, K head dimension.
"""

import jax
import jax.numpy as jnp
import numpy as np

from glmjax import errors
from glmjax.kernels.cpu import library


def attend(
  q_BHK: jax.Array,
  key_BHMK: jax.Array,
  value_BHMK: jax.Array,
  end_B: jax.Array,
  key_scale_BHM: jax.Array | None = None,
  value_scale_BHM: jax.Array | None = None,
) -> jax.Array:
  """Returns softmax(q k / sqrt(K)) v over each row's slots before its end, [B, H, K] in q's dtype; sums are float32.

  A row whose end is 0 gets zeros.

  Args:
    q_BHK: float32 or bfloat16.
    key_BHMK: float32, the bits of bfloat16 as uint16, or int8 with scales.
    value_BHMK: of the same type.
    end_B: int32.
    key_scale_BHM: float32; of int8.
    value_scale_BHM: the same of values.

  Raises:
    errors.InputError: for shapes or types that are not these, or where the library is not there.
  """
  batch, heads, slots, width = key_BHMK.shape
  if q_BHK.shape != (batch, heads, width) or value_BHMK.shape != key_BHMK.shape or end_B.shape != (batch,):
    raise errors.InputError(
      f"q is {q_BHK.shape}, keys {key_BHMK.shape}, values {value_BHMK.shape}, ends {end_B.shape}: [B, H, K], "
      "[B, H, M, K] twice and [B] are needed"
    )
  kinds = (jnp.float32, jnp.uint16, jnp.int8)
  if q_BHK.dtype not in (jnp.float32, jnp.bfloat16) or key_BHMK.dtype not in kinds or end_B.dtype != jnp.int32:
    raise errors.InputError(
      f"q is {q_BHK.dtype}, keys {key_BHMK.dtype}, ends {end_B.dtype}: float32 or bfloat16, float32, uint16 or int8, "
      "and int32 are needed"
    )
  scales = key_scale_BHM, value_scale_BHM
  if key_BHMK.dtype == jnp.int8:
    if any(scale is None or scale.shape != (batch, heads, slots) or scale.dtype != jnp.float32 for scale in scales):
      raise errors.InputError("int8 keys and values need float32 scales [B, H, M]")
  else:
    scales = (np.zeros((1, 0, 0), np.float32),) * 2
  if value_BHMK.dtype != key_BHMK.dtype:
    raise errors.InputError(f"keys are {key_BHMK.dtype} and values {value_BHMK.dtype}: they must be alike")
  if not (now := library.status()).available:
    raise errors.InputError(f"the library of products on CPUs is not there: {now.words}")
  call = jax.ffi.ffi_call(library.ATTENTION, jax.ShapeDtypeStruct(q_BHK.shape, q_BHK.dtype), vmap_method=None)
  kept = key_BHMK, value_BHMK, *scales
  if batch == 1:  # as a loop carries one row's (KVCache.pack): XLA would copy it to give it the axis of rows
    kept = [x.reshape(x.shape[1:]) for x in kept]
  return call(q_BHK, *kept, end_B, isa=library.forced())
