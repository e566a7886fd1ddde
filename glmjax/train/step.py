"""The training and evaluation step: pure functions, jitted once.

A step's batch is [M, B, L] per feature: M micro-batches of B rows; "rows" [M, B] numbers them from the step's first on.
Rows that fill up the last micro-batch have loss weight 0, and micro-batches that hold no row are not run, so a growing
batch never recompiles.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glmjax import batch as batch_lib
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.parallel import partitioning
from glmjax.train import losses
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import pipeline as pipeline_lib
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import zero1
from glmjax.train.pipeline import one_f_one_b
from glmjax.train.pipeline import ring

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# "rows" is GLM-130B's: its micro-batches of one row (paper, table 11) were averaged first, so that [MASK] rows, which
# predict few tokens, counted as much as [gMASK] rows.
MEANS = ("tokens", "rows")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInfo:
  """Where in the data a step stands; uint32 scalars."""

  position: jax.Array  # samples seen before the step, as planned
  first: jax.Array  # number of its first sample
  size: jax.Array  # rows, over all hosts


@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss of one micro-batch as a function of the parameters; static under jit."""

  config: config_lib.GLMConfig
  chunk: int = 1024  # tokens of each part of a batch (partitioning's "groups") whose logits exist at a time
  mean_of: str = "tokens"  # one of MEANS: what weighs the same in the loss
  pipeline: pipeline_lib.Pipeline | None = None  # the stages through which rows flow; parameters lie as they hold them

  def weigh(self, batch: Batch) -> Batch:
    """The batch with loss weights that add up to 1 in each row, if rows are to weigh the same."""
    if self.mean_of == "tokens":
      return batch
    weights = batch["loss_weights"]
    return batch | {"loss_weights": weights / jnp.maximum(weights.sum(-1, keepdims=True), 1.0)}

  def hidden(
    self, params: Any, batch: Batch, alpha: jax.Array | float, rng: jax.Array | None, **apply: Any
  ) -> tuple[Any, Any]:
    """The last hidden states [B, L, D], and what else `apply` asks Linen for.

    Parameters are stacked here and in checkpoints, whether the model scans its layers or not. No pipeline.
    """
    dropout = rng is not None and bool(self.config.hidden_dropout or self.config.attention_dropout)
    model = glm.GLM(self.config, deterministic=not dropout)
    params = params if self.config.scan_layers else glm.unstack_layers(params)
    out, more = model.apply(
      {"params": params},
      batch["tokens"],
      batch["positions"],
      batch["attend_start"],
      batch["attend_end"],
      alpha,
      rows_B=batch["rows"] if dropout else None,
      method="hidden",
      rngs={"dropout": rng} if dropout else None,
      **apply,
    )
    return (out[0], more) if apply else (out, None)

  def loss(
    self, params: Any, batch: Batch, alpha: jax.Array | float = 1.0, rng: jax.Array | None = None
  ) -> losses.Loss:
    """The loss of a batch [B, L], to be differentiated, and its sums; with an rng, dropout is on."""
    kernel_DV = glm.GLM(self.config).apply({"params": params}, alpha, method="head_kernel")
    loss = lambda x_BLD, *features: losses.chunked(kernel_DV, x_BLD, *features, self.chunk)
    features = [batch[name] for name in batch_lib.TARGETS]
    if self.pipeline is None:
      return loss(self.hidden(params, batch, alpha, rng)[0], *features)
    inputs = (batch[name] for name in batch_lib.INPUTS)
    x_BLD = ring.hidden(self.config, self.pipeline, params, *inputs, alpha, rng)
    features = [self.pipeline.spread(feature) for feature in features]
    with partitioning.rows_over_stages():
      return loss(x_BLD, *features)

  def sums(self, params: Any, batch: Batch) -> losses.Sums:
    """Loss and weight sums of a batch [B, L], without dropout, to be read."""
    return self.loss(params, batch).sums

  def add_gradient(
    self,
    params: Any,
    batch: Batch,
    alpha: jax.Array | float,
    rng: jax.Array,
    factor: jax.Array,
    into: tuple[losses.Sums, Any],
  ) -> tuple[losses.Sums, Any]:
    """`into` and, added to it, the sums of a batch [B, L] and the gradient of factor x the summed loss, by 1F1B."""
    inputs, targets = ([batch[name] for name in names] for names in (batch_lib.INPUTS, batch_lib.TARGETS))

    def loss(logits_BLV: jax.Array, targets: list[jax.Array]) -> tuple[jax.Array, losses.Sums]:
      sums = losses.by_objective(losses.cross_entropy(logits_BLV, targets[0]), *targets[1:])
      return sums.loss.sum(), sums

    return one_f_one_b.add_gradient(
      self.config, self.pipeline, params, inputs, alpha, rng, loss, factor, targets, self.chunk, into
    )


def accumulate(
  objective: Objective,
  params: Any,
  batch: Batch,
  num_micro: jax.Array,
  alpha: jax.Array,
  rng: jax.Array,
  scale: jax.Array | float,
  specs: Any = None,
) -> tuple[losses.Sums, Any]:
  """Sums over all micro-batches and the float32 gradient of scale x the mean loss.

  Every token weighs the same whichever micro-batch it is in: the mean's denominator is the whole batch's.
  `specs`: how the parameters are split, for strategies that gather them once.
  """
  factor = scale / jnp.maximum(batch["loss_weights"].sum(), 1.0)
  run = functools.partial(_accumulate, objective)
  if not partitioning.gathers_once():
    return run(params, batch, num_micro, alpha, rng, factor)
  return zero1.sums_and_gradient(run, objective.config.dtype, specs, params, batch, num_micro, alpha, rng, factor)


def _accumulate(
  objective: Objective,
  params: Any,
  batch: Batch,
  num_micro: jax.Array,
  alpha: jax.Array,
  rng: jax.Array,
  factor: jax.Array,
) -> tuple[losses.Sums, Any]:
  """Sums over all micro-batches and the gradient of factor x the summed loss."""
  tick_by_tick = objective.pipeline is not None and objective.pipeline.kind == "1f1b"

  def add(m: jax.Array | int, into: tuple[losses.Sums, Any]) -> tuple[losses.Sums, Any]:
    micro = jax.tree.map(lambda a: a[m], batch)
    if tick_by_tick:
      return objective.add_gradient(params, micro, alpha, rng, factor, into)

    def loss(params: Any) -> tuple[jax.Array, losses.Sums]:
      found = objective.loss(params, micro, alpha, rng)
      return found.total * factor, found.sums

    grads, sums = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(jnp.add, into, (sums, grads))

  zeros = jnp.zeros(losses.NUM_OBJECTIVES, jnp.float32)
  nothing = losses.Sums(zeros, zeros), jax.tree.map(functools.partial(jnp.zeros_like, dtype=jnp.float32), params)
  if batch["tokens"].shape[0] == 1:
    return add(0, nothing)
  with jax.named_scope("micro_batches"):  # by which glmjax.plan knows the loop
    return jax.lax.fori_loop(0, num_micro, add, nothing)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What turns gradients into updates."""

  optimizer: optimizer_lib.AdamW | optimizer_lib.Muon
  learning_rate: schedules.Schedule
  embedding_alpha: schedules.Schedule = schedules.Constant(1.0)  # embedding gradient shrink (paper, section 3)
  loss_scale: state_lib.DynamicLossScale = state_lib.DynamicLossScale()  # of states that have one


def train_step(
  objective: Objective,
  recipe: Recipe,
  tx: optax.GradientTransformation,
  state: state_lib.TrainState,
  batch: Batch,
  info: StepInfo,
  specs: Any = None,
) -> tuple[state_lib.TrainState, Metrics]:
  """One optimizer step.

  The state is left as it was, and stays so, once a gradient is not finite and no smaller fp16 loss scale is left to
  try: a state applies only the step planned for its own samples_seen. The loop stops on "advanced" in the metrics.
  """
  learning_rate, alpha = recipe.learning_rate(info.first), recipe.embedding_alpha(info.first)
  loss_tokens, batch = jnp.count_nonzero(batch["loss_weights"]), objective.weigh(batch)
  scale = jnp.float32(1.0) if state.loss_scale is None else state.loss_scale.scale
  rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
  num_micro = -(-info.size.astype(jnp.int32) // batch["tokens"].shape[1])
  sums, grads = accumulate(objective, state.params, batch, num_micro, alpha, rng, scale, specs)
  squares = {name: square / scale**2 for name, square in part_squares(grads).items()}
  norm = jnp.sqrt(sum(squares.values()))
  finite = jnp.isfinite(norm) & jnp.isfinite(sums.loss.sum())
  planned = state.samples_seen == info.position
  factor = jnp.minimum(1.0, recipe.optimizer.clip_norm / jnp.maximum(norm, 1e-9)) / scale
  updates, opt_state = tx.update(jax.tree.map(lambda g: g * factor, grads), state.opt_state, state.params)
  apply = finite & planned
  keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(apply, n, o), new, old)
  params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
  advance, loss_scale = apply, None
  if state.loss_scale is not None:  # passes over samples that overflow, while the scale can still be halved
    advance = planned & (finite | (scale > recipe.loss_scale.minimum))
    moved = recipe.loss_scale.update(state.loss_scale, finite)
    loss_scale = jax.tree.map(lambda new, old: jnp.where(advance, new, old), moved, state.loss_scale)
  new_state = dataclasses.replace(
    state,
    step=state.step + advance,
    samples_seen=jnp.where(advance, info.first + info.size, state.samples_seen),
    params=keep(params, state.params),
    opt_state=keep(opt_state, state.opt_state),
    loss_scale=loss_scale,
  )
  metrics = {
    "loss": sums.mean(),
    "losses": sums.loss,
    "weights": sums.weight,
    "grad_norm": norm,
    "loss_tokens": loss_tokens,
    "learning_rate": learning_rate,
    "embedding_alpha": alpha,
    "applied": apply,
    "advanced": advance,
    **{f"grad_norm_{name}": jnp.sqrt(square) for name, square in squares.items()},
  }
  if state.loss_scale is not None:
    metrics["loss_scale"] = scale
  return new_state, metrics


def part_squares(grads: Any) -> dict[str, jax.Array]:
  """Sum of squares of each of params.PARTS that the model has."""
  sums = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    part = params_lib.known("/".join(optimizer_lib.path_names(path))).part
    sums[part] = sums.get(part, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
  return {part: sums[part] for part in params_lib.PARTS if part in sums}


def eval_step(objective: Objective, params: Any, batch: Batch) -> losses.Sums:
  """Loss and weight sums of a batch [M, B, L], without dropout."""
  zeros = jnp.zeros(losses.NUM_OBJECTIVES, jnp.float32)
  add = lambda sums, micro: (jax.tree.map(jnp.add, sums, objective.sums(params, micro)), None)
  return jax.lax.scan(add, losses.Sums(zeros, zeros), objective.weigh(batch))[0]


def compile_train_step(
  objective: Objective, recipe: Recipe, tx: optax.GradientTransformation, shardings: state_lib.TrainState
) -> Callable[..., tuple[state_lib.TrainState, Metrics]]:
  """train_step(state, batch, info), which takes over the state's memory."""
  step = functools.partial(train_step, objective, recipe, tx, specs=jax.tree.map(lambda s: s.spec, shardings.params))
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def compile_eval_step(objective: Objective) -> Callable[..., losses.Sums]:
  """eval_step(params, batch)."""
  return jax.jit(functools.partial(eval_step, objective))
