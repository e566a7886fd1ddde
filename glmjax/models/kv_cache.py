"""The KV cache: keys and values of earlier tokens, row by row. It owns how they are written and read.

Slot m of a row holds the row's m-th token, whatever the other rows hold, so that rows of any lengths decode together
and each is the same alone or among others. Heads come before slots, so that a step's products with the cache need no
transposed copy of it.

B batch, L new tokens, M slots, N layers, H heads, K head dimension.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import attention
from glmjax.models import config as config_lib
from glmjax.parallel import partitioning


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """One layer's [B, H, M, K], or a stack of all layers' [N, B, H, M, K]."""

  key: jax.Array
  value: jax.Array
  rows_BJ: jax.Array | None = None  # int32, while `append` gives each row, for its own token, those of these rows

  @property
  def slots(self) -> int:
    """M, how many tokens of a row there is room for."""
    return self.key.shape[-2]

  def append(self, k_BLHK: jax.Array, v_BLHK: jax.Array, first_B: jax.Array) -> "KVCache":
    """Returns one layer's cache with L tokens of each row written from the row's slot `first_B` on.

    With `rows_BJ` L is 1, and each row is given the tokens of J rows, zeros for rows that there are not. All slots that
    are written must be there.
    """
    chex.assert_equal_shape([k_BLHK, v_BLHK])
    chex.assert_shape([self.key, self.value], (len(k_BLHK), k_BLHK.shape[2], self.slots, k_BLHK.shape[3]))
    chex.assert_shape(first_B, (len(k_BLHK),))

    def write(slots_BHMK: jax.Array, new_BLHK: jax.Array) -> jax.Array:
      if self.rows_BJ is not None:
        new_BLHK = jnp.take(new_BLHK[:, 0], self.rows_BJ, axis=0, mode="fill", fill_value=0)
      new_BHLK = _stored(jnp.swapaxes(new_BLHK, 1, 2), slots_BHMK.dtype)
      if len(slots_BHMK) == 1:  # written without its axis, as `pack` says
        return _write_row(slots_BHMK[0], new_BHLK[0], first_B[0])[None]
      return jax.vmap(_write_row)(slots_BHMK, new_BHLK, first_B)

    return KVCache(write(self.key, k_BLHK), write(self.value, v_BLHK))

  def attend(
    self, target: target_lib.Target, q_BLHK: jax.Array, end_BL: jax.Array, prefix: tuple[jax.Array, jax.Array] | None
  ) -> jax.Array:
    """Returns what queries that see their row's slots before `end_BL` read from one layer's cache, [B, L, H, K]."""
    k_BMHK, v_BMHK = (jnp.swapaxes(_computed(x, q_BLHK.dtype), 1, 2) for x in (self.key, self.value))
    return attention.attend(target, q_BLHK, k_BMHK, v_BMHK, jnp.zeros_like(end_BL), end_BL, prefix=prefix)

  def extend(self, slots: int) -> "KVCache":
    """Returns the cache with `slots` empty ones behind those it has."""

    def pad(x: jax.Array) -> jax.Array:
      return jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, slots), (0, 0)])

    return jax.tree.map(pad, self)

  def pack(self) -> "KVCache":
    """Returns the cache as a loop carries it: that of a single row has no axis of rows.

    XLA's CPU (jax 0.10) copies an array [1, H, M, K] four times a step to keep old and new apart, one [H, M, K] never.
    """
    return jax.tree.map(lambda x: jnp.squeeze(x, -4) if x.shape[-4] == 1 else x, self)

  def unpack(self, batch: int) -> "KVCache":
    """Returns the cache of `batch` rows that was packed."""
    return jax.tree.map(lambda x: jnp.expand_dims(x, -4) if batch == 1 else x, self)

  def rows(self, index_B: jax.Array) -> "KVCache":
    """Returns the rows with these numbers, in this order."""
    return jax.tree.map(lambda x: jnp.take(x, index_B, axis=x.ndim - 4), self)

  def constrain(self) -> "KVCache":
    """Splits the cache's rows and heads over the mesh as the rules say; rows that do not divide are not split."""
    rows = "batch" if self.key.shape[-4] % partitioning.parts("batch") == 0 else None
    return jax.tree.map(
      lambda x: partitioning.constrain(x, *[None] * (x.ndim - 4), rows, "act_heads", None, None), self
    )


def of_prompt(target: target_lib.Target, k_BLHK: jax.Array, v_BLHK: jax.Array) -> KVCache:
  """Returns one layer's cache that holds the L first tokens of every row and has no slot more."""
  return KVCache(*(_stored(jnp.swapaxes(x, 1, 2), storage_dtype(target, x.dtype)) for x in (k_BLHK, v_BLHK)))


def empty(target: target_lib.Target, config: config_lib.GLMConfig, batch: int, slots: int) -> Any:
  """Returns zeros, as the model returns them: one KVCache of all layers if scanned, else one a layer ("layers_0",
  ...).
  """
  shape = (batch, config.num_heads, slots, config.head_dim)

  def zeros(*leading: int) -> KVCache:
    return KVCache(*(jnp.zeros((*leading, *shape), storage_dtype(target, config.dtype)) for _ in range(2)))

  if config.scan_layers:
    return zeros(config.num_layers)
  return {f"layers_{i}": zeros() for i in range(config.num_layers)}


def storage_dtype(target: target_lib.Target, dtype: Any) -> jnp.dtype:
  """Says as what keys and values computed in `dtype` are kept: on the CPU half-precision ones as their bits.

  XLA's CPU (jax 0.10) copies a whole bfloat16 array to change one row of it: 95 ms where integers take 0.01 (33 MB).
  """
  dtype = jnp.dtype(dtype)
  return jnp.dtype(jnp.uint16) if dtype.itemsize == 2 and target.platform == "cpu" else dtype


def _write_row(slots_HMK: jax.Array, new_HLK: jax.Array, first: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice(slots_HMK, new_HLK, (0, first, 0))


def _stored(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, dtype) if x.dtype.itemsize == 2 and dtype == jnp.uint16 else x.astype(dtype)


def _computed(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x.astype(dtype)
