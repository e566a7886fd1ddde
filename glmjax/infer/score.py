"""Texts as rows that are scored, and what came of them.

A row reads its tokens and is scored on the last of them, one target each (infer/scoring.py).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from glmjax import display
from glmjax import errors
from glmjax import positions as positions_lib
from glmjax import tokens as tokens_lib
from glmjax.infer import prompt as prompt_lib

_DARKEST = 16  # bits of a token that is shown as dark as can be


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
  if taken + framed >= length:
    raise errors.InputError(
      f"{len(answers)} choices take {taken} tokens together, and the model has {length} places: "
      "give fewer, or shorter ones"
    )
  return max(0, length - taken - 2 - framed)


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


def join(scores: Sequence[Score]) -> Score:
  """Joins the windows of one text into one score."""
  if not scores:
    return Score(np.zeros(0, np.float32), np.zeros(0, bool))
  return Score(np.concatenate([s.log_probs for s in scores]), np.concatenate([s.correct for s in scores]))
