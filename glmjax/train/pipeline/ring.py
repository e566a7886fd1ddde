"""Micro-batches flowing through the layers that lie over the mesh's `stage` axis.

Each tick all stages work at the same time, each on another micro-batch, and hand what they made to the next
stage: one vmap over the stages, one roll along them, which XLA compiles to a collective-permute. Embedding, final norm
and head are computed by all stages, each for its share of the rows, so that the ends carry no more than the others.

The micro-batches wait in a ring that lies over the stages: slot j of stage s holds micro-batch s x K / S + j. Every
tick the first stage takes the first of a slot's line, the line moves up, and what leaves the last stage fills the gap:
so the results of one round are the inputs of the next, and those of the last round end where the inputs began.

B batch, L length, D model, S stages, K micro-batches, R rounds, J = K / S slots, G batch shards of the mesh, N layers.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import layers as layers_lib
from glmjax.models import params as params_lib
from glmjax.models import rotary
from glmjax.parallel import partitioning
from glmjax.train import pipeline as pipeline_lib

_INPUT = "layer_input"  # kept for backward, whatever is made again


def hidden(
  config: config_lib.GLMConfig,
  pipeline: pipeline_lib.Pipeline,
  params: Any,
  batch: dict[str, jax.Array],
  gradient_alpha: jax.Array | float,
  rng: jax.Array | None,
) -> jax.Array:
  """Computes what `GLM.hidden` gives [B, L, D], its rows as `Pipeline.spread` has them; with an rng, dropout is on.

  The weights' layers are stacked as `Pipeline.order` says.
  """
  ring, features = enter(config, pipeline, params, batch, gradient_alpha, rng)
  x_BLD = pipeline.from_ring(_flow(config, pipeline, params["layers"], ring, features))
  with partitioning.rows_over_stages():
    x_BLD = partitioning.constrain(x_BLD, "batch", "length", "act_embed")
    return glm.GLM(config).apply({"params": params}, x_BLD, method="finish")


def enter(
  config: config_lib.GLMConfig,
  pipeline: pipeline_lib.Pipeline,
  params: Any,
  batch: dict[str, jax.Array],
  gradient_alpha: jax.Array | float,
  rng: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the embedded rows as a ring [S, J, B / K, L, D], and what the layers need to know of them [K, B / K, ...].

  Dropout draws by the rows' numbers, batch["rows"].
  """
  model = glm.GLM(config, deterministic=rng is None)
  rngs = None if rng is None else {"dropout": rng}
  tokens_BL, positions, rows_B = (pipeline.spread(batch[name]) for name in ("tokens", "positions", "rows"))
  with partitioning.rows_over_stages():
    x_BLD, keys_B = model.apply(
      {"params": params}, tokens_BL, positions, gradient_alpha, rows_B, method="embed", rngs=rngs
    )
    # Its gradient too, or XLA gathers that over the stages.
    x_BLD = partitioning.constrain(x_BLD, "batch", "norm_length", "act_embed")
  end_BL = glm.cut_causal(config, batch["attend_end"])
  features = {"positions": batch["positions"], "start": batch["attend_start"], "end": end_BL}
  features = {name: pipeline.cut(a) for name, a in features.items()}
  if keys_B is not None:
    keys = pipeline.to_ring(keys_B)
    features["keys"] = partitioning.constrain(keys.reshape(pipeline.microbatches, keys.shape[2]), None, "batch")
  return pipeline.to_ring(x_BLD), features


def _flow(
  config: config_lib.GLMConfig,
  pipeline: pipeline_lib.Pipeline,
  weights: Any,
  ring: jax.Array,
  features: dict[str, jax.Array],
) -> jax.Array:
  """Returns the ring [S, J, B / K, L, D] of micro-batches behind the last layer; `features` [K, B / K, ...] go with
  them.
  """
  stages, slots = pipeline.stages, pipeline.microbatches // pipeline.stages
  extra, more = divmod(stages - 1, slots)  # moves of a line between a micro-batch's start and its end, at least
  places = jnp.arange(stages)
  weights = jax.tree.map(lambda w: w.reshape(stages, pipeline.rounds, pipeline.group, *w.shape[1:]), weights)
  weights = {path: _pair(w) for path, w in params_lib.flatten(weights).items()}
  work = functools.partial(_stage, config, pipeline)
  if config.remat != "none":  # what `glm.remat` keeps of a layer, less the weights: they would be kept for every tick
    names = glm.KEPT if config.remat == "dots" else ()
    policy = jax.checkpoint_policies.save_only_these_names(_INPUT, *names)
    work = jax.checkpoint(work, policy=policy, prevent_cse=False)
  work = jax.vmap(work, spmd_axis_name=partitioning.STAGE_AXIS)

  def tick(carry: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    made, ring = carry
    turn = t - places  # micro-batch by micro-batch, round by round
    line = jax.lax.dynamic_index_in_dim(ring, t % slots, 1, keepdims=False)
    x = where(places == 0, line, jnp.roll(made, 1, 0))
    x = where((turn >= 0) & (turn < pipeline.microbatches * pipeline.rounds), x, jnp.zeros_like(x))  # the bubble
    rounds = jnp.clip(turn // pipeline.microbatches, 0, pipeline.rounds - 1)
    now = jax.tree.map(lambda a: a[turn % pipeline.microbatches], features)
    made = over_stages(work(weights, places, rounds, over_stages(x), now))
    ring = jax.lax.dynamic_update_index_in_dim(ring, jnp.roll(line, -1, 0), t % slots, 1)
    slot = (t - (stages - 1)) % slots
    line = jax.lax.dynamic_index_in_dim(ring, slot, 1, keepdims=False)
    line = where((places == stages - 1 - extra) & (t >= stages - 1), jnp.roll(made, -extra, 0), line)
    return (made, over_stages(jax.lax.dynamic_update_index_in_dim(ring, line, slot, 1))), None

  made = over_stages(jnp.zeros_like(ring[:, 0]))
  ring = jax.lax.scan(tick, (made, over_stages(ring)), jnp.arange(pipeline.ticks))[0][1]
  # While the last micro-batches leave, the lines have moved on; back to where they began.
  return over_stages(jnp.concatenate([jnp.roll(ring[:, :more], extra + 1, 0), jnp.roll(ring[:, more:], extra, 0)], 1))


def _pair(w: Any) -> tuple[Any, jax.Array | None]:
  """Returns a weight, and what gathers its gradient; quantized weights have none."""
  return (jax.lax.stop_gradient(w), _gather_gradient(w)) if isinstance(w, jax.Array) else (w, None)


# Backward adds a gradient for every tick; in the weights' own dtype, where that is half precision, sums would lose what
# is added late. So weights enter the loop twice: as they are, and as float32 zeros that nothing reads, whose gradient
# is the sum.
@jax.custom_vjp
def _gather_gradient(w: jax.Array) -> jax.Array:
  return jnp.zeros(w.shape, jnp.float32)


def _gather_gradient_forward(w: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _gather_gradient(w), jnp.zeros((), w.dtype)


def _gather_gradient_backward(like: jax.Array, g: jax.Array) -> tuple[jax.Array]:
  return (g.astype(like.dtype),)


_gather_gradient.defvjp(_gather_gradient_forward, _gather_gradient_backward)


@jax.custom_vjp
def _read(w: jax.Array, gradient: jax.Array) -> jax.Array:
  """Returns the weight, its gradient going to `gradient`."""
  del gradient
  return w


def _read_forward(w: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
  return _read(w, gradient), None


def _read_backward(_: None, g: jax.Array) -> tuple[None, jax.Array]:
  return None, g.astype(jnp.float32)


_read.defvjp(_read_forward, _read_backward)


def over_stages(x: jax.Array) -> jax.Array:
  """Splits x [S, ..., B, L, D] over the stages by its first axis, rows and tokens as they always are."""
  return partitioning.constrain(x, "layers", *[None] * (x.ndim - 4), "batch", "norm_length", "act_embed")


@functools.partial(jax.checkpoint, prevent_cse=False)  # backward keeps [S] flags, not one for every entry
def where(stages: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns x [S, ...] at these stages, y at the others."""
  return jnp.where(stages.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def _stage(
  config: config_lib.GLMConfig,
  pipeline: pipeline_lib.Pipeline,
  weights: Any,
  stage: jax.Array,
  turn: jax.Array,
  x_BLD: jax.Array,
  features: dict[str, jax.Array],
) -> jax.Array:
  """Computes one stage's layers of this round, of weights by their paths, as `_pair` has them [R, N / (S R), ...]."""

  def of_round(w: jax.Array) -> jax.Array:
    return w[0] if pipeline.rounds == 1 else jax.lax.dynamic_index_in_dim(w, turn, 0, False)

  weights = {
    path: w if gradient is None else _read(w, gradient)
    for path, (w, gradient) in jax.tree.map(of_round, weights).items()
  }
  return layers(config, pipeline, params_lib.nest(weights), None, turn * pipeline.stages + stage, x_BLD, features)[0]


def layers(
  config: config_lib.GLMConfig,
  pipeline: pipeline_lib.Pipeline,
  weights: Any,
  gradient: Any,
  group: jax.Array,
  x_BLD: jax.Array,
  features: dict[str, jax.Array],
) -> tuple[jax.Array, Any]:
  """Returns what a group of layers [N / (S R), ...] makes of a micro-batch, and `gradient` as it was.

  The cotangent of `gradient` (as the weights that are trained, float32; or None) comes back with their gradient added
  to it.
  """
  cos_sin = rotary.tables(config, features["positions"])
  block = glm.remat(dataclasses.replace(config, scan_layers=True))(config, partitioning.target())

  def layer(carry: tuple[jax.Array, Any], at: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
    (x_BLD, gradient), (params, place) = carry, at
    if gradient is not None:
      flat, sums = params_lib.flatten(params), params_lib.flatten(gradient)
      for path in sums:
        flat[path], sums[path] = _add_gradient(place, flat[path], sums[path])
      params, gradient = params_lib.nest(flat), params_lib.nest(sums)
    number = group * pipeline.group + place
    x_BLD = ad_checkpoint.checkpoint_name(x_BLD, _INPUT)
    keys_B = layers_lib.fold_in(features.get("keys"), number)
    y_BLD, _ = block.apply({"params": params}, x_BLD, cos_sin, features["start"], features["end"], keys_B, None, None)
    padded = pipeline.stages * pipeline.rounds * pipeline.group > pipeline.num_layers
    return (jnp.where(number < pipeline.num_layers, y_BLD, x_BLD) if padded else y_BLD, gradient), None

  return jax.lax.scan(layer, (x_BLD, gradient), (weights, jnp.arange(pipeline.group)))[0]


@jax.custom_vjp
def _add_gradient(place: jax.Array, w: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns both as they are. In the loop over layers the cotangent of `gradient` is one array, to which each
  layer's part is added where it lies.
  """
  del place
  return w, gradient


def _add_gradient_forward(
  place: jax.Array, w: jax.Array, gradient: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
  return _add_gradient(place, w, gradient), place


def _add_gradient_backward(place: jax.Array, g: tuple[jax.Array, jax.Array]) -> tuple[None, None, jax.Array]:
  of_layer, sums = g
  return None, None, sums.at[place].add(of_layer.astype(sums.dtype))


_add_gradient.defvjp(_add_gradient_forward, _add_gradient_backward)
