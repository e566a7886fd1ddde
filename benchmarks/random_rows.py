"""Training rows of random tokens, for benchmarks that measure no data."""

import numpy as np

from glmjax.train import feed


def make(rows: int, length: int, vocab_size: int, context: int) -> feed.HostBatch:
  """Makes rows of which the first `context` tokens are seen from both sides and the others are predicted."""
  places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
  tokens, targets = np.random.default_rng(0).integers(0, vocab_size, (2, rows, length)).astype(np.int32)
  return {
    "tokens": tokens,
    "targets": targets,
    "loss_weights": (places >= context).astype(np.float32),
    "positions": places,
    "attend_start": np.zeros_like(places),
    "attend_end": np.maximum(places + 1, context),
    "objective": np.ones_like(places),
  }
