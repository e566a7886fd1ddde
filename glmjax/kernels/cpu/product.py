"""Products of rows with quantized or half-precision weights by the C++ library (library.py), for `jax.jit`.

Weights are [outputs, inputs], both operands contiguous along the inputs. The result of a row is the same, bit for bit,
whatever rows are computed with it: each sum over the inputs has one order. Instruction sets may differ in their last
bits.

R rows, I inputs, O outputs, G groups of inputs that have scales of their own.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from glmjax import errors
from glmjax.kernels.cpu import library

# src/product.h: kinds of weights; rows packed at a time; what the inputs of a group are padded to, at most.
_KINDS = {4: 0, 8: 1, "bfloat16": 2, "float32": 3}
_PANEL_ROWS, _STEP_INPUTS = 512, 128
_TIMED_BYTES = 2**11  # of a row of weights whose products are timed: ChatGLM-6B's width in INT4
_MOST_FAST_INPUTS = 2**17  # of a group: 127 x 128 x 2^17 is the largest sum of bytes below 2^31


def product(x_RI: jax.Array, weight: jax.Array, scale_GO: jax.Array, bits: int, fast: bool = False) -> jax.Array:
  """Returns x times the weight that codes and scales stand for, float32 [R, O].

  Without `fast` rows stay floats: products of float32 rows are float32's; bfloat16 rows are multiplied as they are
  where the machine can (AVX512-BF16), with sums in float32, and as float32 elsewhere. With `fast` each row becomes
  bytes of one scale, its largest magnitude / 127, and products are integers', exact sums of 4,096 inputs at a time,
  which are added in float32. A row with a NaN or an infinity gives NaNs or infinities; one whose largest magnitude is
  below 2^-119 counts as zeros.

  Args:
    x_RI: float32 or bfloat16.
    weight: int8; 8 bits: codes [O, I]; 4 bits: two in a byte, [O, I / 2], two's complement, the even input in the high
      half.
    scale_GO: float16 or float32; a group is I / G inputs that follow one another.
    bits: 4 or 8.
    fast: whether rows are quantized too.

  Raises:
    errors.InputError: for shapes or types that are not these, or where the library is not there.
  """
  if bits not in (4, 8):
    raise errors.InputError(f"bits is {bits}: the library multiplies with codes of 4 and of 8")
  _check_type("codes", weight, (jnp.int8,))
  _check_type("scale", scale_GO, (jnp.float16, jnp.float32))
  inputs = _check_rows(x_RI, weight, bits)
  outputs, groups = weight.shape[0], scale_GO.shape[0] if scale_GO.ndim == 2 else 0
  if scale_GO.ndim != 2 or groups < 1 or scale_GO.shape[1] != outputs:
    raise errors.InputError(f"scale is {scale_GO.shape}: [groups, {outputs}] is needed, one for each output of a group")
  if inputs % (groups * (2 if bits == 4 else 1)):
    raise errors.InputError(f"{inputs} inputs do not make {groups} groups of whole bytes")
  if fast and inputs // groups > _MOST_FAST_INPUTS:
    raise errors.InputError(f"{inputs // groups} inputs in a group: the fast mode sums up to {_MOST_FAST_INPUTS}")
  return _call(x_RI, weight, scale_GO, _KINDS[bits], groups, fast)


def read_speed(num_bytes: int = 2**28, turns: int = 5) -> float:
  """Returns the bytes of INT4 weights that products with one row, rounded, read in a second: the median of some turns.

  That is what decoding one text does but for its attention.

  Args:
    num_bytes: of weights, many times the size of the caches.
    turns: how often.

  Raises:
    errors.InputError: where the library is not there.
  """
  codes = jnp.zeros((num_bytes // _TIMED_BYTES, _TIMED_BYTES), jnp.int8) + 17
  scale, x = jnp.ones((1, len(codes)), jnp.float32), jnp.ones((1, 2 * _TIMED_BYTES), jnp.float32)
  run = jax.jit(functools.partial(product, bits=4, fast=True))
  times = []
  for _ in range(turns + 1):  # the first compiles
    began = time.perf_counter()
    jax.block_until_ready(run(x, codes, scale))
    times.append(time.perf_counter() - began)
  return codes.nbytes / statistics.median(times[1:])


def float_product(x_RI: jax.Array, weight_OI: jax.Array) -> jax.Array:
  """Returns x times the weight, float32 [R, O], with sums in float32.

  Args:
    x_RI: float32 or bfloat16.
    weight_OI: float32, bfloat16, or the bits of bfloat16 as uint16.

  Raises:
    errors.InputError: for shapes or types that are not these, or where the library is not there.
  """
  _check_type("weight", weight_OI, (jnp.float32, jnp.bfloat16, jnp.uint16))
  kind = "float32" if weight_OI.dtype == jnp.float32 else "bfloat16"
  _check_rows(x_RI, weight_OI, 8 * weight_OI.dtype.itemsize)
  return _call(x_RI, weight_OI, np.zeros((0, 0), np.float32), _KINDS[kind], 1, False)


def _check_type(name: str, array: jax.Array, known: tuple[jax.typing.DTypeLike, ...]) -> None:
  if array.dtype not in known:
    words = " or ".join(np.dtype(dtype).name for dtype in known)
    raise errors.InputError(f"the {name} is {array.dtype}: {words} is needed")


def _check_rows(x_RI: jax.Array, weight: jax.Array, bits: int) -> int:
  """Returns the number of inputs, once rows and weight are known to have as many."""
  _check_type("x", x_RI, (jnp.float32, jnp.bfloat16))
  if x_RI.ndim != 2 or weight.ndim != 2 or not x_RI.size or not weight.size:
    raise errors.InputError(f"x is {x_RI.shape} and the weight {weight.shape}: [rows, inputs] and [outputs, inputs]")
  inputs = weight.shape[1] * 2 if bits == 4 else weight.shape[1]
  if x_RI.shape[1] != inputs:
    raise errors.InputError(f"x has {x_RI.shape[1]} inputs, and the weight of {bits} bits {inputs}")
  return inputs


def _call(x_RI: jax.Array, weight: jax.Array, scale: jax.Array, kind: int, groups: int, fast: bool) -> jax.Array:
  now = library.status()
  if not now.available:
    raise errors.InputError(f"the library of products on CPUs is not there: {now.words}")
  rows, outputs = x_RI.shape[0], weight.shape[0]
  results = (
    jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
    jax.ShapeDtypeStruct((_scratch_bytes(rows, x_RI.shape[1], groups, fast),), jnp.uint8),
  )
  call = jax.ffi.ffi_call(library.PRODUCT, results, vmap_method=None)
  return call(x_RI, weight, scale, kind=np.int64(kind), fast=np.bool_(fast), isa=library.forced())[0]


def _scratch_bytes(rows: int, inputs: int, groups: int, fast: bool) -> int:
  """Returns the bytes that XLA sets aside for the rows as the library packs them (src/driver.h counts the same)."""
  steps = -(-(inputs // groups) // _STEP_INPUTS)
  return 64 + min(rows, _PANEL_ROWS) * (groups * steps * (_STEP_INPUTS * (1 if fast else 4) + 4) + 8)
