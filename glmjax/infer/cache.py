"""The KV cache and the shapes it comes in.

Rows are padded on the left, so that every row of a batch writes to the same slot: slot P holds the first
token behind the prompts, whatever their lengths, and one interval per query says what it sees.

B batch, M slots, N layers, H heads, K head dimension. In the model's layout heads come before slots.
"""

import jax
import jax.numpy as jnp

from glmjax.models import config as config_lib
from glmjax.models import glm


def bucket(size: int, smallest: int = 32) -> int:
  """The next size that programs are compiled for: a power of two up to 256, then a multiple of 256."""
  if size > 256:
    return -(-size // 256) * 256
  rounded = smallest
  while rounded < size:
    rounded *= 2
  return rounded


def empty(config: config_lib.GLMConfig, batch: int, slots: int) -> glm.Cache:
  """Zeros in the layout that the model's layers want: stacked if it is scanned, else one pair a layer."""
  shape = (batch, config.num_heads, slots, config.head_dim)
  if config.scan_layers:
    stacked = (config.num_layers, *shape)
    return {name: jnp.zeros(stacked, config.dtype) for name in ("key", "value")}
  return {f"layers_{i}": {name: jnp.zeros(shape, config.dtype) for name in ("key", "value")}
          for i in range(config.num_layers)}


def extend(cache: glm.Cache, slots: int) -> glm.Cache:
  """The cache with `slots` empty ones behind those it has."""
  pads = [(0, 0), (0, 0), (0, slots), (0, 0)]
  if "key" in cache:
    return {name: jnp.pad(x, [(0, 0), *pads]) for name, x in cache.items()}
  return {layer: {name: jnp.pad(x, pads) for name, x in pair.items()} for layer, pair in cache.items()}


def merge_heads(cache: glm.Cache) -> glm.Cache:
  """[..., B, H, M, K] as [..., B * H, M, K], the form that products read.

  A loop that carries it in this form updates it in place on the CPU; XLA copies each of the others three
  times a step, once to reshape and twice to keep old and new apart.
  """
  return jax.tree.map(lambda x: x.reshape(*x.shape[:-4], -1, *x.shape[-2:]), cache)


def split_heads(cache: glm.Cache, num_heads: int) -> glm.Cache:
  """The inverse of `merge_heads`."""
  return jax.tree.map(lambda x: x.reshape(*x.shape[:-3], -1, num_heads, *x.shape[-2:]), cache)
