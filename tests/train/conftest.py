"""A tiny model and random batches for the trainer's tests."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from glmjax.models import config as config_lib

TINY = config_lib.GLMConfig(vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=16)
LENGTH = 16


def row(index: int) -> dict[str, np.ndarray]:
  """Row `index` of a made-up source: a repeating pattern, the first part context, the rest predicted."""
  rng = np.random.default_rng(index)
  context = int(rng.integers(4, 12))
  ids = (rng.integers(1, 8) * np.arange(LENGTH + 1) + rng.integers(0, 8)) % 60
  places = np.arange(LENGTH)
  return {
      "tokens": ids[:-1].astype(np.int32), "targets": ids[1:].astype(np.int32),
      "loss_weights": (places >= context).astype(np.float32), "positions": places.astype(np.int32),
      "attend_start": np.zeros(LENGTH, np.int32),
      "attend_end": np.maximum(places + 1, context).astype(np.int32),
      "objective": np.full(LENGTH, index % 2, np.int32)}


@dataclasses.dataclass
class Source:
  """A DataSource of such rows; `broken` rows carry a token beyond the vocabulary's table."""

  seq_length: int = LENGTH
  name: str = "patterns"

  def describe(self) -> dict:
    return {"name": self.name, "seq_length": self.seq_length}

  def batches(self, plan: Iterator[tuple[int, int]], process_index: int = 0,
              process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
    for first, size in plan:
      rows = [row(first + i) for i in range(size)]
      yield {name: np.stack([r[name] for r in rows]) for name in rows[0]}


@pytest.fixture
def tiny() -> config_lib.GLMConfig:
  return TINY


@pytest.fixture
def source() -> Source:
  return Source()
