"""Few rows times quantized weights on NVIDIA GPUs from Ampere on: a Pallas kernel for Triton.

Decoding multiplies a row or a few with every weight, so that its time is that of reading them. XLA would write a float
copy first and read it again; here codes become floats in registers, on their way to the tensor cores.

R rows, I inputs, O outputs, S parts of the inputs that are summed apart.
"""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from glmjax.target import triton

MOST_ROWS = 16  # of one call; also what tensor cores take at least
# By bits: rows of codes and outputs of a block, warps, stages, and the programs that inputs are split for; fastest on
# an H100 (benchmarks/kernels.py --tune), which has 132 processors.
_SIZES = {8: (32, 128, 4, 4, 264), 4: (64, 64, 4, 3, 528)}


def fits(rows: int, num_codes: int, outputs: int, bits: int) -> bool:
  """Tells whether `product` takes these sizes; `num_codes` rows of codes: I, or I / 2 of INT4."""
  block_i, block_o, *_ = _SIZES[bits]
  return rows <= MOST_ROWS and num_codes % block_i == 0 and outputs % block_o == 0


def product(x_RI: jax.Array, values: jax.Array, bits: int, *, interpret: bool = False) -> jax.Array:
  """Returns x @ codes, float32 [R, O]; values are int8 [I, O], or INT4 pairs along I, int8 [I / 2, O]."""
  rows, (num_codes, outputs) = x_RI.shape[0], values.shape
  block_i, block_o, warps, stages, programs = _SIZES[bits]
  parts = 1
  while outputs // block_o * parts < programs and not num_codes % (2 * parts * block_i):
    parts *= 2
  pairs = 8 // bits
  x_PRI = jnp.moveaxis(jnp.pad(x_RI, ((0, MOST_ROWS - rows), (0, 0))).reshape(MOST_ROWS, -1, pairs), 2, 0)
  span = num_codes // parts
  sums_SRO = pl.pallas_call(
    functools.partial(_kernel, bits=bits, block=block_i),
    grid=(outputs // block_o, parts),
    in_specs=[
      pl.BlockSpec((pairs, MOST_ROWS, span), lambda o, s: (0, 0, s)),
      pl.BlockSpec((span, block_o), lambda o, s: (s, o)),
    ],
    out_specs=pl.BlockSpec((None, MOST_ROWS, block_o), lambda o, s: (s, 0, o)),
    out_shape=jax.ShapeDtypeStruct((parts, MOST_ROWS, outputs), jnp.float32),
    compiler_params=triton().CompilerParams(num_warps=warps, num_stages=stages),
    interpret=interpret,
    name=f"int{bits}_product",
  )(x_PRI, values)
  return sums_SRO.sum(0)[:rows]


def _kernel(x_ref: Any, values_ref: Any, out_ref: Any, *, bits: int, block: int) -> None:
  def body(i: jax.Array, total: jax.Array) -> jax.Array:
    here = pl.ds(i * block, block)
    values = values_ref[here, :]
    if bits == 8:
      return total + triton().dot(x_ref[0, :, here], values.astype(x_ref.dtype))
    wide = values.astype(jnp.int32)
    codes = wide >> 4, (wide << 28) >> 28  # even inputs in the high half, each sign-extended
    for pair, code in enumerate(codes):
      total += triton().dot(x_ref[pair, :, here], code.astype(jnp.float32).astype(x_ref.dtype))
    return total

  out_ref[...] = jax.lax.fori_loop(0, values_ref.shape[0] // block, body, jnp.zeros(out_ref.shape, jnp.float32))
