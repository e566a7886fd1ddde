"""What the model's figures are held against: a unigram model and xz, on the same text."""

import dataclasses
import lzma
from collections.abc import Sequence

import numpy as np

from glmjax.data import shards

_CHUNK = 1 << 20  # tokens read at a time
_MAX_CHUNKS = 64  # of a longer split, this many chunks spread evenly are counted


@dataclasses.dataclass(frozen=True)
class Unigram:
  """Token frequencies of the training text, with one added to every count."""

  log2_probs: np.ndarray  # float64 [vocabulary]
  most_frequent: int

  def bits(self, documents: Sequence[np.ndarray]) -> float:
    """Returns -log2 p of all tokens."""
    return float(-sum(self.log2_probs[ids].sum() for ids in documents))

  def num_right(self, targets: Sequence[Sequence[int]]) -> int:
    """Counts how many tokens the most frequent one gets right."""
    return sum(list(ids).count(self.most_frequent) for ids in targets)


def count_unigrams(reader: shards.SplitReader, vocab_size: int, end: int | None) -> Unigram:
  """Counts the tokens of a split; `end`, which ends every document, is no text and left out."""
  num_chunks = -(-reader.num_tokens // _CHUNK)
  counts = np.ones(vocab_size, np.int64)
  for i in np.unique(np.linspace(0, max(num_chunks - 1, 0), min(num_chunks, _MAX_CHUNKS)).astype(np.int64)):
    start = int(i) * _CHUNK
    counts += np.bincount(reader.read(start, min(start + _CHUNK, reader.num_tokens)), minlength=vocab_size)
  if end is not None:
    counts[end] = 1
  return Unigram(np.log2(counts / counts.sum()), int(counts.argmax()))


def xz_bits(text: bytes) -> int:
  """Returns the bits of the text as one xz file at its strongest preset."""
  return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
