"""A made-up DataSource and a gin file around it, for trainings in processes of their own."""

import dataclasses
import json
import os
import time
from collections.abc import Iterator

import numpy as np

LENGTH = 16
GIN = """
from __gin__ import dynamic_registration
import patterns
from glmjax.models import config
from glmjax.parallel import mesh
from glmjax.parallel import peers
from glmjax.train import loop
from glmjax.train import schedules

config.GLMConfig:
  vocab_size = 64
  num_layers = 2
  embed_dim = 32
  num_heads = 4
  mlp_dim = 48
  max_length = 16
  hidden_dropout = 0.1
validation/patterns.Source:  # what tests bind is for the training source alone
  seconds = 0.0
  batches_read = None
  fails_at = None
  hangs_at = None
schedules.Batches.size = 16
schedules.LearningRate:
  peak = 1e-2
  minimum = 1e-3
  warmup_samples = 32
  decay_samples = 160
loop.Intervals:
  log = 1
  save = 3
  evaluate = 4
  eval_samples = 8
peers.Watch.silent_seconds = 8
loop.train:
  model = @config.GLMConfig()
  data = @patterns.Source()
  validation = @validation/patterns.Source()
  batches = @schedules.Batches()
  total_samples = 160
  learning_rate = @schedules.LearningRate()
  mesh = @mesh.MeshConfig()
  watch = @peers.Watch()
  intervals = @loop.Intervals()
"""


def row(index: int) -> dict[str, np.ndarray]:
  """Row `index`: a repeating pattern, the first part context, the rest predicted."""
  rng = np.random.default_rng(index)
  context = int(rng.integers(4, 12))
  ids = (rng.integers(1, 8) * np.arange(LENGTH + 1) + rng.integers(0, 8)) % 60
  places = np.arange(LENGTH)
  return {
    "tokens": ids[:-1].astype(np.int32),
    "targets": ids[1:].astype(np.int32),
    "loss_weights": (places >= context).astype(np.float32),
    "positions": places.astype(np.int32),
    "attend_start": np.zeros(LENGTH, np.int32),
    "attend_end": np.maximum(places + 1, context).astype(np.int32),
    "objective": np.full(LENGTH, index % 2, np.int32),
  }


@dataclasses.dataclass(frozen=True)
class Source:
  """Such rows; `batches_read` is a folder where each process notes the samples it reads."""

  seq_length: int = LENGTH
  name: str = "patterns"
  seconds: float = 0.0  # that a batch takes
  batches_read: str | None = None
  fails_at: int | None = None  # the step, from 1, whose batch process 1 cannot read
  hangs_at: int | None = None  # the step whose batch process 1 never gets

  def describe(self) -> dict:
    """The same for all, as a rule."""
    return {"name": self.name}

  def batches(
    self, plan: Iterator[tuple[int, int]], process_index: int = 0, process_count: int = 1
  ) -> Iterator[dict[str, np.ndarray]]:
    """This host's rows of each batch."""
    for step, (first, size) in enumerate(plan, 1):
      time.sleep(self.seconds)
      if step == self.fails_at and process_index == 1:
        raise OSError("no such disk")
      if step == self.hangs_at and process_index == 1:
        time.sleep(3600)
      local = size // process_count
      numbers = range(first + process_index * local, first + (process_index + 1) * local)
      if self.batches_read:
        with open(f"{self.batches_read}/{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
          file.write(json.dumps(list(numbers)) + "\n")
      rows = [row(number) for number in numbers]
      yield {name: np.stack([r[name] for r in rows]) for name in rows[0]}
