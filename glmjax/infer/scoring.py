"""The programs that score rows, in batches of few shapes.

Logits are made for the scored places only, and chunk by chunk. Equal prompts are read once. What several rows have in
view from both sides, as the choices of one question have their context, is read once: each then reads its own tokens
behind the cache of that.

B batch, C continuations of each context, N = B C, L length, S scored places of a row, D model, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from glmjax import errors
from glmjax.infer import decode
from glmjax.infer import lanes as lanes_lib
from glmjax.infer import offload
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import readings as readings_lib
from glmjax.infer import rows as rows_lib
from glmjax.infer import runner as runner_lib
from glmjax.infer import score
from glmjax.infer import vocabulary
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import kv_cache
from glmjax.models import lowrank
from glmjax.parallel import partitioning
from glmjax.parallel import processes

_CHUNK_LOGITS = 1 << 23  # most logits that exist at a time
_TOKENS = 4096  # of a batch
_CPU_TOKENS = 1024  # a CPU's caches hold what is between the layers: 10 % less time a token than with 4,096
_BLOCK, _CPU_BLOCK = 128, 32  # places: those of the flash kernels and of a TPU's matrices; a CPU's products take any
_ENTRIES = 8  # fewest that programs have for a row: one logit more costs less than one program more
_CONTINUATIONS = 16  # most of one context in one batch
_CACHE_SHARE = 4  # caches of contexts take one part of so many of the memory that is free

_Item = TypeVar("_Item")
# Log-probabilities float32 and correctness bool [B, S]; the likeliest tokens and their log-probabilities [B, S, top].
Figures = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class Scored(NamedTuple):
  """What is scored in each row; int32 [B, S]."""

  places: np.ndarray
  targets: np.ndarray


@functools.partial(jax.jit, static_argnames=("config", "top"))
def log_probs(
  config: config_lib.GLMConfig, params: Any, batch: rows_lib.Batch, scored: Scored, unguessed_V: jax.Array, top: int = 0
) -> Figures:
  """Returns the figures of what is scored in each row, [B, S] and [B, S, top]."""
  decode.check_rows(batch)
  chex.assert_equal_shape_prefix([batch.tokens, scored.targets], 1)
  model, params = glm.GLM(config), lowrank.for_rows(offload.fetch(params), batch.adapter)
  positions = config.position_kind.of_model(batch.positions)
  x_BLD, _ = model.apply({"params": params}, batch.tokens, positions, batch.start, batch.end, method="hidden")
  return _score(config, params, x_BLD, scored, unguessed_V, top)


@functools.partial(jax.jit, static_argnames=("config", "top"))
def log_probs_behind(
  config: config_lib.GLMConfig,
  params: Any,
  contexts: rows_lib.Batch,
  continuations: rows_lib.Batch,
  scored: Scored,
  unguessed_V: jax.Array,
  top: int = 0,
) -> Figures:
  """Returns the figures of what is scored in continuations, [N, S] and [N, S, top], of which each context has C.

  What `continuations` says of the interval that its tokens see counts from the context's beginning.
  """
  for batch in (contexts, continuations):
    decode.check_rows(batch)
  chex.assert_equal_shape_prefix([continuations.tokens, scored.targets], 1)
  model, params = glm.GLM(config), offload.fetch(params)
  of_model = config.position_kind.of_model
  _, cache = model.apply(
    {"params": lowrank.for_rows(params, contexts.adapter)},
    contexts.tokens,
    of_model(contexts.positions),
    contexts.start,
    contexts.end,
    cache=kv_cache.empty(partitioning.target(), config, len(contexts.tokens), 0),
    method="hidden",
  )
  rows, places = continuations.tokens.shape
  context_N = jnp.arange(rows) // (rows // len(contexts.tokens))
  x_NLD, _ = model.apply(
    {"params": lowrank.for_rows(params, continuations.adapter)},
    continuations.tokens,
    of_model(continuations.positions),
    continuations.start,
    continuations.end,
    cache=decode.extend(decode.take_rows(cache, context_N), places),
    lengths_B=continuations.end[:, 0] - 1,
    method="hidden",
  )
  return _score(config, params, x_NLD, scored, unguessed_V, top)


def _score(
  config: config_lib.GLMConfig, params: Any, x_BLD: jax.Array, scored: Scored, unguessed_V: jax.Array, top: int
) -> Figures:
  """Returns the figures of targets from what a model's head reads."""
  rows, places = scored.targets.shape
  x_BSD = jnp.take_along_axis(x_BLD, scored.places[..., None], axis=1)
  chunk = places
  while chunk % 2 == 0 and rows * chunk * config.vocab_size > _CHUNK_LOGITS:
    chunk //= 2

  def of_chunk(x_targets: tuple[jax.Array, jax.Array]) -> Figures:
    x_BCD, targets_BC = x_targets
    logits_BCV = glm.GLM(config).apply({"params": params}, x_BCD, method="head")
    chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    sums_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    guesses_BC = jnp.argmax(jnp.where(unguessed_V, -jnp.inf, logits_BCV), axis=-1)
    found_BCK, ids_BCK = jax.lax.top_k(logits_BCV, top)
    return chosen_BC - sums_BC, guesses_BC == targets_BC, ids_BCK, found_BCK - sums_BC[..., None]

  def split(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x.reshape(rows, places // chunk, chunk, *x.shape[2:]), 1, 0)

  def join(x: jax.Array) -> jax.Array:  # whole on every device: the host of each process looks at them all
    x = jnp.moveaxis(x, 0, 1)
    x = x.reshape(rows, places, *x.shape[3:])
    return partitioning.constrain(x, *[None] * x.ndim)

  return jax.tree.map(join, jax.lax.map(of_chunk, (split(x_BSD), split(scored.targets))))


def score_rows(
  runner: runner_lib.Runner,
  rows: Sequence[score.Row],
  pad: int,
  batch_tokens: int | None = None,
  progress: Callable[[int], Any] | None = None,
  unguessed: Collection[int] = (),
  top: int = 0,
) -> list[score.Score]:
  """Returns each row's score, in order.

  Args:
    runner: the model; its caches are exact here, so that a row has one score, with others of its context and alone.
    rows: what is scored; those of like length share a batch, those of one prompt or context its reading.
    pad: an id that fills rows up.
    batch_tokens: about how many tokens run at a time; None: as many as the platform does well with.
    progress: is told the number of tokens done after each batch.
    unguessed: ids that are passed over when the most probable token is looked for; they keep their probability.
    top: how many of the likeliest tokens are told.

  Raises:
    errors.InputError: for a row that is too long, or holds no ids; NotFiniteError where the model's logits are none.
  """
  runner = runner.with_exact_caches()
  for row in rows:
    _check(row, runner.config)
  unguessed_V = vocabulary.mask(unguessed, runner.config.vocab_size)
  scores: list[score.Score | None] = [None] * len(rows)
  batch_tokens = batch_tokens or (_CPU_TOKENS if _on_cpu(runner) else _TOKENS)
  for program, arguments, read in _Batches(runner, pad, batch_tokens).of(rows):
    found = runner.run(program, *arguments, unguessed_V, top=min(top, runner.config.vocab_size))
    probs, correct, ids, top_probs = map(np.asarray, found)
    decode.check_finite([np.isfinite(probs[at, : each.scored]).all() for at, each in read.items()])
    for at, each in read.items():
      for (i, _), (_, of) in zip(each.rows, each.targets(), strict=True):
        places_top = zip(ids[at, of].tolist(), top_probs[at, of].tolist())
        scores[i] = score.Score(probs[at, of], correct[at, of], [list(zip(*pair)) for pair in places_top])
    if progress is not None:
      progress(sum(len(rows[i].prompt.tokens) for each in read.values() for i, _ in each.rows))
  return scores


def _check(row: score.Row, config: config_lib.GLMConfig) -> None:
  length = len(row.prompt.tokens)
  assert 0 < len(row.targets) <= length, (len(row.targets), length)
  if length > config.max_length:
    raise errors.InputError(
      f"a text to score takes {length} places, and the model has {config.max_length}: "
      "shorten it, or score it in windows"
    )
  prompt_lib.check_ids([*row.prompt.tokens, *row.targets], config.vocab_size)


# A program, its arguments but for the last, and what is read in rows of the batch, by their numbers; others fill it up.
_Batch = tuple[Callable[..., Figures], tuple[Any, ...], dict[int, readings_lib.Reading]]


@dataclasses.dataclass(frozen=True)
class _Batches:
  """Makes the batches of readings: about `tokens` tokens each, filled up with `pad`."""

  runner: runner_lib.Runner
  pad: int
  tokens: int

  def of(self, rows: Sequence[score.Row]) -> Iterator[_Batch]:
    """Yields the batches in which rows are scored."""
    alone, families = readings_lib.of(rows)
    groups: dict[tuple[int, int], list[list[readings_lib.Reading]]] = {}
    for members in families:
      for first in range(0, len(members), _CONTINUATIONS):
        some = members[first : first + _CONTINUATIONS]
        shape = rows_lib.bucket(max(each.answer for each in some), 1), rows_lib.bucket(len(some), 1)
        groups.setdefault(shape, []).append(some)
    free = processes.from_first(self.runner.free_bytes) if groups else None  # all run batches of one shape
    for (places, continuations), group in sorted(groups.items()):
      room = None if free is None else free // (_CACHE_SHARE * lanes_lib.slot_bytes(self.runner, continuations))
      slots = self.tokens if room is None else min(self.tokens, room)
      fit: list[list[readings_lib.Reading]] = []
      for some in group:
        if room is None or self._length(some[0].context) + places <= room:
          fit.append(some)
        else:
          alone += some
      yield from self._behind(fit, places, continuations, slots)
    yield from self._alone(alone)

  def _alone(self, readings: Sequence[readings_lib.Reading]) -> Iterator[_Batch]:
    """Yields the batches of prompts that are read from their beginnings."""
    groups: dict[int, list[readings_lib.Reading]] = {}
    for each in readings:
      groups.setdefault(rows_lib.bucket(each.scored, _ENTRIES), []).append(each)
    for entries, group in sorted(groups.items()):
      for length, size, some in self._cut(group, lambda each: each.length, 0, self.tokens):
        read = dict(enumerate(some))
        batch = rows_lib.pad([each.prompt for each in some], self.pad, size, length)
        yield log_probs, (batch, _scored(read, size, entries)), read

  def _behind(
    self, families: Sequence[list[readings_lib.Reading]], places: int, continuations: int, slots: int
  ) -> Iterator[_Batch]:
    """Yields the batches of prompts that are read behind contexts which they have in common."""
    for length, size, some in self._cut(families, lambda members: members[0].context, places, slots):
      read = {i * continuations + j: each for i, members in enumerate(some) for j, each in enumerate(members)}
      contexts = rows_lib.pad([members[0].head for members in some], self.pad, size, length)
      batch = _continuations(read, self.pad, size * continuations, places)
      entries = rows_lib.bucket(max(each.scored for each in read.values()), _ENTRIES)
      yield log_probs_behind, (contexts, batch, _scored(read, size * continuations, entries, behind=True)), read

  def _cut(
    self, items: Sequence[_Item], length_of: Callable[[_Item], int], more: int, most: int
  ) -> Iterator[tuple[int, int, Sequence[_Item]]]:
    """Yields batches, the longest first: a length, a size, and what they hold; only the last may have room.

    Args:
      items: what is read.
      length_of: how many tokens of one are read together.
      more: how many are added behind them.
      most: about how many tokens a batch has.
    """
    waiting, first = sorted(items, key=length_of, reverse=True), 0
    while first < len(waiting):
      length = self._length(length_of(waiting[first]))
      size = max(1, most // (length + more))
      size = self.runner.batch_size(min(len(waiting) - first, 1 << size.bit_length() - 1))
      yield length, size, waiting[first : first + size]
      first += size

  def _length(self, size: int) -> int:
    """Returns the next length that there are programs for, with mostly an eighth of padding or less.

    Batches of long prompts cost more than programs to compile: lengths are finer than those of rows that decode.
    """
    block = _CPU_BLOCK if _on_cpu(self.runner) else _BLOCK
    if size <= block:
      return rows_lib.bucket(size)
    step = max(block, 1 << (size - 1).bit_length() - 3)
    return -(-size // step) * step


def _continuations(read: Mapping[int, readings_lib.Reading], pad: int, size: int, places: int) -> rows_lib.Batch:
  """Makes `size` rows of `places` tokens behind their contexts; those that only fill the batch read padding."""
  tokens = np.full((size, places), pad, np.int32)
  positions = np.zeros((size, 2, places), np.int32)
  firsts, adapter = np.zeros((size, 1), np.int32), np.zeros(size, np.int32)
  for at, each in read.items():
    tokens[at, : each.answer] = each.prompt.tokens[each.context :]
    positions[at, :, : each.answer] = each.prompt.positions[:, each.context :]
    firsts[at], adapter[at] = each.context, each.prompt.adapter
  ends = firsts + np.arange(1, places + 1, dtype=np.int32)  # padding sees what is before it, too: nobody looks at it
  return rows_lib.Batch(tokens, positions, np.zeros_like(ends), ends, adapter)


def _scored(read: Mapping[int, readings_lib.Reading], size: int, entries: int, behind: bool = False) -> Scored:
  """Makes `size` rows of what is scored, in places that count from the prompt's beginning, or `behind` its context."""
  scored = Scored(np.zeros((size, entries), np.int32), np.zeros((size, entries), np.int32))
  for at, each in read.items():
    for targets, of in each.targets():
      first = each.length - len(targets) - (each.context if behind else 0)
      scored.places[at, of] = first + np.arange(len(targets))
      scored.targets[at, of] = targets
  return scored


def _on_cpu(runner: runner_lib.Runner) -> bool:
  return runner.placement.target.platform == "cpu"
