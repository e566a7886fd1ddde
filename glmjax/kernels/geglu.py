"""GeGLU's backward: the activation again and the gradients of both branches, in one pass over what went in.

B batch, L length, F mlp, S spans of a row.
"""

import math

import jax
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import geglu_gpu
from glmjax.kernels import registry
from glmjax.parallel import partitioning

AXES = ("batch", "length", "act_mlp")
Gradients = tuple[jax.Array, jax.Array, jax.Array]


def cdf(y: jax.Array) -> jax.Array:
  """Returns the normal distribution's cdf, through erf as in PyTorch; jax.nn.gelu's erfc takes XLA's CPU longer."""
  return 0.5 * (1.0 + jax.lax.erf(y * math.sqrt(0.5)))


def plain(target: target_lib.Target, hidden_BL2F: jax.Array, bias_2F: jax.Array, d_BLF: jax.Array) -> Gradients:
  """Returns the activation [B, L, F] of hidden + bias, and its gradients for hidden [B, L, 2, F], of d's dtype, and
  bias [2, F], float32.
  """
  del target
  hidden_BL2F = hidden_BL2F + bias_2F.astype(hidden_BL2F.dtype)
  up, gate = (hidden_BL2F[:, :, i].astype(jnp.float32) for i in range(2))
  act, d_up, d_gate = geglu_gpu.gradients(up, gate, d_BLF.astype(jnp.float32), cdf(gate), d_BLF.dtype)
  d_hidden_BL2F = jnp.stack([d_up, d_gate], 2)
  return act, d_hidden_BL2F, d_hidden_BL2F.astype(jnp.float32).sum((0, 1))


def _fits(target: target_lib.Target, hidden_BL2F: jax.Array, bias_2F: jax.Array, d_BLF: jax.Array) -> bool:
  """Tells whether each device has whole blocks of half-precision floats."""
  del hidden_BL2F, bias_2F
  if d_BLF.dtype not in (jnp.bfloat16, jnp.float16):
    return False
  blocks = (1, geglu_gpu.SPAN, geglu_gpu.COLUMNS)
  return all(size % (block * target.split(axis)) == 0 for size, block, axis in zip(d_BLF.shape, blocks, AXES))


def _by_kernel(target: target_lib.Target, hidden_BL2F: jax.Array, bias_2F: jax.Array, d_BLF: jax.Array) -> Gradients:
  """Computes each device's own part by the GPU's kernel."""
  del target
  two = (*AXES[:2], None, AXES[2])
  run = partitioning.on_each_device(geglu_gpu.gradient, (two, (None, AXES[2]), AXES), [AXES, two, two])
  act_BLF, d_hidden_BL2F, sums_BS2F = run(hidden_BL2F, bias_2F, d_BLF)
  return act_BLF, d_hidden_BL2F, sums_BS2F.sum((0, 1))


# Of (target, hidden, bias, d), d the activation's gradient.
BACKWARD = registry.Operation(
  "GeGLU, backward",
  (
    registry.Implementation(
      "Pallas Triton, one pass",
      f"bfloat16 or float16, lengths of whole {geglu_gpu.SPAN}s, mlp of whole {geglu_gpu.COLUMNS}s",
      _by_kernel,
      needs=("triton",),
      fits=_fits,
    ),
    registry.Implementation("XLA", "all", plain),
  ),
)
