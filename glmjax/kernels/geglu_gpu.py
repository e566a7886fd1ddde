"""GeGLU's backward for NVIDIA GPUs from Ampere on: a Pallas kernel for Triton that reads its inputs once.

B batch, L length, F mlp, S spans of a row.
"""

import math
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from glmjax.target import triton

SPAN, _ROWS, COLUMNS = 128, 16, 128  # tokens of a program, tokens and columns that it takes at a time


def gradients(up: jax.Array, gate: jax.Array, d: jax.Array, cdf: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
  """Returns the activation, rounded as `activate` does, and the gradients of both branches."""
  density = jnp.exp(gate * gate * -0.5) * (1.0 / math.sqrt(2.0 * math.pi))
  act = up.astype(dtype) * (gate * cdf).astype(dtype)
  return act, (d * gate * cdf).astype(dtype), (d * up * (cdf + gate * density)).astype(dtype)


def gradient(
  hidden_BL2F: jax.Array, bias_2F: jax.Array, d_BLF: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes `kernels.geglu.plain` in one pass; the bias's for each span of a row's tokens apart, [B, S, 2, F]."""
  batch, length, width = d_BLF.shape
  one = pl.BlockSpec((None, SPAN, COLUMNS), lambda b, i, j: (b, i, j))
  two = pl.BlockSpec((None, SPAN, 2, COLUMNS), lambda b, i, j: (b, i, 0, j))
  sums = pl.BlockSpec((None, None, 2, COLUMNS), lambda b, i, j: (b, i, 0, j))
  bias = pl.BlockSpec((2, COLUMNS), lambda b, i, j: (0, j))
  size = d_BLF.size
  return pl.pallas_call(
    _kernel,
    grid=(batch, length // SPAN, width // COLUMNS),
    in_specs=[two, bias, one],
    out_specs=[one, two, sums],
    out_shape=[
      jax.ShapeDtypeStruct(d_BLF.shape, d_BLF.dtype),
      jax.ShapeDtypeStruct(hidden_BL2F.shape, d_BLF.dtype),
      jax.ShapeDtypeStruct((batch, length // SPAN, 2, width), jnp.float32),
    ],
    compiler_params=triton().CompilerParams(num_warps=4, num_stages=1),
    cost_estimate=pl.CostEstimate(flops=0, transcendentals=size, bytes_accessed=6 * size * d_BLF.dtype.itemsize),
    interpret=interpret,
    name="geglu_gradient",
  )(hidden_BL2F, bias_2F, d_BLF)


def _kernel(hidden_ref: Any, bias_ref: Any, d_ref: Any, act_ref: Any, d_hidden_ref: Any, sums_ref: Any) -> None:
  def body(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    here = pl.ds(i * _ROWS, _ROWS)
    up, gate = ((hidden_ref[here, t, :] + bias_ref[t, :].astype(hidden_ref.dtype)).astype(jnp.float32) for t in (0, 1))
    # Triton has no erf; Abramowitz and Stegun, formula 7.1.26, within 1.5e-7, shares its exponential with the density.
    t = 1.0 / (1.0 + 0.3275911 * math.sqrt(0.5) * jnp.abs(gate))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * series * jnp.exp(gate * gate * -0.5)
    cdf = jnp.where(gate < 0, tail, 1.0 - tail)
    act, *d_hidden = gradients(up, gate, d_ref[here, :].astype(jnp.float32), cdf, d_ref.dtype)
    act_ref[here, :] = act
    for half, d in enumerate(d_hidden):
      d_hidden_ref[here, half, :] = d
    return tuple(total + d.astype(jnp.float32).sum(0) for total, d in zip(sums, d_hidden))

  zeros = jnp.zeros(COLUMNS, jnp.float32)
  for half, total in enumerate(jax.lax.fori_loop(0, SPAN // _ROWS, body, (zeros, zeros))):
    sums_ref[half, :] = total
