"""GeGLU and the product behind it, which keep for backward only what went in.

Left to itself, differentiation keeps the activation for the product, or computes it again in a pass of its own; the
gradients of the two branches, joined, take another. Here one pass over the branches gives all three; on NVIDIA GPUs
from Ampere on by a Pallas kernel for Triton.

B batch, L length, F mlp, D model, S spans of a row.
"""

import math
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from glmjax import target
from glmjax.models import layers
from glmjax.parallel import partitioning
from glmjax.quantize import ops
from glmjax.quantize import qarray

try:
  from jax.experimental.pallas import triton
except ImportError:  # `target.runs_triton` then says so
  triton = None

_SPAN, _ROWS, _COLUMNS = 128, 16, 128  # tokens of a program, tokens and columns that it takes at a time
_AXES = ("batch", "length", "act_mlp")


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, through erf as in PyTorch and in float32; jax.nn.gelu's erfc takes XLA's CPU longer."""
  y = x.astype(jnp.float32)
  return (y * _cdf(y)).astype(x.dtype)


def _cdf(y: jax.Array) -> jax.Array:
  return 0.5 * (1.0 + jax.lax.erf(y * math.sqrt(0.5)))


def activate(hidden_BL2F: jax.Array, bias_2F: jax.Array) -> jax.Array:
  """Of hidden + bias the first half times gelu of the second, [B, L, F]."""
  hidden_BL2F = layers.add_bias(hidden_BL2F, bias_2F)
  return hidden_BL2F[:, :, 0] * gelu(hidden_BL2F[:, :, 1])


def product(bias_2F: jax.Array, hidden_BL2F: jax.Array, kernel_FD: "jax.Array | qarray.QuantizedArray") -> jax.Array:
  """activate(hidden, bias) @ kernel, [B, L, D] in hidden's dtype; sums in float32."""
  if isinstance(kernel_FD, qarray.QuantizedArray):
    return ops.einsum(
      "BLF,FD->BLD", _split(activate(hidden_BL2F, bias_2F)), kernel_FD, layers.mesh_split(("mlp", "embed"))
    )
  return _product(hidden_BL2F, bias_2F, kernel_FD)


@jax.custom_vjp
def _product(hidden_BL2F: jax.Array, bias_2F: jax.Array, kernel_FD: jax.Array) -> jax.Array:
  return ops.matmul("BLF,FD->BLD", _split(activate(hidden_BL2F, bias_2F)), kernel_FD)


def _split(x_BLF: jax.Array) -> jax.Array:
  return partitioning.constrain(x_BLF, *_AXES)


def _product_backward(residuals: tuple[jax.Array, ...], g_BLD: jax.Array) -> tuple[jax.Array, ...]:
  hidden_BL2F, bias_2F, kernel_FD = residuals
  d_BLF = _split(ops.matmul("BLD,FD->BLF", g_BLD.astype(hidden_BL2F.dtype), kernel_FD))
  run = _by_kernel if _fits(d_BLF) else gradient
  act_BLF, d_hidden_BL2F, d_bias_2F = run(hidden_BL2F, bias_2F, d_BLF)
  return (
    d_hidden_BL2F,
    d_bias_2F.astype(bias_2F.dtype),
    ops.matmul("BLF,BLD->FD", _split(act_BLF), g_BLD, kernel_FD.dtype),
  )


_product.defvjp(lambda *inputs: (_product(*inputs), inputs), _product_backward)


def gradient(hidden_BL2F: jax.Array, bias_2F: jax.Array, d_BLF: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`activate` again [B, L, F], and its gradients for hidden [B, L, 2, F], of d's dtype, and bias [2, F], float32."""
  hidden_BL2F = layers.add_bias(hidden_BL2F, bias_2F)
  up, gate = (hidden_BL2F[:, :, i].astype(jnp.float32) for i in range(2))
  act, d_up, d_gate = _gradients(up, gate, d_BLF.astype(jnp.float32), _cdf(gate), d_BLF.dtype)
  d_hidden_BL2F = jnp.stack([d_up, d_gate], 2)
  return act, d_hidden_BL2F, d_hidden_BL2F.astype(jnp.float32).sum((0, 1))


def _gradients(up: jax.Array, gate: jax.Array, d: jax.Array, cdf: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
  """The activation, rounded as `activate` does, and the gradients of both branches."""
  density = jnp.exp(gate * gate * -0.5) * (1.0 / math.sqrt(2.0 * math.pi))
  act = up.astype(dtype) * (gate * cdf).astype(dtype)
  return act, (d * gate * cdf).astype(dtype), (d * up * (cdf + gate * density)).astype(dtype)


def _fits(d_BLF: jax.Array) -> bool:
  """Whether the kernel takes these: on each device whole blocks of half-precision floats."""
  if not target.runs_triton() or d_BLF.dtype not in (jnp.bfloat16, jnp.float16):
    return False
  blocks = (1, _SPAN, _COLUMNS)
  return all(size % (block * partitioning.parts(axis)) == 0 for size, block, axis in zip(d_BLF.shape, blocks, _AXES))


def _by_kernel(hidden_BL2F: jax.Array, bias_2F: jax.Array, d_BLF: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`gradient`, each device for its own part."""
  two = (*_AXES[:2], None, _AXES[2])
  run = partitioning.on_each_device(kernel_gradient, (two, (None, _AXES[2]), _AXES), [_AXES, two, two])
  act_BLF, d_hidden_BL2F, sums_BS2F = run(hidden_BL2F, bias_2F, d_BLF)
  return act_BLF, d_hidden_BL2F, sums_BS2F.sum((0, 1))


def kernel_gradient(
  hidden_BL2F: jax.Array, bias_2F: jax.Array, d_BLF: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`gradient` in one pass over its inputs; the bias's for each span of a row's tokens apart, [B, S, 2, F]."""
  batch, length, width = d_BLF.shape
  one = pl.BlockSpec((None, _SPAN, _COLUMNS), lambda b, i, j: (b, i, j))
  two = pl.BlockSpec((None, _SPAN, 2, _COLUMNS), lambda b, i, j: (b, i, 0, j))
  sums = pl.BlockSpec((None, None, 2, _COLUMNS), lambda b, i, j: (b, i, 0, j))
  bias = pl.BlockSpec((2, _COLUMNS), lambda b, i, j: (0, j))
  size = d_BLF.size
  return pl.pallas_call(
    _kernel,
    grid=(batch, length // _SPAN, width // _COLUMNS),
    in_specs=[two, bias, one],
    out_specs=[one, two, sums],
    out_shape=[
      jax.ShapeDtypeStruct(d_BLF.shape, d_BLF.dtype),
      jax.ShapeDtypeStruct(hidden_BL2F.shape, d_BLF.dtype),
      jax.ShapeDtypeStruct((batch, length // _SPAN, 2, width), jnp.float32),
    ],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
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
    act, *d_hidden = _gradients(up, gate, d_ref[here, :].astype(jnp.float32), cdf, d_ref.dtype)
    act_ref[here, :] = act
    for half, d in enumerate(d_hidden):
      d_hidden_ref[here, half, :] = d
    return tuple(total + d.astype(jnp.float32).sum(0) for total, d in zip(sums, d_hidden))

  zeros = jnp.zeros(_COLUMNS, jnp.float32)
  for half, total in enumerate(jax.lax.fori_loop(0, _SPAN // _ROWS, body, (zeros, zeros))):
    sums_ref[half, :] = total
