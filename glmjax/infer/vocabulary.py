"""What inference needs of a tokenizer, and which ids of a model's vocabulary stand for no text."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from glmjax import tokens as tokens_lib


class Tokenizer(Protocol):
  """What the engine needs of `glmjax.tokenizer.Tokenizer`."""

  specials: tokens_lib.SpecialTokens
  vocab_size: int
  num_image_tokens: int

  def encode(self, text: str, allow_special: bool = False) -> list[int]: ...

  def decode(self, ids: Sequence[int]) -> str: ...

  def decode_bytes(self, ids: Sequence[int], show_special: bool = False, dummy_prefix: bool = True) -> bytes: ...


def not_text(tokenizer: Tokenizer, vocab_size: int) -> set[int]:
  """Returns a model's ids that stand for no text: special tokens, image ids, and the rows that pad its vocabulary."""
  return {
    *dataclasses.astuple(tokenizer.specials),
    *range(tokenizer.num_image_tokens),
    *range(tokenizer.vocab_size, vocab_size),
  }


def mask(ids: Iterable[int], vocab_size: int) -> np.ndarray:
  """Returns bool [vocab_size], True at the ids."""
  found = np.zeros(vocab_size, bool)
  found[list(ids)] = True
  return found
