"""Products with quantized weights: sums over their codes, which meet the scale in the sum.

The codes are multiplied as floats, exactly (127 is exact in any float type). INT4's even and odd inputs are two
products, so that nothing is interleaved.

XLA's CPU makes a float copy of all the weights of a product. Taking a block of inputs at a time keeps that
copy in the cache: at 4096 x 4096 and one row INT8 takes 3 ms instead of 94 on two cores; at 128 rows it is no
slower than float.

XLA's GPU compilers write such a copy for each product too, of one row in float32. For few rows a sum over multiplied
elements takes its place, a loop over the codes in which they become floats in registers.

Codes are int8 [inputs, outputs], in any number of axes each, in INT4 two in a byte along the last input axis.
"""

import functools
import math
from collections.abc import Callable

import jax
from jax.experimental import layout
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import matmul as matmul_lib
from glmjax.kernels import matmul_gpu
from glmjax.kernels import registry
from glmjax.parallel import partitioning

_BLOCK = 128  # inputs (INT4: bytes) at a time on a CPU; 64 to 256 are much alike
# Rows of a product that are summed on a GPU. Two share a loop: by the bytes that compiled steps of ChatGLM-6B and
# GLM-130B move, eight read the codes less often than a float copy costs, ten in INT8 more often (docs/hardware.md).
_MOST_SUMMED = 8
# What sums are split for: so many of them at a time, each of so many rows of codes at least. With fewer, XLA takes
# multiplying into memory and summing from there to be faster.
_SUMS, _LEAST_ROWS = 2**16, 64

Axes = tuple[str | None, ...]  # the logical axes of a weight


def halves(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the even and the odd codes of packed INT4, sign-extended."""
  return codes >> 4, (codes << 4) >> 4


def _splits_weights_alone(target: target_lib.Target, codes: jax.Array, axes: Axes | None) -> bool:
  """Tells whether each device has its own part of the weights, and all rows."""
  return target.split("batch") == 1 and math.prod(_parts(target, codes, axes)) == target.devices


def _parts(target: target_lib.Target, codes: jax.Array, axes: Axes | None) -> list[int]:
  """Says into how many parts the mesh splits each axis of the codes."""
  return [target.split(axis) if axis else 1 for axis in axes] if axes else [1] * codes.ndim


def _on_parts(
  product: Callable[[jax.Array, jax.Array, int], jax.Array],
  target: target_lib.Target,
  x: jax.Array,
  codes: jax.Array,
  bits: int,
  num_inputs: int,
  axes: Axes | None,
) -> jax.Array:
  """Computes x_RI @ codes by `product`, of (x_RI, values, bits), each device with its part of the weights."""
  leading = x.ndim - num_inputs
  axes = axes or (None,) * codes.ndim
  split_inputs = [axis for axis in axes[:num_inputs] if axis and target.split(axis) > 1]

  def run(x: jax.Array, codes: jax.Array) -> jax.Array:
    outputs = codes.shape[num_inputs:]
    flat = codes.reshape(-1, math.prod(outputs))
    sums = product(x.reshape(-1, flat.shape[0] * 8 // bits), flat, bits)
    sums = sums.reshape(*x.shape[:leading], *outputs)
    for axis in split_inputs:
      sums = jax.lax.psum(sums, partitioning.mesh_axes(axis))
    return sums

  rows = (None,) * leading
  inputs = (*rows, *axes[:num_inputs]), axes
  return partitioning.on_each_device(run, inputs, (*rows, *axes[num_inputs:]))(x, codes)


def _kernel_fits(
  target: target_lib.Target, spec: str, x: jax.Array, codes: jax.Array, bits: int, num_inputs: int, axes: Axes | None
) -> bool:
  """Tells whether the kernel for few rows fits: half precision, sizes that divide, and a mesh that splits nothing but
  the weights.
  """
  del spec
  if x.dtype not in (jnp.bfloat16, jnp.float16) or not _splits_weights_alone(target, codes, axes):
    return False
  sizes = [size // part for size, part in zip(codes.shape, _parts(target, codes, axes))]
  rows = math.prod(x.shape[: x.ndim - num_inputs])
  return matmul_gpu.fits(rows, math.prod(sizes[:num_inputs]), math.prod(sizes[num_inputs:]), bits)


def _by_kernel(
  target: target_lib.Target, spec: str, x: jax.Array, codes: jax.Array, bits: int, num_inputs: int, axes: Axes | None
) -> jax.Array:
  """Multiplies by the GPU's kernel."""
  del spec
  return _on_parts(matmul_gpu.product, target, x, codes, bits, num_inputs, axes)


def _sums_fit(
  target: target_lib.Target, spec: str, x: jax.Array, codes: jax.Array, bits: int, num_inputs: int, axes: Axes | None
) -> bool:
  """Tells whether sums of multiplied elements move less than a product with a float copy."""
  del spec, bits
  rows = math.prod(x.shape[: x.ndim - num_inputs])
  return rows <= _MOST_SUMMED and _splits_weights_alone(target, codes, axes)


def _as_sums(
  target: target_lib.Target, spec: str, x: jax.Array, codes: jax.Array, bits: int, num_inputs: int, axes: Axes | None
) -> jax.Array:
  """Sums multiplied elements."""
  del spec
  return _on_parts(_summed, target, x, codes, bits, num_inputs, axes)


def _summed(x_RI: jax.Array, values: jax.Array, bits: int) -> jax.Array:
  """Returns x @ codes, float32 [R, O], by sums over parts of the inputs; values are int8 [I, O], or INT4 pairs along I.

  Layouts are given: XLA may sum over the last axis instead, and keep a transposed copy of the values for that; and it
  would make one sum of a part's and the parts'.
  """
  rows, outputs = values.shape
  parts = 1
  while parts * outputs < _SUMS and rows % (2 * parts * _LEAST_ROWS) == 0:
    parts *= 2
  values_SIO = _in_order(values.reshape(parts, -1, outputs))
  codes = [code.astype(jnp.float32) for code in ((values_SIO,) if bits == 8 else halves(values_SIO))]
  x_RSIP = x_RI.astype(jnp.float32).reshape(len(x_RI), parts, -1, len(codes))
  sums_SO = [sum(x_SIP[..., p, None] * code for p, code in enumerate(codes)).sum(1) for x_SIP in x_RSIP]
  return jnp.stack([_in_order(x_SO).sum(0) for x_SO in sums_SO])


def _in_order(x: jax.Array) -> jax.Array:
  """Returns x, the last axis side by side in memory."""
  return layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim))))


def _even_odd(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
  return pairs.take(0, axis + 1), pairs.take(1, axis + 1)


def _operands(spec: str, x: jax.Array, bits: int, num_inputs: int) -> tuple[jax.Array, ...]:
  """Returns x, or its even and odd inputs for the two halves of INT4."""
  return (x,) if bits == 8 else _even_odd(x, spec.index(spec.split(",")[1][num_inputs - 1]))


def _at_once(
  target: target_lib.Target, spec: str, x: jax.Array, codes: jax.Array, bits: int, num_inputs: int, axes: Axes | None
) -> jax.Array:
  """Computes one product, or one for each half."""
  del target, axes
  return _sums(spec, _operands(spec, x, bits, num_inputs), codes)


def _sums(spec: str, operands: tuple[jax.Array, ...], codes: jax.Array) -> jax.Array:
  parts = (codes,) if len(operands) == 1 else halves(codes)
  return sum(
    jnp.einsum(spec, x, c.astype(x.dtype), preferred_element_type=jnp.float32) for x, c in zip(operands, parts)
  )


def _block(codes: jax.Array, num_inputs: int) -> int | None:
  """Says how many indices of the first input axis make a block; None where blocks do not pay: one, no good divisor."""
  length, row = codes.shape[0], math.prod(codes.shape[1:num_inputs])
  block = max(d for d in range(1, max(1, _BLOCK // row) + 1) if length % d == 0)
  return None if block == length or block * row < _BLOCK // 8 else block


def _fit_blocks(
  target: target_lib.Target, spec: str, x: jax.Array, codes: jax.Array, bits: int, num_inputs: int, axes: Axes | None
) -> bool:
  del target, spec, x, bits, axes
  return _block(codes, num_inputs) is not None


def _by_blocks(
  target: target_lib.Target, spec: str, x: jax.Array, codes: jax.Array, bits: int, num_inputs: int, axes: Axes | None
) -> jax.Array:
  """Sums the products of a block of the first input axis at a time."""
  del target, axes
  operands, block = _operands(spec, x, bits, num_inputs), _block(codes, num_inputs)
  axis = spec.index(spec.split(",")[1][0])
  split = codes.shape[0] // block, block
  blocks = tuple(jnp.moveaxis(x.reshape(*x.shape[:axis], *split, *x.shape[axis + 1 :]), axis, 0) for x in operands)

  def add(total: jax.Array, of: tuple[tuple[jax.Array, ...], jax.Array]) -> tuple[jax.Array, None]:
    return total + _sums(spec, *of), None

  start = jax.eval_shape(functools.partial(_sums, spec), operands, codes)
  return jax.lax.scan(add, jnp.zeros(start.shape, start.dtype), (blocks, codes.reshape(*split, *codes.shape[1:])))[0]


# Of (target, spec, x, codes, bits, num_inputs, axes): einsum(spec, x, codes) in float32. `axes`: the weight's, where a
# mesh may split it.
PRODUCT = registry.Operation(
  "product with quantized weights",
  (
    registry.Implementation(
      "Pallas Triton, codes to floats in registers",
      f"up to {matmul_gpu.MOST_ROWS} rows of bfloat16 or float16, whole blocks, a mesh that splits weights alone",
      _by_kernel,
      needs=("triton",),
      fits=_kernel_fits,
    ),
    registry.Implementation(
      "XLA, sums of multiplied elements",
      f"up to {_MOST_SUMMED} rows, a mesh that splits weights alone",
      _as_sums,
      needs=("gpu",),
      fits=_sums_fit,
    ),
    registry.Implementation(
      "XLA, a block of inputs at a time", "inputs that divide", _by_blocks, needs=("cpu",), fits=_fit_blocks
    ),
    registry.Implementation("XLA", "all", _at_once),
  ),
)


def transposed(
  target: target_lib.Target, spec: str, d: jax.Array, codes: jax.Array, bits: int, num_inputs: int
) -> jax.Array:
  """Returns the float32 gradient of the sums' x, for a cotangent d of the sums: one more product, over the outputs.

  Where float copies of weights cost much, a block of the first input axis at a time here too.
  """
  a, b, c = spec.replace("->", ",").split(",")
  back = matmul_lib.in_order(f"{c},{b}->{a}")
  packed = a.index(b[num_inputs - 1])

  def of(codes: jax.Array) -> jax.Array:
    parts = (codes,) if bits == 8 else halves(codes)
    found = [jnp.einsum(back, d, part.astype(d.dtype), preferred_element_type=jnp.float32) for part in parts]
    if bits == 8:
      return found[0]
    paired = jnp.stack(found, packed + 1)
    return paired.reshape(*paired.shape[:packed], -1, *paired.shape[packed + 2 :])

  block = _block(codes, num_inputs) if target.platform == "cpu" else None
  if block is None:
    return of(codes)
  first = a.index(b[0])
  found = jnp.moveaxis(jax.lax.map(of, codes.reshape(-1, block, *codes.shape[1:])), 0, first)
  return found.reshape(*found.shape[:first], -1, *found.shape[first + 2 :])
