"""The training and evaluation step: pure functions, jitted once.

A step's batch is [M, B, L] per feature: M micro-batches of B rows; "rows" [M, B] numbers them from the step's first on.
Rows that fill up the last micro-batch have loss weight 0, and micro-batches that hold no row are not run, so a growing
batch never recompiles.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from glmjax.models import params as params_lib
from glmjax.parallel import partitioning
from glmjax.train import gradient
from glmjax.train import losses
from glmjax.train import objective as objective_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import schedules
from glmjax.train import state as state_lib

Metrics = dict[str, Any]  # arrays; under "layers" dicts of them
Rows = tuple[jax.Array, jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Limits:
  """What a step's watched values may be, in the order of `watched`; float32 [K], infinite where there is no limit."""

  apply: jax.Array  # a value above its own: the update is not applied; -1: whatever the values are
  clip: jax.Array  # a norm of the gradient above its own: the gradient is scaled down until it is not

  def are_passed(self, values: Sequence[jax.Array]) -> jax.Array:
    """Tells whether any of the watched values is above its limit."""
    return jnp.any(jnp.stack(values) > self.apply)

  def factor(self, norms: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the factor that brings every norm of the gradient below its limit; those follow that of the loss."""
    below = self.clip[1 : 1 + len(norms)] / jnp.maximum(jnp.stack([*norms.values()]), 1e-9)
    return jnp.minimum(1.0, below.min())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInfo:
  """Where in the data a step stands (uint32 scalars), and what it may do."""

  position: jax.Array  # samples seen before the step, as planned
  first: jax.Array  # number of its first sample
  size: jax.Array  # rows, over all hosts
  limits: Limits | None = None  # None: nothing is watched


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What turns gradients into updates."""

  optimizer: optimizer_lib.AdamW | optimizer_lib.Muon
  learning_rate: schedules.Schedule
  embedding_alpha: schedules.Schedule = schedules.Constant(1.0)  # embedding gradient shrink (paper, section 3)
  loss_scale: state_lib.DynamicLossScale = state_lib.DynamicLossScale()  # of states that have one
  tells_layers: bool = False  # whether the metrics have "layers": norms of each layer's gradient, update, parameters


def train_step(
  objective: objective_lib.Objective,
  recipe: Recipe,
  tx: optax.GradientTransformation,
  state: state_lib.TrainState,
  batch: objective_lib.Batch,
  info: StepInfo,
  specs: tuple[Any, Any] | None = None,
) -> tuple[state_lib.TrainState, Metrics]:
  """Does one optimizer step of what is trained.

  The state is left as it was, and stays so, once a gradient is not finite and no smaller fp16 loss scale is left to
  try: a state applies only the step planned for its own samples_seen. The loop stops on "advanced" in the metrics.
  A step that is above a limit is passed over: its samples are seen, and nothing else changes ("held" in the metrics).
  """
  chex.assert_rank(batch["tokens"], 3)
  chex.assert_tree_shape_prefix(batch, batch["tokens"].shape[:2])
  chex.assert_type([info.position, info.first, info.size], jnp.uint32)
  learning_rate, alpha = recipe.learning_rate(info.first), recipe.embedding_alpha(info.first)
  loss_tokens, batch = jnp.count_nonzero(batch["loss_weights"]), objective.weigh(batch)
  scale = jnp.float32(1.0) if state.loss_scale is None else state.loss_scale.scale
  rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
  num_micro = -(-info.size.astype(jnp.int32) // batch["tokens"].shape[1])
  work = objective_lib.Work(batch, alpha, rng, scale / jnp.maximum(objective.weight(batch), 1.0))
  sums, grads = gradient.of_step(objective, state.params, state.frozen, work, num_micro, specs)
  squares = {name: square / scale**2 for name, square in part_squares(grads).items()}
  norm = jnp.sqrt(sum(squares.values()))
  finite = jnp.isfinite(norm) & jnp.isfinite(sums.loss.sum())
  planned = state.samples_seen == info.position
  norms = {"grad_norm": norm} | {f"grad_norm_{name}": jnp.sqrt(square) for name, square in squares.items()}
  factor = jnp.minimum(1.0, recipe.optimizer.clip_norm / jnp.maximum(norm, 1e-9))
  if info.limits is not None:
    factor = jnp.minimum(factor, info.limits.factor(norms))
  factor /= scale
  updates, opt_state = tx.update(jax.tree.map(lambda g: g * factor, grads), state.opt_state, state.params)
  apply, watched_too = finite & planned, {}
  if info.limits is not None:
    update_norms = {f"update_norm_{name}": jnp.sqrt(square) for name, square in part_squares(updates).items()}
    held = finite & info.limits.are_passed([sums.mean(), *norms.values(), *update_norms.values()])
    apply, watched_too = apply & ~held, update_norms | {"held": held}
  params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
  advance, loss_scale = finite & planned, None
  if state.loss_scale is not None:  # passes over samples that overflow, while the scale can still be halved
    advance = planned & (finite | (scale > recipe.loss_scale.minimum))
    moved = recipe.loss_scale.update(state.loss_scale, finite)
    loss_scale = _choose(advance, moved, state.loss_scale)
  new_state = dataclasses.replace(
    state,
    step=state.step + advance,
    samples_seen=jnp.where(advance, info.first + info.size, state.samples_seen),
    params=_choose(apply, params, state.params),
    opt_state=_choose(apply, opt_state, state.opt_state),
    loss_scale=loss_scale,
  )
  metrics = {
    "loss": sums.mean(),
    "losses": sums.loss,
    "weights": sums.weight,
    **norms,
    "loss_tokens": loss_tokens,
    "learning_rate": learning_rate,
    "embedding_alpha": alpha,
    "applied": apply,
    "advanced": advance,
    **watched_too,
  }
  if state.loss_scale is not None:
    metrics["loss_scale"] = scale
  if recipe.tells_layers:
    metrics["layers"] = {
      "grad_norm": {name: norms / scale for name, norms in layer_norms(grads).items()},
      "update_norm": layer_norms(updates),
      "param_norm": layer_norms(state.params),
    }
  if sums.pairs is not None:
    metrics["ordered"] = sums.pairs.ordered / jnp.maximum(sums.pairs.count, 1.0)
  return new_state, metrics


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
  return jax.tree.map(functools.partial(jnp.where, condition), new, old)


def part_squares(grads: Any) -> dict[str, jax.Array]:
  """Sums the squares of each of params.PARTS that the model has."""
  sums = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    part = params_lib.known("/".join(optimizer_lib.path_names(path))).part
    sums[part] = sums.get(part, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
  return {part: sums[part] for part in params_lib.PARTS if part in sums}


def layer_norms(tree: Any) -> dict[str, jax.Array]:
  """Returns the norm of each layer, [N] under "layers", and of what is in no layer, by its first name in the tree.

  Args:
    tree: as the trained parameters, stacked in the model's order.
  """
  sums = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = optimizer_lib.path_names(path)[0]
    axes = range(1 if name == params_lib.LAYERS else 0, leaf.ndim)
    sums[name] = sums.get(name, 0.0) + jnp.square(leaf.astype(jnp.float32)).sum(tuple(axes))
  return jax.tree.map(jnp.sqrt, sums)


def watched(params: Any) -> tuple[str, ...]:
  """Names the metrics of a step that have limits: the loss, the norms of the gradient, all of it and each part that
  is trained, and those of each part's update before the learning rate, which may jump when it is told to.
  """
  found = jax.eval_shape(part_squares, params)
  parts = [part for part in params_lib.PARTS if part in found]
  return ("loss", "grad_norm", *(f"grad_norm_{part}" for part in parts), *(f"update_norm_{part}" for part in parts))


def eval_step(objective: objective_lib.Objective, params: Any, frozen: Any, batch: objective_lib.Batch) -> losses.Sums:
  """Returns loss and weight sums of a batch [M, B, L], without dropout."""
  params = params_lib.merge(params, frozen)

  def add(sums: losses.Sums, micro: objective_lib.Batch) -> tuple[losses.Sums, None]:
    return jax.tree.map(jnp.add, sums, objective.sums(params, micro)), None

  return jax.lax.scan(add, objective.zeros(), objective.weigh(batch))[0]


def row_step(objective: objective_lib.Objective, params: Any, frozen: Any, batch: objective_lib.Batch) -> Rows:
  """Returns what `Objective.rows` does of each micro-batch of a batch [M, B, L], [M, B] each."""
  params = params_lib.merge(params, frozen)
  return jax.lax.map(lambda micro: objective.rows(params, micro), batch)


def compile_train_step(
  objective: objective_lib.Objective, recipe: Recipe, tx: optax.GradientTransformation, shardings: state_lib.TrainState
) -> Callable[..., tuple[state_lib.TrainState, Metrics]]:
  """Compiles train_step(state, batch, info), which takes over the state's memory."""
  specs = jax.tree.map(lambda s: s.spec, (shardings.params, shardings.frozen))
  step = functools.partial(train_step, objective, recipe, tx, specs=specs)
  # Metrics lie as the step's number: whole on every device, as every process reads them.
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def compile_eval_step(objective: objective_lib.Objective) -> Callable[..., losses.Sums]:
  """Compiles eval_step(params, frozen, batch)."""
  return jax.jit(functools.partial(eval_step, objective), out_shardings=partitioning.replicated())


def compile_row_step(objective: objective_lib.Objective) -> Callable[..., Rows]:
  """Compiles row_step(params, frozen, batch)."""
  return jax.jit(functools.partial(row_step, objective), out_shardings=partitioning.replicated())
