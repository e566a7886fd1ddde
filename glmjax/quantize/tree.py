"""Which parameters are quantized: the four kernels of every block, and nothing else."""

import functools
from typing import Any

import jax

from glmjax.quantize import qarray

# Input axes, counted from the end, of each kernel in architecture.md's layout.
KERNELS = {
  ("attention", "qkv"): (-4,),  # [D, 3, H, K]
  ("attention", "out"): (-3, -2),  # [H, K, D]
  ("mlp", "wi"): (-3,),  # [D, 2, F]
  ("mlp", "wo"): (-2,),  # [F, D]
}


def kernel_axes(names: tuple[str, ...]) -> tuple[int, ...] | None:
  """The input axes of the kernel at this path of dict keys; None for any other parameter."""
  return KERNELS.get(names[-3:-1]) if names[-1:] == ("kernel",) else None


@functools.partial(jax.jit, static_argnames=("bits", "axes"))
def quantize_kernel(kernel: jax.Array, bits: int, axes: tuple[int, ...]) -> qarray.QuantizedArray:
  """One kernel, a layer at a time where layers are stacked, so that temporaries stay one layer's size."""
  one = functools.partial(qarray.quantize, bits=bits, axes=axes)
  stacked = kernel.ndim > -axes[0]
  return jax.lax.map(one, kernel) if stacked else one(kernel)


def quantize_params(params: Any, bits: int) -> Any:
  """The same tree, with QuantizedArrays for kernels; embeddings, head, norms and biases stay as they are.

  Raises:
    errors.InputError: for bits other than 4 and 8, or a size that does not pack.
  """

  def leaf(path: tuple[Any, ...], x: jax.Array) -> Any:
    axes = kernel_axes(tuple(str(key.key) for key in path))
    return x if axes is None else quantize_kernel(x, bits, axes)

  return jax.tree_util.tree_map_with_path(leaf, params)


def params_bytes(params: Any) -> int:
  """Bytes of all arrays in memory."""
  return sum(x.nbytes for x in jax.tree.leaves(params))
