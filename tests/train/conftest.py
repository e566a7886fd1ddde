"""A tiny model and random batches for the trainer's tests."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import patterns
import pytest

from glmjax.models import config as config_lib

TINY = config_lib.GLMConfig(vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=16)
LENGTH = 16
row = patterns.row


@dataclasses.dataclass(frozen=True)
class Source:
  """A DataSource of such rows."""

  seq_length: int = LENGTH
  name: str = "patterns"
  infinite: int | None = None  # the row whose loss weight is infinite
  wide: bool = False  # positions [2, L]
  weight: float = 1.0  # of all tokens in the loss
  last: int | None = None  # number of the last sample that it has

  def describe(self) -> dict:
    return {"name": self.name, "seq_length": self.seq_length}

  def batches(
    self, plan: Iterator[tuple[int, int]], process_index: int = 0, process_count: int = 1
  ) -> Iterator[dict[str, np.ndarray]]:
    for first, size in plan:
      if self.last is not None and first + size > self.last:
        return
      rows = [row(first + i) for i in range(size)]
      if self.infinite is not None and first <= self.infinite < first + size:
        rows[self.infinite - first]["loss_weights"][-1] = np.inf
      for each in rows if self.weight != 1 else ():
        each["loss_weights"] = each["loss_weights"] * np.float32(self.weight)
      if self.wide:
        rows = [r | {"positions": np.stack([r["positions"], r["positions"] % 5])} for r in rows]
      rows = rows[process_index * size // process_count : (process_index + 1) * size // process_count]
      yield {name: np.stack([r[name] for r in rows]) for name in rows[0]}


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
  """Equal programs are compiled once per session."""
  settings = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0.3,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope="session")
def tiny() -> config_lib.GLMConfig:
  return TINY


@pytest.fixture(scope="session")
def source() -> Source:
  return Source()
