"""LayerNorm's backward for NVIDIA GPUs from Ampere on: a Pallas kernel for Triton.

XLA takes seven passes over float32 copies of what comes in; this takes one, and sums the gradients of scale and bias on
its way.

B batch, L length, D model, S spans of a row, R rows of tokens at a time, P parts of the width.
"""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from glmjax.target import triton

SPAN = 32  # tokens of a program
_ENTRIES = 4096  # that a program holds of each array at a time; this and the warps are fastest on an H100 at D = 2048
_WARPS = 4


def fits(width: int) -> bool:
  """Tells whether rows of this width can be held, in a few parts whose widths are powers of two."""
  return width % 128 == 0 and width <= 4 * _ENTRIES and width // _part(width) <= 8


def _part(width: int) -> int:
  """Returns the largest power of two that divides the width."""
  return width & -width


def backward(
  epsilon: float, x_BLD: jax.Array, scale_D: jax.Array, g_BLD: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradient of x in its dtype; those of scale and bias for each span of a row, float32 [B, S, 2, D]."""
  batch, length, width = x_BLD.shape
  tokens = pl.BlockSpec((None, SPAN, width), lambda b, i: (b, i, 0))
  return pl.pallas_call(
    functools.partial(_kernel, epsilon=epsilon),
    grid=(batch, length // SPAN),
    in_specs=[tokens, pl.BlockSpec((width,), lambda b, i: (0,)), tokens],
    out_specs=[tokens, pl.BlockSpec((None, None, 2, width), lambda b, i: (b, i, 0, 0))],
    out_shape=[
      jax.ShapeDtypeStruct(x_BLD.shape, x_BLD.dtype),
      jax.ShapeDtypeStruct((batch, length // SPAN, 2, width), jnp.float32),
    ],
    compiler_params=triton().CompilerParams(num_warps=_WARPS, num_stages=1),
    cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=3 * x_BLD.nbytes),
    interpret=interpret,
    name="layer_norm_backward",
  )(x_BLD, scale_D, g_BLD)


def _kernel(x_ref: Any, scale_ref: Any, g_ref: Any, dx_ref: Any, sums_ref: Any, *, epsilon: float) -> None:
  width = x_ref.shape[1]
  part = _part(width)
  parts = [pl.ds(i, part) for i in range(0, width, part)]
  rows = max(1, min(SPAN, _ENTRIES >> (width - 1).bit_length()))

  def mean(xs: list[jax.Array]) -> jax.Array:
    return sum(x.sum(-1, keepdims=True) for x in xs) / width

  def body(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    here = pl.ds(i * rows, rows)
    xs, gs = ([ref[here, at].astype(jnp.float32) for at in parts] for ref in (x_ref, g_ref))
    middle = mean(xs)
    xs = [x - middle for x in xs]
    factor = jax.lax.rsqrt(mean([x * x for x in xs]) + epsilon)
    normals = [x * factor for x in xs]
    ds = [g * scale_ref[at].astype(jnp.float32)[None] for g, at in zip(gs, parts)]
    mean_d, mean_dn = mean(ds), mean([d * n for d, n in zip(ds, normals)])
    for d, n, at in zip(ds, normals, parts):
      dx_ref[here, at] = (factor * (d - mean_d - n * mean_dn)).astype(dx_ref.dtype)
    new = [(g * n).sum(0) for g, n in zip(gs, normals)] + [g.sum(0) for g in gs]
    return tuple(map(jnp.add, sums, new))

  zeros = (jnp.zeros(part, jnp.float32),) * (2 * len(parts))
  sums = jax.lax.fori_loop(0, SPAN // rows, body, zeros)
  for half in (0, 1):
    for at, total in zip(parts, sums[half * len(parts) :]):
      sums_ref[half, at] = total
