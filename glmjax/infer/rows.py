"""Prompts as batches of fixed shapes: padded on the right, in few sizes, so that few programs are compiled.

B batch, L length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glmjax.infer import prompt as prompt_lib


class Batch(NamedTuple):
  """Rows as the model reads them; `start` and `end` are the interval that each token sees."""

  tokens: np.ndarray  # int32 [B, L]
  positions: np.ndarray  # int32 [B, 2, L]: position, block position
  start: np.ndarray  # int32 [B, L]
  end: np.ndarray
  adapter: np.ndarray  # int32 [B]: the number of each row's adapter; 0: none


def bucket(size: int, smallest: int = 32) -> int:
  """Returns the next size that programs are compiled for: a power of two up to 256, then a multiple of 256."""
  if size > 256:
    return -(-size // 256) * 256
  rounded = smallest
  while rounded < size:
    rounded *= 2
  return rounded


def pad(prompts: Sequence[prompt_lib.Prompt], pad_id: int, batch: int, length: int) -> Batch:
  """Makes `batch` rows of `length` tokens; padding sees itself alone."""
  tokens = np.full((batch, length), pad_id, np.int32)
  positions = np.zeros((batch, 2, length), np.int32)
  start = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
  end = start + 1
  adapter = np.zeros(batch, np.int32)
  for row, prompt in enumerate(prompts):
    n = len(prompt.tokens)
    assert n <= length, (n, length)
    tokens[row, :n], positions[row, :, :n] = prompt.tokens, prompt.positions
    start[row, :n] = 0
    end[row, :n] = np.maximum(end[row, :n], prompt.context_length)
    adapter[row] = prompt.adapter
  return Batch(tokens, positions, start, end, adapter)


def column(values: Sequence, filling: int, fill: int | tuple[int, int]) -> np.ndarray:
  """Returns int32: one value a row, and `fill` in the rows that only fill the batch."""
  return np.array([*values, *[fill] * filling], np.int32)
