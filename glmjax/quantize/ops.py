"""einsum over plain or quantized weights.

The codes are multiplied as floats, exactly (127 is exact in any float type), and the scale meets the sum:
it is one per output. INT4's even and odd inputs are two products, so that nothing is interleaved.

XLA's CPU makes a float copy of all the weights of a product. Taking a block of inputs at a time keeps that
copy in the cache: at 4096 x 4096 and one row INT8 takes 3 ms instead of 94 on two cores; at 128 rows it is no
slower than float.
"""

import functools
import math

import jax
import jax.numpy as jnp

from glmjax.quantize import qarray

_BLOCK = 128  # inputs (INT4: bytes) at a time on a CPU; 64 to 256 are much alike


def einsum(spec: str, x: jax.Array, kernel: "jax.Array | qarray.QuantizedArray") -> jax.Array:
  """jnp.einsum(spec, x, kernel) in x's dtype. A quantized kernel's input axes come first."""
  if not isinstance(kernel, qarray.QuantizedArray):
    return jnp.einsum(spec, x, kernel.astype(x.dtype))
  labels = spec.replace("->", ",").split(",")[1]
  inputs = labels[:kernel.values.ndim + kernel.axis + 1]
  parts = (x,) if kernel.bits == 8 else _even_odd(x, spec.index(inputs[-1]))
  sums = jax.lax.platform_dependent(parts, kernel.values, default=functools.partial(_product, spec),
                                    cpu=functools.partial(_blocked_product, spec, len(inputs)))
  outputs = kernel.scale.shape[len(inputs):]
  assert sums.shape[sums.ndim - len(outputs):] == outputs, (spec, sums.shape, outputs)
  scale = kernel.scale.astype(jnp.float32).reshape((1,) * (sums.ndim - len(outputs)) + outputs)
  return (sums * scale).astype(x.dtype)


def _even_odd(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1:])
  return pairs.take(0, axis + 1), pairs.take(1, axis + 1)


def _product(spec: str, parts: tuple[jax.Array, ...], values: jax.Array) -> jax.Array:
  """float32 sums over codes, all at once."""
  codes = (values,) if len(parts) == 1 else qarray.halves(values)
  return sum(jnp.einsum(spec, x, c.astype(x.dtype), preferred_element_type=jnp.float32)
             for x, c in zip(parts, codes))


def _blocked_product(spec: str, num_inputs: int, parts: tuple[jax.Array, ...], values: jax.Array
                     ) -> jax.Array:
  """The same, a block of the first input axis at a time."""
  length, row = values.shape[0], math.prod(values.shape[1:num_inputs])
  block = max(d for d in range(1, max(1, _BLOCK // row) + 1) if length % d == 0)
  if block == length or block * row < _BLOCK // 8:  # one block, or a length with no good divisor
    return _product(spec, parts, values)
  axis = spec.index(spec.split(",")[1][0])
  split = length // block, block
  blocks = tuple(jnp.moveaxis(x.reshape(*x.shape[:axis], *split, *x.shape[axis + 1:]), axis, 0)
                 for x in parts)

  def add(total: jax.Array, of: tuple[tuple[jax.Array, ...], jax.Array]) -> tuple[jax.Array, None]:
    return total + _product(spec, *of), None

  start = jax.eval_shape(functools.partial(_product, spec), parts, values)
  return jax.lax.scan(add, jnp.zeros(start.shape, start.dtype),
                      (blocks, values.reshape(*split, *values.shape[1:])))[0]
