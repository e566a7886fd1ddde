"""LayerNorm over the last axis, statistics in float32; backward keeps x as it came and makes the rest again.

B batch, L length, D model, S spans of a row.
"""

import functools

import jax
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import layer_norm_gpu
from glmjax.kernels import registry
from glmjax.parallel import partitioning

Gradients = tuple[jax.Array, jax.Array, jax.Array]  # of x, in its dtype, scale and bias, float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def layer_norm(
  target: target_lib.Target, epsilon: float, dtype: str, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
  """Returns x with mean 0 and variance 1 along its last axis, times scale, plus bias, in `dtype`."""
  normal, _ = _normalize(epsilon, x)
  return (normal * _along(x, scale) + _along(x, bias)).astype(dtype)


def _normalize(epsilon: float, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns x with mean 0 and variance 1, and the factor that did it, float32."""
  x = x.astype(jnp.float32)
  x = x - x.mean(-1, keepdims=True)
  factor = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
  return x * factor, factor


def _along(x: jax.Array, weights: jax.Array) -> jax.Array:
  return weights.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + weights.shape)


def _forward(
  target: target_lib.Target, epsilon: float, dtype: str, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return layer_norm(target, epsilon, dtype, x, scale, bias), (x, scale, bias)


def _backward(
  target: target_lib.Target, epsilon: float, dtype: str, residuals: tuple[jax.Array, ...], g: jax.Array
) -> Gradients:
  del dtype
  x, scale, bias = residuals
  dx, d_scale, d_bias = BACKWARD.run(target, epsilon, x, scale, g)
  return dx, d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


layer_norm.defvjp(_forward, _backward)


def _plain(target: target_lib.Target, epsilon: float, x: jax.Array, scale: jax.Array, g: jax.Array) -> Gradients:
  del target
  normal, factor = _normalize(epsilon, x)
  g = g.astype(jnp.float32)
  d = g * _along(x, scale)
  dx = factor * (d - d.mean(-1, keepdims=True) - normal * (d * normal).mean(-1, keepdims=True))
  rows = tuple(range(x.ndim - 1))
  return dx.astype(x.dtype), (g * normal).sum(rows), g.sum(rows)


def _fits(target: target_lib.Target, epsilon: float, x: jax.Array, scale: jax.Array, g: jax.Array) -> bool:
  """Tells whether x is half-precision [B, L, D], with whole spans of tokens on each device."""
  del epsilon, scale, g
  if x.ndim != 3 or x.dtype not in (jnp.bfloat16, jnp.float16):
    return False
  tokens = layer_norm_gpu.SPAN * target.split("norm_length")
  whole_spans = x.shape[0] % target.split("batch") == x.shape[1] % tokens == 0
  return whole_spans and target.split("act_embed") == 1 and layer_norm_gpu.fits(x.shape[2])


def _by_kernel(
  target: target_lib.Target, epsilon: float, x_BLD: jax.Array, scale_D: jax.Array, g_BLD: jax.Array
) -> Gradients:
  """Computes the gradients of each device's own tokens by the GPU's kernel."""
  del target
  tokens = ("batch", "norm_length")
  run = partitioning.on_each_device(
    functools.partial(layer_norm_gpu.backward, epsilon), (tokens, (), tokens), [tokens, tokens]
  )
  dx_BLD, sums_BS2D = run(x_BLD, scale_D, g_BLD)
  return dx_BLD, *sums_BS2D.sum((0, 1))


# Of (target, epsilon, x, scale, g), g the output's gradient.
BACKWARD = registry.Operation(
  "layer norm, backward",
  (
    registry.Implementation(
      "Pallas Triton, one pass",
      f"bfloat16 or float16, lengths of whole {layer_norm_gpu.SPAN}s, widths of few powers of two",
      _by_kernel,
      needs=("triton",),
      fits=_fits,
    ),
    registry.Implementation("XLA", "all", _plain),
  ),
)
