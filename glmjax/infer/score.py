"""Log-likelihood of given tokens, in large fixed batches.

A row reads its tokens and is scored on the last of them, one target each. Logits are made for those places only, and
chunk by chunk.

B batch, L length, S scored places, D model, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from glmjax import display
from glmjax import errors
from glmjax import positions as positions_lib
from glmjax import tokens as tokens_lib
from glmjax.infer import decode
from glmjax.infer import offload
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import rows as rows_lib
from glmjax.infer import runner as runner_lib
from glmjax.infer import vocabulary
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.parallel import partitioning

_DARKEST = 16  # bits of a token that is shown as dark as can be
_CHUNK_LOGITS = 1 << 23  # most logits that exist at a time


@dataclasses.dataclass(frozen=True)
class Row:
  """Tokens to read, and what the last len(targets) of them should predict."""

  prompt: prompt_lib.Prompt
  targets: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Score:
  """The score of one row, or of one text over all its windows."""

  log_probs: np.ndarray  # float32 [n], natural logarithm, of each target
  correct: np.ndarray  # bool [n]: the target was the most probable of the tokens that may be guessed
  # The likeliest tokens in each target's place with their log-probabilities, the likeliest first, where asked for.
  likeliest: Sequence[list[tuple[int, float]]] = ()
  # Decodes the targets, as texts; None: ids were scored.
  read: Callable[[], list[str]] | None = dataclasses.field(default=None, repr=False, compare=False)

  @property
  def pieces(self) -> list[str]:
    """What each target reads as, its number where ids were scored; decoded when asked, as few look."""
    return [str(i) for i in range(self.count)] if self.read is None else self.read()

  @property
  def total(self) -> float:
    """The log-probability of all the targets."""
    return float(np.sum(self.log_probs, dtype=np.float64))

  @property
  def count(self) -> int:
    """The number of targets."""
    return len(self.log_probs)

  def _repr_html_(self) -> str:
    bits = [float(-each) / math.log(2) for each in self.log_probs]
    notes = [f"{bit:.2f} bits{', the likeliest' if hit else ''}" for bit, hit in zip(bits, self.correct)]
    shown = display.shaded(self.pieces, [bit / _DARKEST for bit in bits], notes)
    summary = f"{self.total:.2f} nats over {self.count} tokens; the darker, the less expected (black: {_DARKEST} bits)"
    return f"{shown}<div>{summary}</div>"


@dataclasses.dataclass(frozen=True)
class Choices:
  """The scores of what may fill one blank."""

  scores: list[Score]
  left_out: int  # of the context's tokens, the oldest, for want of room

  @property
  def best(self) -> int:
    """The likeliest choice by the sum of its tokens, the first of equal ones."""
    return max(range(len(self.scores)), key=lambda i: self.scores[i].total)

  def _repr_html_(self) -> str:
    rows = [
      (
        "".join(each.pieces) if each.read else f"choice {i}",
        f"{each.total:.2f}",
        each.count,
        "best" if i == self.best else "",
      )
      for i, each in enumerate(self.scores)
    ]
    return display.table(("choice", "nats", "tokens", ""), rows)


def room_for_choices(answers: Sequence[Sequence[int]], length: int, framed: int) -> int:
  """Returns the most tokens of a context that GLM-130B's evaluation keeps beside these answers, which it put into one
  row.

  `framed` places are left to what the family puts around the context.
  """
  taken = 1 if all(len(answer) == 1 for answer in answers) else sum(map(len, answers))
  if taken + 2 + framed > length:
    raise errors.InputError(
      f"{len(answers)} choices take {taken} tokens together, and the model has {length} places: "
      "give fewer, or shorter ones"
    )
  return length - taken - 2 - framed


def with_blank(
  context: Sequence[int], mask: int, specials: tokens_lib.SpecialTokens, kind: positions_lib.Positions
) -> list[int]:
  """Returns a context with one blank, `mask` at its end if it has none, framed where the family's own evaluation
  framed it.
  """
  context = list(context)
  if prompt_lib.first_mask(context, specials) is None:
    context.append(mask)
  return kind.frame(context, specials) if kind.frame_size else context


def target_row(
  context: Sequence[int], target: Sequence[int], specials: tokens_lib.SpecialTokens, kind: positions_lib.Positions
) -> Row:
  """Returns `target` as the filling of the first blank of `context`, both sides in view."""
  prompt = prompt_lib.fill(context, specials, kind)
  return Row(prompt_lib.extend(prompt, target[:-1]), list(target))


def window_rows(
  tokens: Sequence[int],
  specials: tokens_lib.SpecialTokens,
  kind: positions_lib.Positions,
  length: int,
  stride: int | None = None,
  skip: int = 0,
) -> list[Row]:
  """Cuts a text into windows of at most `length` places that score each token once, as the filling of a [gMASK].

  The first window scores all it holds, behind `skip` tokens of context; each later one scores `stride`
  tokens (length // 2) behind as many earlier ones as fit, which are seen from both sides, as GLM-130B was
  evaluated.
  """
  room = length - 1  # for [gMASK]; sop takes the place of the last target
  stride = length // 2 if stride is None else stride
  if not 0 < stride <= room:
    raise errors.InputError(f"windows of {length} places cannot advance by {stride} tokens: use 1 to {room}")
  rows, begin = [], skip
  while begin < len(tokens):
    end = min(len(tokens), room if not rows else begin + stride)
    first = max(0, begin - (room - stride)) if rows else 0
    context, text = list(tokens[first:begin]), list(tokens[begin:end])
    prompt = prompt_lib.extend(prompt_lib.fill([*context, specials.gmask], specials, kind), text[:-1])
    rows.append(Row(prompt, text))
    begin = end
  return rows


@functools.partial(jax.jit, static_argnames=("config", "top"))
def log_probs(
  config: config_lib.GLMConfig,
  params: Any,
  batch: rows_lib.Batch,
  targets_BS: jax.Array,
  first_B: jax.Array,
  unguessed_V: jax.Array,
  top: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns log-probabilities float32 and correctness bool, [B, S], of targets at S places of each row from
  `first_B` on; then the `top` likeliest tokens there and their log-probabilities, [B, S, top].
  """
  decode.check_rows(batch)
  chex.assert_rank([targets_BS, first_B], [2, 1])
  chex.assert_equal_shape_prefix([batch.tokens, targets_BS, first_B], 1)
  model, params = glm.GLM(config), offload.fetch(params)
  x_BLD, _ = model.apply(
    {"params": params},
    batch.tokens,
    config.position_kind.of_model(batch.positions),
    batch.start,
    batch.end,
    method="hidden",
  )
  rows, places = targets_BS.shape
  at_BS = jnp.minimum(first_B[:, None] + jnp.arange(places), x_BLD.shape[1] - 1)
  x_BSD = jnp.take_along_axis(x_BLD, at_BS[..., None], axis=1)
  chunk = places
  while chunk % 2 == 0 and rows * chunk * config.vocab_size > _CHUNK_LOGITS:
    chunk //= 2

  def score(x_targets: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    x_BCD, targets_BC = x_targets
    logits_BCV = model.apply({"params": params}, x_BCD, method="head")
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

  return jax.tree.map(join, jax.lax.map(score, (split(x_BSD), split(targets_BS))))


def score_rows(
  runner: runner_lib.Runner,
  rows: Sequence[Row],
  pad: int,
  batch_tokens: int = 4096,
  progress: Callable[[int], Any] | None = None,
  unguessed: Collection[int] = (),
  top: int = 0,
) -> list[Score]:
  """Returns each row's score, in order; about `batch_tokens` tokens run at a time.

  Rows of like size share a batch, whose shape is one of few: programs compile once for each.
  `unguessed` ids are passed over when the most probable token is looked for; they keep their probability.
  `progress` is told the number of tokens read after each batch. `top`: how many of the likeliest tokens are told.

  Raises:
    errors.InputError: for a row that is too long, or holds no ids; NotFiniteError where the model's logits are none.
  """
  config = runner.config
  unguessed_V = vocabulary.mask(unguessed, config.vocab_size)
  groups: dict[tuple[int, int], list[int]] = {}
  for i, row in enumerate(rows):
    assert 0 < len(row.targets) <= len(row.prompt.tokens), (len(row.targets), len(row.prompt.tokens))
    if len(row.prompt.tokens) > config.max_length:
      raise errors.InputError(
        f"a text to score takes {len(row.prompt.tokens)} places, and the model has "
        f"{config.max_length}: shorten it, or score it in windows"
      )
    prompt_lib.check_ids([*row.prompt.tokens, *row.targets], config.vocab_size)
    # A text's targets are one fewer than what is read: with 1 more both have one size, at powers of two too.
    shape = rows_lib.bucket(len(row.prompt.tokens)), rows_lib.bucket(len(row.targets) + 1)
    groups.setdefault(shape, []).append(i)
  scores: list[Score | None] = [None] * len(rows)
  for (length, places), members in sorted(groups.items()):
    size = runner.batch_size(min(len(members), 1 << max(0, (batch_tokens // length).bit_length() - 1)))
    for first in range(0, len(members), size):
      some = members[first : first + size]
      batch = rows_lib.pad([rows[i].prompt for i in some], pad, size, length)
      targets = np.zeros((size, places), np.int32)
      for at, i in enumerate(some):
        targets[at, : len(rows[i].targets)] = rows[i].targets
      starts = rows_lib.column([len(rows[i].prompt.tokens) - len(rows[i].targets) for i in some], size - len(some), 0)
      found = runner.run(log_probs, batch, targets, starts, unguessed_V, top=min(top, config.vocab_size))
      probs, correct, ids, top_probs = map(np.asarray, found)
      decode.check_finite([np.isfinite(probs[at, : len(rows[i].targets)]).all() for at, i in enumerate(some)])
      for at, i in enumerate(some):
        count = len(rows[i].targets)
        places_top = zip(ids[at, :count].tolist(), top_probs[at, :count].tolist())
        scores[i] = Score(probs[at, :count], correct[at, :count], [list(zip(*each)) for each in places_top])
      if progress is not None:
        progress(sum(len(rows[i].prompt.tokens) for i in some))
  return scores


def join(scores: Sequence[Score]) -> Score:
  """Joins the windows of one text into one score."""
  if not scores:
    return Score(np.zeros(0, np.float32), np.zeros(0, bool))
  return Score(np.concatenate([s.log_probs for s in scores]), np.concatenate([s.correct for s in scores]))
