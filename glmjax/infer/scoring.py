"""The programs that score rows, in large fixed batches.

Logits are made for the scored places only, and chunk by chunk. What several rows have in view from both sides, as the
choices of one question have their context, is read once: each then reads its own tokens behind the cache of that.

B batch, L length, N continuations, S scored places, D model, V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from glmjax import errors
from glmjax.infer import decode
from glmjax.infer import lanes as lanes_lib
from glmjax.infer import offload
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import rows as rows_lib
from glmjax.infer import runner as runner_lib
from glmjax.infer import score
from glmjax.infer import vocabulary
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import kv_cache
from glmjax.parallel import partitioning
from glmjax.parallel import processes

_CHUNK_LOGITS = 1 << 23  # most logits that exist at a time
_CONTINUATIONS = 4  # of a batch, for each of its contexts
_CACHE_SHARE = 4  # caches of contexts take one part of so many of the memory that is free

_Scored = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(jax.jit, static_argnames=("config", "top"))
def log_probs(
  config: config_lib.GLMConfig,
  params: Any,
  batch: rows_lib.Batch,
  targets_BS: jax.Array,
  first_B: jax.Array,
  unguessed_V: jax.Array,
  top: int = 0,
) -> _Scored:
  """Returns log-probabilities float32 and correctness bool, [B, S], of targets at S places of each row from
  `first_B` on; then the `top` likeliest tokens there and their log-probabilities, [B, S, top].
  """
  decode.check_rows(batch)
  chex.assert_rank([targets_BS, first_B], [2, 1])
  chex.assert_equal_shape_prefix([batch.tokens, targets_BS, first_B], 1)
  model, params = glm.GLM(config), offload.fetch(params)
  positions = config.position_kind.of_model(batch.positions)
  x_BLD, _ = model.apply({"params": params}, batch.tokens, positions, batch.start, batch.end, method="hidden")
  at_BS = jnp.minimum(first_B[:, None] + jnp.arange(targets_BS.shape[1]), x_BLD.shape[1] - 1)
  return _score(config, params, jnp.take_along_axis(x_BLD, at_BS[..., None], axis=1), targets_BS, unguessed_V, top)


@functools.partial(jax.jit, static_argnames=("config", "top"))
def log_probs_behind(
  config: config_lib.GLMConfig,
  params: Any,
  contexts: rows_lib.Batch,
  context_N: jax.Array,
  continuations: rows_lib.Batch,
  targets_NS: jax.Array,
  unguessed_V: jax.Array,
  top: int = 0,
) -> _Scored:
  """Returns what `log_probs` does, [N, S] and [N, S, top], of continuations that are scored on each of their tokens.

  Continuation n is read behind the context `context_N[n]` of the batch; what `continuations` says of the interval that
  its tokens see counts from the context's beginning.
  """
  for batch in (contexts, continuations):
    decode.check_rows(batch)
  chex.assert_equal_shape([continuations.tokens, targets_NS])
  chex.assert_equal_shape_prefix([continuations.tokens, context_N], 1)
  model, params = glm.GLM(config), offload.fetch(params)
  of_model = config.position_kind.of_model
  _, cache = model.apply(
    {"params": params},
    contexts.tokens,
    of_model(contexts.positions),
    contexts.start,
    contexts.end,
    cache=kv_cache.empty(partitioning.target(), config, len(contexts.tokens), 0),
    method="hidden",
  )
  cache = decode.extend(decode.take_rows(cache, context_N), targets_NS.shape[1])
  x_NSD, _ = model.apply(
    {"params": params},
    continuations.tokens,
    of_model(continuations.positions),
    continuations.start,
    continuations.end,
    cache=cache,
    lengths_B=continuations.end[:, 0] - 1,
    method="hidden",
  )
  return _score(config, params, x_NSD, targets_NS, unguessed_V, top)


def _score(
  config: config_lib.GLMConfig, params: Any, x_BSD: jax.Array, targets_BS: jax.Array, unguessed_V: jax.Array, top: int
) -> _Scored:
  """Returns the figures of targets from what the head reads in their places."""
  rows, places = targets_BS.shape
  chunk = places
  while chunk % 2 == 0 and rows * chunk * config.vocab_size > _CHUNK_LOGITS:
    chunk //= 2

  def of_chunk(x_targets: tuple[jax.Array, jax.Array]) -> _Scored:
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

  return jax.tree.map(join, jax.lax.map(of_chunk, (split(x_BSD), split(targets_BS))))


def score_rows(
  runner: runner_lib.Runner,
  rows: Sequence[score.Row],
  pad: int,
  batch_tokens: int = 4096,
  progress: Callable[[int], Any] | None = None,
  unguessed: Collection[int] = (),
  top: int = 0,
) -> list[score.Score]:
  """Returns each row's score, in order; about `batch_tokens` tokens run at a time.

  Rows of like size share a batch, whose shape is one of few: programs compile once for each. Rows of one context share
  its reading.
  `unguessed` ids are passed over when the most probable token is looked for; they keep their probability.
  `progress` is told the number of tokens done after each batch. `top`: how many of the likeliest tokens are told.

  Raises:
    errors.InputError: for a row that is too long, or holds no ids; NotFiniteError where the model's logits are none.
  """
  runner = runner.with_exact_caches()  # a row has one score, with others of its context and alone
  for row in rows:
    _check(row, runner.config)
  unguessed_V = vocabulary.mask(unguessed, runner.config.vocab_size)
  families = _families(rows)
  related = {i for members in families for i in members}
  alone = [i for i in range(len(rows)) if i not in related]
  scores: list[score.Score | None] = [None] * len(rows)
  batches = itertools.chain(
    _alone(runner, rows, alone, pad, batch_tokens), _behind(runner, rows, families, pad, batch_tokens)
  )
  for program, arguments, members in batches:
    found = runner.run(program, *arguments, unguessed_V, top=min(top, runner.config.vocab_size))
    probs, correct, ids, top_probs = map(np.asarray, found)
    counts = [len(rows[i].targets) for i in members]
    decode.check_finite([np.isfinite(probs[at, :count]).all() for at, count in enumerate(counts)])
    for at, (i, count) in enumerate(zip(members, counts, strict=True)):
      places_top = zip(ids[at, :count].tolist(), top_probs[at, :count].tolist())
      scores[i] = score.Score(probs[at, :count], correct[at, :count], [list(zip(*each)) for each in places_top])
    if progress is not None:
      progress(sum(len(rows[i].prompt.tokens) for i in members))
  return scores


# A program, its arguments but for the last, and the numbers of the rows that it scores, in their places.
_Batch = tuple[Callable[..., _Scored], tuple[Any, ...], Sequence[int]]


def _check(row: score.Row, config: config_lib.GLMConfig) -> None:
  length = len(row.prompt.tokens)
  assert 0 < len(row.targets) <= length, (len(row.targets), length)
  if length > config.max_length:
    raise errors.InputError(
      f"a text to score takes {length} places, and the model has {config.max_length}: "
      "shorten it, or score it in windows"
    )
  prompt_lib.check_ids([*row.prompt.tokens, *row.targets], config.vocab_size)


def _families(rows: Sequence[score.Row]) -> list[list[int]]:
  """Returns the numbers of the rows that have a context in common, two or more each, where it is long enough to pay.

  Only a whole context is shared: of what is seen from both sides every token depends on all the others.
  """
  families: dict[bytes, list[int]] = {}
  for i, row in enumerate(rows):
    prompt, context = row.prompt, _context(row)
    if len(row.targets) <= context == prompt.context_length:
      key = np.array(prompt.tokens[:context], np.int64).tobytes() + prompt.positions[:, :context].tobytes()
      families.setdefault(key, []).append(i)
  return [members for members in families.values() if len(members) > 1]


def _alone(
  runner: runner_lib.Runner, rows: Sequence[score.Row], numbers: Sequence[int], pad: int, batch_tokens: int
) -> Iterator[_Batch]:
  """Yields the batches of the rows with these numbers, each of which is read from its beginning."""
  groups: dict[tuple[int, int], list[int]] = {}
  for i in numbers:
    # A text's targets are one fewer than what is read: with 1 more both have one size, at powers of two too.
    shape = rows_lib.bucket(len(rows[i].prompt.tokens)), rows_lib.bucket(len(rows[i].targets) + 1)
    groups.setdefault(shape, []).append(i)
  for (length, places), members in sorted(groups.items()):
    size = runner.batch_size(min(len(members), 1 << max(0, (batch_tokens // length).bit_length() - 1)))
    for first in range(0, len(members), size):
      some = members[first : first + size]
      batch = rows_lib.pad([rows[i].prompt for i in some], pad, size, length)
      starts = rows_lib.column([_context(rows[i]) for i in some], size - len(some), 0)
      yield log_probs, (batch, _targets([rows[i] for i in some], size, places), starts), some


def _behind(
  runner: runner_lib.Runner, rows: Sequence[score.Row], families: Sequence[list[int]], pad: int, batch_tokens: int
) -> Iterator[_Batch]:
  """Yields the batches of rows that are read behind contexts, which they have in common."""
  free = processes.from_first(runner.free_bytes) if families else None  # all run batches of one shape
  groups: dict[tuple[int, int], list[list[int]]] = {}
  for members in families:
    length = rows_lib.bucket(_context(rows[members[0]]))
    places = rows_lib.bucket(max(len(rows[i].targets) for i in members), 1)
    groups.setdefault((length, places), []).append(members)
  for (length, places), group in sorted(groups.items()):
    most = max(1, batch_tokens // length)
    if free is not None:
      most = min(most, free // (_CACHE_SHARE * lanes_lib.slot_bytes(runner, _CONTINUATIONS) * (length + places)))
    if most < 1:  # no memory for caches: each row reads its context itself
      yield from _alone(runner, rows, [i for members in group for i in members], pad, batch_tokens)
      continue
    size = runner.batch_size(min(len(group), 1 << most.bit_length() - 1))
    for some in _packed(group, size):
      numbers = [i for members in some for i in members]
      contexts = [_head(rows[members[0]]) for members in some]
      of = [at for at, members in enumerate(some) for _ in members]
      batch = _continuations([rows[i] for i in numbers], pad, size * _CONTINUATIONS, places)
      targets = _targets([rows[i] for i in numbers], size * _CONTINUATIONS, places)
      context = rows_lib.column(of, size * _CONTINUATIONS - len(of), 0)
      yield log_probs_behind, (rows_lib.pad(contexts, pad, size, length), context, batch, targets), numbers


def _packed(families: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
  """Yields families, larger ones in pieces, that make a batch together: up to `size`, of as many rows as it takes."""
  room = size * _CONTINUATIONS
  some: list[list[int]] = []
  for members in families:
    for first in range(0, len(members), room):
      piece = members[first : first + room]
      if len(some) == size or sum(map(len, some)) + len(piece) > room:
        yield some
        some = []
      some.append(piece)
  if some:
    yield some


def _head(row: score.Row) -> prompt_lib.Prompt:
  """Returns a row's context."""
  context, prompt = _context(row), row.prompt
  return dataclasses.replace(prompt, tokens=prompt.tokens[:context], positions=prompt.positions[:, :context])


def _continuations(rows: Sequence[score.Row], pad: int, size: int, places: int) -> rows_lib.Batch:
  """Makes `size` rows of `places` tokens behind their contexts."""
  tails = []
  for row in rows:
    context, prompt = _context(row), row.prompt
    tails.append(
      dataclasses.replace(
        prompt, tokens=prompt.tokens[context:], positions=prompt.positions[:, context:], context_length=0
      )
    )
  firsts = rows_lib.column([_context(row) for row in rows], size - len(rows), 0)[:, None]
  ends = firsts + np.arange(1, places + 1, dtype=np.int32)  # padding sees what is before it, too: nobody looks at it
  return rows_lib.pad(tails, pad, size, places)._replace(start=np.zeros_like(ends), end=ends)


def _context(row: score.Row) -> int:
  """Returns how many of a row's tokens come before those that are scored."""
  return len(row.prompt.tokens) - len(row.targets)


def _targets(rows: Sequence[score.Row], size: int, places: int) -> np.ndarray:
  targets = np.zeros((size, places), np.int32)
  for at, row in enumerate(rows):
    targets[at, : len(row.targets)] = row.targets
  return targets
