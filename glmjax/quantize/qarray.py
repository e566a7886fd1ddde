"""QuantizedArray: integer weights with a scale per output row, a pytree that stands in params for an array.

GLM-130B's scheme (paper B.8): weight-only, symmetric, scale = max|row| / 127 or 7 over a row's inputs,
code = round(w / scale) to even; INT4 holds two codes in a byte, even input in the high nibble.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from glmjax import errors
from glmjax import target

BITS = (4, 8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
  """Codes and scales of one weight array; any leading axes may be scanned, mapped or sharded.

  Axes are counted from the end, so that a layer's slice of a stack is itself a QuantizedArray.
  """

  values: jax.Array  # int8 codes; 4 bits: two codes a byte along `axis`, which is half as long
  scale: jax.Array  # the weight's rank, 1 along its input axes; or g along the first one, a scale for each g-th of it
  bits: int = dataclasses.field(metadata={"static": True})
  axis: int = dataclasses.field(metadata={"static": True})  # negative; the last of the input axes

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the weight that it stands for."""
    shape = list(self.values.shape)
    shape[self.axis] *= 8 // self.bits
    return tuple(shape)

  @property
  def nbytes(self) -> int:
    """Of codes and scales, as stored."""
    return self.values.nbytes + self.scale.nbytes


def _divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
  """x / y correctly rounded: by a number or a broadcast, XLA would multiply with the reciprocal instead."""
  y = jax.lax.optimization_barrier(jnp.broadcast_to(y, x.shape).astype(x.dtype))
  return x / y if target.platform() == "cpu" else _mended(x / y, x, y)


def _mended(quotient: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  """The float32 quotient correctly rounded, where the device's is a unit or two off (XLA on GPUs).

  What is left of x, computed exactly from products of half the bits (Dekker 1971), is divided as well.
  """
  product = jax.lax.optimization_barrier(quotient * y)
  (q, dq), (z, dz) = _upper_half(quotient), _upper_half(y)
  error = ((q * z - product) + q * dz + dq * z) + dq * dz
  return quotient + ((x - product) - error) / y


def _upper_half(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """float32 as a sum of two whose mantissas have 12 bits."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
  upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return upper, x - upper


def _round_half(x: jax.Array) -> jax.Array:
  """float32 rounded to fp16's precision, whatever XLA thinks of excess precision."""
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


def quantize(x: jax.Array, bits: int, axes: Sequence[int], scale_dtype: Any = jnp.float16) -> QuantizedArray:
  """Rows of absmax codes, the bits of the original's for fp16 and fp32 weights.

  Two differences, both where the original is wrong: codes are clamped to +-127 or +-7 (there, a scale that
  fp16 rounds down can give 128, which wraps to -128), and a row of zeros has codes 0 (there 0/0).

  Args:
    x: the weight.
    bits: 4 or 8.
    axes: the axes that a product sums over; codes are packed along the last of them.
    scale_dtype: of the scales; float16 in the original.

  Raises:
    errors.InputError: for other bits, or an odd number of inputs to pack.
  """
  if bits not in BITS:
    raise errors.InputError(f"bits is {bits}: quantization knows 8 and 4")
  axes = [axis % x.ndim - x.ndim for axis in axes]
  if bits == 4 and x.shape[axes[-1]] % 2:
    raise errors.InputError(
      f"INT4 packs two inputs in a byte, and shape {tuple(x.shape)} has an odd number "
      f"of them in axis {x.ndim + axes[-1]}: use 8 bits or an even size"
    )
  limit = 2 ** (bits - 1) - 1
  w = x.astype(jnp.float32)
  scale = _divide(jnp.abs(w).max(axes, keepdims=True), limit).astype(scale_dtype)
  scale = jax.lax.optimization_barrier(scale)  # XLA must not skip the rounding to scale_dtype
  quotient = _divide(w, scale)
  if x.dtype == jnp.float16:
    quotient = _round_half(quotient)  # the original divides in the weight's own precision
  codes = jnp.clip(jnp.where(scale > 0, jnp.round(quotient), 0), -limit, limit).astype(jnp.int8)
  return QuantizedArray(_pack(codes, axes[-1]) if bits == 4 else codes, scale, bits, axes[-1])


def _pack(codes: jax.Array, axis: int) -> jax.Array:
  """Two codes a byte, the even one high."""
  pairs = codes.reshape(*codes.shape[:axis], codes.shape[axis] // 2, 2, *_after(codes.shape, axis))
  high, low = jnp.split(pairs, 2, axis)
  return ((high << 4) | (low & 15)).squeeze(axis)


def _after(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
  return shape[axis + 1 :] if axis != -1 else ()


def halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The even and the odd codes of packed values, sign-extended."""
  return values >> 4, (values << 4) >> 4


def codes(q: QuantizedArray) -> jax.Array:
  """int8 codes in the weight's shape."""
  if q.bits == 8:
    return q.values
  paired = jnp.stack(halves(q.values), axis=q.values.ndim + q.axis + 1)
  return paired.reshape(q.shape)


def dequantize(q: QuantizedArray, dtype: Any = jnp.float32) -> jax.Array:
  """The weight that the codes stand for: code times scale, in `dtype`."""
  scale = q.scale.astype(dtype)
  for axis, (size, groups) in enumerate(zip(q.shape, scale.shape)):
    if 1 < groups < size:
      scale = jnp.repeat(scale, size // groups, axis)
  return codes(q).astype(dtype) * scale
