"""What a layer asks of the weight that it multiplies with, and who answers: float arrays and quantized ones."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import matmul
from glmjax.models import params as params_lib
from glmjax.quantize import qarray

Axes = tuple[str | None, ...]  # a weight's logical axes


@runtime_checkable
class Weight(Protocol):
  """A pytree that stands in a layer's parameters for the kernel of an einsum."""

  def product(self, target: target_lib.Target, spec: str, x: jax.Array, axes: Axes | None = None) -> jax.Array:
    """jnp.einsum(spec, x, weight) in x's dtype, sums in float32; linear in x, differentiable in what trains.

    `axes`: the weight's logical axes, where a mesh may split it.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float:
  """A float array as a weight."""

  array: jax.Array

  def product(self, target: target_lib.Target, spec: str, x: jax.Array, axes: Axes | None = None) -> jax.Array:
    """Operands in x's dtype; the array's gradient in its own: float32 for a master weight."""
    del axes
    return matmul.matmul(target, spec, x, self.array)


def of(value: Any) -> Weight:
  """A parameter as a weight: itself where it is one."""
  return value if isinstance(value, Weight) else Float(value)


def input_gradient(
  target: target_lib.Target, spec: str, weight: Weight, x: jax.ShapeDtypeStruct, g: jax.Array, axes: Axes | None = None
) -> jax.Array:
  """The gradient of a product's x, of this shape and dtype, for the product's gradient g."""

  def product(x: jax.Array) -> jax.Array:
    return weight.product(target, spec, x, axes)

  (dx,) = jax.vjp(product, jnp.zeros(x.shape, x.dtype))[1](g)  # linear: XLA drops the product of zeros
  return dx


def quantize(params: Any, bits: int) -> Any:
  """The same tree, with QuantizedArrays for the kernels that the parameter table quantizes.

  Raises:
    errors.InputError: for bits other than 4 and 8, or a size that does not pack.
  """

  def leaf(path: tuple[Any, ...], x: jax.Array) -> Any:
    axes = params_lib.quantized_inputs("/".join(str(key.key) for key in path))
    return x if axes is None else qarray.quantize_layers(x, bits, axes)

  return jax.tree_util.tree_map_with_path(leaf, params)
