"""The layers laid over the mesh's `stage` axis, micro-batches flowing through them.

A stage holds one group of consecutive layers, or with more than one round every S-th group (a circular, or interleaved,
schedule). Each tick all stages work at the same time, each on another micro-batch, and hand what they made to the next
stage: one vmap over the stages, one roll along them, which XLA compiles to a collective-permute. Embedding, final norm
and head are computed by all stages, each for its share of the rows, so that the ends carry no more than the others.

The micro-batches wait in a ring that lies over the stages: slot j of stage s holds micro-batch s x K / S + j. Every
tick the first stage takes the first of a slot's line, the line moves up, and what leaves the last stage fills the gap:
so the results of one round are the inputs of the next, and those of the last round end where the inputs began.

B batch, L length, D model, S stages, K micro-batches, R rounds, J = K / S slots, G batch shards of the mesh, N layers.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from flax import linen as nn
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from glmjax import errors
from glmjax import ranges
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import layers as layers_lib
from glmjax.models import rotary
from glmjax.parallel import partitioning

AXIS = "stage"  # of the mesh
# 1f1b (models/one_f_one_b.py): training goes backward with a micro-batch as soon as it has come to the end. gpipe: once
# all have.
KINDS = ("1f1b", "gpipe")

_INPUT = "layer_input"  # kept for backward, whatever is made again


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How the rows of a micro-batch of `loop.train` flow through the stages of the mesh."""

  microbatches: int | None = None  # K, into which they are cut; None: one row of every batch shard at a time
  rounds: int = 1  # R, times that a micro-batch goes around; more than one: circular, with a smaller bubble
  kind: str = "1f1b"  # one of KINDS

  def __post_init__(self) -> None:
    ranges.choice("pipeline.Schedule.kind", self.kind, KINDS)
    ranges.whole("pipeline.Schedule.rounds", self.rounds, 1)
    if self.microbatches is not None:
      ranges.whole("pipeline.Schedule.microbatches", self.microbatches, 1)
    if self.kind == "1f1b" and self.rounds > 1:
      raise errors.InputError(
        f'pipeline.Schedule: 1f1b goes around once, rounds is {self.rounds}; use 1, or kind "gpipe"'
      )


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A schedule on the stages of one mesh, for one model."""

  stages: int  # S
  microbatches: int  # K
  rounds: int  # R
  num_layers: int  # N
  kind: str  # one of KINDS

  @property
  def group(self) -> int:
    """Layers of a stage in a round; the last groups may hold fewer, and compute as many all the same."""
    return -(-self.num_layers // (self.stages * self.rounds))

  @property
  def ticks(self) -> int:
    """How often all stages compute a group, for all micro-batches."""
    return self.microbatches * self.rounds + self.stages - 1

  @property
  def bubble(self) -> float:
    """Share of the ticks that a stage waits."""
    return (self.stages - 1) / self.ticks

  def order(self) -> list[int]:
    """The layer at each place of the stacked weights in memory, stage by stage; N and more: room without a layer."""
    return [
      (r * self.stages + s) * self.group + j
      for s in range(self.stages)
      for r in range(self.rounds)
      for j in range(self.group)
    ]

  def spread(self, a: jax.Array) -> jax.Array:
    """Rows [B, ...] in the order in which `hidden` has them, each stage's share in one piece on it."""
    shards = partitioning.parts("batch")
    a = a.reshape(shards, self.stages, -1, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)
    with rows_over_stages():
      return partitioning.constrain(a, "batch", *[None] * (a.ndim - 1))

  def to_ring(self, a: jax.Array) -> jax.Array:
    """Spread rows as [S, J, B / K, ...]."""
    shards, slots = partitioning.parts("batch"), self.microbatches // self.stages
    a = a.reshape(self.stages, shards, slots, -1, *a.shape[1:]).swapaxes(1, 2)
    return a.reshape(self.stages, slots, -1, *a.shape[4:])

  def from_ring(self, a: jax.Array) -> jax.Array:
    """The inverse of `to_ring`."""
    shards, slots = partitioning.parts("batch"), self.microbatches // self.stages
    a = a.reshape(self.stages, slots, shards, -1, *a.shape[3:]).swapaxes(1, 2)
    return a.reshape(-1, *a.shape[4:])

  def cut(self, a: jax.Array) -> jax.Array:
    """Rows [B, ...] as micro-batches [K, B / K, ...], the same on all stages."""
    shards = partitioning.parts("batch")
    a = a.reshape(shards, self.microbatches, -1, *a.shape[1:]).swapaxes(0, 1)
    a = a.reshape(self.microbatches, -1, *a.shape[3:])
    return partitioning.constrain(a, None, "batch", *[None] * (a.ndim - 2))


def make(schedule: Schedule, config: config_lib.GLMConfig, mesh: jax.sharding.Mesh, rows: int) -> Pipeline | None:
  """The pipeline that `rows` rows at a time take on this mesh; None where it has one stage.

  Raises:
    errors.InputError: where rows or layers do not divide.
  """
  stages, shards = mesh.shape[AXIS], partitioning.batch_shards(mesh)
  if stages == 1:
    return None
  count = schedule.microbatches or rows // shards
  if count % stages or rows % (count * shards):
    raise errors.InputError(
      f"{rows} rows at a time, {count} pipeline micro-batches: these must be a multiple of the mesh's stage={stages},"
      f" and the rows one of micro-batches x data x fsdp = {count * shards}; change micro_batch, or "
      "pipeline.Schedule.microbatches"
    )
  found = Pipeline(stages, count, schedule.rounds, config.num_layers, schedule.kind)
  if (stages * schedule.rounds - 1) * found.group >= config.num_layers:
    raise errors.InputError(
      f"num_layers {config.num_layers} in groups of {found.group} leaves some of stage={stages} x "
      f"rounds={schedule.rounds} without a layer: choose stages and rounds whose product divides the layers"
    )
  return found


@contextlib.contextmanager
def rows_over_stages() -> Iterator[None]:
  """Within it, rows are split over the stages too."""
  extend = lambda axes: (AXIS, *((axes,) if isinstance(axes, str) else axes or ()))
  rules = [(name, extend(axes) if name in ("batch", "groups") else axes) for name, axes in nn.get_logical_axis_rules()]
  with nn.logical_axis_rules(rules):
    yield


def hidden(
  config: config_lib.GLMConfig,
  pipeline: Pipeline,
  params: Any,
  tokens_BL: jax.Array,
  positions: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  rows_B: jax.Array,
  gradient_alpha: jax.Array | float,
  rng: jax.Array | None,
) -> jax.Array:
  """What `GLM.hidden` gives [B, L, D], its rows as `Pipeline.spread` has them; with an rng, dropout is on.

  The weights' layers are stacked as `Pipeline.order` says.
  """
  ring, features = enter(config, pipeline, params, tokens_BL, positions, start_BL, end_BL, rows_B, gradient_alpha, rng)
  x_BLD = pipeline.from_ring(_flow(config, pipeline, params["layers"], ring, features))
  with rows_over_stages():
    x_BLD = partitioning.constrain(x_BLD, "batch", "length", "act_embed")
    return glm.GLM(config).apply({"params": params}, x_BLD, method="finish")


def enter(
  config: config_lib.GLMConfig,
  pipeline: Pipeline,
  params: Any,
  tokens_BL: jax.Array,
  positions: jax.Array,
  start_BL: jax.Array,
  end_BL: jax.Array,
  rows_B: jax.Array,
  gradient_alpha: jax.Array | float,
  rng: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The embedded rows as a ring [S, J, B / K, L, D], and what the layers need to know of them [K, B / K, ...].

  `rows_B`: the rows' numbers, by which dropout draws.
  """
  model = glm.GLM(config, deterministic=rng is None)
  rngs = None if rng is None else {"dropout": rng}
  spread = [pipeline.spread(a) for a in (tokens_BL, positions, rows_B)]
  with rows_over_stages():
    x_BLD, keys_B = model.apply({"params": params}, *spread[:2], gradient_alpha, spread[2], method="embed", rngs=rngs)
    # Its gradient too, or XLA gathers that over the stages.
    x_BLD = partitioning.constrain(x_BLD, "batch", "norm_length", "act_embed")
  features = {"positions": positions, "start": start_BL, "end": glm.cut_causal(config, end_BL)}
  features = {name: pipeline.cut(a) for name, a in features.items()}
  if keys_B is not None:
    keys = pipeline.to_ring(keys_B)
    features["keys"] = partitioning.constrain(keys.reshape(pipeline.microbatches, keys.shape[2]), None, "batch")
  return pipeline.to_ring(x_BLD), features


def _flow(
  config: config_lib.GLMConfig, pipeline: Pipeline, weights: Any, ring: jax.Array, features: dict[str, jax.Array]
) -> jax.Array:
  """The ring [S, J, B / K, L, D] of micro-batches behind the last layer; `features` [K, B / K, ...] go with them."""
  stages, slots = pipeline.stages, pipeline.microbatches // pipeline.stages
  extra, more = divmod(stages - 1, slots)  # moves of a line between a micro-batch's start and its end, at least
  places = jnp.arange(stages)
  weights = jax.tree.map(lambda w: w.reshape(stages, pipeline.rounds, pipeline.group, *w.shape[1:]), weights)
  weights = jax.tree.map(lambda w: (jax.lax.stop_gradient(w), _gather_gradient(w)), weights)
  work = functools.partial(_stage, config, pipeline)
  if config.remat != "none":  # what `glm.remat` keeps of a layer, less the weights: they would be kept for every tick
    names = glm.KEPT if config.remat == "dots" else ()
    policy = jax.checkpoint_policies.save_only_these_names(_INPUT, *names)
    work = jax.checkpoint(work, policy=policy, prevent_cse=False)
  work = jax.vmap(work, spmd_axis_name=AXIS)

  def tick(carry: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    made, ring = carry
    turn = t - places  # micro-batch by micro-batch, round by round
    line = jax.lax.dynamic_index_in_dim(ring, t % slots, 1, keepdims=False)
    x = where(places == 0, line, jnp.roll(made, 1, 0))
    x = where((turn >= 0) & (turn < pipeline.microbatches * pipeline.rounds), x, jnp.zeros_like(x))  # the bubble
    rounds = jnp.clip(turn // pipeline.microbatches, 0, pipeline.rounds - 1)
    now = jax.tree.map(lambda a: a[turn % pipeline.microbatches], features)
    made = lay(work(weights, places, rounds, lay(x), now))
    ring = jax.lax.dynamic_update_index_in_dim(ring, jnp.roll(line, -1, 0), t % slots, 1)
    slot = (t - (stages - 1)) % slots
    line = jax.lax.dynamic_index_in_dim(ring, slot, 1, keepdims=False)
    line = where((places == stages - 1 - extra) & (t >= stages - 1), jnp.roll(made, -extra, 0), line)
    return (made, lay(jax.lax.dynamic_update_index_in_dim(ring, line, slot, 1))), None

  made = lay(jnp.zeros_like(ring[:, 0]))
  ring = jax.lax.scan(tick, (made, lay(ring)), jnp.arange(pipeline.ticks))[0][1]
  # While the last micro-batches leave, the lines have moved on; back to where they began.
  return lay(jnp.concatenate([jnp.roll(ring[:, :more], extra + 1, 0), jnp.roll(ring[:, more:], extra, 0)], 1))


# Backward adds a gradient for every tick; in the weights' own dtype, where that is half precision, sums would lose what
# is added late. So weights enter the loop twice: as they are, and as float32 zeros that nothing reads, whose gradient
# is the sum.
@jax.custom_vjp
def _gather_gradient(w: jax.Array) -> jax.Array:
  return jnp.zeros(w.shape, jnp.float32)


_gather_gradient.defvjp(
  lambda w: (_gather_gradient(w), jnp.zeros((), w.dtype)), lambda like, g: (g.astype(like.dtype),)
)


@jax.custom_vjp
def _read(w: jax.Array, gradient: jax.Array) -> jax.Array:
  del gradient
  return w


_read.defvjp(lambda w, gradient: (w, None), lambda _, g: (None, g.astype(jnp.float32)))


def lay(x: jax.Array) -> jax.Array:
  """Stages first, rows and tokens where they always are."""
  return partitioning.constrain(x, "layers", *[None] * (x.ndim - 4), "batch", "norm_length", "act_embed")


@functools.partial(jax.checkpoint, prevent_cse=False)  # backward keeps [S] flags, not one for every entry
def where(stages: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  """x [S, ...] at these stages, y at the others."""
  return jnp.where(stages.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def _stage(
  config: config_lib.GLMConfig,
  pipeline: Pipeline,
  weights: Any,
  stage: jax.Array,
  turn: jax.Array,
  x_BLD: jax.Array,
  features: dict[str, jax.Array],
) -> jax.Array:
  """One stage's layers of this round, of weights and their `_gather_gradient` [R, N / (S R), ...]."""
  of_round = (lambda w: w[0]) if pipeline.rounds == 1 else lambda w: jax.lax.dynamic_index_in_dim(w, turn, 0, False)
  weights = jax.tree.map(lambda pair: _read(*map(of_round, pair)), weights, is_leaf=lambda x: isinstance(x, tuple))
  return layers(config, pipeline, weights, None, turn * pipeline.stages + stage, x_BLD, features)[0]


def layers(
  config: config_lib.GLMConfig,
  pipeline: Pipeline,
  weights: Any,
  gradient: Any,
  group: jax.Array,
  x_BLD: jax.Array,
  features: dict[str, jax.Array],
) -> tuple[jax.Array, Any]:
  """What a group of layers [N / (S R), ...] makes of a micro-batch, and `gradient` as it was.

  The cotangent of `gradient` (as the weights, float32; or None) comes back with the weights' gradient added to it.
  """
  cos_sin = rotary.tables(config, features["positions"])
  block = glm.remat(dataclasses.replace(config, scan_layers=True))(config)

  def layer(carry: tuple[jax.Array, Any], at: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
    (x_BLD, gradient), (params, place) = carry, at
    if gradient is not None:
      pairs = jax.tree.map(functools.partial(_add_gradient, place), params, gradient)
      params, gradient = jax.tree.transpose(jax.tree.structure(params), None, pairs)
    number = group * pipeline.group + place
    x_BLD = ad_checkpoint.checkpoint_name(x_BLD, _INPUT)
    keys_B = layers_lib.fold_in(features.get("keys"), number)
    y_BLD, _ = block.apply({"params": params}, x_BLD, cos_sin, features["start"], features["end"], keys_B, None, None)
    padded = pipeline.stages * pipeline.rounds * pipeline.group > pipeline.num_layers
    return (jnp.where(number < pipeline.num_layers, y_BLD, x_BLD) if padded else y_BLD, gradient), None

  return jax.lax.scan(layer, (x_BLD, gradient), (weights, jnp.arange(pipeline.group)))[0]


@jax.custom_vjp
def _add_gradient(place: jax.Array, w: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  del place
  return w, gradient


# In the loop over layers the cotangent of `gradient` is one array, to which each layer's part is added where it lies.
_add_gradient.defvjp(
  lambda place, w, gradient: ((w, gradient), place),
  lambda place, g: (None, None, g[1].at[place].add(g[0].astype(g[1].dtype))),
)
