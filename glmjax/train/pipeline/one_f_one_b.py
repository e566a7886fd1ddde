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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import layers
from glmjax.parallel import partitioning
from glmjax.quantize import ops
from glmjax.train import pipeline as pipeline_lib
from glmjax.train.pipeline import ring as ring_lib

Loss = Callable[[jax.Array, Any], tuple[jax.Array, Any]]  # (logits, targets) -> (what to differentiate, sums)
Ring = jax.Array  # [S, J, B / K, L, D], as ring.py has it

_HEAD = ("layers", "embed", "vocab")  # of the stages' gradients of the head's kernel


def add_gradient(
  config: config_lib.GLMConfig,
  pipeline: pipeline_lib.Pipeline,
  params: Any,
  inputs: Sequence[jax.Array],
  gradient_alpha: jax.Array | float,
  rng: jax.Array | None,
  loss: Loss,
  factor: jax.Array,
  targets: Any,
  chunk: int,
  into: tuple[Any, Any],
) -> tuple[Any, Any]:
  """`into`, float32 sums and gradients, and added to it a batch's sums and the gradient of factor x its loss.

  Args:
    params: the layers stacked as `Pipeline.order` says.
    inputs: tokens, positions, starts and ends of intervals, numbers of rows.
    rng: dropout's, if it is on.
    loss: of logits, float32 [B, L, V], and targets: what is to be differentiated, and sums; both sums over tokens.
    factor: multiplies the gradient behind the head: half precision would lose that of a logit times a small factor.
    targets: [B, L] arrays.
    chunk: tokens of each stage and part of the batch whose logits exist at a time.
  """
  (sums, gradient), rest = into, {name: x for name, x in params.items() if name != "layers"}
  rest = jax.tree.map(lambda x: x.astype(jnp.float32), rest)  # as their gradients, over whatever dtype it passes
  enter = lambda rest: ring_lib.enter(config, pipeline, rest, *inputs, gradient_alpha, rng)
  ring, pull, features = jax.vjp(jax.checkpoint(enter), rest, has_aux=True)
  kernel_DV = glm.GLM(config).apply({"params": rest}, gradient_alpha, method="head_kernel")
  ends = {"final_norm": rest["final_norm"], "kernel": kernel_DV}
  group = lambda w: w.reshape(pipeline.stages, pipeline.group, *w.shape[1:])
  stages = _Stages(config, pipeline, jax.tree.map(group, params["layers"]), features)
  cut = lambda a: jax.vmap(functools.partial(_share, pipeline, chunk))(pipeline.cut(a))
  behind = functools.partial(_ends, config, loss, factor, ends)
  ring, of_layers, of_ends, own = _ticks(
    stages,
    behind,
    _zeros(sums, ends, pipeline),
    jax.tree.map(cut, targets),
    chunk,
    ring,
    jax.tree.map(group, gradient["layers"]),
  )
  (of_rest,) = pull(ring)
  of_ends = jax.tree.map(lambda g: g * factor, of_ends)
  add = functools.partial(jax.tree.map, jnp.add)
  of_rest = add(of_rest, _through_kernel(config, rest, gradient_alpha, of_ends["kernel"]))
  of_rest["final_norm"] = add(of_rest["final_norm"], of_ends["final_norm"])
  of_layers = jax.tree.map(lambda g, w: g.reshape(w.shape), of_layers, params["layers"])
  return add(sums, own), add({name: gradient[name] for name in rest}, of_rest) | {"layers": of_layers}


def _through_kernel(config: config_lib.GLMConfig, rest: Any, gradient_alpha: jax.Array | float, g_DV: jax.Array) -> Any:
  """The gradient of the weights that the head's kernel is made of, from the kernel's, both float32."""
  model = glm.GLM(dataclasses.replace(config, dtype="float32"))
  make = lambda rest: model.apply({"params": rest}, gradient_alpha, method="head_kernel")
  return jax.vjp(make, rest)[1](g_DV)[0]


def _zeros(sums: Any, ends: Any, pipeline: pipeline_lib.Pipeline) -> tuple[Any, Any]:
  """Sums and gradients behind the layers: of each stage [S, ...]."""
  zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros((pipeline.stages, *x.shape), jnp.float32))
  gradient = zeros(ends)
  return zeros(sums), gradient | {"kernel": partitioning.constrain(gradient["kernel"], *_HEAD)}


def _ticks(
  stages: "_Stages", ends: Callable[..., Any], own: Any, targets: Any, chunk: int, ring: Ring, gradient: Any
) -> tuple[Ring, Any, Any, Any]:
  """The gradients of the ring's inputs, of the layers, of what is behind them, and the sums."""
  pipeline = stages.pipeline
  warm, both = pipeline.stages - 1, pipeline.stages - 1 + pipeline.microbatches
  nothing = ring_lib.lay(jnp.zeros_like(ring[:, 0]))
  inputs = ring_lib.lay(jnp.zeros((pipeline.stages, stages.kept, *ring.shape[2:]), ring.dtype))

  def forward(carry: Any, t: jax.Array) -> tuple[Any, None]:
    return stages.forward(t, *carry), None

  def forward_and_backward(carry: Any, at: tuple[jax.Array, Any]) -> tuple[Any, None]:
    (ring, made, inputs, came, gradient, own), (t, targets) = carry, at
    ring, made, inputs = stages.forward(t, ring, made, inputs)
    parts, pull = jax.vjp(functools.partial(_leave, pipeline, chunk), made)
    own, d_parts = ends(own, parts, targets)
    ring, came, gradient = stages.backward(t, ring, inputs, came, pull(d_parts)[0], gradient)
    return (ring, made, inputs, came, gradient, own), None

  def backward(carry: Any, t: jax.Array) -> tuple[Any, None]:
    ring, came, gradient = carry
    return stages.backward(t, stages.move(t, ring)[0], inputs, came, nothing, gradient), None

  ring, made, inputs = jax.lax.scan(forward, (ring_lib.lay(ring), nothing, inputs), jnp.arange(warm))[0]
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
    """W, a stage's inputs that wait for backward: the first stage's."""
    return 2 * self.pipeline.stages - 1

  def move(self, t: jax.Array, ring: Ring) -> tuple[Ring, jax.Array]:
    """The ring without the first of a line, and the line as it was, whose first is the first stage's next input."""
    slot = t % ring.shape[1]
    line = jax.lax.dynamic_index_in_dim(ring, slot, 1, keepdims=False)
    return ring_lib.lay(jax.lax.dynamic_update_index_in_dim(ring, jnp.roll(line, -1, 0), slot, 1)), line

  def forward(self, t: jax.Array, ring: Ring, made: jax.Array, inputs: jax.Array) -> tuple[Ring, jax.Array, jax.Array]:
    """The ring, what the stages made [S, B / K, L, D], and their inputs [S, W, B / K, L, D], of which one is new."""
    places = jnp.arange(self.pipeline.stages)
    ring, line = self.move(t, ring)
    x = ring_lib.where(places == 0, line, jnp.roll(made, 1, 0))
    x = ring_lib.lay(ring_lib.where(self._runs(t - places), x, jnp.zeros_like(x)))
    work = lambda *a: ring_lib.layers(self.config, self.pipeline, a[0], None, *a[1:])[0]
    made = ring_lib.lay(
      jax.vmap(work, spmd_axis_name=partitioning.STAGE_AXIS)(self.weights, places, x, self._of(t - places))
    )
    return ring, made, ring_lib.lay(jax.lax.dynamic_update_index_in_dim(inputs, x, t % self.kept, 1))

  def backward(
    self, t: jax.Array, ring: Ring, inputs: jax.Array, came: jax.Array, last: jax.Array, gradient: Any
  ) -> tuple[Ring, jax.Array, Any]:
    """The ring with the gradient that left the first stage, the gradients of the stages' inputs, and of their weights.

    Args:
      came: the gradients of the inputs that the stages had in the tick before.
      last: that of what the last stage made; zeros elsewhere.
      gradient: of the weights, to be added to.
    """
    places, delay = jnp.arange(self.pipeline.stages), 2 * (self.pipeline.stages - 1)
    turn = t - delay + places
    g = ring_lib.where(places == self.pipeline.stages - 1, last, jnp.roll(came, -1, 0))
    g = ring_lib.lay(ring_lib.where(self._runs(turn), g, jnp.zeros_like(g)))
    pick = jax.vmap(lambda a, i: jax.lax.dynamic_index_in_dim(a, i, 0, False), spmd_axis_name=partitioning.STAGE_AXIS)
    x = ring_lib.lay(pick(inputs, (t - delay + 2 * places) % self.kept))

    def work(weights: Any, gradient: Any, place: jax.Array, x: jax.Array, g: jax.Array, features: Any) -> Any:
      run = lambda x, gradient: ring_lib.layers(self.config, self.pipeline, weights, gradient, place, x, features)
      return jax.vjp(run, x, gradient)[1]((g, gradient))

    came, gradient = jax.vmap(work, spmd_axis_name=partitioning.STAGE_AXIS)(
      self.weights, gradient, places, x, g, self._of(turn)
    )
    came = ring_lib.lay(came)
    extra, slot = delay // ring.shape[1], (t - delay) % ring.shape[1]  # moves of its line since its input left
    line = jax.lax.dynamic_index_in_dim(ring, slot, 1, keepdims=False)
    there = (self.pipeline.stages - 1 - extra) % self.pipeline.stages
    line = ring_lib.where((places == there) & (t >= delay), jnp.roll(came, there, 0), line)
    return ring_lib.lay(jax.lax.dynamic_update_index_in_dim(ring, line, slot, 1)), came, gradient

  def settle(self, ring: Ring) -> Ring:
    """The ring behind all ticks, its lines back where they began."""
    extra, more = divmod(2 * (self.pipeline.stages - 1), ring.shape[1])
    lines = jnp.roll(ring[:, :more], extra + 1, 0), jnp.roll(ring[:, more:], extra, 0)
    return ring_lib.lay(jnp.concatenate(lines, 1))

  def _runs(self, turn: jax.Array) -> jax.Array:
    return (turn >= 0) & (turn < self.pipeline.microbatches)  # not in the bubble

  def _of(self, turn: jax.Array) -> dict[str, jax.Array]:
    return jax.tree.map(lambda a: a[turn % self.pipeline.microbatches], self.features)


def _share(pipeline: pipeline_lib.Pipeline, chunk: int, a: jax.Array) -> jax.Array:
  """Tokens [B, L, ...] of a micro-batch as the stages share them, [S, pieces, B, tokens, ...]; zeros fill them up."""
  (rows, length, *rest), parts = a.shape, partitioning.parts("length")
  own = -(-length // (parts * pipeline.stages))  # tokens of a row for each stage, from each part of the row
  pieces = -(-own * rows // (chunk * partitioning.parts("batch")))
  tokens = -(-own // pieces)
  a = a.reshape(rows, parts, length // parts, *rest)
  a = jnp.pad(a, [(0, 0), (0, 0), (0, pipeline.stages * pieces * tokens - a.shape[2]), *[(0, 0)] * len(rest)])
  a = jnp.moveaxis(a.reshape(rows, parts, pipeline.stages, pieces, tokens, *rest), (2, 3), (0, 1))
  return a.reshape(pipeline.stages, pieces, rows, parts * tokens, *rest)


def _leave(pipeline: pipeline_lib.Pipeline, chunk: int, made: jax.Array) -> jax.Array:
  """The last of [S, B, L, D], shared by the stages: [S, pieces, B, tokens, D]."""
  parts = jax.vmap(functools.partial(_share, pipeline, chunk))(made)
  rest = (None, "batch", "length", "act_embed")
  return partitioning.constrain(partitioning.constrain(parts, "layers", None, *rest), None, "layers", *rest)[-1]


def _ends(
  config: config_lib.GLMConfig, loss: Loss, factor: jax.Array, ends: Any, own: Any, parts: jax.Array, targets: Any
) -> tuple[Any, jax.Array]:
  """The stages' own sums and gradients, with their shares of a micro-batch's added, and factor x the shares'."""

  def stage(own: Any, x: jax.Array, targets: Any) -> tuple[Any, jax.Array]:
    def piece(own: Any, at: tuple[jax.Array, Any]) -> tuple[Any, jax.Array]:
      x_BLD, targets = at

      def value_and_sums(ends: Any, x_BLD: jax.Array) -> tuple[jax.Array, Any]:
        x_BLD = glm.GLM(config).apply({"params": ends}, x_BLD, method="finish")
        logits_BLV = ops.matmul("BLD,DV->BLV", x_BLD, ends["kernel"], jnp.float32)
        return loss(layers.constrain_logits(logits_BLV), targets)

      value, pull, sums = jax.vjp(value_and_sums, ends, x_BLD, has_aux=True)
      gradient, dx = pull(jnp.ones_like(value))
      return jax.tree.map(lambda a, b: a + b.astype(a.dtype), own, (sums, gradient)), (dx * factor).astype(dx.dtype)

    return jax.lax.scan(piece, own, (x, targets))

  (sums, gradient), dx = jax.vmap(stage, spmd_axis_name=partitioning.STAGE_AXIS)(own, parts, targets)
  return (sums, gradient | {"kernel": partitioning.constrain(gradient["kernel"], *_HEAD)}), dx
