"""GeGLU and the product behind it, which keep for backward only what went in.

Left to itself, differentiation keeps the activation for the product, or computes it again in a pass of its own; the
gradients of the two branches, joined, take another. Here one pass over the branches gives all three
(kernels/geglu.py).

B batch, L length, F mlp, D model.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import geglu
from glmjax.models import layers
from glmjax.models import weights
from glmjax.parallel import partitioning

_SPEC, _AXES = "BLF,FD->BLD", ("mlp", "embed")  # of the product behind it, and of its weight


def gelu(x: jax.Array) -> jax.Array:
  """Computes exact GELU, through erf and in float32."""
  y = x.astype(jnp.float32)
  return (y * geglu.cdf(y)).astype(x.dtype)


def activate(hidden_BL2F: jax.Array, bias_2F: jax.Array) -> jax.Array:
  """Multiplies the first half of hidden + bias with gelu of the second, [B, L, F]."""
  hidden_BL2F = layers.add_bias(hidden_BL2F, bias_2F)
  return hidden_BL2F[:, :, 0] * gelu(hidden_BL2F[:, :, 1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(
  target: target_lib.Target, bias_2F: jax.Array, hidden_BL2F: jax.Array, kernel_FD: weights.Weight
) -> jax.Array:
  """Computes activate(hidden, bias) @ kernel, [B, L, D] in hidden's dtype; sums in float32."""
  return kernel_FD.product(target, _SPEC, _split(activate(hidden_BL2F, bias_2F)), _AXES)


def _split(x_BLF: jax.Array) -> jax.Array:
  return partitioning.constrain(x_BLF, *geglu.AXES)


def _forward(
  target: target_lib.Target, bias_2F: jax.Array, hidden_BL2F: jax.Array, kernel_FD: weights.Weight
) -> tuple[jax.Array, tuple[Any, ...]]:
  return product(target, bias_2F, hidden_BL2F, kernel_FD), (hidden_BL2F, bias_2F, kernel_FD)


def _backward(target: target_lib.Target, residuals: tuple[Any, ...], g_BLD: jax.Array) -> tuple[Any, ...]:
  hidden_BL2F, bias_2F, kernel_FD = residuals
  d_BLF = _split(kernel_FD.input_gradient(target, _SPEC, g_BLD, hidden_BL2F.dtype))
  act_BLF, d_hidden_BL2F, d_bias_2F = geglu.BACKWARD.run(target, hidden_BL2F, bias_2F, d_BLF)
  d_kernel = kernel_FD.gradient(target, _SPEC, _split(act_BLF), g_BLD)
  return d_bias_2F.astype(bias_2F.dtype), d_hidden_BL2F, d_kernel


product.defvjp(_forward, _backward)
