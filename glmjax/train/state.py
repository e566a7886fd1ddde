"""TrainState: everything that a run carries from step to step, created sharded.

| field | meaning |
|---|---|
| step | int32, optimizer steps done |
| samples_seen | uint32, number of the next sample (schedules.py) |
| params | float32 master parameters: those that are trained |
| opt_state | the optimizer's, of these |
| rng | uint32 [2], raw key data; dropout folds the step into it |
| loss_scale | None, or the dynamic scale of an fp16 run |
| frozen | the model's other parameters, floats or quantized: no gradient, no optimizer state, no part of a checkpoint |
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glmjax import errors
from glmjax import ranges
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.parallel import partitioning
from glmjax.quantize import qarray
from glmjax.train import optimizer as optimizer_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
  """The loss's factor in an fp16 run: halved on overflow, doubled after a long time without (table 11)."""

  scale: jax.Array  # float32
  good_steps: jax.Array  # int32, steps since the last overflow or doubling
  patience: jax.Array  # int32, overflows left before the scale is halved


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """One run's state; see the module's table."""

  step: jax.Array
  samples_seen: jax.Array
  params: Any
  opt_state: Any
  rng: jax.Array
  loss_scale: LossScale | None
  frozen: Any = dataclasses.field(default_factory=dict)

  def trained(self) -> "TrainState":
    """Returns the state without what is frozen, as checkpoints have it."""
    return dataclasses.replace(self, frozen={})

  @property
  def model_params(self) -> Any:
    """All parameters, as a model takes them."""
    return params_lib.merge(self.params, self.frozen)


@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
  """How the loss scale of a float16 model moves; the defaults are GLM-130B's (paper, table 11)."""

  start: float = 65_536.0
  minimum: float = 1.0
  window: int = 2_000  # steps without overflow until it doubles
  hysteresis: int = 2  # overflows until it is halved

  def __post_init__(self) -> None:
    for name in ("start", "minimum"):
      ranges.number(f"DynamicLossScale.{name}", getattr(self, name), above=0)
    if self.minimum > self.start:
      raise errors.InputError(
        f"DynamicLossScale: start {self.start:g} and minimum {self.minimum:g}: give a minimum "
        "above 0 and a start that is not below it"
      )
    for name in ("window", "hysteresis"):
      ranges.whole(f"DynamicLossScale.{name}", getattr(self, name), 1)

  def init(self) -> LossScale:
    """Returns the scale of a new run."""
    return LossScale(jnp.float32(self.start), jnp.int32(0), jnp.int32(self.hysteresis))

  def update(self, state: LossScale, finite: jax.Array) -> LossScale:
    """Returns the scale after a step whose gradients were finite, or were not."""
    good = state.good_steps + 1
    grow = good >= self.window
    halve = state.patience <= 1
    return LossScale(
      jnp.where(
        finite,
        jnp.where(grow, state.scale * 2, state.scale),
        jnp.where(halve, jnp.maximum(state.scale / 2, self.minimum), state.scale),
      ),
      jnp.where(finite & ~grow, good, 0),
      jnp.where(finite, jnp.where(grow, self.hysteresis, state.patience), jnp.maximum(state.patience - 1, 1)),
    )


def init(
  config: config_lib.GLMConfig,
  tx: optax.GradientTransformation,
  seed: int,
  loss_scale: DynamicLossScale = DynamicLossScale(),
  is_trained: params_lib.Predicate = params_lib.always,
) -> TrainState:
  """Makes a new run's state, its parameters stacked and still boxed with their logical axis names; the others are
  frozen.
  """
  init_key, run_key = jax.random.split(jax.random.key(seed))
  boxed, frozen = params_lib.split(glm.init(dataclasses.replace(config, scan_layers=True), init_key), is_trained)
  return TrainState(
    step=jnp.int32(0),
    samples_seen=jnp.uint32(0),
    params=boxed,
    opt_state=tx.init(partitioning.unbox(boxed)),
    rng=jax.random.key_data(run_key),
    loss_scale=loss_scale.init() if config.dtype == "float16" else None,
    frozen=frozen,
  )


def abstract(
  config: config_lib.GLMConfig,
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  rules: partitioning.Rules = partitioning.FSDP,
  is_trained: params_lib.Predicate = params_lib.always,
  frozen_bits: int | None = None,
) -> TrainState:
  """Returns shapes, dtypes and shardings of the state, without allocating any of it.

  What is frozen lies as inference has it: matrices in the compute dtype, or kernels quantized to `frozen_bits`.
  """
  boxed = jax.eval_shape(lambda: init(config, tx, 0, is_trained=is_trained))
  partitioning.check_divisible(params_lib.sizes(config), mesh, rules)
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  param_shardings = partitioning.shardings(boxed.params, mesh, rules)
  by_path = {
    optimizer_lib.path_names(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(param_shardings)
  }

  def opt_sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
    names = optimizer_lib.path_names(path)  # ends with the parameter's own path, where there is one
    matches = (by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path)
    return next(matches, replicated) if leaf.ndim else replicated

  shapes = dataclasses.replace(partitioning.unbox(boxed), frozen={})
  shardings = jax.tree.map(lambda _: replicated, dataclasses.replace(shapes, params=None, opt_state=None, frozen=None))
  shardings = dataclasses.replace(
    shardings,
    params=param_shardings,
    frozen={},
    opt_state=jax.tree_util.tree_map_with_path(opt_sharding, shapes.opt_state),
  )
  trained = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
  of_frozen = partitioning.shardings(boxed.frozen, mesh, rules)
  return dataclasses.replace(trained, frozen=_frozen(config, partitioning.unbox(boxed.frozen), of_frozen, frozen_bits))


def _frozen(config: config_lib.GLMConfig, shapes: Any, shardings: Any, bits: int | None) -> Any:
  """Returns the frozen parameters as they lie, of those of a float model."""
  found, shardings = {}, params_lib.flatten(shardings)
  for path, x in params_lib.flatten(shapes).items():
    param, sharding = params_lib.known(path), shardings[path]
    if param.quantizes and bits:
      like = qarray.abstract(x.shape, bits, param.inputs)
      scale_sharding = partitioning.unsplit(sharding, param.inputs, x.ndim)
      values = jax.ShapeDtypeStruct(like.values.shape, like.values.dtype, sharding=sharding)
      scale = jax.ShapeDtypeStruct(like.scale.shape, like.scale.dtype, sharding=scale_sharding)
      found[path] = dataclasses.replace(like, values=values, scale=scale)
    else:
      dtype = config.dtype if param.is_matrix else config.param_dtype
      found[path] = jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)
  return params_lib.nest(found)


def create(
  config: config_lib.GLMConfig,
  tx: optax.GradientTransformation,
  seed: int,
  abstract_state: TrainState,
  loss_scale: DynamicLossScale = DynamicLossScale(),
  is_trained: params_lib.Predicate = params_lib.always,
) -> TrainState:
  """Makes a new run's state, each array made where `abstract_state` wants it; nothing frozen where that has none."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract_state)

  def make() -> TrainState:
    state = partitioning.unbox(init(config, tx, seed, loss_scale, is_trained))
    if not abstract_state.frozen:
      return state.trained()
    frozen = jax.tree.map(lambda x, like: x.astype(like.dtype), state.frozen, abstract_state.frozen)
    return dataclasses.replace(state, frozen=frozen)

  return jax.jit(make, out_shardings=shardings)()
