"""einsum over plain or quantized weights."""

import jax
import jax.numpy as jnp

from glmjax.quantize import qarray


def einsum(spec: str, x: jax.Array, kernel: "jax.Array | qarray.QuantizedArray") -> jax.Array:
  """jnp.einsum(spec, x, kernel) in x's dtype."""
  return jnp.einsum(spec, x, kernel.astype(x.dtype))
