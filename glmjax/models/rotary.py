"""Rotary position embedding in the half ("NeoX") layout, one- and two-dimensional.

B batch, L length, H heads, K head dimension.
"""

import chex
import jax
import jax.numpy as jnp

from glmjax.models import config as config_lib


def table(positions_BL: jax.Array, dim: int, base: float, rounding: str) -> tuple[jax.Array, jax.Array]:
  """Returns cos and sin of the angles, float32 [B, L, dim / 2].

  `rounding` names what the original code kept in half precision: "half_frequencies" (the inverse
  frequencies; GLM-130B and ChatGLM-6B run in float32) or "half_table" (angles, cos and sin too; as
  deployed in fp16). At 2,048 positions a half-precision table is off by up to 0.9 in a cosine.
  """
  frequencies = 1.0 / (base ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim))
  if rounding == "none":
    angles = positions_BL.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)
  frequencies = _half(frequencies)
  angles = positions_BL.astype(jnp.float32)[..., None] * frequencies
  if rounding == "half_frequencies":
    return jnp.cos(angles), jnp.sin(angles)
  angles = _half(_half(positions_BL.astype(jnp.float32))[..., None] * frequencies)
  return _half(jnp.cos(angles)), _half(jnp.sin(angles))


def _half(x: jax.Array) -> jax.Array:
  """Rounds x to half precision; not by a cast there and back, which XLA may remove."""
  return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)


def tables(config: config_lib.GLMConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
  """Returns cos and sin for `rotate`, [B, L, K / 2] float32, or None for learned positions.

  `positions` is [B, L], or [B, 2, L] where each half of a head is rotated by one of two (ChatGLM-6B).
  """
  kind = config.position_kind
  if not kind.rotary_parts:
    return None
  rows = jnp.arange(config.max_length)[None]

  def gather(positions_BL: jax.Array) -> list[jax.Array]:
    # As the original code does. XLA's CPU would compute the cosines again for every head of every layer.
    # A position beyond the model's length gives NaN.
    return [
      t[0].at[positions_BL].get(mode="fill", fill_value=jnp.nan)
      for t in table(rows, config.head_dim // kind.rotary_parts, config.rotary_base, config.rotary_rounding)
    ]

  chex.assert_rank(positions, 1 + kind.axes)
  if kind.axes == 1:
    return tuple(gather(positions))
  pairs = [gather(positions[:, i]) for i in range(kind.axes)]
  return jnp.concatenate([p[0] for p in pairs], -1), jnp.concatenate([p[1] for p in pairs], -1)


def rotate(x_BLHK: jax.Array, cos_sin: tuple[jax.Array, jax.Array] | None, parts: int) -> jax.Array:
  """Rotates each of `parts` equal pieces of the head by its share of the table, in float32."""
  if cos_sin is None:
    return x_BLHK
  chex.assert_shape(cos_sin, (None, x_BLHK.shape[1], x_BLHK.shape[3] // 2))
  # Halves change places by a reversed axis: XLA writes joined pieces at half the speed on GPUs.
  halves = x_BLHK.astype(jnp.float32).reshape(*x_BLHK.shape[:-1], parts, 2, -1)
  cos, sin = (t.reshape(*t.shape[:-1], parts, 1, -1)[:, :, None] for t in cos_sin)
  turned = jnp.flip(halves, -2) * jnp.array([[-1.0], [1.0]])
  return (halves * cos + turned * sin).reshape(x_BLHK.shape).astype(x_BLHK.dtype)
