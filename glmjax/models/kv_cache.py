"""The KV cache: keys and values of earlier tokens, row by row. It owns how they are written and read.

Slot m of a row holds the row's m-th token, whatever the other rows hold, so that rows of any lengths decode together
and each is the same alone or among others. Heads come before slots, so that a step's products with the cache need no
transposed copy of it.

As int8 (GLMConfig.kv_cache_dtype) a slot's K numbers of each head have one scale, the largest of them / 127, so that a
token is kept alike whatever else is there.

B batch, L new tokens, M slots, N layers, H heads, K head dimension.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import attention
from glmjax.kernels.cpu import attention as cpu_attention
from glmjax.models import config as config_lib
from glmjax.parallel import partitioning


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """Keys, or values, as they are kept: one layer's [B, H, M, K], or a stack of all layers' [N, B, H, M, K]."""

  kept: jax.Array
  scale: jax.Array | None = None  # of int8: float32 [..., H, M, 1]

  @classmethod
  def keep(cls, x: jax.Array, dtype: jnp.dtype) -> "Slots":
    """Returns slots that hold these numbers, as `storage_dtype` says."""
    if dtype == jnp.uint16:
      return cls(jax.lax.bitcast_convert_type(x, dtype))
    if dtype != jnp.int8:
      return cls(x.astype(dtype))
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1, keepdims=True) / 127
    codes = jnp.round(x / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny))  # zeros have the scale 0
    return cls(codes.astype(jnp.int8), scale)

  def computed(self, dtype: jnp.dtype) -> jax.Array:
    """Returns the numbers in `dtype`."""
    if self.kept.dtype == jnp.uint16:
      return jax.lax.bitcast_convert_type(self.kept, dtype)
    if self.scale is None:
      return self.kept.astype(dtype)
    return (self.kept.astype(jnp.float32) * self.scale).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """The cache of one layer, or of all layers, stacked."""

  key: Slots
  value: Slots
  rows_BJ: jax.Array | None = None  # int32, while `append` gives each row, for its own token, those of these rows

  @property
  def slots(self) -> int:
    """M, how many tokens of a row there is room for."""
    return self.key.kept.shape[-2]

  def append(self, k_BLHK: jax.Array, v_BLHK: jax.Array, first_B: jax.Array) -> "KVCache":
    """Returns one layer's cache with L tokens of each row written from the row's slot `first_B` on.

    With `rows_BJ` L is 1, and each row is given the tokens of J rows, zeros for rows that there are not. All slots that
    are written must be there.
    """
    chex.assert_equal_shape([k_BLHK, v_BLHK])
    shape = len(k_BLHK), k_BLHK.shape[2], self.slots, k_BLHK.shape[3]
    chex.assert_shape([self.key.kept, self.value.kept], shape)
    chex.assert_shape(first_B, (len(k_BLHK),))

    def write(x_BHMK: jax.Array, new_BHLK: jax.Array) -> jax.Array:
      if len(x_BHMK) == 1:  # written without its axis, as `pack` says
        return _write_row(x_BHMK[0], new_BHLK[0], first_B[0])[None]
      return jax.vmap(_write_row)(x_BHMK, new_BHLK, first_B)

    def add(slots: Slots, new_BLHK: jax.Array) -> Slots:
      if self.rows_BJ is not None:
        new_BLHK = jnp.take(new_BLHK[:, 0], self.rows_BJ, axis=0, mode="fill", fill_value=0)
      return jax.tree.map(write, slots, Slots.keep(jnp.swapaxes(new_BLHK, 1, 2), slots.kept.dtype))

    return KVCache(add(self.key, k_BLHK), add(self.value, v_BLHK))

  def attend(
    self,
    target: target_lib.Target,
    q_BLHK: jax.Array,
    end_BL: jax.Array,
    prefix: tuple[jax.Array, jax.Array] | None,
    scores_dtype: str,
  ) -> jax.Array:
    """Returns what queries that see their row's slots before `end_BL` read from one layer's cache, [B, L, H, K]."""
    if prefix is None and scores_dtype == "float32" and self._reads_as_kept(target, q_BLHK):
      scales = [slots.scale[..., 0] for slots in (self.key, self.value) if slots.scale is not None]
      return cpu_attention.attend(q_BLHK[:, 0], self.key.kept, self.value.kept, end_BL[:, 0], *scales)[:, None]
    k_BMHK, v_BMHK = (jnp.swapaxes(slots.computed(q_BLHK.dtype), 1, 2) for slots in (self.key, self.value))
    start_BL = jnp.zeros_like(end_BL)
    return attention.attend(target, q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL, None, prefix, scores_dtype)

  def _reads_as_kept(self, target: target_lib.Target, q_BLHK: jax.Array) -> bool:
    """Tells whether the C++ library of CPUs reads the cache: of one query a row, on one device."""
    takes = q_BLHK.dtype in (jnp.float32, jnp.bfloat16) and self.key.kept.dtype in (jnp.float32, jnp.uint16, jnp.int8)
    return takes and q_BLHK.shape[1] == 1 and target.is_one_cpu and not target.lacks("cpu_library")

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
    rows = "batch" if self.key.kept.shape[-4] % partitioning.parts("batch") == 0 else None
    return jax.tree.map(
      lambda x: partitioning.constrain(x, *[None] * (x.ndim - 4), rows, "act_heads", None, None), self
    )


def of_prompt(target: target_lib.Target, config: config_lib.GLMConfig, k_BLHK: jax.Array, v_BLHK: jax.Array) -> KVCache:
  """Returns one layer's cache that holds the L first tokens of every row and has no slot more."""
  dtype = storage_dtype(target, config)
  return KVCache(*(Slots.keep(jnp.swapaxes(x, 1, 2), dtype) for x in (k_BLHK, v_BLHK)))


def empty(target: target_lib.Target, config: config_lib.GLMConfig, batch: int, slots: int) -> Any:
  """Returns zeros, as the model returns them: one KVCache of all layers if scanned, else one a layer ("layers_0",
  ...).
  """
  shape = (batch, config.num_heads, slots, config.head_dim)

  def zeros(*leading: int) -> KVCache:
    x = jnp.zeros((*leading, *shape), config.dtype)
    return KVCache(*(Slots.keep(x, storage_dtype(target, config)) for _ in range(2)))

  if config.scan_layers:
    return zeros(config.num_layers)
  return {f"layers_{i}": zeros() for i in range(config.num_layers)}


def storage_dtype(target: target_lib.Target, config: config_lib.GLMConfig) -> jnp.dtype:
  """Says as what keys and values are kept: on the CPU half-precision ones as their bits.

  XLA's CPU (jax 0.10) copies a whole bfloat16 array to change one row of it: 95 ms where integers take 0.01 (33 MB).
  """
  dtype = jnp.dtype(config.kv_cache_dtype or config.dtype)
  return jnp.dtype(jnp.uint16) if dtype.itemsize == 2 and target.platform == "cpu" else dtype


def _write_row(slots_HMK: jax.Array, new_HLK: jax.Array, first: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice(slots_HMK, new_HLK, (0, first, 0))
