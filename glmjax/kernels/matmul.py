"""einsum of two floats, with the precision that training wants of sums and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from glmjax import target as target_lib


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 4))
def matmul(
  target: target_lib.Target, spec: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype | None = None
) -> jax.Array:
  """Computes jnp.einsum of two floats: operands in x's dtype, sums in float32, the result in `dtype` (x's).

  So are the gradients: the cotangent is rounded to x's dtype first, and y's gradient comes out in y's own
  dtype, float32 for a master weight. (JAX's own would multiply bf16 by float32, as float32.)
  """
  return _einsum(target, spec, x, y.astype(x.dtype), dtype or x.dtype)


def in_order(spec: str) -> str:
  """Renames the spec's labels: sums run over axes in the order of their names, and in any order but that of the
  operands XLA copies these first.
  """
  labels = "".join(dict.fromkeys(spec.split(",")[1].replace("->", "") + spec.split(",")[0]))
  return spec.translate(str.maketrans(labels, "abcdefghijklm"[: len(labels)]))


def _einsum(target: target_lib.Target, spec: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Computes an einsum of operands of one dtype. XLA's CPU multiplies bf16 at twice float32's speed, but into float32
  alone; others round in the product.
  """
  sums = jnp.float32 if target.platform == "cpu" else dtype
  return jnp.einsum(in_order(spec), x, y, preferred_element_type=sums).astype(dtype)


def _forward(
  target: target_lib.Target, spec: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype | None
) -> tuple[jax.Array, Any]:
  return matmul(target, spec, x, y, dtype), (x, y)


def _backward(
  target: target_lib.Target, spec: str, dtype: jnp.dtype | None, residuals: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
  del dtype
  x, y = residuals
  return first_gradient(target, spec, y, g, x.dtype), second_gradient(target, spec, x, g, y.dtype)


def first_gradient(target: target_lib.Target, spec: str, y: jax.Array, g: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns the gradient of matmul's x, which has this dtype, for its result's gradient g."""
  a, b, c = spec.replace("->", ",").split(",")
  return _einsum(target, f"{c},{b}->{a}", g.astype(dtype), y.astype(dtype), dtype)


def second_gradient(target: target_lib.Target, spec: str, x: jax.Array, g: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns the gradient of matmul's y, which has this dtype, for its result's gradient g."""
  a, b, c = spec.replace("->", ",").split(",")
  g = g.astype(x.dtype)
  if set(a) & set(b) & set(c) and target.platform == "cpu":
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)  # XLA's CPU fails on batches of transposed bf16 (jax 0.10)
  return _einsum(target, f"{a},{c}->{b}", x, g, dtype)


matmul.defvjp(_forward, _backward)
