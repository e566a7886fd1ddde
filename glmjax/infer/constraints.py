"""What a row's next token may not be, or is made less likely to be, by what came before it.

The order is that of transformers' processors: repetition penalty, bias, n-grams, shortest length; temperature and
filters come behind. As in GLM-130B's beam search an n-gram is banned where its last token was generated: the prompt may
be repeated.

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
  """The constraints of a batch: all of them, so that one program serves whatever its rows ask for."""

  min_tokens_B: jax.Array  # int32: no stop token before so many
  ngram_B: jax.Array  # int32: size of the n-grams that come once; 0: any
  tail_BN: jax.Array  # int32: the prompts' last tokens; N is the longest n-gram's size less 1
  penalty_B: jax.Array  # float32
  said_BV: jax.Array  # bool: tokens of the prompts
  bias_BV: jax.Array  # float32: added to the logits


def make(
  prompts: Sequence[prompt_lib.Prompt], samplings: Sequence[sampling.Sampling], batch: int, vocab_size: int
) -> Constraints | None:
  """Makes the constraints of each prompt, in a batch of `batch` rows; None where no prompt has any."""
  rows = [*samplings, *[sampling.Sampling()] * (batch - len(samplings))]
  if not any(row.constrained for row in rows):
    return None
  tail_BN = np.full((batch, sampling.LONGEST_NGRAM - 1), _NOTHING, np.int32)
  said_BV, bias_BV = np.zeros((batch, vocab_size), bool), np.zeros((batch, vocab_size), np.float32)
  for row, prompt in enumerate(prompts):
    last = prompt.tokens[-tail_BN.shape[1] :]
    tail_BN[row, tail_BN.shape[1] - len(last) :] = last
    said_BV[row, prompt.tokens] = True
  for row, settings in enumerate(rows):
    for token, bias in settings.logit_bias:
      bias_BV[row, token] = bias
  return Constraints(
    min_tokens_B=np.array([row.min_tokens for row in rows], np.int32),
    ngram_B=np.array([row.no_repeat_ngram for row in rows], np.int32),
    tail_BN=tail_BN,
    penalty_B=np.array([row.repetition_penalty for row in rows], np.float32),
    said_BV=said_BV,
    bias_BV=bias_BV,
  )


def apply(
  constraints: Constraints, logits_BV: jax.Array, generated_BT: jax.Array, step_B: jax.Array, stops_V: jax.Array
) -> jax.Array:
  """Returns logits as the constraints leave them, float32; `step_B` tokens of each row of `generated_BT` are there."""
  logits_BV = logits_BV.astype(jnp.float32)
  rows_B1 = jnp.arange(len(logits_BV))[:, None]
  vocab = logits_BV.shape[-1]
  there_BT = jnp.where(generated_BT < 0, vocab, generated_BT)  # beyond the vocabulary: dropped
  said_BV = jnp.asarray(constraints.said_BV).at[rows_B1, there_BT].set(True, mode="drop") & ~stops_V
  penalty_B1 = constraints.penalty_B[:, None]
  less_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
  logits_BV = jnp.where(said_BV, less_BV, logits_BV) + constraints.bias_BV
  banned_BT = jnp.where(_completes_ngram(constraints, generated_BT, step_B), generated_BT, vocab)
  logits_BV = logits_BV.at[rows_B1, banned_BT].set(sampling.FILTERED, mode="drop")
  too_soon_B1 = (step_B < constraints.min_tokens_B)[:, None]
  return jnp.where(too_soon_B1 & stops_V, sampling.FILTERED, logits_BV)


def _completes_ngram(constraints: Constraints, generated_BT: jax.Array, step_B: jax.Array) -> jax.Array:
  """Returns bool [B, T]: the generated token stands behind the same tokens as the next one will."""
  text = jnp.concatenate([constraints.tail_BN, generated_BT], axis=1)
  places, size = generated_BT.shape[1], constraints.tail_BN.shape[1]
  same_BT = (jnp.arange(places) < step_B[:, None]) & (constraints.ngram_B > 0)[:, None]

  def compare(i: jax.Array, same_BT: jax.Array) -> jax.Array:  # tokens in front, from the nearest
    now_B1 = jnp.take_along_axis(text, (size + step_B - 1 - i)[:, None], axis=1)
    before_BT = jax.lax.dynamic_slice_in_dim(text, size - 1 - i, places, axis=1)
    return same_BT & ((before_BT == now_B1) | (i + 1 >= constraints.ngram_B)[:, None])

  return jax.lax.fori_loop(0, jnp.max(constraints.ngram_B) - 1, compare, same_BT)
