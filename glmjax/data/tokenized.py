"""What rows are made from: tokens of a mixture's tasks, by split, in a token cache or in memory."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from glmjax.data import shards

PREFERENCE = "preference"  # kind of a task: of each two documents the first one's answer is preferred


class Split(Protocol):
  """One task's split: a stream of tokens, which is its documents laid end to end."""

  num_tokens: int

  def read(self, start: int, stop: int) -> np.ndarray:
    """Reads token ids [start, stop) of the stream, int32."""

  def documents_between(self, first: int, last: int) -> list[shards.Document]:
    """Reads documents [first, last)."""

  def document_lengths(self) -> np.ndarray:
    """Returns int64 [documents, 2]: input tokens and the rest (for text: 0 and all tokens) of every document."""


class Mixture(Protocol):
  """The tasks of a mixture: shards.TokenCache, or in_memory.Tokens."""

  @property
  def directory(self) -> object:
    """What it is called in errors."""

  @property
  def tasks(self) -> Mapping[str, dict[str, Any]]:
    """For each task "kind", "rate", and "splits": for each split "documents", how many there are."""

  def split(self, task: str, split: str) -> Split:
    """Returns a reader of one task's split."""
