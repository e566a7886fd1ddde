"""The next token from logits: greedy, temperature, top-k, top-p, in the order of GLM-130B's BaseStrategy.

B batch, V vocabulary, F a few of the likeliest tokens.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from glmjax import errors
from glmjax import ranges

# What the original puts in place of a logit that must not win.
FILTERED = -65504.0
LONGEST_NGRAM = 64  # that can be asked not to come twice
LEAST_PENALTY, MOST_PENALTY = 0.01, 100.0  # of repetition: logits stay finite
_FEW = 128  # tokens that are looked at before all are sorted
_COLDEST = 1e-30  # temperature; what is less is rounded to 0 by some devices
_BLOCK = 128  # tokens whose probabilities are summed first


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one request's tokens are drawn; the default takes the most probable one.

  Raises:
    errors.InputError: for a value out of range.
  """

  temperature: float = 0.0  # 0: greedy; else the logits are divided by it
  top_k: int = 0  # only the k most probable tokens, ties with the k-th included; 0: all
  top_p: float = 1.0  # only the most probable tokens that together reach this probability; 1: all
  min_tokens: int = 0  # before a stop token, in each blank
  no_repeat_ngram: int = 0  # no n-gram of this size is generated twice; 0: as it comes, else 2 or more
  repetition_penalty: float = 1.0  # of tokens that are there already: positive logits divided by it, others times it
  logit_bias: tuple[tuple[int, float], ...] = ()  # what is added to some tokens' logits, -100 to 100 each

  def __post_init__(self) -> None:
    ranges.number("temperature", self.temperature, 0)
    ranges.whole("top_k", self.top_k)
    ranges.number("top_p", self.top_p, above=0, most=1)
    check_repetition(self.min_tokens, self.no_repeat_ngram, self.repetition_penalty)
    for token, bias in self.logit_bias:
      ranges.whole("a token of logit_bias", token)
      ranges.number(f"logit_bias of token {token}", bias, -100, 100)

  @property
  def greedy(self) -> bool:
    return self.temperature == 0 or self.top_k == 1

  @property
  def constrained(self) -> bool:
    """Whether what came before, or a bias, changes the logits."""
    return bool(self.min_tokens or self.no_repeat_ngram or self.repetition_penalty != 1 or self.logit_bias)


def check_repetition(min_tokens: int, no_repeat_ngram: int, repetition_penalty: float) -> None:
  """Raises InputError for a value out of range."""
  ranges.whole("min_tokens", min_tokens)
  ranges.whole("no_repeat_ngram", no_repeat_ngram, 0, LONGEST_NGRAM)
  if no_repeat_ngram == 1:
    raise errors.InputError("no_repeat_ngram is 1: give 0 (as it comes), or 2 and more")
  ranges.number("repetition_penalty", repetition_penalty, LEAST_PENALTY, MOST_PENALTY)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
  """The sampling of a batch: one program serves every value of these, or, a smaller one, greedy rows alone."""

  seeds_B: jax.Array  # uint32: of each row's random key
  temperature_B: jax.Array  # float32; 0: greedy
  top_k_B: jax.Array  # int32; 0: all
  top_p_B: jax.Array  # float32
  greedy: bool = dataclasses.field(metadata={"static": True})  # every row is, and nothing else is compiled


def draws(samplings: Sequence[Sampling], seeds: Sequence[int], any_kind: bool = False) -> Draws:
  """Returns the draws of requests, a row of each; a row's draws depend on its own seed alone.

  With `any_kind` they are for the program that serves every kind, even where all rows are greedy.
  """
  assert len(samplings) == len(seeds), (len(samplings), len(seeds))
  return Draws(
    seeds_B=np.array([seed % 2**32 for seed in seeds], np.uint32),
    temperature_B=np.array([0.0 if s.greedy else s.temperature for s in samplings], np.float32),
    top_k_B=np.array([s.top_k for s in samplings], np.int32),
    top_p_B=np.array([s.top_p for s in samplings], np.float32),
    greedy=not any_kind and all(s.greedy for s in samplings),
  )


def filter_logits(logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
  """Returns logits with the tokens that top-k, then top-p of what is left, rule out at FILTERED.

  To sort a whole vocabulary takes longer than all else here, so the likeliest F tokens are looked at first:
  where the last of them is ruled out, so is all that comes behind it.
  """
  few = min(_FEW, logits_BV.shape[-1])
  # The lower id of equal ones first. Without a barrier XLA takes its slices apart, and sorts them all; with one for
  # both, XLA for CPUs aborts where the vocabulary is split over devices.
  sorted_BF, order_BF = map(jax.lax.optimization_barrier, jax.lax.top_k(logits_BV, few))
  all_B = top_k_B == 0
  kth_B1 = jnp.take_along_axis(sorted_BF, jnp.clip(top_k_B, 1, few)[:, None] - 1, axis=-1)
  kept_BF = all_B[:, None] | (sorted_BF >= kth_B1)
  odds_BF = jnp.where(kept_BF, jnp.exp(sorted_BF - sorted_BF[:, :1]), 0)
  total_B = jnp.where(all_B, jnp.exp(logits_BV - sorted_BF[:, :1]).sum(-1), odds_BF.sum(-1))
  stays_BF = kept_BF & _within(odds_BF / total_B[:, None], top_p_B)
  found_BV = jnp.put_along_axis(
    jnp.full_like(logits_BV, FILTERED), order_BF, jnp.where(stays_BF, sorted_BF, FILTERED), axis=-1, inplace=False
  )
  unfiltered_B = all_B & (top_p_B >= 1)
  if few < logits_BV.shape[-1]:
    more_B = jnp.where(all_B, stays_BF[:, -1], kept_BF[:, -1]) & ~unfiltered_B

    def sort() -> jax.Array:  # the other rows stay as they are alone: the two ways' sums round apart
      return jnp.where(more_B[:, None], _filter_sorted(logits_BV, top_k_B, top_p_B), found_BV)

    found_BV = jax.lax.cond(more_B.any(), sort, lambda: found_BV)
  return jnp.where(unfiltered_B[:, None], logits_BV, found_BV)


def _filter_sorted(logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
  """Computes `filter_logits` by way of all tokens in order."""
  vocab = logits_BV.shape[-1]
  order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)  # stable: the lower id of equal ones first
  sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
  last_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, vocab), vocab) - 1
  kth_B1 = jnp.take_along_axis(sorted_BV, last_B[:, None], axis=-1)
  sorted_BV = jnp.where(sorted_BV < kth_B1, FILTERED, sorted_BV)
  sorted_BV = jnp.where(_within(jax.nn.softmax(sorted_BV, axis=-1), top_p_B), sorted_BV, FILTERED)
  return jnp.put_along_axis(logits_BV, order_BV, sorted_BV, axis=-1, inplace=False)


def _within(probs: jax.Array, top_p_B: jax.Array) -> jax.Array:
  """Tells whether tokens in order of their probabilities, [B, ...], belong to the first that together reach p."""
  # A token stays while those before it have not gone beyond p: the one that crosses p stays too.
  before = jnp.cumsum(probs, axis=-1) - probs
  stays = (before <= top_p_B[:, None]) | (top_p_B[:, None] >= 1)
  return stays.at[:, 0].set(True)


def sample(logits_BV: jax.Array, suppressed_V: jax.Array, draws: Draws, step_B: jax.Array) -> jax.Array:
  """Draws tokens int32 [B]; `suppressed_V` (bool) never come out, `step_B` counts the draws of each row.

  What no row asks for is compiled, unless all are greedy, and passed over when the program runs.
  """
  allowed_BV = jnp.where(suppressed_V, FILTERED, logits_BV.astype(jnp.float32))
  greedy_B = jnp.argmax(allowed_BV, axis=-1).astype(jnp.int32)
  if draws.greedy:
    return greedy_B
  warm_B = draws.temperature_B > 0
  filters_B = warm_B & ((draws.top_k_B > 0) | (draws.top_p_B < 1))

  def draw() -> jax.Array:
    # Less the largest, so that the likeliest one stays at 0 whatever it is divided by.
    temperature_B = jnp.where(warm_B, jnp.maximum(draws.temperature_B, _COLDEST), 1.0)
    warmed_BV = (allowed_BV - allowed_BV.max(-1, keepdims=True)) / temperature_B[:, None]
    warmed_BV = jnp.where(suppressed_V, FILTERED, warmed_BV)
    filtered_BV = jax.lax.cond(
      filters_B.any(), lambda: filter_logits(warmed_BV, draws.top_k_B, draws.top_p_B), lambda: warmed_BV
    )
    return jnp.where(warm_B, jax.vmap(_draw)(draws.seeds_B, step_B, filtered_BV), greedy_B)

  return jax.lax.cond(warm_B.any(), draw, lambda: greedy_B)


def _draw(seed: jax.Array, step: jax.Array, logits_V: jax.Array) -> jax.Array:
  """Draws one row's token; depends on its seed, step and logits alone.

  One number is drawn: the token is where the sum of probabilities passes it, found among sums of blocks first. A number
  for each token, as in jax.random.categorical, takes as long on a CPU as a layer does.
  """
  weights_V = jnp.exp(logits_V - logits_V.max())
  weights_NW = jnp.pad(weights_V, (0, -len(weights_V) % _BLOCK)).reshape(-1, _BLOCK)
  sums_N = jnp.cumsum(weights_NW.sum(1))
  number = sums_N[-1] * jax.random.uniform(jax.random.fold_in(jax.random.key(seed), step))
  block = _passes(sums_N, weights_NW.sum(1), number)
  before = jnp.where(block > 0, sums_N[block - 1], 0)
  weights_W = weights_NW[block]
  token = block * _BLOCK + _passes(jnp.cumsum(weights_W), weights_W, number - before)
  return jnp.minimum(token, len(logits_V) - 1)  # of logits that are not finite, which ends the answer elsewhere


def _passes(sums: jax.Array, weights: jax.Array, number: jax.Array) -> jax.Array:
  """Returns the first place, of those that weigh anything, where the running sum is above a number; or the last."""
  weighs = weights > 0  # sums are rounded, also where nothing is added
  passes = weighs & (sums > number)
  last = len(weights) - 1 - jnp.argmax(weighs[::-1])
  return jnp.where(passes.any(), jnp.argmax(passes), last).astype(jnp.int32)
