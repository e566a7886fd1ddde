"""What the flash kernels share: which blocks of queries and keys meet, and what is known of each query.

B batch, L query length, M key length, H heads.
"""

import math

import jax
import jax.numpy as jnp

from glmjax.kernels import dropout as dropout_lib

LOG2E = math.log2(math.e)
LOW = -1e30  # below every score that a query sees; finite, so that it minus itself is 0
UNSEEN = 2 * LOW  # a score that no query sees: so far below LOW that its weight is 0 whatever the others are
LEAST = 1e-30  # a sum of weights, of a query that sees nothing


def key_range(
  start_BL: jax.Array, end_BL: jax.Array, block_q: int, block_k: int, num_keys: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the first and past-the-last block of keys that each block of queries sees, int32 [B, L / block_q] each."""
  starts, ends = (x.reshape(x.shape[0], -1, block_q) for x in (start_BL, end_BL))
  last = jnp.minimum(-(-ends.max(-1) // block_k), num_keys // block_k)
  return jnp.clip(starts.min(-1) // block_k, 0, last), last


def query_range(
  start_BL: jax.Array, end_BL: jax.Array, block_q: int, block_k: int, num_keys: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the first and past-the-last block of queries that sees each block of keys, int32 [B, M / block_k] each."""
  first, last = (x[..., None] for x in key_range(start_BL, end_BL, block_q, block_k, num_keys))
  blocks = jnp.arange(num_keys // block_k)
  seen = (first <= blocks) & (blocks < last)  # [B, query blocks, key blocks]
  any_seen = seen.any(1)
  past = seen.shape[1] - jnp.argmax(seen[:, ::-1], axis=1)
  return (
    jnp.where(any_seen, jnp.argmax(seen, axis=1), 0).astype(jnp.int32),
    jnp.where(any_seen, past, 0).astype(jnp.int32),
  )


def lines(
  start_BL: jax.Array, end_BL: jax.Array, dropout: dropout_lib.Dropout | None
) -> tuple[tuple[jax.Array, ...], float]:
  """Returns what the kernels' masks know of each query (its interval, and where some are dropped its seeds) and the
  rate.
  """
  return ((start_BL, end_BL), 0.0) if dropout is None else ((start_BL, end_BL, dropout.seeds), dropout.rate)
