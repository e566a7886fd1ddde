"""Batches of packed samples, for tests that compare meshes."""

import functools

import numpy as np


@functools.cache
def rows(count: int, length: int, vocab_size: int) -> dict[str, np.ndarray]:
  """Rows of packed samples, each with a context of its own; the last row holds padding alone."""
  rng = np.random.default_rng(0)
  batch = {
    "tokens": rng.integers(0, vocab_size, (count, length)),
    "targets": rng.integers(0, vocab_size, (count, length)),
    "objective": rng.integers(0, 3, (count, length)),
    "loss_weights": np.zeros((count, length)),
    **{name: np.tile(np.arange(length), (count, 1)) for name in ("positions", "attend_start", "attend_end")},
  }
  batch["attend_end"] += 1
  for row in range(count - 1):
    edges = [0, *sorted(rng.choice(np.arange(1, length), 2, replace=False)), length]
    for first, last in zip(edges, edges[1:]):
      context = rng.integers(first, last)
      batch["attend_start"][row, first:last] = first
      batch["attend_end"][row, first:last] = np.maximum(np.arange(first, last) + 1, context)
      batch["loss_weights"][row, context:last] = 1
      batch["positions"][row, first:last] -= first
  return {name: a.astype(np.float32 if name == "loss_weights" else np.int32) for name, a in batch.items()}
