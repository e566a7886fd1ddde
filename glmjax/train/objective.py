"""The loss of a batch as a function of a model's parameters: what is differentiated, evaluated and diagnosed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from glmjax import batch as batch_lib
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.parallel import partitioning
from glmjax.train import losses
from glmjax.train import pipeline as pipeline_lib
from glmjax.train import preference as preference_lib
from glmjax.train.pipeline import ring

Batch = dict[str, jax.Array]

# "rows" is GLM-130B's: its micro-batches of one row (paper, table 11) were averaged first, so that [MASK] rows, which
# predict few tokens, counted as much as [gMASK] rows.
MEANS = ("tokens", "rows")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
  """Rows whose gradient is to be computed, and what else it depends on besides the parameters."""

  batch: Batch  # [M, B, ...] of a step, [B, ...] of one micro-batch
  alpha: jax.Array  # the embedding gradient's factor
  rng: jax.Array  # dropout's
  factor: jax.Array  # the loss's: one over the step's weights, times the loss scale

  def micro_batch(self, m: jax.Array | int) -> "Work":
    """Returns micro-batch m of a step."""
    return dataclasses.replace(self, batch=jax.tree.map(lambda a: a[m], self.batch))


@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss of one micro-batch as a function of the parameters; static under jit."""

  config: config_lib.GLMConfig
  chunk: int = 1024  # tokens of each part of a batch (partitioning's "groups") whose logits exist at a time
  mean_of: str = "tokens"  # one of MEANS: what weighs the same in the loss
  pipeline: pipeline_lib.Pipeline | None = None  # the stages through which rows flow; parameters lie as they hold them
  preference: preference_lib.Preference | None = None  # of rows that hold a chosen and a rejected answer each
  reference: config_lib.GLMConfig | None = None  # the model that it compares with: the same one without its adapter

  def weigh(self, batch: Batch) -> Batch:
    """Returns the batch with loss weights that add up to 1 in each row, if rows are to weigh the same."""
    if self.mean_of == "tokens" or self.preference is not None:
      return batch
    weights = batch["loss_weights"]
    return batch | {"loss_weights": weights / jnp.maximum(weights.sum(-1, keepdims=True), 1.0)}

  def weight(self, batch: Batch) -> jax.Array:
    """Counts what the loss of a weighed batch [..., L] is the mean of: weighted tokens, or pairs."""
    weights = batch["loss_weights"]
    return (weights.sum() if self.preference is None else (weights != 0).any(-1).sum()).astype(jnp.float32)

  def zeros(self) -> losses.Sums:
    """Returns the sums of no rows."""
    zeros, zero = jnp.zeros(losses.NUM_OBJECTIVES, jnp.float32), jnp.float32(0)
    return losses.Sums(zeros, zeros, None if self.preference is None else losses.Pairs(zero, zero, zero))

  def hidden(
    self, params: Any, batch: Batch, alpha: jax.Array | float, rng: jax.Array | None, **apply: Any
  ) -> tuple[Any, Any]:
    """Computes the last hidden states [B, L, D], and what else `apply` asks Linen for.

    Parameters are stacked here and in checkpoints, whether the model scans its layers or not. No pipeline.
    """
    dropout = rng is not None and self.config.drops
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
    """Computes the loss of a batch [B, L], to be differentiated, and its sums; with an rng, dropout is on."""
    kernel_DV = glm.GLM(self.config).apply({"params": params}, alpha, method="head_kernel")
    targets = [batch[name] for name in batch_lib.TARGETS]
    if self.pipeline is None:
      x_BLD, _ = self.hidden(params, batch, alpha, rng)
      if self.preference is not None:
        return self._of_pairs(params, batch, kernel_DV, x_BLD)
      return losses.chunked(kernel_DV, x_BLD, *targets, self.chunk)
    x_BLD = ring.hidden(self.config, self.pipeline, params, batch, alpha, rng)
    targets = [self.pipeline.spread(feature) for feature in targets]
    with partitioning.rows_over_stages():
      return losses.chunked(kernel_DV, x_BLD, *targets, self.chunk)

  def _of_pairs(self, params: Any, batch: Batch, kernel_DV: jax.Array, x_BLD: jax.Array) -> losses.Loss:
    """Computes the loss of a batch whose rows are pairs, from its last hidden states.

    It is a function of each answer's log-probability, so its gradient is that of a cross entropy whose tokens weigh as
    much as the function changes with them.
    """
    targets_BL, weights_BL, objectives_BL = (batch[name] for name in batch_lib.TARGETS)
    entropy_BL = losses.of_tokens(kernel_DV, x_BLD, targets_BL, weights_BL, self.chunk)
    reference_BL = None
    if self.reference is not None:
      other = dataclasses.replace(self, config=self.reference)
      other_BLD, _ = other.hidden(jax.lax.stop_gradient(params), batch, 1.0, None)
      reference_BL = losses.of_tokens(kernel_DV, other_BLD, targets_BL, weights_BL, self.chunk)
    pairs, slopes_BL = preference_lib.of_pairs(self.preference, entropy_BL, reference_BL, weights_BL, objectives_BL)
    along = losses.chunked(kernel_DV, x_BLD, targets_BL, slopes_BL, objectives_BL, self.chunk).total
    sums = losses.by_objective(entropy_BL, weights_BL, objectives_BL)
    return losses.Loss(pairs.loss + along - jax.lax.stop_gradient(along), sums._replace(pairs=pairs))

  def rows(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes for each row of a batch [B, L] its number, and the sums of its weighted cross entropies and of its
    weights, [B] each, without dropout, to be read. Pipelines give the rows in another order.
    """
    kernel_DV = glm.GLM(self.config).apply({"params": params}, 1.0, method="head_kernel")
    targets_BL, weights_BL, _ = (batch[name] for name in batch_lib.TARGETS)
    if self.pipeline is None:
      x_BLD, _ = self.hidden(params, batch, 1.0, None)
      entropy_BL = losses.of_tokens(kernel_DV, x_BLD, targets_BL, weights_BL, self.chunk)
      return batch["rows"], (entropy_BL * weights_BL).sum(-1), weights_BL.sum(-1)
    x_BLD = ring.hidden(self.config, self.pipeline, params, batch, 1.0, None)
    rows_B, targets_BL, weights_BL = map(self.pipeline.spread, (batch["rows"], targets_BL, weights_BL))
    with partitioning.rows_over_stages():
      entropy_BL = losses.of_tokens(kernel_DV, x_BLD, targets_BL, weights_BL, self.chunk)
    return rows_B, (entropy_BL * weights_BL).sum(-1), weights_BL.sum(-1)

  def sums(self, params: Any, batch: Batch) -> losses.Sums:
    """Computes loss and weight sums of a batch [B, L], without dropout, to be read."""
    return self.loss(params, batch).sums
