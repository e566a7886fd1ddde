"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): a weight, and a product of two thin ones beside it.

  x -> x W + scale * dropout(x) A B

A maps a weight's inputs to R numbers, B these to its outputs. W may be a float array or codes; only A and B train.
In inference there may be several, of which each row of x has its own.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmjax import target as target_lib
from glmjax.kernels import dropout as dropout_lib
from glmjax.kernels import matmul
from glmjax.models import weights

_RANK = "R"  # the label of the rank in specs, which no other axis has


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """A weight with an adapter beside it; stands where the weight stood (models/weights.py)."""

  base: Any  # weights.Weight, or in its gradient None
  a: jax.Array  # [inputs, R]
  b: jax.Array  # [R, outputs]
  scale: float = dataclasses.field(metadata={"static": True})
  rate: float = dataclasses.field(default=0.0, metadata={"static": True})  # of dropout
  seeds: jax.Array | None = None  # dropout's, of the axes of x but the last; None: nothing is dropped

  def product(
    self, target: target_lib.Target, spec: str, x: jax.Array, axes: weights.Axes | None = None, dtype: Any = None
  ) -> jax.Array:
    """Computes jnp.einsum(spec, x, weight) in `dtype` (x's) with what the adapter adds."""
    low, high = _specs(spec)
    added = weights.of(self.b).product(target, high, self._low(target, low, x), dtype=dtype)
    out = self.base.product(target, spec, x, axes, dtype)
    return out + added * jnp.asarray(self.scale, added.dtype)

  def input_gradient(self, target: target_lib.Target, spec: str, g: jax.Array, dtype: Any) -> jax.Array:
    """Returns the gradient of the product's x, which has this dtype, for the product's gradient g."""
    low, high = _specs(spec)
    through = weights.Float(self.b).input_gradient(target, high, self._scaled(g), dtype)
    through = self._dropped(weights.Float(self.a).input_gradient(target, low, through, dtype))
    return self.base.input_gradient(target, spec, g, dtype) + through

  def gradient(self, target: target_lib.Target, spec: str, x: jax.Array, g: jax.Array) -> "LowRank":
    """Returns the gradients of the base, of A and of B for the product's gradient g."""
    low, high = _specs(spec)
    through = weights.Float(self.b).input_gradient(target, high, self._scaled(g), x.dtype)
    return dataclasses.replace(
      self,
      base=self.base.gradient(target, spec, x, g),
      a=weights.Float(self.a).gradient(target, low, self._dropped(x), through).array,
      b=weights.Float(self.b).gradient(target, high, self._low(target, low, x), self._scaled(g)).array,
      seeds=None,
    )

  def _low(self, target: target_lib.Target, spec: str, x: jax.Array) -> jax.Array:
    return weights.of(self.a).product(target, spec, self._dropped(x))

  def _dropped(self, x: jax.Array) -> jax.Array:
    return x if self.seeds is None else dropout_lib.apply(dropout_lib.Dropout(self.rate, self.seeds), x)

  def _scaled(self, g: jax.Array) -> jax.Array:
    return g * jnp.asarray(self.scale, g.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked(weights.ForInference):
  """One factor of several adapters, on top of each other; stands where one adapter's stands (models/weights.py).

  Each row of x is multiplied with that of its own adapter, by itself: what the others have changes no bit of it.
  """

  array: jax.Array  # [adapters, ...]; of number 0, which is none, zeros
  number_B: jax.Array | None = None  # int32: which of them each row of x has

  def product(
    self, target: target_lib.Target, spec: str, x: jax.Array, axes: weights.Axes | None = None, dtype: Any = None
  ) -> jax.Array:
    """Computes jnp.einsum(spec, x, factor) in `dtype` (x's); the first axis of x is that of the rows."""
    del axes
    assert self.number_B is not None, "a program says which adapter each row has"
    labels, rest = spec.split(",")
    each = jnp.take(self.array, self.number_B, axis=0, mode="clip")
    return matmul.matmul(target, f"{labels},{labels[0]}{rest}", x, each, dtype)


def for_rows(params: Any, number_B: jax.Array) -> Any:
  """Returns parameters whose stacked factors multiply each row of x with those of the adapter of this number."""
  return weights.replace(params, Stacked, number_B=number_B)


@functools.cache
def _specs(spec: str) -> tuple[str, str]:
  """Returns the specs of the products with A and with B, of that with the weight: BLD,DTF->BLTF gives BLD,DR->BLR and
  BLR,RTF->BLTF.
  """
  x, weight, out = spec.replace("->", ",").split(",")
  inputs = "".join(label for label in weight if label not in out)
  between = "".join(label for label in x if label not in inputs) + _RANK
  outputs = "".join(label for label in weight if label in out)
  return f"{x},{inputs}{_RANK}->{between}", f"{between},{_RANK}{outputs}->{out}"


def added(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
  """Returns what factors add to a weight, float32 [inputs, outputs] of any axes."""
  rank = a.shape[-1]
  product = a.reshape(-1, rank).astype(np.float32) @ b.reshape(rank, -1).astype(np.float32)
  return scale * product.reshape(*a.shape[:-1], *b.shape[1:])
