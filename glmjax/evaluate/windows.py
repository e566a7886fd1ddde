"""What is asked of the model on held-out text: documents, windows read left to right, and blanks to fill.

Sizes are in tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from glmjax import positions as positions_lib
from glmjax import tokens as tokens_lib
from glmjax.data import sampler
from glmjax.data import shards
from glmjax.data import spans
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import score

_SHORTEST_FILL = 12  # text of fewer tokens has no middle worth filling
_FILLS_PER_WINDOW = 4  # more would ask for the same tokens again


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """The documents of one language that are evaluated, without the tokens that end them."""

  documents: list[np.ndarray]
  text: bytes  # of all of them, one after the other
  utf8_bytes: int  # of the text as it was before tokenizing
  end: int | None  # the token that ends documents in the cache: the model knows it as what is before a text

  @property
  def num_tokens(self) -> int:
    return sum(map(len, self.documents))


def choose_documents(
  reader: shards.SplitReader,
  specials: tokens_lib.SpecialTokens,
  decode_bytes: Callable[[Iterable[int]], bytes],
  max_tokens: int,
  seed: int,
) -> HeldOut:
  """Chooses documents in a random order that `seed` settles, up to `max_tokens`; the last one is cut there."""
  documents, texts, utf8_bytes, left, end = [], [], 0, max_tokens, None
  for i in range(reader.num_documents):
    document = reader.document(sampler.permute(i, reader.num_documents, seed, "held out"))
    ids = document.tokens
    if len(ids) and ids[-1] in (specials.eos, specials.eod):
      ids, end = ids[:-1], int(ids[-1])
    if not len(ids):
      continue
    is_whole = len(ids) <= left
    text = decode_bytes(ids[:left])
    utf8_bytes += document.utf8_bytes if is_whole and document.utf8_bytes >= 0 else len(text)
    documents.append(ids[:left])
    texts.append(text)
    left -= min(len(ids), left)
    if not left:
      break
  return HeldOut(documents, b"".join(texts), utf8_bytes, end)


def left_to_right(
  held_out: HeldOut, length: int, specials: tokens_lib.SpecialTokens, positions: positions_lib.Positions
) -> list[score.Row]:
  """Returns [gMASK] windows of `length` places in which every token of the documents is a target exactly once."""
  before = [] if held_out.end is None else [held_out.end]
  rows = []
  for ids in held_out.documents:
    rows += score.window_rows([*before, *ids.tolist()], specials, positions, length, skip=len(before))
  return rows


def causal(row: score.Row, specials: tokens_lib.SpecialTokens, positions: positions_lib.Positions) -> score.Row:
  """Returns a row whose context ends in [gMASK] as a causal model reads it: [gMASK] first, then all from left to
  right.
  """
  context = row.prompt.tokens[: row.prompt.context_length - 1]
  return score.Row(prompt_lib.left_to_right([*context, *row.targets[:-1]], specials, positions), row.targets)


@dataclasses.dataclass(frozen=True)
class Fill:
  """One span of a text, asked for with both sides in view ([MASK]) and with the left one only ([gMASK])."""

  both_sides: score.Row
  left_only: score.Row

  @property
  def targets(self) -> list[int]:
    return list(self.both_sides.targets)


def fills(
  held_out: HeldOut,
  length: int,
  count: int,
  seed: int,
  specials: tokens_lib.SpecialTokens,
  positions: positions_lib.Positions,
  mean_span_length: float,
  max_span_length: int,
) -> list[Fill]:
  """Returns up to `count` spans of windows that do not overlap, with at least a quarter of the window on either side.

  Args:
    held_out: the documents.
    length: places of a window, mask and targets included: what the model was trained on.
    count: how many; fewer where the text does not have enough windows.
    seed: settles windows, lengths and places.
    specials, positions: the model's.
    mean_span_length, max_span_length: of the Poisson distribution that lengths are drawn from.
  """
  room = length - 2  # [MASK] and sop come on top
  if room < _SHORTEST_FILL:
    return []
  pieces = [ids[i : i + room] for ids in held_out.documents for i in range(0, len(ids), room)]
  pieces = [piece for piece in pieces if len(piece) >= _SHORTEST_FILL]
  rng = spans.example_rng(seed, 0)
  passes = min(-(-count // max(len(pieces), 1)), _FILLS_PER_WINDOW)
  chosen = np.tile(rng.permutation(len(pieces)), passes)[:count]
  pmf = spans.span_length_pmf(mean_span_length, max_span_length)
  lengths = 1 + rng.choice(len(pmf), size=len(chosen), p=pmf)
  asked = []
  for text, span_length in zip((pieces[i].tolist() for i in chosen), lengths.tolist()):
    side = len(text) // 4
    span_length = min(span_length, len(text) - 2 * side)
    start = int(rng.integers(side, len(text) - side - span_length + 1))
    target, left, right = text[start : start + span_length], text[:start], text[start + span_length :]
    asked.append(
      Fill(
        score.target_row([*left, specials.mask, *right], target, specials, positions),
        score.target_row([*left, specials.gmask], target, specials, positions),
      )
    )
  return asked
