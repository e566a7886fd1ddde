"""What a layer asks of the weight that it multiplies with, and who answers: float arrays and quantized ones."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax

from glmjax import target as target_lib
from glmjax.kernels import matmul
from glmjax.models import params as params_lib
from glmjax.quantize import qarray

Axes = tuple[str | None, ...]  # a weight's logical axes


@runtime_checkable
class Weight(Protocol):
  """A pytree that stands in a layer's parameters for the kernel of an einsum."""

  def product(
    self, target: target_lib.Target, spec: str, x: jax.Array, axes: Axes | None = None, dtype: Any = None
  ) -> jax.Array:
    """Computes jnp.einsum(spec, x, weight) in `dtype` (x's), sums in float32; linear in x, differentiable in what
    trains.

    `axes`: the weight's logical axes, where a mesh may split it.
    """

  def input_gradient(self, target: target_lib.Target, spec: str, g: jax.Array, dtype: Any) -> jax.Array:
    """Returns the gradient of the product's x, which has this dtype, for the product's gradient g."""

  def gradient(self, target: target_lib.Target, spec: str, x: jax.Array, g: jax.Array) -> "Weight | None":
    """Returns the weight's own gradient, a weight like it, for the product's gradient g; None where nothing of it
    trains.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float:
  """A float array as a weight."""

  array: jax.Array

  def product(
    self, target: target_lib.Target, spec: str, x: jax.Array, axes: Axes | None = None, dtype: Any = None
  ) -> jax.Array:
    """Multiplies operands in x's dtype; the array's gradient is in its own: float32 for a master weight."""
    del axes
    return matmul.matmul(target, spec, x, self.array, dtype)

  def input_gradient(self, target: target_lib.Target, spec: str, g: jax.Array, dtype: Any) -> jax.Array:
    """Returns x's gradient, computed of operands in x's dtype."""
    return matmul.first_gradient(target, spec, self.array, g, dtype)

  def gradient(self, target: target_lib.Target, spec: str, x: jax.Array, g: jax.Array) -> "Float":
    """Returns the array's gradient, in the array's dtype."""
    return Float(matmul.second_gradient(target, spec, x, g, self.array.dtype))


def of(value: Any) -> Weight:
  """Returns a parameter as a weight: itself where it is one."""
  return value if isinstance(value, Weight) else Float(value)


class ForInference:
  """What a weight that never trains says of gradients."""

  def input_gradient(self, target: target_lib.Target, spec: str, g: jax.Array, dtype: Any) -> jax.Array:
    """Raises NotImplementedError."""
    raise NotImplementedError(f"{type(self).__name__} is for inference alone")

  def gradient(self, target: target_lib.Target, spec: str, x: jax.Array, g: jax.Array) -> None:
    """Raises NotImplementedError."""
    raise NotImplementedError(f"{type(self).__name__} is for inference alone")


def replace(params: Any, kind: type, **changes: Any) -> Any:
  """Returns parameters with other fields in each weight of this kind, as what rows it is to be multiplied with."""

  def is_one(x: Any) -> bool:
    return isinstance(x, kind)

  return jax.tree.map(lambda x: dataclasses.replace(x, **changes) if is_one(x) else x, params, is_leaf=is_one)


def quantize(params: Any, bits: int) -> Any:
  """Returns the same tree, with QuantizedArrays for the kernels that the parameter table quantizes.

  Raises:
    errors.InputError: for bits other than 4 and 8, or a size that does not pack.
  """

  def leaf(path: tuple[Any, ...], x: jax.Array) -> Any:
    axes = params_lib.quantized_inputs("/".join(str(key.key) for key in path))
    return x if axes is None else qarray.quantize_layers(x, bits, axes)

  return jax.tree_util.tree_map_with_path(leaf, params)
