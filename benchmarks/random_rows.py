"""Training rows of random tokens, for benchmarks that measure no data."""

import numpy as np

from glmjax import batch
from glmjax import positions
from glmjax.train import feed


def make(rows: int, length: int, vocab_size: int, context: int) -> feed.HostBatch:
  """Makes rows of which the first `context` tokens are seen from both sides and the others are predicted."""
  made = {feature.name: feature.padding(rows, length, positions.ROTARY) for feature in batch.FEATURES}
  made["tokens"][:], made["targets"][:] = np.random.default_rng(0).integers(0, vocab_size, (2, rows, length))
  made["loss_weights"][:, context:] = 1
  made["positions"][:] = np.arange(length)
  made["attend_start"][:] = 0
  made["attend_end"][:, :context] = context
  made["objective"][:] = 1
  return made
