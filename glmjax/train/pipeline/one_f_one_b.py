"""The one-forward-one-backward schedule (1F1B, PipeDream-Flush: Narayanan et al. 2021, arXiv 2006.09503).

In a tick every stage goes forward with one micro-batch and backward with another, so that a micro-batch's activations
are gone soon after they came, however many micro-batches follow. Stage s takes micro-batch m forward in tick m + s and
backward in tick m + 2 (S - 1) - s: the last stage both in one tick, with the loss between them. S - 1 ticks go forward
alone, K both ways, S - 1 backward alone.

Of a micro-batch that is under way a stage keeps its own input alone, and goes forward with it once more before it goes
backward: `remat` says what the layers keep between these two. So the gradient is not left to jax.grad, which would
first go forward through all ticks: it is computed here, tick by tick, in float32 where it lies.

The head's work on a micro-batch is split over all stages, by tokens. Each adds up a gradient of its own, which meet
once, behind all ticks.

B batch, L length, D model, V vocabulary, S stages, K micro-batches, J = K / S slots, W = 2 S - 1 inputs, N layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from glmjax import batch as batch_lib
from glmjax.kernels import matmul
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import layers as layers_lib
from glmjax.models import params as params_lib
from glmjax.parallel import partitioning
from glmjax.train import losses
from glmjax.train import objective as objective_lib
from glmjax.train import pipeline as pipeline_lib
from glmjax.train.pipeline import ring as ring_lib

Ring = jax.Array  # [S, J, B / K, L, D], as ring.py has it

_HEAD = ("layers", "embed", "vocab")  # of the stages' gradients of the head's kernel


def add_gradient(
  objective: objective_lib.Objective, params: Any, frozen: Any, work: objective_lib.Work, found: tuple[losses.Sums, Any]
) -> tuple[losses.Sums, Any]:
  """Returns `found`, float32 sums and gradients, and added to it the sums and the gradient of one micro-batch of a
  step.

  work.factor multiplies the gradient behind the head: half precision would lose that of a logit times a small factor.

  Args:
    params: what is trained, the layers stacked as `Pipeline.order` says.
    frozen: the model's other parameters, likewise.
    work: rows [B, ...], which are cut into the pipeline's own micro-batches.
  """
  config, pipeline = objective.config, objective.pipeline
  (sums, gradient), layers = found, params_lib.merge(params.get("layers", {}), frozen.get("layers", {}))
  rest, frozen_rest = _without_layers(params), _without_layers(frozen)
  rest = jax.tree.map(lambda x: x.astype(jnp.float32), rest)  # as their gradients, over whatever dtype it passes

  def enter(rest: Any) -> tuple[Ring, dict[str, jax.Array]]:
    whole = params_lib.merge(rest, frozen_rest)
    return ring_lib.enter(config, pipeline, whole, work.batch, work.alpha, work.rng)

  def group(w: jax.Array) -> jax.Array:
    return w.reshape(pipeline.stages, pipeline.group, *w.shape[1:])

  def share(a: jax.Array) -> jax.Array:
    return jax.vmap(functools.partial(_share, pipeline, objective.chunk))(pipeline.cut(a))

  ring, pull, features = jax.vjp(jax.checkpoint(enter), rest, has_aux=True)
  whole = params_lib.merge(rest, frozen_rest)
  kernel_DV = glm.GLM(config).apply({"params": whole}, work.alpha, method="head_kernel")
  ends = _Ends(config, work.factor, {"final_norm": whole["final_norm"], "kernel": kernel_DV})
  ring, of_layers, of_ends, own = _ticks(
    _Stages(config, pipeline, jax.tree.map(group, layers), features),
    ends,
    ends.zeros(sums, pipeline.stages),
    [share(work.batch[name]) for name in batch_lib.TARGETS],
    objective.chunk,
    ring,
    jax.tree.map(group, gradient.get("layers", {})),
  )
  (of_rest,) = pull(ring)
  of_ends = jax.tree.map(lambda g: g * work.factor, of_ends)
  of_rest = _add(of_rest, _through_kernel(config, rest, frozen_rest, work.alpha, of_ends["kernel"]))
  flat = params_lib.flatten(of_rest)
  for name, g in of_ends["final_norm"].items():
    if (path := f"final_norm/{name}") in flat:
      flat[path] += g
  of_rest = _add(_without_layers(gradient), params_lib.nest(flat))
  of_layers = jax.tree.map(lambda g, w: g.reshape(w.shape), of_layers, gradient.get("layers", {}))
  return _add(sums, own), of_rest | ({"layers": of_layers} if of_layers else {})


def _add(a: Any, b: Any) -> Any:
  return jax.tree.map(jnp.add, a, b)


def _without_layers(params: Any) -> Any:
  return {name: x for name, x in params.items() if name != "layers"}


def _through_kernel(
  config: config_lib.GLMConfig, rest: Any, frozen: Any, gradient_alpha: jax.Array | float, g_DV: jax.Array
) -> Any:
  """Returns the gradient of the weights `rest` that the head's kernel is made of, from the kernel's, both float32."""
  model = glm.GLM(dataclasses.replace(config, dtype="float32"))

  def make(rest: Any) -> jax.Array:
    return model.apply({"params": params_lib.merge(rest, frozen)}, gradient_alpha, method="head_kernel")

  return jax.vjp(make, rest)[1](g_DV)[0]


def _ticks(
  stages: "_Stages", ends: "_Ends", own: Any, targets: Any, chunk: int, ring: Ring, gradient: Any
) -> tuple[Ring, Any, Any, Any]:
  """Returns the gradients of the ring's inputs, of the layers, of what is behind them, and the sums.

  Args:
    own: as `_Ends.zeros` begins it.
    targets: [K, S, pieces, B / K, tokens] arrays, as `_share` cuts them.
    chunk: tokens of each stage and part of the batch whose logits exist at a time.
    gradient: of the layers that are trained, to be added to.
  """
  pipeline = stages.pipeline
  warm, both = pipeline.stages - 1, pipeline.stages - 1 + pipeline.microbatches
  nothing = ring_lib.over_stages(jnp.zeros_like(ring[:, 0]))
  inputs = ring_lib.over_stages(jnp.zeros((pipeline.stages, stages.kept, *ring.shape[2:]), ring.dtype))

  def forward(carry: Any, t: jax.Array) -> tuple[Any, None]:
    return stages.forward(t, *carry), None

  def forward_and_backward(carry: Any, at: tuple[jax.Array, Any]) -> tuple[Any, None]:
    (ring, made, inputs, came, gradient, own), (t, targets) = carry, at
    ring, made, inputs = stages.forward(t, ring, made, inputs)
    parts, pull = jax.vjp(functools.partial(_leave, pipeline, chunk), made)
    own, d_parts = ends.add(own, parts, targets)
    ring, came, gradient = stages.backward(t, ring, inputs, came, pull(d_parts)[0], gradient)
    return (ring, made, inputs, came, gradient, own), None

  def backward(carry: Any, t: jax.Array) -> tuple[Any, None]:
    ring, came, gradient = carry
    return stages.backward(t, stages.move(t, ring)[0], inputs, came, nothing, gradient), None

  ring, made, inputs = jax.lax.scan(forward, (ring_lib.over_stages(ring), nothing, inputs), jnp.arange(warm))[0]
  carry = ring, made, inputs, nothing, gradient, own
  carry = jax.lax.scan(forward_and_backward, carry, (jnp.arange(warm, both), targets))[0]
  ring, made, inputs, came, gradient, own = carry
  ring, came, gradient = jax.lax.scan(backward, (ring, came, gradient), jnp.arange(both, both + warm))[0]
  sums, of_ends = jax.tree.map(lambda x: x.sum(0), own)
  return stages.settle(ring), gradient, of_ends, sums


@dataclasses.dataclass(frozen=True)
class _Stages:
  """What all stages do in a tick, t, each with another micro-batch."""

  config: config_lib.GLMConfig
  pipeline: pipeline_lib.Pipeline
  weights: Any  # [S, N / S, ...]
  features: dict[str, jax.Array]  # [K, B / K, ...]

  @property
  def kept(self) -> int:
    """W, the number of a stage's inputs that wait for backward: the first stage's."""
    return 2 * self.pipeline.stages - 1

  def move(self, t: jax.Array, ring: Ring) -> tuple[Ring, jax.Array]:
    """Returns the ring without the first of a line, and the line as it was, whose first is the first stage's next
    input.
    """
    slot = t % ring.shape[1]
    line = jax.lax.dynamic_index_in_dim(ring, slot, 1, keepdims=False)
    return ring_lib.over_stages(jax.lax.dynamic_update_index_in_dim(ring, jnp.roll(line, -1, 0), slot, 1)), line

  def forward(self, t: jax.Array, ring: Ring, made: jax.Array, inputs: jax.Array) -> tuple[Ring, jax.Array, jax.Array]:
    """Returns the ring, what the stages made [S, B / K, L, D], and their inputs [S, W, B / K, L, D], of which one is
    new.
    """
    places = jnp.arange(self.pipeline.stages)
    ring, line = self.move(t, ring)
    x = ring_lib.where(places == 0, line, jnp.roll(made, 1, 0))
    x = ring_lib.over_stages(ring_lib.where(self._runs(t - places), x, jnp.zeros_like(x)))

    def work(weights: Any, place: jax.Array, x: jax.Array, features: Any) -> jax.Array:
      return ring_lib.layers(self.config, self.pipeline, weights, None, place, x, features)[0]

    work = jax.vmap(work, spmd_axis_name=partitioning.STAGE_AXIS)
    made = ring_lib.over_stages(work(self.weights, places, x, self._of(t - places)))
    return ring, made, ring_lib.over_stages(jax.lax.dynamic_update_index_in_dim(inputs, x, t % self.kept, 1))

  def backward(
    self, t: jax.Array, ring: Ring, inputs: jax.Array, came: jax.Array, last: jax.Array, gradient: Any
  ) -> tuple[Ring, jax.Array, Any]:
    """Returns the ring with the gradient that left the first stage, the gradients of the stages' inputs, and of their
    weights.

    Args:
      came: the gradients of the inputs that the stages had in the tick before.
      last: that of what the last stage made; zeros elsewhere.
      gradient: of the weights, to be added to.
    """
    places, delay = jnp.arange(self.pipeline.stages), 2 * (self.pipeline.stages - 1)
    turn = t - delay + places
    g = ring_lib.where(places == self.pipeline.stages - 1, last, jnp.roll(came, -1, 0))
    g = ring_lib.over_stages(ring_lib.where(self._runs(turn), g, jnp.zeros_like(g)))
    pick = jax.vmap(_pick, spmd_axis_name=partitioning.STAGE_AXIS)
    x = ring_lib.over_stages(pick(inputs, (t - delay + 2 * places) % self.kept))

    def work(weights: Any, gradient: Any, place: jax.Array, x: jax.Array, g: jax.Array, features: Any) -> Any:
      def run(x: jax.Array, gradient: Any) -> tuple[jax.Array, Any]:
        return ring_lib.layers(self.config, self.pipeline, weights, gradient, place, x, features)

      return jax.vjp(run, x, gradient)[1]((g, gradient))

    came, gradient = jax.vmap(work, spmd_axis_name=partitioning.STAGE_AXIS)(
      self.weights, gradient, places, x, g, self._of(turn)
    )
    came = ring_lib.over_stages(came)
    extra, slot = delay // ring.shape[1], (t - delay) % ring.shape[1]  # moves of its line since its input left
    line = jax.lax.dynamic_index_in_dim(ring, slot, 1, keepdims=False)
    there = (self.pipeline.stages - 1 - extra) % self.pipeline.stages
    line = ring_lib.where((places == there) & (t >= delay), jnp.roll(came, there, 0), line)
    return ring_lib.over_stages(jax.lax.dynamic_update_index_in_dim(ring, line, slot, 1)), came, gradient

  def settle(self, ring: Ring) -> Ring:
    """Returns the ring behind all ticks, its lines back where they began."""
    extra, more = divmod(2 * (self.pipeline.stages - 1), ring.shape[1])
    lines = jnp.roll(ring[:, :more], extra + 1, 0), jnp.roll(ring[:, more:], extra, 0)
    return ring_lib.over_stages(jnp.concatenate(lines, 1))

  def _runs(self, turn: jax.Array) -> jax.Array:
    return (turn >= 0) & (turn < self.pipeline.microbatches)  # not in the bubble

  def _of(self, turn: jax.Array) -> dict[str, jax.Array]:
    return jax.tree.map(lambda a: a[turn % self.pipeline.microbatches], self.features)


def _pick(a: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(a, i, 0, False)


def _share(pipeline: pipeline_lib.Pipeline, chunk: int, a: jax.Array) -> jax.Array:
  """Cuts tokens [B, L, ...] of a micro-batch as the stages share them, [S, pieces, B, tokens, ...]; zeros fill them
  up.
  """
  (rows, length, *rest), parts = a.shape, partitioning.parts("length")
  own = -(-length // (parts * pipeline.stages))  # tokens of a row for each stage, from each part of the row
  pieces = -(-own * rows // (chunk * partitioning.parts("batch")))
  tokens = -(-own // pieces)
  a = a.reshape(rows, parts, length // parts, *rest)
  a = jnp.pad(a, [(0, 0), (0, 0), (0, pipeline.stages * pieces * tokens - a.shape[2]), *[(0, 0)] * len(rest)])
  a = jnp.moveaxis(a.reshape(rows, parts, pipeline.stages, pieces, tokens, *rest), (2, 3), (0, 1))
  return a.reshape(pipeline.stages, pieces, rows, parts * tokens, *rest)


def _leave(pipeline: pipeline_lib.Pipeline, chunk: int, made: jax.Array) -> jax.Array:
  """Cuts the last of [S, B, L, D] as the stages share it: [S, pieces, B, tokens, D]."""
  parts = jax.vmap(functools.partial(_share, pipeline, chunk))(made)
  rest = (None, "batch", "length", "act_embed")
  return partitioning.constrain(partitioning.constrain(parts, "layers", None, *rest), None, "layers", *rest)[-1]


@dataclasses.dataclass(frozen=True)
class _Ends:
  """What is behind the layers: the final norm, the head and the loss, of which each stage computes a share."""

  config: config_lib.GLMConfig
  factor: jax.Array  # of the loss
  weights: Any  # final_norm, and the head's kernel [D, V]

  def zeros(self, sums: losses.Sums, stages: int) -> tuple[Any, Any]:
    """Returns each stage's own sums and gradients [S, ...], to begin with."""
    zeros, gradient = (
      jax.tree.map(lambda x: jnp.zeros((stages, *x.shape), jnp.float32), tree) for tree in (sums, self.weights)
    )
    return zeros, gradient | {"kernel": partitioning.constrain(gradient["kernel"], *_HEAD)}

  def add(self, own: Any, parts: jax.Array, targets: list[jax.Array]) -> tuple[Any, jax.Array]:
    """Returns the stages' own sums and gradients with their shares of a micro-batch's added, and factor x the
    shares'.
    """
    stage = jax.vmap(self._add_share, spmd_axis_name=partitioning.STAGE_AXIS)
    (sums, gradient), dx = stage(own, parts, targets)
    return (sums, gradient | {"kernel": partitioning.constrain(gradient["kernel"], *_HEAD)}), dx

  def _add_share(self, own: Any, x: jax.Array, targets: list[jax.Array]) -> tuple[Any, jax.Array]:
    """Does the same for one stage, a piece at a time."""
    target = partitioning.target()

    def piece(own: Any, at: tuple[jax.Array, Any]) -> tuple[Any, jax.Array]:
      x_BLD, targets = at

      def total_and_sums(weights: Any, x_BLD: jax.Array) -> tuple[jax.Array, losses.Sums]:
        x_BLD = glm.GLM(self.config).apply({"params": weights}, x_BLD, method="finish")
        logits_BLV = matmul.matmul(target, "BLD,DV->BLV", x_BLD, weights["kernel"], jnp.float32)
        return losses.of_logits(layers_lib.constrain_logits(logits_BLV), *targets)

      total, pull, sums = jax.vjp(total_and_sums, self.weights, x_BLD, has_aux=True)
      gradient, dx = pull(jnp.ones_like(total))
      own = jax.tree.map(lambda a, b: a + b.astype(a.dtype), own, (sums, gradient))
      return own, (dx * self.factor).astype(dx.dtype)

    return jax.lax.scan(piece, own, (x, targets))
