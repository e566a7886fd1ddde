"""QuantizedArray: integer weights with a scale per output row, a pytree that stands in params for an array.

GLM-130B's scheme (paper B.8): weight-only, symmetric, scale = max|row| / 127 or 7 over a row's inputs,
code = round(w / scale) to even; INT4 holds two codes in a byte, even input in the high nibble.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from glmjax import errors
from glmjax import target as target_lib
from glmjax.kernels import quantized

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
    """The shape of the weight that it stands for."""
    shape = list(self.values.shape)
    shape[self.axis] *= 8 // self.bits
    return tuple(shape)

  @property
  def nbytes(self) -> int:
    """The bytes of codes and scales, as stored."""
    return self.values.nbytes + self.scale.nbytes

  def product(
    self, target: target_lib.Target, spec: str, x: jax.Array, axes: quantized.Axes | None = None, dtype: Any = None
  ) -> jax.Array:
    """Computes jnp.einsum(spec, x, weight) in `dtype` (x's), as models.weights.Weight has it; input axes come first.

    The scale meets the sum: it is one per output. x has a gradient, codes and scales have none.
    """
    whole = x, self.values, self.scale
    groups = self.scale.shape[0]
    if groups == 1:
      return _product(target, spec, self.bits, self.axis, axes, *whole).astype(dtype or x.dtype)
    first = spec.index(spec.split(",")[1][0])  # each part of the first input axis has scales of its own
    parts = zip(*(jnp.split(y, groups, at) for y, at in zip(whole, (first, 0, 0))))
    return sum(_product(target, spec, self.bits, self.axis, None, *part) for part in parts).astype(dtype or x.dtype)

  def input_gradient(self, target: target_lib.Target, spec: str, g: jax.Array, dtype: Any) -> jax.Array:
    """Returns the gradient of the product's x, which has this dtype, for the product's gradient g."""
    groups, first = self.scale.shape[0], spec.index(spec.split(",")[1][0])
    parts = zip(jnp.split(self.values, groups), jnp.split(self.scale, groups))
    return jnp.concatenate(
      [_input_gradient(target, spec, self.bits, self.axis, *part, g, dtype) for part in parts], first
    )

  def gradient(self, target: target_lib.Target, spec: str, x: jax.Array, g: jax.Array) -> None:
    """Returns None: codes and scales do not train."""


def _divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
  """Returns x / y correctly rounded: by a number or a broadcast, XLA would multiply with the reciprocal instead."""
  y = jax.lax.optimization_barrier(jnp.broadcast_to(y, x.shape).astype(x.dtype))
  return jax.lax.platform_dependent(x, y, cpu=jnp.divide, default=_divide_and_mend)


def _divide_and_mend(x: jax.Array, y: jax.Array) -> jax.Array:
  return _mended(x / y, x, y)


def _mended(quotient: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns the float32 quotient correctly rounded, where the device's is a unit or two off (XLA on GPUs).

  What is left of x, computed exactly from products of half the bits (Dekker 1971), is divided as well.
  """
  product = jax.lax.optimization_barrier(quotient * y)
  (q, dq), (z, dz) = _upper_half(quotient), _upper_half(y)
  error = ((q * z - product) + q * dz + dq * z) + dq * dz
  return quotient + ((x - product) - error) / y


def _upper_half(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Splits float32 into a sum of two whose mantissas have 12 bits."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
  upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return upper, x - upper


def _round_half(x: jax.Array) -> jax.Array:
  """Rounds float32 to fp16's precision, whatever XLA thinks of excess precision."""
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


def quantize(x: jax.Array, bits: int, axes: Sequence[int], scale_dtype: Any = jnp.float16) -> QuantizedArray:
  """Returns rows of absmax codes, the bits of the original's for fp16 and fp32 weights.

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
  axes = _from_end(x.shape, bits, axes)
  limit = 2 ** (bits - 1) - 1
  w = x.astype(jnp.float32)
  scale = _divide(jnp.abs(w).max(axes, keepdims=True), limit).astype(scale_dtype)
  scale = jax.lax.optimization_barrier(scale)  # XLA must not skip the rounding to scale_dtype
  quotient = _divide(w, scale)
  if x.dtype == jnp.float16:
    quotient = _round_half(quotient)  # the original divides in the weight's own precision
  codes = jnp.clip(jnp.where(scale > 0, jnp.round(quotient), 0), -limit, limit).astype(jnp.int8)
  return QuantizedArray(_pack(codes, axes[-1]) if bits == 4 else codes, scale, bits, axes[-1])


def abstract(shape: Sequence[int], bits: int, axes: Sequence[int], groups: int = 1) -> QuantizedArray:
  """Returns the shapes and dtypes of what `quantize` makes of a weight of this shape, or of so many parts of its first
  input axis, each with scales of its own; raises as it does.
  """
  axes = _from_end(shape, bits, axes)
  values, scale = list(shape), list(shape)
  values[axes[-1]] //= 8 // bits
  for axis in axes:
    scale[axis] = 1
  scale[axes[0]] = groups
  make = jax.ShapeDtypeStruct
  return QuantizedArray(make(values, jnp.int8), make(scale, jnp.float16), bits, axes[-1])


def _from_end(shape: Sequence[int], bits: int, axes: Sequence[int]) -> list[int]:
  """Returns the axes counted from the end, once it is known that such a weight can be quantized."""
  if bits not in BITS:
    raise errors.InputError(f"bits is {bits}: quantization knows 8 and 4")
  axes = [axis % len(shape) - len(shape) for axis in axes]
  if bits == 4 and shape[axes[-1]] % 2:
    raise errors.InputError(
      f"INT4 packs two inputs in a byte, and shape {tuple(shape)} has an odd number "
      f"of them in axis {len(shape) + axes[-1]}: use 8 bits or an even size"
    )
  return axes


def _pack(codes: jax.Array, axis: int) -> jax.Array:
  """Packs two codes a byte, the even one high."""
  pairs = codes.reshape(*codes.shape[:axis], codes.shape[axis] // 2, 2, *_after(codes.shape, axis))
  high, low = jnp.split(pairs, 2, axis)
  return ((high << 4) | (low & 15)).squeeze(axis)


def _after(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
  return shape[axis + 1 :] if axis != -1 else ()


def codes(q: QuantizedArray) -> jax.Array:
  """Returns int8 codes in the weight's shape."""
  if q.bits == 8:
    return q.values
  paired = jnp.stack(quantized.halves(q.values), axis=q.values.ndim + q.axis + 1)
  return paired.reshape(q.shape)


def dequantize(q: QuantizedArray, dtype: Any = jnp.float32) -> jax.Array:
  """Returns the weight that the codes stand for: code times scale, in `dtype`."""
  scale = q.scale.astype(dtype)
  for axis, (size, groups) in enumerate(zip(q.shape, scale.shape)):
    if 1 < groups < size:
      scale = jnp.repeat(scale, size // groups, axis)
  return codes(q).astype(dtype) * scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _product(
  target: target_lib.Target,
  spec: str,
  bits: int,
  axis: int,
  axes: quantized.Axes | None,
  x: jax.Array,
  values: jax.Array,
  scale: jax.Array,
) -> jax.Array:
  """Multiplies x with codes and scales, in float32."""
  num_inputs = values.ndim + axis + 1
  sums = quantized.PRODUCT.run(target, spec, x, values, bits, num_inputs, axes)
  return sums * _along_outputs(scale, num_inputs, sums)


def _along_outputs(scale: jax.Array, num_inputs: int, sums: jax.Array) -> jax.Array:
  """Returns the scales in float32, to be multiplied with the sums."""
  outputs = scale.shape[num_inputs:]
  assert sums.shape[sums.ndim - len(outputs) :] == outputs, (sums.shape, outputs)
  return scale.astype(jnp.float32).reshape((1,) * (sums.ndim - len(outputs)) + outputs)


def _product_forward(
  target: target_lib.Target,
  spec: str,
  bits: int,
  axis: int,
  axes: quantized.Axes | None,
  x: jax.Array,
  values: jax.Array,
  scale: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return _product(target, spec, bits, axis, axes, x, values, scale), (jnp.zeros((), x.dtype), values, scale)


def _product_backward(
  target: target_lib.Target,
  spec: str,
  bits: int,
  axis: int,
  axes: quantized.Axes | None,
  residuals: tuple[jax.Array, ...],
  g: jax.Array,
) -> tuple[jax.Array, None, None]:
  del axes
  like, values, scale = residuals
  return _input_gradient(target, spec, bits, axis, values, scale, g, like.dtype), None, None


def _input_gradient(
  target: target_lib.Target,
  spec: str,
  bits: int,
  axis: int,
  values: jax.Array,
  scale: jax.Array,
  g: jax.Array,
  dtype: Any,
) -> jax.Array:
  """Computes one more product with the codes, over the outputs; no float copy of them is kept for it."""
  num_inputs = values.ndim + axis + 1
  largest = jnp.maximum(scale.astype(jnp.float32).max(), jnp.finfo(jnp.float32).tiny)
  scales = _along_outputs(scale, num_inputs, g) / largest  # at most 1: float16 would lose what a small scale leaves
  d = (g * scales).astype(dtype)
  dx = quantized.transposed(target, spec, d, values, bits, num_inputs)
  return (dx * largest).astype(dtype)


_product.defvjp(_product_forward, _product_backward)


def bits_of(params: Iterable[Any]) -> int | None:
  """Returns how many bits the quantized ones of these parameters have; None where none is quantized."""
  return next((x.bits for x in params if isinstance(x, QuantizedArray)), None)


@functools.partial(jax.jit, static_argnames=("bits", "axes"))
def quantize_layers(kernel: jax.Array, bits: int, axes: tuple[int, ...]) -> QuantizedArray:
  """Applies `quantize` to one kernel, a layer at a time where layers are stacked, so that temporaries stay one layer's
  size.

  Args:
    axes: the axes that a product sums over, counted from the end, from the first of a layer's on.
  """
  one = functools.partial(quantize, bits=bits, axes=axes)
  stacked = kernel.ndim > -axes[0]
  return jax.lax.map(one, kernel) if stacked else one(kernel)
