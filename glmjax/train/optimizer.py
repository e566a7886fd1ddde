"""Optimizers: frozen configurations, one for each, that make an optax transformation.

The transformation turns gradients into a direction; the step clips before it and multiplies by the learning
rate after it, because the rate is a function of samples seen, which optax does not count.
"""

import dataclasses
import math
from typing import Any

import jax
import optax
from optax import contrib

# A kernel's input axes and output axes, counted behind the leading layers axis; Muon treats every other
# axis (layers, and the three of query, key and value or the two GeGLU halves) as separate matrices.
_MATRICES = {
    "attention/qkv": ((0,), (2, 3)),  # [D, 3, H, K]
    "attention/out": ((0, 1), (2,)),  # [H, K, D]
    "mlp/wi": ((0,), (2,)),  # [D, branches, F]
    "mlp/wo": ((0,), (1,)),  # [F, D]
}


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
  """The dict keys of a jax.tree_util path."""
  return tuple(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def decays(path: tuple[Any, ...]) -> bool:
  """Whether weight decay applies: to all but biases and norms; embeddings decay too, as in Megatron."""
  return path_names(path)[-1] not in ("bias", "scale")


def add_decay(rate: float) -> optax.GradientTransformation:
  """Adds rate x parameter to the direction (decoupled weight decay, Loshchilov and Hutter 2019)."""

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    add = lambda path, u, p: u + rate * p.astype(u.dtype) if decays(path) else u
    return jax.tree_util.tree_map_with_path(add, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@dataclasses.dataclass(frozen=True)
class AdamW:
  """Adam with decoupled weight decay; the defaults are GLM-130B's (paper, table 11)."""

  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0  # gradients are scaled down to this global norm

  def make(self) -> optax.GradientTransformation:
    """Gradients to a direction, before the learning rate."""
    return optax.chain(optax.scale_by_adam(self.b1, self.b2, self.epsilon), add_decay(self.weight_decay))


@dataclasses.dataclass(frozen=True)
class Muon:
  """Muon for the blocks' kernels, Adam for all else; one learning rate for both.

  A kernel's update is orthogonal and scaled to the size of Adam's (Moonlight, arXiv 2502.16982: 0.2 times
  the root of the longer side), so that learning rate and weight decay mean what they mean for AdamW.
  """

  momentum: float = 0.95
  steps: int = 5  # of the Newton-Schulz iteration
  update_size: float = 0.2  # root mean square of an update's entries
  adam: AdamW = AdamW()

  @property
  def clip_norm(self) -> float:
    """Gradients are scaled down to this global norm."""
    return self.adam.clip_norm

  def make(self) -> optax.GradientTransformation:
    """Gradients to a direction, before the learning rate."""
    adam = optax.scale_by_adam(self.adam.b1, self.adam.b2, self.adam.epsilon)
    label = lambda path, _: "muon" if _matrix(path) else "adam"
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
    return optax.chain(optax.partition({"muon": _muon(self), "adam": adam}, labels),
                       add_decay(self.adam.weight_decay))


def _matrix(path: tuple[Any, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """Input and output axes of a block's kernel, None for other parameters."""
  names = path_names(path)
  if names[-1] != "kernel" or not names[0].startswith("layers"):
    return None
  inputs, outputs = _MATRICES["/".join(names[-3:-1])]
  stacked = int(names[0] == "layers")  # unrolled models have layers_0, layers_1, ...
  return tuple(axis + stacked for axis in inputs), tuple(axis + stacked for axis in outputs)


def _muon(config: Muon) -> optax.GradientTransformation:
  def dimensions(updates: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: contrib.MuonDimensionNumbers(*_matrix(path)), updates)

  def resize(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    sides = (math.prod(x.shape[i] for i in axes) for axes in _matrix(path))
    return x * (config.update_size * max(sides) ** 0.5)

  return optax.chain(
      contrib.scale_by_muon(ns_steps=config.steps, beta=config.momentum, weight_dimension_numbers=dimensions),
      optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(resize, updates)))
