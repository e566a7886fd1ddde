"""Prompts as the model reads them: tokens, positions, and how far both sides see.

`text [MASK] text` becomes `text [MASK] text sop`, whose continuation fills the blank. All before sop is
visible to every token, the rest left to right. glmjax/positions.py says how the tokens are numbered.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from glmjax import errors
from glmjax import positions as positions_lib
from glmjax import tokens as tokens_lib


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One row to continue."""

  tokens: list[int]
  positions: np.ndarray  # int32 [2, n]: position, block position
  context_length: int  # leading tokens that every token sees
  stride: tuple[int, int]  # what each new token adds to the last positions
  adapter: int = 0  # the number of the adapter that it is read and continued with (infer/adapters.py); 0: none


def check_ids(tokens: Sequence[int], vocab_size: int) -> None:
  """Raises InputError where a token is no id of the model's vocabulary."""
  ids = np.asarray(tokens)
  wrong = ids[(ids < 0) | (ids >= vocab_size)] if ids.size else ids
  if wrong.size:
    raise errors.InputError(
      f"token {wrong[0]} is no id of the model's, which has {vocab_size}: use the tokenizer that "
      "the model was trained with"
    )


def first_mask(tokens: Sequence[int], specials: tokens_lib.SpecialTokens) -> int | None:
  """Returns the index of the blank to fill next: [MASK] and [sMASK] left to right, then [gMASK]; None without any."""
  for kinds in ((specials.mask, specials.smask), (specials.gmask,)):
    for i, token in enumerate(tokens):
      if token in kinds:
        return i
  return None


def fill(tokens: Sequence[int], specials: tokens_lib.SpecialTokens, kind: positions_lib.Positions) -> Prompt:
  """Makes a prompt that fills the first blank of `tokens`, which must hold one."""
  mask = first_mask(tokens, specials)
  assert mask is not None, "no mask in the tokens"
  return fill_at(tokens, mask, specials, kind, runs_on=tokens[mask] == specials.gmask)


def fill_at(
  tokens: Sequence[int], mask: int, specials: tokens_lib.SpecialTokens, kind: positions_lib.Positions, runs_on: bool
) -> Prompt:
  """Makes a prompt that fills the blank at index `mask`; `runs_on`: as in `Positions.blank`."""
  n = len(tokens)
  numbers = np.zeros((2, n + 1), np.int32)
  numbers[0] = np.arange(n + 1)
  numbers[:, n], stride = kind.blank(mask, n, runs_on)
  return Prompt([*tokens, specials.sop], numbers, n, stride)


def left_to_right(tokens: Sequence[int], specials: tokens_lib.SpecialTokens, kind: positions_lib.Positions) -> Prompt:
  """Makes a prompt of tokens that fill a [gMASK] at the beginning, so that none sees a later one: all that a causal
  model is trained on.
  """
  return extend(fill_at([specials.gmask], 0, specials, kind, runs_on=True), tokens)


def extend(prompt: Prompt, tokens: Sequence[int]) -> Prompt:
  """Returns the prompt with tokens that continue it, as if it had generated them."""
  steps = np.arange(1, len(tokens) + 1, dtype=np.int32)
  more = prompt.positions[:, -1:] + np.array(prompt.stride, np.int32)[:, None] * steps
  return dataclasses.replace(
    prompt, tokens=[*prompt.tokens, *tokens], positions=np.concatenate([prompt.positions, more], axis=1)
  )
