"""GeGLU and the product behind it, which keep for backward only what went in.

Left to itself, differentiation keeps the activation for the product, or computes it again in a pass of its own; the
gradients of the two branches, joined, take another. Here one pass over the branches gives all three; on NVIDIA GPUs
from Ampere on by a Pallas kernel for Triton.

B batch, L length, F mlp, D model, S spans of a row.
"""

import math

import jax
import jax.numpy as jnp

from glmjax import target
from glmjax.kernels import geglu_gpu
from glmjax.models import layers
from glmjax.parallel import partitioning
from glmjax.quantize import ops
from glmjax.quantize import qarray

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
  act, d_up, d_gate = geglu_gpu.gradients(up, gate, d_BLF.astype(jnp.float32), _cdf(gate), d_BLF.dtype)
  d_hidden_BL2F = jnp.stack([d_up, d_gate], 2)
  return act, d_hidden_BL2F, d_hidden_BL2F.astype(jnp.float32).sum((0, 1))


def _fits(d_BLF: jax.Array) -> bool:
  """Whether the kernel takes these: on each device whole blocks of half-precision floats."""
  if not target.runs_triton() or d_BLF.dtype not in (jnp.bfloat16, jnp.float16):
    return False
  blocks = (1, geglu_gpu.SPAN, geglu_gpu.COLUMNS)
  return all(size % (block * partitioning.parts(axis)) == 0 for size, block, axis in zip(d_BLF.shape, blocks, _AXES))


def _by_kernel(hidden_BL2F: jax.Array, bias_2F: jax.Array, d_BLF: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`gradient`, each device for its own part."""
  two = (*_AXES[:2], None, _AXES[2])
  run = partitioning.on_each_device(geglu_gpu.gradient, (two, (None, _AXES[2]), _AXES), [_AXES, two, two])
  act_BLF, d_hidden_BL2F, sums_BS2F = run(hidden_BL2F, bias_2F, d_BLF)
  return act_BLF, d_hidden_BL2F, sums_BS2F.sum((0, 1))
