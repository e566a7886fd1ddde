"""Weights as CPUs read them: a row of inputs for each output, side by side in memory.

Of one layer alone, for inference on one device. With the C++ library the result of a row of x is the same, bit for bit,
whatever rows are multiplied with it (kernels/cpu/product.py).

I inputs, O outputs, G groups of inputs that have scales of their own.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import rows as rows_lib
from glmjax.models import weights
from glmjax.quantize import qarray

_AT_ONCE = 2**25  # floats that are quantized at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputRows(weights.ForInference):
  """A weight [inputs, outputs], any number of axes each, as [O, I]: floats, or codes and scales."""

  values: jax.Array  # float32, bfloat16's bits or int8 codes [O, I]; 4 bits: [O, I / 2], the even input's code high
  scale_GO: jax.Array | None  # of codes
  bits: int | None = dataclasses.field(metadata={"static": True})  # None: floats
  outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # the sizes of the axes that make O
  fast: bool = dataclasses.field(metadata={"static": True})  # codes are multiplied with rows of x rounded to 8 bits
  needed_B: jax.Array | None = None  # bool, for a product of which some rows of x are not needed: these give zeros

  @property
  def nbytes(self) -> int:
    """The bytes of values and scales, as stored."""
    return self.values.nbytes + (0 if self.scale_GO is None else self.scale_GO.nbytes)

  def product(
    self,
    target: target_lib.Target,
    spec: str,
    x: jax.Array,
    axes: tuple[str | None, ...] | None = None,
    dtype: Any = None,
  ) -> jax.Array:
    """Computes jnp.einsum(spec, x, weight) in `dtype` (x's); the weight's axes are x's last ones and the result's."""
    del axes
    inputs = len(spec.split("->")[0].split(",")[1]) - len(self.outputs)
    leading = x.shape[: x.ndim - inputs]
    if self.needed_B is not None:  # rows of zeros cost nothing
      x = jnp.where(self.needed_B.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    x_RI = x.reshape(math.prod(leading), -1)
    sums_RO = rows_lib.PRODUCT.run(target, x_RI, self.values, self.scale_GO, self.bits, self.fast)
    return sums_RO.reshape(*leading, *self.outputs).astype(dtype or x.dtype)


def for_rows(params: Any, needed_B: jax.Array) -> Any:
  """Returns parameters whose OutputRows compute no other rows than those that are needed."""
  return weights.replace(params, OutputRows, needed_B=needed_B)


def of(weight: jax.Array | qarray.QuantizedArray, num_inputs: int, fast: bool) -> OutputRows:
  """Returns a weight whose first axes are `num_inputs` input axes, laid out anew."""
  if isinstance(weight, qarray.QuantizedArray):
    outputs, groups = weight.shape[num_inputs:], weight.scale.shape[0]
    scale_GO = weight.scale.reshape(groups, math.prod(outputs))
    return OutputRows(_transposed(weight.values, num_inputs), scale_GO, weight.bits, outputs, fast)
  return OutputRows(_transposed(weight, num_inputs), None, None, weight.shape[num_inputs:], fast)


def of_table(table_VD: jax.Array) -> OutputRows:
  """Returns the head that is tied to an embedding table: the same array."""
  return OutputRows(table_VD, None, None, table_VD.shape[:1], False)


def quantized(rows: OutputRows, bits: int, fast: bool) -> OutputRows:
  """Returns a float weight's rows as codes and scales (qarray.quantize), some rows at a time."""
  size = max(1, _AT_ONCE // rows.values.shape[1])
  firsts = range(0, rows.values.shape[0], size)
  parts = [_quantized(rows.values[first : first + size], bits) for first in firsts]
  values, scale_GO = jnp.concatenate([x for x, _ in parts]), jnp.concatenate([x for _, x in parts], 1)
  return OutputRows(values, scale_GO, bits, rows.outputs, fast)


@functools.partial(jax.jit, static_argnames=("bits",))
def _quantized(values_OI: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
  if values_OI.dtype == jnp.uint16:
    values_OI = jax.lax.bitcast_convert_type(values_OI, jnp.bfloat16)
  found = qarray.quantize(values_OI, bits, (1,))
  return found.values, found.scale.T


@functools.partial(jax.jit, static_argnames=("num_inputs",))
def _transposed(x: jax.Array, num_inputs: int) -> jax.Array:
  """Returns x [inputs, outputs] as [O, I]; of bfloat16 the bits, which XLA's CPU moves as they are."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x
  return bits.reshape(math.prod(x.shape[:num_inputs]), -1).T
