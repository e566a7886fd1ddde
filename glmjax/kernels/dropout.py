"""Dropout as a pure function of a row's key and places: head, query and key of attention weights, token and column of
hidden states.

A hash says for each pair of a query (token) and a key (column) whether it is kept, so that the whole matrix and kernels
that see a block of it at a time, on any mesh, drop the same pairs. Each query of each head gets a seed; a pair's hash
mixes it with the key's place. The hash is the finalizer of MurmurHash3 (fmix32), once for each of key words, head
and query, and once for a pair, whose last step is left out: it changes the lower half of the bits alone.

B batch, L query length, H heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# As int32, for which the kernels' compilers have all they need: 0x85EBCA6B and 0xC2B2AE35 of MurmurHash3, and
# 0x9E3779B1, a prime near 2^32 / golden ratio, that spreads consecutive numbers.
_FIRST, _SECOND, _SPREAD = -0x7A143595, -0x3D4D51CB, -0x61C8864F


class Dropout(NamedTuple):
  """What is dropped: of attention's weights (seeds of each query of each head), or of hidden states (of each token)."""

  rate: float  # 0 < rate < 1; static under jit
  seeds: jax.Array  # int32: [B, H, L], of each query, or [B, L], of each token


def make(rate: float, keys_B: jax.Array, *sizes: int) -> Dropout:
  """Makes a dropout by which each row drops by its own key; `sizes`: of the axes between rows and the last, whose
  places count from 0.
  """
  words = jax.lax.bitcast_convert_type(jax.random.key_data(keys_B), jnp.int32)
  seeds = jnp.zeros(keys_B.shape[:1], jnp.int32)
  for i in range(words.shape[1]):
    seeds = _mix(seeds ^ words[:, i])
  for count in sizes:
    seeds = _mix(seeds[..., None] ^ (jnp.arange(1, count + 1, dtype=jnp.int32) * _SPREAD))
  return Dropout(rate, seeds)


def keep(rate: float, seeds: jax.Array, keys: jax.Array) -> jax.Array:
  """Returns bool, whether pairs are kept, of queries' seeds and the keys' places, int32 that broadcast."""
  return _scramble(seeds ^ (keys * _SPREAD)) >= round(rate * 2**32) - 2**31


def apply(dropout: Dropout, x: jax.Array) -> jax.Array:
  """Returns x, attention weights [B, H, L, M] or hidden states [B, L, D], with those dropped 0, others scaled up."""
  keys = jnp.arange(x.shape[-1], dtype=jnp.int32)
  kept = keep(dropout.rate, dropout.seeds[..., None], keys)
  return jnp.where(kept, x / jnp.asarray(1.0 - dropout.rate, x.dtype), 0)


def _scramble(x: jax.Array) -> jax.Array:
  x = (x ^ jax.lax.shift_right_logical(x, 16)) * _FIRST
  return (x ^ jax.lax.shift_right_logical(x, 13)) * _SECOND


def _mix(x: jax.Array) -> jax.Array:
  x = _scramble(x)
  return x ^ jax.lax.shift_right_logical(x, 16)
