"""Masked cross entropy whose logits are made only where the loss counts, chunk by chunk.

A blank-infilling row is loss on its spans alone, and a [V]-wide row of float32 logits costs more memory
than everything else a token needs. So the tokens that count are brought to the front, and logits, their
softmax and the head's gradients are computed for a chunk of them at a time.

G groups of rows (one per batch shard, so that nothing moves between devices), R tokens of a group,
C tokens of a chunk, D model, V vocabulary, O objectives.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glmjax import tokens as tokens_lib

NUM_OBJECTIVES = len(tokens_lib.OBJECTIVES)

# (the head's parameters, hidden states [G, C, D]) -> logits [G, C, V]
HeadFn = Callable[[Any, jax.Array], jax.Array]


class Sums(NamedTuple):
  """Loss-weighted cross entropy and the weights themselves, summed per objective: float32 [O] each."""

  loss: jax.Array
  weight: jax.Array

  def mean(self) -> jax.Array:
    """Loss per weighted token, over all objectives."""
    return self.loss.sum() / jnp.maximum(self.weight.sum(), 1.0)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """-log softmax(logits)[target] in float32, shaped as targets."""
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


def by_objective(losses: jax.Array, weights: jax.Array, objectives: jax.Array) -> Sums:
  """Sums of per-token losses, all arrays of one shape."""
  one_hot = jax.nn.one_hot(objectives.reshape(-1), NUM_OBJECTIVES, dtype=jnp.float32)
  flat = weights.astype(jnp.float32).reshape(-1)
  return Sums((flat * losses.reshape(-1)) @ one_hot, flat @ one_hot)


def chunked(head: HeadFn, head_params: Any, x_BLD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array,
            objectives_BL: jax.Array, groups: int = 1, chunk: int = 512) -> Sums:
  """Cross entropy of head(head_params, x) at every weighted token, per objective.

  Equal to making all logits at once. Differentiable in head_params and x, once; the head's gradients are
  computed together with the loss, so that no logits are kept or made twice.

  Args:
    groups: batch shards of the mesh; divides B.
    chunk: C, tokens of each group whose logits exist at a time.
  """
  batch, length = weights_BL.shape
  rows = batch // groups * length
  assert batch % groups == 0, (batch, groups)
  chunk = min(chunk, rows)
  x_GRD = x_BLD.reshape(groups, rows, -1)
  targets, weights, objectives = (a.reshape(groups, rows) for a in (targets_BL, weights_BL, objectives_BL))
  order = jnp.argsort(weights == 0, axis=1, stable=True)  # weighted tokens first, in their order
  front = Front(order, *(jnp.take_along_axis(a, order, axis=1) for a in (targets, weights, objectives)))
  front = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, -rows % chunk))), front)
  return _front_loss(head, chunk, head_params, x_GRD, front)


class Front(NamedTuple):
  """The tokens of each group, weighted ones first, padded to whole chunks: [G, R] each."""

  order: jax.Array  # index into the group's tokens
  targets: jax.Array
  weights: jax.Array
  objectives: jax.Array

  def num_chunks(self, chunk: int) -> jax.Array:
    """Chunks that hold a weighted token in any group."""
    return -(-jnp.max(jnp.sum(self.weights != 0, axis=1)) // chunk)

  def cut(self, i: jax.Array, chunk: int) -> "Front":
    """Chunk i: [G, C] each."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk, axis=1), self)


def _take(x_GRD: jax.Array, index_GC: jax.Array) -> jax.Array:
  return jnp.take_along_axis(x_GRD, index_GC[..., None], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _front_loss(head: HeadFn, chunk: int, head_params: Any, x_GRD: jax.Array, front: Front) -> Sums:
  def body(i: jax.Array, sums: Sums) -> Sums:
    part = front.cut(i, chunk)
    losses = cross_entropy(head(head_params, _take(x_GRD, part.order)), part.targets)
    return jax.tree.map(jnp.add, sums, by_objective(losses, part.weights, part.objectives))

  zeros = jnp.zeros(NUM_OBJECTIVES, jnp.float32)
  return jax.lax.fori_loop(0, front.num_chunks(chunk), body, Sums(zeros, zeros))


def _front_loss_forward(head: HeadFn, chunk: int, head_params: Any, x_GRD: jax.Array,
                        front: Front) -> tuple[Sums, tuple[Any, ...]]:
  """Also the gradients of the loss's sum, which backward only scales: all objectives count alike."""
  groups, rows, width = x_GRD.shape

  def body(i: jax.Array, carry: tuple[Sums, Any, jax.Array]) -> tuple[Sums, Any, jax.Array]:
    sums, d_params, dx = carry
    part = front.cut(i, chunk)
    logits_GCV, head_vjp = jax.vjp(head, head_params, _take(x_GRD, part.order))
    logits_GCV = logits_GCV.astype(jnp.float32)
    log_sum_GC = jax.nn.logsumexp(logits_GCV, axis=-1)
    picked_GC = jnp.take_along_axis(logits_GCV, part.targets[..., None], axis=-1)[..., 0]
    sums = jax.tree.map(jnp.add, sums, by_objective(log_sum_GC - picked_GC, part.weights, part.objectives))
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits_GCV.shape, 2) == part.targets[..., None]
    d_logits = (jnp.exp(logits_GCV - log_sum_GC[..., None]) - is_target) * part.weights[..., None]
    more, dx_chunk = head_vjp(d_logits)
    dx = jax.lax.dynamic_update_slice_in_dim(dx, dx_chunk, i * chunk, axis=1)
    return sums, jax.tree.map(jnp.add, d_params, more), dx

  zeros = jnp.zeros(NUM_OBJECTIVES, jnp.float32)
  start = (Sums(zeros, zeros), jax.tree.map(jnp.zeros_like, head_params),
           jnp.zeros((groups, front.order.shape[1], width), x_GRD.dtype))
  sums, d_params, dx = jax.lax.fori_loop(0, front.num_chunks(chunk), body, start)
  dx_GRD = _take(dx, jnp.argsort(front.order[:, :rows], axis=1))  # back to the tokens' own places
  return sums, (d_params, dx_GRD)


def _front_loss_backward(head: HeadFn, chunk: int, residuals: tuple[Any, ...], d_sums: Sums) -> tuple[Any, ...]:
  del head, chunk
  d_params, dx_GRD = residuals
  scale = d_sums.loss[0]
  scaled = lambda a: (a * scale).astype(a.dtype)
  return jax.tree.map(scaled, d_params), scaled(dx_GRD), None


_front_loss.defvjp(_front_loss_forward, _front_loss_backward)
