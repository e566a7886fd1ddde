"""A training state whose layers lie in memory as the stages of a pipeline hold them.

In checkpoints, and on any other mesh, the layers are stacked in the model's order [N, ...]. A stage of a circular
pipeline holds layers from several places of it, and where the layers do not divide over the stages some groups have
room for one more. So the state is put in order when it is made or restored, and back for a checkpoint, an array at a
time. Where the order is the model's own, nothing moves.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import partitioning
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import pipeline as pipeline_lib
from glmjax.train import state as state_lib


@dataclasses.dataclass(frozen=True)
class StageLayout:
  """The state's shapes, dtypes and shardings in both orders of its layers, and the ways between them."""

  as_checkpointed: state_lib.TrainState  # the model's order
  in_stages: state_lib.TrainState  # what the steps take
  order: tuple[int, ...] | None  # pipeline.Pipeline.order; None: the model's

  def put_in_stages(self, state: state_lib.TrainState) -> state_lib.TrainState:
    """Turns a state in the model's order into one as the steps take it. Arrays that move are deleted as they go."""

    def move(
      path: tuple[Any, ...], x: jax.Array, before: jax.ShapeDtypeStruct, after: jax.ShapeDtypeStruct
    ) -> jax.Array:
      if not _is_layers(path, x):
        return x
      y = jax.block_until_ready(_take(x, self.order, before.shape[0], before.sharding, after.sharding))
      x.delete()
      return y

    if self.order is None:
      return state
    return jax.tree_util.tree_map_with_path(move, state, self.as_checkpointed, self.in_stages)

  def put_back(self, state: state_lib.TrainState) -> state_lib.TrainState:
    """Turns a state in the stages' order, or what is trained of it, into one as checkpoints have it; what was given
    stays.
    """
    like = self.as_checkpointed if state.frozen else self.as_checkpointed.trained()

    def move(path: tuple[Any, ...], x: jax.Array, after: jax.ShapeDtypeStruct) -> jax.Array:
      if not _is_layers(path, x):
        return x
      back = tuple(np.argsort(self.order)[: after.shape[0]].tolist())
      return jax.block_until_ready(_take(x, back, x.shape[0], after.sharding, after.sharding))

    return state if self.order is None else jax.tree_util.tree_map_with_path(move, state, like)


def make(
  config: config_lib.GLMConfig,
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  rules: partitioning.Rules,
  pipeline: pipeline_lib.Pipeline | None,
  is_trained: params_lib.Predicate = params_lib.always,
  frozen_bits: int | None = None,
) -> StageLayout:
  """Returns both orders of a run's state."""
  order = None if pipeline is None else tuple(pipeline.order())
  if order is None or order == tuple(range(config.num_layers)):
    abstract = state_lib.abstract(config, tx, mesh, rules, is_trained, frozen_bits)
    return StageLayout(abstract, abstract, None)
  whole = tuple((name, None if name == "layers" else axes) for name, axes in rules)
  plain = state_lib.abstract(config, tx, mesh, whole, is_trained, frozen_bits)

  def staged(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if not _is_layers(path, x):
      return x
    spec = jax.sharding.PartitionSpec(partitioning.STAGE_AXIS, *x.sharding.spec[1:])
    return jax.ShapeDtypeStruct((len(order), *x.shape[1:]), x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

  ordered = jax.tree_util.tree_map_with_path(lambda path, x: _across(x) if _is_layers(path, x) else x, plain)
  return StageLayout(ordered, jax.tree_util.tree_map_with_path(staged, plain), order)


def _is_layers(path: tuple[Any, ...], x: Any) -> bool:
  """Tells whether it holds all layers' values, stacked."""
  return "layers" in optimizer_lib.path_names(path) and x.ndim > 0


def _across(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Splits another axis than the layers' over the stages, where one divides: so layers can change places."""
  mesh, spec = x.sharding.mesh, list(x.sharding.spec) + [None] * (x.ndim - len(x.sharding.spec))
  for axis in range(1, x.ndim):
    taken = (spec[axis],) if isinstance(spec[axis], str) else tuple(spec[axis] or ())
    if x.shape[axis] % (mesh.shape[partitioning.STAGE_AXIS] * int(np.prod([mesh.shape[name] for name in taken]))) == 0:
      spec[axis] = (*taken, partitioning.STAGE_AXIS)
      break
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _take(
  x: jax.Array, places: tuple[int, ...], count: int, through: jax.sharding.NamedSharding, to: jax.sharding.NamedSharding
) -> jax.Array:
  """Returns x[places], zeros where a place is `count` or more; each device takes them from its part of every layer."""
  return _compiled(places, count, through, to)(x)


@functools.cache
def _compiled(
  places: tuple[int, ...], count: int, through: jax.sharding.NamedSharding, to: jax.sharding.NamedSharding
) -> Any:
  index = np.array(places)

  def take(x: jax.Array) -> jax.Array:
    x = jax.lax.with_sharding_constraint(x, through)
    x = jax.lax.with_sharding_constraint(x[np.minimum(index, count - 1)], through)
    return jnp.where((index < count).reshape(-1, *[1] * (x.ndim - 1)), x, 0) if (index >= count).any() else x

  return jax.jit(take, out_shardings=to)
