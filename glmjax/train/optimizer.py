"""Optimizers: frozen configurations, one for each, that make an optax transformation.

The transformation turns gradients into a direction; the step clips before it and multiplies by the learning
rate after it, because the rate is a function of samples seen, which optax does not count.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from glmjax import errors
from glmjax import ranges
from glmjax.models import params as params_lib


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
  """Returns the dict keys of a jax.tree_util path."""
  return tuple(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def decays(path: tuple[Any, ...]) -> bool:
  """Tells whether weight decay applies to a parameter (models/params.py); one that no model has is an error."""
  return params_lib.known("/".join(path_names(path))).decays


def add_decay(rate: float) -> optax.GradientTransformation:
  """Adds rate x parameter to the direction (decoupled weight decay, Loshchilov and Hutter 2019)."""

  def init(params: Any) -> optax.EmptyState:
    del params
    return optax.EmptyState()

  def add(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
    return update + rate * param.astype(update.dtype) if decays(path) else update

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    return jax.tree_util.tree_map_with_path(add, updates, params), state

  return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class AdamW:
  """Adam with decoupled weight decay; the defaults are GLM-130B's (paper, table 11)."""

  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0  # gradients are scaled down to this global norm; 1e9: hardly ever

  def __post_init__(self) -> None:
    for name in ("b1", "b2"):
      ranges.number(f"AdamW.{name}", getattr(self, name), 0, below=1)
    for name in ("epsilon", "clip_norm"):
      ranges.number(f"AdamW.{name}", getattr(self, name), above=0)
    ranges.number("AdamW.weight_decay", self.weight_decay, 0)

  def make(self) -> optax.GradientTransformation:
    """Makes the transformation of gradients to a direction, before the learning rate."""
    return optax.chain(_adam(self), add_decay(self.weight_decay))


def _adam(config: AdamW) -> optax.GradientTransformation:
  """Returns optax.scale_by_adam with the bias of its moments corrected to float32's last digit.

  1 - b ** count leaves five digits of a first step's 0.001, and every parameter's step is off alike: thirty steps of
  P-Tuning v2 end 2e-4 from torch's loss, not 3e-6.
  """

  def bias(b: float, count: jax.Array) -> jax.Array:
    return -jnp.expm1(count * math.log(b)) if b else jnp.float32(1.0)

  def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
    del params
    b1, b2, count = config.b1, config.b2, optax.safe_increment(state.count)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
    first, second = bias(b1, count), bias(b2, count)
    direction = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v / second) + config.epsilon), mu, nu)
    return direction, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(optax.scale_by_adam(config.b1, config.b2, config.epsilon).init, update)


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

  def __post_init__(self) -> None:
    ranges.number("Muon.momentum", self.momentum, 0, below=1)
    ranges.whole("Muon.steps", self.steps, 1, 100)
    ranges.number("Muon.update_size", self.update_size, above=0)
    if not isinstance(self.adam, AdamW):
      raise errors.InputError(f"Muon.adam is {self.adam!r}: give an AdamW, in gin @optimizer.AdamW()")

  @property
  def clip_norm(self) -> float:
    """The global norm down to which gradients are scaled."""
    return self.adam.clip_norm

  def make(self) -> optax.GradientTransformation:
    """Makes the transformation of gradients to a direction, before the learning rate."""
    kinds = {"muon": _muon(self), "adam": _adam(self.adam)}
    return optax.chain(optax.partition(kinds, _labels), add_decay(self.adam.weight_decay))


def _labels(params: Any) -> Any:
  """Says of each parameter which of Muon's two optimizers moves it."""
  return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if _matrix(path) else "adam", params)


def _matrix(path: tuple[Any, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """Returns input and output axes of a block's kernel, None for other parameters; other axes only tell matrices
  apart.
  """
  names = path_names(path)
  return params_lib.known("/".join(names)).matrix if names[0].startswith(params_lib.LAYERS) else None


class MuonState(NamedTuple):
  """The momentum of every kernel, float32."""

  momentum: Any


def _muon(config: Muon) -> optax.GradientTransformation:
  def init(params: Any) -> MuonState:
    return MuonState(jax.tree.map(jnp.zeros_like, params))

  def blend(momentum: jax.Array, gradient: jax.Array) -> jax.Array:
    return config.momentum * momentum + (1 - config.momentum) * gradient

  def direction(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    return _orthogonal(x, *_matrix(path), config.steps) * config.update_size

  def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
    del params
    momentum = jax.tree.map(blend, state.momentum, grads)
    nesterov = jax.tree.map(blend, momentum, grads)
    return jax.tree_util.tree_map_with_path(direction, nesterov), MuonState(momentum)

  return optax.GradientTransformation(init, update)


def _orthogonal(x: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...], steps: int) -> jax.Array:
  """Returns the nearest matrices with equal singular values, about, scaled to entries of root mean square 1.

  Keller Jordan's quintic Newton-Schulz iteration, as there with bfloat16 products.
  """
  others = tuple(set(range(x.ndim)) - {*inputs, *outputs})
  rows, columns = (math.prod(x.shape[i] for i in axes) for axes in (inputs, outputs))
  order = (*others, *inputs, *outputs) if rows <= columns else (*others, *outputs, *inputs)  # wide, not tall
  shape = tuple(x.shape[i] for i in order)
  m = x.transpose(order).reshape(-1, min(rows, columns), max(rows, columns))
  m = (m / (jnp.linalg.norm(m, axis=(1, 2), keepdims=True) + 1e-7)).astype(jnp.bfloat16)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  for _ in range(steps):
    gram = product("bmk,bnk->bmn", m, m).astype(m.dtype)
    polynomial = -4.7750 * gram + 2.0315 * product("bmk,bkn->bmn", gram, gram)
    m = (3.4445 * m + product("bmk,bkn->bmn", polynomial.astype(m.dtype), m)).astype(m.dtype)
  m = m.astype(x.dtype) * max(rows, columns) ** 0.5
  return m.reshape(shape).transpose(sorted(range(x.ndim), key=order.__getitem__))
