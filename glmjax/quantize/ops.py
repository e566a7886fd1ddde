"""einsum over plain or quantized weights.

The codes are multiplied as floats, exactly (127 is exact in any float type), and the scale meets the sum:
it is one per output. INT4's even and odd inputs are two products, so that nothing is interleaved.

XLA's CPU makes a float copy of all the weights of a product. Taking a block of inputs at a time keeps that
copy in the cache: at 4096 x 4096 and one row INT8 takes 3 ms instead of 94 on two cores; at 128 rows it is no
slower than float.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from glmjax import target
from glmjax.kernels import matmul_gpu
from glmjax.quantize import qarray

_BLOCK = 128  # inputs (INT4: bytes) at a time on a CPU; 64 to 256 are much alike


def einsum(
  spec: str, x: jax.Array, kernel: "jax.Array | qarray.QuantizedArray", split: jax.sharding.PartitionSpec | None = None
) -> jax.Array:
  """jnp.einsum(spec, x, kernel) in x's dtype. A quantized kernel's input axes come first.

  `split`: how a mesh of several devices splits the kernel, which GPU kernels need to know.
  """
  if not isinstance(kernel, qarray.QuantizedArray):
    return matmul(spec, x, kernel)
  groups = kernel.scale.shape[0]
  if groups > 1:  # each part of the first input axis has scales of its own
    axis = spec.index(spec.split(",")[1][0])
    parts = (jnp.split(y, groups, at) for y, at in ((x, axis), (kernel.values, 0), (kernel.scale, 0)))
    return sum(
      _scaled_sums(spec, x, qarray.QuantizedArray(values, scale, kernel.bits, kernel.axis))
      for x, values, scale in zip(*parts)
    ).astype(x.dtype)
  return _scaled_sums(spec, x, kernel, split).astype(x.dtype)


def _scaled_sums(
  spec: str, x: jax.Array, kernel: qarray.QuantizedArray, split: jax.sharding.PartitionSpec | None = None
) -> jax.Array:
  """The product in float32."""
  labels = spec.replace("->", ",").split(",")[1]
  inputs = labels[: kernel.values.ndim + kernel.axis + 1]
  outputs = kernel.scale.shape[len(inputs) :]
  parts = _parts(kernel, split)
  if _takes_few_rows(x, kernel, len(inputs), parts):
    sums = _few_rows(x, kernel, len(inputs), parts)
  else:
    parts = (x,) if kernel.bits == 8 else _even_odd(x, spec.index(inputs[-1]))
    product = functools.partial(_blocked_product, len(inputs)) if target.platform() == "cpu" else _product
    sums = product(spec, parts, kernel.values)
  assert sums.shape[sums.ndim - len(outputs) :] == outputs, (spec, sums.shape, outputs)
  scale = kernel.scale.astype(jnp.float32).reshape((1,) * (sums.ndim - len(outputs)) + outputs)
  return sums * scale


def _parts(kernel: qarray.QuantizedArray, split: jax.sharding.PartitionSpec | None) -> tuple[bool, ...] | None:
  """Which axes of a kernel the mesh splits, if it splits nothing but weights along "tensor"; None of other meshes."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return (False,) * kernel.values.ndim
  if split is None or mesh.shape.get("tensor") != mesh.size:
    return None
  return tuple(i < len(split) and "tensor" in (split[i] or ()) for i in range(kernel.values.ndim))


def _takes_few_rows(
  x: jax.Array, kernel: qarray.QuantizedArray, num_inputs: int, parts: tuple[bool, ...] | None
) -> bool:
  """Whether the GPU kernel for a row or a few is for this product: in half precision, of sizes that divide."""
  if not target.runs_triton() or x.dtype not in (jnp.bfloat16, jnp.float16) or parts is None:
    return False
  devices = jax.sharding.get_abstract_mesh().size
  sizes = [size // (devices if part else 1) for size, part in zip(kernel.values.shape, parts)]
  return matmul_gpu.fits(
    math.prod(x.shape[: x.ndim - num_inputs]), math.prod(sizes[:num_inputs]), math.prod(sizes[num_inputs:]), kernel.bits
  )


def _few_rows(x: jax.Array, kernel: qarray.QuantizedArray, num_inputs: int, parts: tuple[bool, ...]) -> jax.Array:
  """Sums over codes by the GPU's kernel, each device multiplying its part of the weights."""
  leading = x.ndim - num_inputs

  def run(x: jax.Array, values: jax.Array) -> jax.Array:
    outputs = values.shape[num_inputs:]
    flat = values.reshape(-1, math.prod(outputs))
    sums = matmul_gpu.product(x.reshape(-1, flat.shape[0] * 8 // kernel.bits), flat, kernel.bits)
    sums = sums.reshape(*x.shape[:leading], *outputs)
    return jax.lax.psum(sums, "tensor") if any(parts[:num_inputs]) else sums

  if not any(parts):
    return run(x, kernel.values)
  names = ["tensor" if part else None for part in parts]
  spec = lambda count, names: jax.sharding.PartitionSpec(*[None] * count, *names)
  return jax.shard_map(
    run,
    in_specs=(spec(leading, names[:num_inputs]), spec(0, names)),
    check_vma=False,
    out_specs=spec(leading, names[num_inputs:]),
  )(x, kernel.values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def matmul(spec: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
  """jnp.einsum of two floats: operands in x's dtype, sums in float32, the result in `dtype` (x's).

  So are the gradients: the cotangent is rounded to x's dtype first, and y's gradient comes out in y's own
  dtype, float32 for a master weight. (JAX's own would multiply bf16 by float32, as float32.)
  """
  dtype = dtype or x.dtype
  return _float_einsum(spec, x, y.astype(x.dtype), dtype)


def _float_einsum(spec: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """jnp.einsum of operands of one dtype, its labels renamed: sums run over axes in the order of their names, and in
  any order but that of the operands XLA copies these first."""
  labels = "".join(dict.fromkeys(spec.split(",")[1].replace("->", "") + spec.split(",")[0]))
  spec = spec.translate(str.maketrans(labels, "abcdefghijklm"[: len(labels)]))
  return jnp.einsum(spec, x, y, preferred_element_type=_sums(dtype)).astype(dtype)


def _sums(dtype: jnp.dtype) -> jnp.dtype:
  """XLA's CPU multiplies bf16 at twice float32's speed, but into float32 alone; others round in the product."""
  return jnp.float32 if target.platform() == "cpu" else dtype


def _matmul_forward(spec: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype | None) -> tuple[jax.Array, Any]:
  return matmul(spec, x, y, dtype), (x, y)


def _matmul_backward(spec: str, dtype: jnp.dtype | None, residuals: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  del dtype
  (x, y), (a, b, c) = residuals, spec.replace("->", ",").split(",")
  g = g.astype(x.dtype)
  dx = _float_einsum(f"{c},{b}->{a}", g, y.astype(x.dtype), x.dtype)
  if set(a) & set(b) & set(c) and target.platform() == "cpu":
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)  # XLA's CPU fails on batches of transposed bf16 (jax 0.10)
  return dx, _float_einsum(f"{a},{c}->{b}", x, g, y.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _even_odd(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
  return pairs.take(0, axis + 1), pairs.take(1, axis + 1)


def _product(spec: str, parts: tuple[jax.Array, ...], values: jax.Array) -> jax.Array:
  """float32 sums over codes, all at once."""
  codes = (values,) if len(parts) == 1 else qarray.halves(values)
  return sum(jnp.einsum(spec, x, c.astype(x.dtype), preferred_element_type=jnp.float32) for x, c in zip(parts, codes))


def _blocked_product(num_inputs: int, spec: str, parts: tuple[jax.Array, ...], values: jax.Array) -> jax.Array:
  """The same, a block of the first input axis at a time."""
  length, row = values.shape[0], math.prod(values.shape[1:num_inputs])
  block = max(d for d in range(1, max(1, _BLOCK // row) + 1) if length % d == 0)
  if block == length or block * row < _BLOCK // 8:  # one block, or a length with no good divisor
    return _product(spec, parts, values)
  axis = spec.index(spec.split(",")[1][0])
  split = length // block, block
  blocks = tuple(jnp.moveaxis(x.reshape(*x.shape[:axis], *split, *x.shape[axis + 1 :]), axis, 0) for x in parts)

  def add(total: jax.Array, of: tuple[tuple[jax.Array, ...], jax.Array]) -> tuple[jax.Array, None]:
    return total + _product(spec, *of), None

  start = jax.eval_shape(functools.partial(_product, spec), parts, values)
  return jax.lax.scan(add, jnp.zeros(start.shape, start.dtype), (blocks, values.reshape(*split, *values.shape[1:])))[0]
