"""Masked cross entropy whose logits are made only where the loss counts, chunk by chunk.

A blank-infilling row is loss on its spans alone, and a [V]-wide row of float32 logits costs more memory
than everything else a token needs. So the tokens that count are brought to the front, and logits, their
softmax and the head's gradients are computed for a chunk of them at a time.

G groups of tokens (one for each part of the batch, so that nothing moves between devices), R tokens of a group,
C tokens of a chunk, D model, V vocabulary, O objectives.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax import tokens as tokens_lib
from glmjax.parallel import partitioning
from glmjax.train import scopes

NUM_OBJECTIVES = len(tokens_lib.OBJECTIVES)


class Pairs(NamedTuple):
  """What is summed over pairs of a chosen and a rejected answer; float32 scalars."""

  loss: jax.Array
  count: jax.Array
  ordered: jax.Array  # how many have the chosen answer ahead


class Sums(NamedTuple):
  """Loss-weighted cross entropy and the weights themselves, summed per objective: float32 [O] each."""

  loss: jax.Array
  weight: jax.Array
  pairs: Pairs | None = None  # where the loss is one of pairs; the cross entropies are then only read

  def mean(self) -> jax.Array:
    """Returns the loss per weighted token, over all objectives, or per pair."""
    loss, weight = (self.loss.sum(), self.weight.sum()) if self.pairs is None else (self.pairs.loss, self.pairs.count)
    return loss / jnp.maximum(weight, 1.0)


class Loss(NamedTuple):
  """A loss to be differentiated, and its sums to be read. What multiplies some tokens goes into their weights."""

  total: jax.Array  # float32: weight times cross entropy, summed over all tokens
  sums: Sums  # the same per objective; a gradient of it is NaN, so that none passes for one


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Computes -log softmax(logits)[target] in float32, shaped as targets; a target that is no id has logit 0, on any
  mesh.
  """
  logits = logits.astype(jnp.float32)
  return jax.nn.logsumexp(logits, axis=-1) - _pick(logits, targets)


def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Picks the target's logit; summed out of the others where the vocabulary is split, each device having only its
  part.
  """
  if partitioning.parts("act_vocab") == 1:
    there = (targets >= 0) & (targets < logits.shape[-1])
    picked = jnp.take_along_axis(logits, jnp.where(there, targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(there, picked, 0.0)
  ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
  return jnp.where(ids == targets[..., None], logits, 0.0).sum(-1)


def by_objective(losses: jax.Array, weights: jax.Array, objectives: jax.Array) -> Sums:
  """Sums per-token losses per objective, all arrays of one shape."""
  one_hot = jax.nn.one_hot(objectives.reshape(-1), NUM_OBJECTIVES, dtype=jnp.float32)
  flat = weights.astype(jnp.float32).reshape(-1)
  return Sums((flat * losses.reshape(-1)) @ one_hot, flat @ one_hot)


def of_logits(logits_BLV: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, objectives_BL: jax.Array) -> Loss:
  """Computes the cross entropy of logits that are there, in total and per objective."""
  chex.assert_shape([targets_BL, weights_BL, objectives_BL], logits_BLV.shape[:-1])
  sums = by_objective(cross_entropy(logits_BLV, targets_BL), weights_BL, objectives_BL)
  return Loss(sums.loss.sum(), sums)


def chunked(
  kernel_DV: jax.Array,
  x_BLD: jax.Array,
  targets_BL: jax.Array,
  weights_BL: jax.Array,
  objectives_BL: jax.Array,
  chunk: int = 512,
) -> Loss:
  """Computes the cross entropy of the logits x @ kernel at every weighted token, in total and per objective.

  Equal to making all logits at once. The total is differentiable in kernel and x, once; the head's gradients are
  computed together with the loss, so that no logits are kept or made twice.

  Args:
    kernel_DV, x_BLD: in the compute dtype; sums are float32.
    weights_BL: of the tokens in the loss and its gradient: what an objective counts more than others goes in here.
    chunk: C, tokens of each group whose logits exist at a time.
  """
  chex.assert_rank([kernel_DV, x_BLD], [2, 3])
  chex.assert_axis_dimension(kernel_DV, 0, x_BLD.shape[2])
  chex.assert_shape([targets_BL, weights_BL, objectives_BL], x_BLD.shape[:2])
  chex.assert_type([targets_BL, objectives_BL], int)
  front, chunk = _front(targets_BL, weights_BL, objectives_BL, chunk)
  return _front_loss(partitioning.target(), chunk, kernel_DV, _group(x_BLD), front)


def of_tokens(
  kernel_DV: jax.Array, x_BLD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, chunk: int = 512
) -> jax.Array:
  """Computes the cross entropy of each weighted token, float32 [B, L], 0 for the others; it has no gradient."""
  kernel_DV, x_GRD = jax.lax.stop_gradient((kernel_DV, _group(x_BLD)))
  front, chunk = _front(targets_BL, weights_BL, jnp.zeros_like(targets_BL), chunk)

  def body(i: jax.Array, found_GR: jax.Array) -> jax.Array:
    part = front.cut(i, chunk)
    losses = cross_entropy(_logits(kernel_DV, _take(x_GRD, part.order)), part.targets)
    return jax.lax.dynamic_update_slice_in_dim(found_GR, losses * (part.weights != 0), i * chunk, axis=1)

  found_GR = partitioning.constrain(jnp.zeros(front.order.shape, jnp.float32), "groups", None)
  with jax.named_scope(scopes.LOSS_CHUNKS):
    found_GR = jax.lax.fori_loop(0, front.num_chunks(chunk), body, found_GR)
  places = jnp.argsort(front.order[:, : x_GRD.shape[1]], axis=1)  # back to the tokens' own
  return _ungroup(jnp.take_along_axis(found_GR, places, axis=1), targets_BL.shape)


def _front(targets_BL: jax.Array, weights_BL: jax.Array, objectives_BL: jax.Array, chunk: int) -> tuple["Front", int]:
  """Brings the weighted tokens of each group to its front; returns the size of chunks too, `chunk` at most."""
  targets, weights, objectives = map(_group, (targets_BL, weights_BL, objectives_BL))
  rows = weights.shape[1]
  chunk = min(chunk, rows)
  order = jnp.argsort(weights == 0, axis=1, stable=True)  # weighted tokens first, in their order
  front = Front(order, *(jnp.take_along_axis(a, order, axis=1) for a in (targets, weights, objectives)))
  return jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, -rows % chunk))), front), chunk


def _group(a: jax.Array) -> jax.Array:
  """Turns [B, L, ...] into [G, R, ...]: each group holds the tokens of one device, or of those that share a part."""
  batch, length, *rest = a.shape
  rows, tokens = partitioning.parts("batch"), partitioning.parts("length")
  assert batch % rows == 0 and length % tokens == 0, (a.shape, rows, tokens)
  if tokens > 1:
    a = a.reshape(rows, batch // rows, tokens, length // tokens, *rest)
    a = jnp.swapaxes(partitioning.constrain(a, "batch", None, "length", *[None] * (a.ndim - 3)), 1, 2)
  return partitioning.constrain(a.reshape(rows * tokens, -1, *rest), "groups", *[None] * (1 + len(rest)))


def _ungroup(a_GR: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Turns [G, R] of `_group` back into [B, L]."""
  (batch, length), rows, tokens = shape, partitioning.parts("batch"), partitioning.parts("length")
  if tokens > 1:
    a_GR = jnp.swapaxes(a_GR.reshape(rows, tokens, batch // rows, length // tokens), 1, 2)
  return partitioning.constrain(a_GR.reshape(batch, length), "batch", "length")


class Front(NamedTuple):
  """The tokens of each group, weighted ones first, padded to whole chunks: [G, R] each."""

  order: jax.Array  # index into the group's tokens
  targets: jax.Array
  weights: jax.Array
  objectives: jax.Array

  def num_chunks(self, chunk: int) -> jax.Array:
    """Counts the chunks that hold a weighted token in any group."""
    return -(-partitioning.largest(jnp.max(jnp.sum(self.weights != 0, axis=1))) // chunk)

  def cut(self, i: jax.Array, chunk: int) -> "Front":
    """Returns chunk i: [G, C] each."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk, axis=1), self)


def _take(x_GRD: jax.Array, index_GC: jax.Array) -> jax.Array:
  return jnp.take_along_axis(x_GRD, index_GC[..., None], axis=1)


def _logits(kernel_DV: jax.Array, x_GCD: jax.Array) -> jax.Array:
  logits_GCV = jnp.einsum("GCD,DV->GCV", x_GCD, kernel_DV, preferred_element_type=jnp.float32)
  return partitioning.constrain(logits_GCV, "groups", None, "act_vocab")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _front_loss(target: target_lib.Target, chunk: int, kernel_DV: jax.Array, x_GRD: jax.Array, front: Front) -> Loss:
  del target

  def body(i: jax.Array, sums: Sums) -> Sums:
    part = front.cut(i, chunk)
    losses = cross_entropy(_logits(kernel_DV, _take(x_GRD, part.order)), part.targets)
    return jax.tree.map(jnp.add, sums, jax.vmap(by_objective)(losses, part.weights, part.objectives))

  with jax.named_scope(scopes.LOSS_CHUNKS):
    return _total(jax.lax.fori_loop(0, front.num_chunks(chunk), body, _zeros(front)))


def _zeros(front: Front) -> Sums:
  """Returns zeros for each group, [G, O], so that devices meet once, behind the loop."""
  zeros = jnp.zeros((front.order.shape[0], NUM_OBJECTIVES), jnp.float32)
  return Sums(zeros, zeros)


def _total(sums: Sums) -> Loss:
  sums = jax.tree.map(lambda a: a.sum(0), sums)
  return Loss(sums.loss.sum(), sums)


def _softmax_sums(target: target_lib.Target, logits_GCV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the largest logit of each token, and the sum of exp(logit - largest); GPUs read the logits once for
  both.
  """
  if target.platform != "gpu" or target.split("act_vocab") > 1:
    max_GC = logits_GCV.max(-1)
    return max_GC, jnp.exp(logits_GCV - max_GC[..., None]).sum(-1)

  def merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    high = jnp.maximum(a[0], b[0])
    return high, a[1] * jnp.exp(a[0] - high) + b[1] * jnp.exp(b[0] - high)

  lowest = jnp.finfo(jnp.float32).min  # finite: it minus itself is 0
  return jax.lax.reduce((logits_GCV, jnp.ones_like(logits_GCV)), (lowest, jnp.float32(0)), merge, (2,))


def _front_loss_forward(
  target: target_lib.Target, chunk: int, kernel_DV: jax.Array, x_GRD: jax.Array, front: Front
) -> tuple[Loss, Any]:
  """Returns the loss and the gradients of the total, which backward only scales."""
  groups, rows, width = x_GRD.shape
  # Each group sums a gradient of its own too.
  kernel_spec = "GCD,GCV->DV" if groups == 1 else "GCD,GCV->GDV"

  def body(i: jax.Array, carry: tuple[Sums, jax.Array, jax.Array]) -> tuple[Sums, jax.Array, jax.Array]:
    sums, d_kernel, dx = carry
    part = front.cut(i, chunk)
    x_GCD = _take(x_GRD, part.order)
    logits_GCV = _logits(kernel_DV, x_GCD)
    picked_GC = _pick(logits_GCV, part.targets)
    max_GC, total_GC = _softmax_sums(target, logits_GCV)
    exp_GCV = jnp.exp(logits_GCV - max_GC[..., None])
    losses_GC = jnp.log(total_GC) + max_GC - picked_GC
    sums = jax.tree.map(jnp.add, sums, jax.vmap(by_objective)(losses_GC, part.weights, part.objectives))
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits_GCV.shape, 2) == part.targets[..., None]
    d_logits = exp_GCV * (part.weights / total_GC)[..., None] - jnp.where(is_target, part.weights[..., None], 0.0)
    d_logits = d_logits.astype(x_GRD.dtype)
    d_kernel += jnp.einsum(kernel_spec, x_GCD, d_logits, preferred_element_type=jnp.float32)
    dx_GCD = jnp.einsum("GCV,DV->GCD", d_logits, kernel_DV, preferred_element_type=jnp.float32)
    dx = jax.lax.dynamic_update_slice_in_dim(dx, dx_GCD.astype(dx.dtype), i * chunk, axis=1)
    return sums, d_kernel, dx

  d_kernel = jnp.zeros(kernel_DV.shape if groups == 1 else (groups, *kernel_DV.shape), jnp.float32)
  if groups > 1:
    d_kernel = partitioning.constrain(d_kernel, "groups", None, "act_vocab")
  dx = partitioning.constrain(jnp.zeros((groups, front.order.shape[1], width), x_GRD.dtype), "groups", None, None)
  with jax.named_scope(scopes.LOSS_CHUNKS):
    sums, d_kernel, dx = jax.lax.fori_loop(0, front.num_chunks(chunk), body, (_zeros(front), d_kernel, dx))
  if groups > 1:  # of which each device keeps its part of the head
    d_kernel = partitioning.constrain(d_kernel.sum(0), "embed", "vocab")
  dx_GRD = _take(dx, jnp.argsort(front.order[:, :rows], axis=1))  # back to the tokens' own places
  return _total(sums), (d_kernel, dx_GRD, kernel_DV)


def _front_loss_backward(
  target: target_lib.Target, chunk: int, residuals: Any, d: Loss
) -> tuple[jax.Array, jax.Array, None]:
  del target, chunk
  d_kernel, dx_GRD, kernel_DV = residuals
  scale = jnp.where((d.sums.loss != 0).any() | (d.sums.weight != 0).any(), jnp.nan, d.total)
  return (d_kernel * scale).astype(kernel_DV.dtype), (dx_GRD * scale).astype(dx_GRD.dtype), None


_front_loss.defvjp(_front_loss_forward, _front_loss_backward)
