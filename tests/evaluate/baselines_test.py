"""The unigram model and xz on text small enough to count by hand."""

import math

import numpy as np
import pytest

from glmjax.evaluate import baselines


def test_unigram_of_the_training_text(cache, tokenizer) -> None:
  reader = cache.split("pretrain_en", "train")
  unigram = baselines.count_unigrams(reader, tokenizer.vocab_size, tokenizer.specials.eos)
  ids = reader.read(0, reader.num_tokens)
  ids = ids[ids != tokenizer.specials.eos]
  counts = np.bincount(ids, minlength=tokenizer.vocab_size) + 1
  np.testing.assert_allclose(2.0**unigram.log2_probs, counts / counts.sum(), rtol=1e-12)
  assert counts[unigram.most_frequent] == counts.max()
  documents = [np.array([unigram.most_frequent, 7]), np.array([7])]
  expected = -math.log2(counts.max() / counts.sum()) - 2 * math.log2(counts[7] / counts.sum())
  assert unigram.bits(documents) == pytest.approx(expected)
  assert unigram.num_right(documents) == 1


def test_a_long_split_is_counted_in_evenly_spread_chunks(monkeypatch) -> None:
  class Reader:
    num_tokens = 1000

    def read(self, start: int, stop: int) -> np.ndarray:
      seen.append((start, stop))
      return np.arange(start, stop) % 10

  seen = []
  monkeypatch.setattr(baselines, "_CHUNK", 30)
  monkeypatch.setattr(baselines, "_MAX_CHUNKS", 5)
  unigram = baselines.count_unigrams(Reader(), 12, end=11)
  assert len(seen) == 5 and seen[0] == (0, 30) and seen[-1] == (990, 1000)
  np.testing.assert_allclose(2.0 ** unigram.log2_probs[:10], 14 / 142)


def test_xz_of_repeated_text_is_small() -> None:
  assert baselines.xz_bits(b"the fox " * 1000) < 8000 * 8 / 40
