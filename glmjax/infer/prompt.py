"""Prompts as the model reads them: tokens, positions, and how far both sides see.

`text [MASK] text` becomes `text [MASK] text sop`, whose continuation fills the blank. All before sop is
visible to every token, the rest left to right. Positions (FACTS 1, 6.4; the original code's rules):

| family | in the text | from sop on: [MASK], [sMASK] | from sop on: [gMASK] |
|---|---|---|---|
| rotary (GLM-130B) | 0, 1, 2, ... | the mask's | run on |
| rotary_2d (ChatGLM-6B), learned_2d (GLM-10B) | 0, 1, 2, ...; block 0 | the mask's; block 1, 2, ... | same |
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glmjax import errors
from glmjax import tokens as tokens_lib


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One row to continue."""

  tokens: list[int]
  positions: np.ndarray  # int32 [2, n]: position, block position
  context_length: int  # leading tokens that every token sees
  stride: tuple[int, int]  # what each new token adds to the last positions


def check_ids(tokens: Sequence[int], vocab_size: int) -> None:
  """Raises InputError where a token is no id of the model's vocabulary."""
  ids = np.asarray(tokens)
  wrong = ids[(ids < 0) | (ids >= vocab_size)] if ids.size else ids
  if wrong.size:
    raise errors.InputError(f"token {wrong[0]} is no id of the model's, which has {vocab_size}: use the tokenizer that "
                            "the model was trained with")


def first_mask(tokens: Sequence[int], specials: tokens_lib.SpecialTokens) -> int | None:
  """Index of the blank to fill next: [MASK] and [sMASK] left to right, then [gMASK]; None without any."""
  for kinds in ((specials.mask, specials.smask), (specials.gmask,)):
    for i, token in enumerate(tokens):
      if token in kinds:
        return i
  return None


def frame(tokens: Sequence[int], specials: tokens_lib.SpecialTokens, positions: str) -> list[int]:
  """The user's tokens with what the family's original code puts around them.

  Without a mask, [gMASK] at the end; eos behind text that does not end in a mask (not in ChatGLM-6B);
  ENC in front for GLM-10B.
  """
  tokens = list(tokens)
  masks = (specials.mask, specials.gmask, specials.smask)
  if not any(token in masks for token in tokens):
    tokens.append(specials.gmask)
  if tokens[-1] not in masks and positions != "rotary_2d":
    tokens.append(specials.eos)
  return [specials.enc, *tokens] if positions == "learned_2d" else tokens


def fill(tokens: Sequence[int], specials: tokens_lib.SpecialTokens, positions: str) -> Prompt:
  """A prompt that fills the first blank of `tokens`, which must hold one."""
  mask = first_mask(tokens, specials)
  assert mask is not None, "no mask in the tokens"
  n = len(tokens)
  runs_on = positions == "rotary" and tokens[mask] == specials.gmask
  table = np.zeros((2, n + 1), np.int32)
  table[0] = np.arange(n + 1)
  if not runs_on:
    table[:, n] = mask, 1
  stride = (1, 0) if runs_on else (0, 1)
  return Prompt([*tokens, specials.sop], table, n, stride)


def left_to_right(tokens: Sequence[int], specials: tokens_lib.SpecialTokens, positions: str) -> Prompt:
  """`[gMASK] sop text`: nothing but the mask is seen from both sides (GLM-130B's unidirectional mode)."""
  prompt = fill([specials.gmask], specials, positions)
  return extend(prompt, tokens)


def extend(prompt: Prompt, tokens: Sequence[int]) -> Prompt:
  """The prompt with tokens that continue it, as if it had generated them."""
  steps = np.arange(1, len(tokens) + 1, dtype=np.int32)
  more = prompt.positions[:, -1:] + np.array(prompt.stride, np.int32)[:, None] * steps
  return dataclasses.replace(prompt, tokens=[*prompt.tokens, *tokens],
                             positions=np.concatenate([prompt.positions, more], axis=1))


class Batch(NamedTuple):
  """Prompts padded on the left; `start` and `end` are the interval that each token sees."""

  tokens: np.ndarray  # int32 [B, L]
  positions: np.ndarray  # int32 [B, 2, L]
  start: np.ndarray  # int32 [B, L]
  end: np.ndarray


def pad_left(prompts: Sequence[Prompt], pad: int, batch: int, length: int) -> Batch:
  """`batch` rows of `length` tokens; padding sees itself alone."""
  tokens = np.full((batch, length), pad, np.int32)
  positions = np.zeros((batch, 2, length), np.int32)
  start = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
  end = start + 1
  for row, prompt in enumerate(prompts):
    at = length - len(prompt.tokens)
    assert at >= 0, (length, len(prompt.tokens))
    tokens[row, at:], positions[row, :, at:] = prompt.tokens, prompt.positions
    start[row, at:] = at
    end[row, at:] = np.maximum(end[row, at:], at + prompt.context_length)
  return Batch(tokens, positions, start, end)
