"""What a row's next token may not be, or is made less likely to be, by what came before it.

The order is that of transformers' processors: repetition penalty, n-grams, shortest length; temperature and filters
come behind. As in GLM-130B's beam search an n-gram is banned where its last token was generated: the prompt may be
repeated.

B batch, T generated tokens, N a few of the prompt's last tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.infer import prompt as prompt_lib
from glmjax.infer import sampling

_NOTHING = -1  # in front of a prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constraints:
  """The constraints of a batch; None in place of what no row asks for."""

  min_tokens_B: jax.Array | None  # int32: no stop token before so many
  ngram_B: jax.Array | None  # int32: size of the n-grams that come once; 0: any
  tail_BN: jax.Array | None  # int32: the prompts' last tokens; N is the longest n-gram's size less 1
  penalty_B: jax.Array | None  # float32
  said_BV: jax.Array | None  # bool: tokens of the prompts


def make(
  prompts: Sequence[prompt_lib.Prompt], samplings: Sequence[sampling.Sampling], batch: int, vocab_size: int
) -> Constraints | None:
  """Makes the constraints of each prompt, in a batch of `batch` rows; None where no prompt has any."""
  filling = [sampling.Sampling()] * (batch - len(samplings))
  rows = [*samplings, *filling]
  longest = max(row.no_repeat_ngram for row in rows)
  shortest, penalized = any(row.min_tokens for row in rows), any(row.repetition_penalty != 1 for row in rows)
  if not longest and not shortest and not penalized:
    return None
  tail_BN = np.full((batch, max(0, longest - 1)), _NOTHING, np.int32)
  said_BV = np.zeros((batch, vocab_size), bool)
  for row, prompt in enumerate(prompts):
    last = prompt.tokens[-tail_BN.shape[1] :] if longest > 1 else []
    tail_BN[row, tail_BN.shape[1] - len(last) :] = last
    said_BV[row, prompt.tokens] = True
  return Constraints(
    min_tokens_B=np.array([row.min_tokens for row in rows], np.int32) if shortest else None,
    ngram_B=np.array([row.no_repeat_ngram for row in rows], np.int32) if longest else None,
    tail_BN=tail_BN if longest else None,
    penalty_B=np.array([row.repetition_penalty for row in rows], np.float32) if penalized else None,
    said_BV=said_BV if penalized else None,
  )


def apply(
  constraints: Constraints, logits_BV: jax.Array, generated_BT: jax.Array, step_B: jax.Array, stops_V: jax.Array
) -> jax.Array:
  """Returns logits as the constraints leave them, float32; `step_B` tokens of each row of `generated_BT` are there."""
  logits_BV = logits_BV.astype(jnp.float32)
  rows_B1 = jnp.arange(len(logits_BV))[:, None]
  vocab = logits_BV.shape[-1]
  if constraints.penalty_B is not None:
    there_BT = jnp.where(generated_BT < 0, vocab, generated_BT)  # beyond the vocabulary: dropped
    said_BV = jnp.asarray(constraints.said_BV).at[rows_B1, there_BT].set(True, mode="drop") & ~stops_V
    penalty_B1 = constraints.penalty_B[:, None]
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where(said_BV, less_BV, logits_BV)
  if constraints.ngram_B is not None:
    banned_BT = jnp.where(_completes_ngram(constraints, generated_BT, step_B), generated_BT, vocab)
    logits_BV = logits_BV.at[rows_B1, banned_BT].set(sampling.FILTERED, mode="drop")
  if constraints.min_tokens_B is not None:
    too_soon_B1 = (step_B < constraints.min_tokens_B)[:, None]
    logits_BV = jnp.where(too_soon_B1 & stops_V, sampling.FILTERED, logits_BV)
  return logits_BV


def _completes_ngram(constraints: Constraints, generated_BT: jax.Array, step_B: jax.Array) -> jax.Array:
  """Returns bool [B, T]: the generated token stands behind the same tokens as the next one will."""
  text = jnp.concatenate([constraints.tail_BN, generated_BT], axis=1)
  places, size = generated_BT.shape[1], constraints.tail_BN.shape[1]
  same_BT = (jnp.arange(places) < step_B[:, None]) & (constraints.ngram_B > 0)[:, None]
  for i in range(size):  # tokens in front, from the nearest
    now_B1 = jnp.take_along_axis(text, (size + step_B - 1 - i)[:, None], axis=1)
    before_BT = text[:, size - 1 - i : size - 1 - i + places]
    same_BT &= (before_BT == now_B1) | (i + 1 >= constraints.ngram_B)[:, None]
  return same_BT
