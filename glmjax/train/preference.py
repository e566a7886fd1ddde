"""Losses of pairs: an answer that is preferred to another one, to the same question.

B pairs, a row of a batch each, L places.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from glmjax import ranges
from glmjax import tokens as tokens_lib
from glmjax.train import losses


class Answers(NamedTuple):
  """What a loss sees of one answer of each pair; float32 [B] each."""

  log_prob: jax.Array  # of all its tokens
  tokens: jax.Array  # how many
  reference: jax.Array  # the reference model's log_prob; 0 where there is none


@dataclasses.dataclass(frozen=True)
class DPO:
  """Direct preference optimization (arXiv 2305.18290): against the model without its adapter, the chosen answer gains
  probability on the rejected one.
  """

  compares: ClassVar[bool] = True  # with a reference model
  beta: float = 0.1  # how dear it is to leave the reference model; the paper's

  def __post_init__(self) -> None:
    ranges.number("DPO.beta", self.beta, above=0)

  def loss(self, chosen: Answers, rejected: Answers) -> tuple[jax.Array, jax.Array]:
    """Returns of each pair the loss, and by how much the chosen answer is ahead."""
    ahead = self.beta * ((chosen.log_prob - chosen.reference) - (rejected.log_prob - rejected.reference))
    return jax.nn.softplus(-ahead), ahead


@dataclasses.dataclass(frozen=True)
class ORPO:
  """Odds ratio preference optimization (arXiv 2403.07691): the chosen answer is learned, and its odds are raised above
  the rejected one's; no reference model.
  """

  compares: ClassVar[bool] = False  # with a reference model
  weight: float = 0.1  # of the odds ratio's part; the paper's lambda

  def __post_init__(self) -> None:
    ranges.number("ORPO.weight", self.weight, 0)

  def loss(self, chosen: Answers, rejected: Answers) -> tuple[jax.Array, jax.Array]:
    """Returns of each pair the loss, and by how much the chosen answer is ahead."""
    means = [answers.log_prob / jnp.maximum(answers.tokens, 1.0) for answers in (chosen, rejected)]
    log_odds = [mean - jnp.log(-jnp.expm1(jnp.minimum(mean, -_LEAST))) for mean in means]
    ahead = log_odds[0] - log_odds[1]
    return self.weight * jax.nn.softplus(-ahead) - means[0], ahead


Preference = DPO | ORPO
_LEAST = 1e-6  # nats: an answer that is all but certain has odds of a million, instead of infinite ones


def of_pairs(
  preference: Preference,
  entropy_BL: jax.Array,
  reference_BL: jax.Array | None,
  weights_BL: jax.Array,
  objectives_BL: jax.Array,
) -> tuple[losses.Pairs, jax.Array]:
  """Returns the sums over pairs, and how much their loss grows with each token's cross entropy, float32 [B, L].

  Args:
    preference: the loss.
    entropy_BL: each token's cross entropy.
    reference_BL: the reference model's.
    weights_BL: 1 for the answers' tokens; rows of 0 are no pairs.
    objectives_BL: says which tokens are the chosen answer's, and which are the rejected one's.
  """
  counted_BL = weights_BL != 0
  own = [counted_BL & (objectives_BL == kind) for kind in (tokens_lib.OBJECTIVE_CHOSEN, tokens_lib.OBJECTIVE_REJECTED)]
  there_B = own[0].any(-1) & own[1].any(-1)

  def sums(values_BL: jax.Array | None, mask_BL: jax.Array) -> jax.Array:
    return jnp.zeros(mask_BL.shape[0], jnp.float32) if values_BL is None else jnp.where(mask_BL, values_BL, 0.0).sum(-1)

  def loss_of(chosen_B: jax.Array, rejected_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    answers = [
      Answers(log_prob_B, mask_BL.sum(-1).astype(jnp.float32), -sums(reference_BL, mask_BL))
      for log_prob_B, mask_BL in zip((chosen_B, rejected_B), own, strict=True)
    ]
    loss_B, ahead_B = preference.loss(*answers)
    return jnp.where(there_B, loss_B, 0.0).sum(), ahead_B

  log_probs = [-sums(entropy_BL, mask_BL) for mask_BL in own]
  (loss, ahead_B), slopes = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(*log_probs)
  slopes_BL = sum(jnp.where(mask_BL, -slope_B[:, None], 0.0) for mask_BL, slope_B in zip(own, slopes, strict=True))
  pairs = losses.Pairs(loss, there_B.sum().astype(jnp.float32), (there_B & (ahead_B > 0)).sum().astype(jnp.float32))
  return pairs, slopes_BL
