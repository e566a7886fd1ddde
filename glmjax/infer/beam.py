"""Beam search as GLM-130B's BeamSearchStrategy does it, deterministic.

The model runs on the device; which beams live on is decided on the host, where each beam is a list of
tokens. Peculiarities kept for parity: lengths count the prompt; n-grams are banned only where the search
itself made them; an ended beam counts only among the best (ends + 1) * beams candidates of its step.

B beams of all prompts, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmjax import ranges
from glmjax.infer import decode
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import rows as rows_lib
from glmjax.infer import runner as runner_lib
from glmjax.infer import sampling
from glmjax.models import config as config_lib
from glmjax.parallel import partitioning


@dataclasses.dataclass(frozen=True)
class BeamSearch:
  """What to search for; the defaults are those of GLM-130B's scripts/generate.sh, but for n-grams."""

  num_beams: int = 4
  length_penalty: float = 1.0  # scores are divided by ((5 + length) / 6) to this power
  no_repeat_ngram: int = 0  # no n-gram of this size twice; 0: as it comes, else 2 or more
  min_tokens: int = 0  # before a stop token
  stop_early: bool = True  # keep beams that end; False: stop tokens only end the search
  repetition_penalty: float = 1.0  # of tokens that are there already, as sampling.Sampling has it

  def __post_init__(self) -> None:
    ranges.whole("num_beams", self.num_beams, 1, 64)
    ranges.number("length_penalty", self.length_penalty, -100, 100)
    sampling.check_repetition(self.min_tokens, self.no_repeat_ngram, self.repetition_penalty)


@dataclasses.dataclass(frozen=True)
class Beam:
  """A sequence with its prompt, and its score divided by the length penalty."""

  tokens: list[int]
  score: float


@dataclasses.dataclass(frozen=True)
class Ids:
  """What some ids of the vocabulary mean to a search."""

  stops: Sequence[int]  # end an answer
  pad: int  # fills rows up
  suppressed_V: np.ndarray | None = None  # bool: never come out
  banned_beginnings: Sequence[Sequence[int]] = ()  # with none of these an answer begins


class Search:
  """One prompt's beams: `advance` with the model's logits, best first in `result`."""

  def __init__(self, settings: BeamSearch, prompt: Sequence[int], ids: Ids):
    self.settings = settings
    self.live = [list(prompt)]  # one at first: all beams would be the same
    self.scores = np.zeros(1, np.float32)
    self.ended: list[Beam] = []
    self.done = False
    self._stops = list(ids.stops)
    self._ids = ids
    self._prompt_length = len(prompt)
    self._bans: list[dict[tuple[int, ...], list[int]]] = [{}]

  def advance(self, logits_BV: np.ndarray) -> list[int]:
    """Moves on by one token; returns the beams that the live ones continue."""
    settings = self.settings
    log_probs_BV = _log_softmax(self._masked(np.array(logits_BV, np.float32)))
    totals = (log_probs_BV + self.scores[:, None]).ravel()
    count = min((max(1, len(self._stops)) + 1) * settings.num_beams, totals.size)
    best = np.argpartition(-totals, count - 1)[:count]
    best = best[np.argsort(-totals[best], kind="stable")]
    size = log_probs_BV.shape[1]
    live, scores, parents, bans = [], [], [], []
    for candidate in best.tolist():
      parent, token = divmod(candidate, size)
      if not self.done and token in self._stops:
        self._end(self.ended, [*self.live[parent], token], totals[candidate])
      elif len(live) == settings.num_beams:
        break
      else:
        live.append([*self.live[parent], token])
        scores.append(totals[candidate])
        parents.append(parent)
        bans.append(self._banned_after(parent, token))
    self.live, self.scores, self._bans = live, np.array(scores, np.float32), bans
    # Done when none of the live ones, ending now, would beat the worst that ended.
    self.done |= len(self.ended) == settings.num_beams and self.ended[-1].score >= self.scores.max() / self._penalty(
      len(live[0])
    )
    return parents

  def result(self) -> list[Beam]:
    """Returns ended beams, with the live ones among them unless the search is done; best first."""
    if not self.settings.stop_early:
      return [Beam(tokens, float(score)) for tokens, score in zip(self.live, self.scores)]
    ended = list(self.ended)
    if not self.done:
      for tokens, score in zip(self.live, self.scores):
        self._end(ended, tokens, score)
    return ended

  def _masked(self, logits_BV: np.ndarray) -> np.ndarray:
    settings = self.settings
    if settings.repetition_penalty != 1:
      for row, tokens in enumerate(self.live):
        said = list({*tokens} - {*self._stops})
        of_said = logits_BV[row, said]
        logits_BV[row, said] = np.where(
          of_said > 0, of_said / settings.repetition_penalty, of_said * settings.repetition_penalty
        )
    if self._ids.suppressed_V is not None:
      logits_BV[:, self._ids.suppressed_V] = sampling.FILTERED
    for banned in self._ids.banned_beginnings:
      for row, tokens in enumerate(self.live):
        if tokens[self._prompt_length :] == list(banned[:-1]):
          logits_BV[row, banned[-1]] = sampling.FILTERED
    if len(self.live[0]) - self._prompt_length < settings.min_tokens:
      logits_BV[:, self._stops] = sampling.FILTERED
    if settings.no_repeat_ngram and len(self.live[0]) > settings.no_repeat_ngram:
      for row, (tokens, bans) in enumerate(zip(self.live, self._bans)):
        logits_BV[row, bans.get(tuple(tokens[1 - settings.no_repeat_ngram :]), [])] = sampling.FILTERED
    return logits_BV

  def _banned_after(self, parent: int, token: int) -> dict[tuple[int, ...], list[int]]:
    if not self.settings.no_repeat_ngram:
      return {}
    prefix = tuple(self.live[parent][1 - self.settings.no_repeat_ngram :])
    bans = self._bans[parent]
    return bans | {prefix: [*bans.get(prefix, []), token]}

  def _penalty(self, length: int) -> float:
    return ((5.0 + length) / 6) ** self.settings.length_penalty

  def _end(self, ended: list[Beam], tokens: list[int], score: float) -> None:
    """Adds a beam where it belongs, best first; what goes beyond `num_beams` is dropped."""
    beam = Beam(tokens, float(score / self._penalty(len(tokens))))
    ended.insert(sum(beam.score < other.score for other in ended), beam)
    del ended[self.settings.num_beams :]


def _log_softmax(logits_BV: np.ndarray) -> np.ndarray:
  shifted = logits_BV - logits_BV.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def step(
  config: config_lib.GLMConfig,
  params: Any,
  rows: decode.Rows,
  state: decode.State,
  parents_B: jax.Array,
  tokens_B: jax.Array,
) -> tuple[jax.Array, decode.State]:
  """Returns logits [B, V] behind `tokens_B`, each read behind the cache of its parent."""
  state = dataclasses.replace(decode.take_state(state, parents_B), last_B=tokens_B)
  logits_BV, cache = decode.next_logits(config, params, rows, state)
  # Whole on every device: the host of each process looks at them all.
  return partitioning.constrain(logits_BV, None, None), decode.constrain(
    dataclasses.replace(state, cache=cache, length_B=state.length_B + 1, step_B=state.step_B + 1)
  )


@functools.partial(jax.jit, static_argnames=("config", "times"))
def repeat(config: config_lib.GLMConfig, params: Any, state: decode.State, times: int) -> decode.State:
  """Returns the state with every row there so many times, side by side."""
  del config, params
  return decode.take_state(state, jnp.repeat(jnp.arange(len(state.last_B)), times))


def search(
  runner: runner_lib.Runner,
  prompts: Sequence[prompt_lib.Prompt],
  max_tokens: int,
  settings: BeamSearch,
  ids: Ids,
  counted: Sequence[Sequence[int]] | None = None,
) -> list[list[Beam]]:
  """Returns each prompt's best beams, of up to `max_tokens` new tokens, stop token included.

  `counted`: what stands in a prompt's place where its length and its n-grams count, and in its beams: the prompt as a
  program of fixed shapes had it, with padding; None: the prompt itself.
  """
  n = settings.num_beams
  batch, rows = decode.make_rows(prompts, [max_tokens] * len(prompts), ids.pad, runner.batch_size(len(prompts)))
  state = runner.run(decode.prefill, batch, rows, new_tokens=rows_lib.bucket(max_tokens))
  num_rows = len(rows.limit_B)
  rows = jax.tree.map(lambda x: np.repeat(x, n, axis=0), rows)
  state = runner.run(repeat, state, times=n)
  searches = [Search(settings, tokens, ids) for tokens in counted or [p.tokens for p in prompts]]
  parents, tokens = np.arange(num_rows * n, dtype=np.int32), rows.last_B.copy()
  for _ in range(max_tokens):
    if all(s.done for s in searches):
      break
    logits, state = runner.run(step, rows, state, parents, tokens)
    logits = np.asarray(logits)
    decode.check_finite(
      [np.isfinite(logits[i * n : i * n + len(s.live)]).all() for i, s in enumerate(searches) if not s.done]
    )
    for i, s in enumerate(searches):
      if not s.done:
        own = slice(i * n, i * n + len(s.live))
        parents[i * n : (i + 1) * n] = np.resize(i * n + np.array(s.advance(logits[own])), n)
        tokens[i * n : (i + 1) * n] = np.resize([beam[-1] for beam in s.live], n)
  return [s.result() for s in searches]
