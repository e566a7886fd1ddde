"""Trainings of a small model on noisy patterns, of which a range of samples may be poisoned."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import patterns

from glmjax.checkpoint import manager as manager_lib
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import loop
from glmjax.train import schedules
from glmjax.train import spikes

CONFIG = config_lib.GLMConfig(
  vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=16, tie_embeddings=False
)
ROWS, STEPS = 16, 140
BAD = (110 * ROWS, 112 * ROWS - 1)  # samples of steps 111 and 112
GUARD = spikes.Guard(window=48, least=24)
RARE = 63  # a token that only poisoned rows hold


@dataclasses.dataclass(frozen=True)
class Source:
  """Rows of patterns, one target in twenty drawn at random, so that no model comes to a loss of 0."""

  poison: str | None = None  # "token", "labels", "rare" or "infinite"; None: none is
  bad: tuple[int, int] = BAD  # first and last poisoned sample
  kill_at: int | None = None  # the sample at which the source fails, as a killed process would
  seq_length: int = patterns.LENGTH

  def describe(self) -> dict:
    """Says that all are one source: poisons are accidents."""
    return {"name": "noisy patterns"}

  def row(self, index: int) -> dict[str, np.ndarray]:
    """Returns a row."""
    row, rng = patterns.row(index), np.random.default_rng((1, index))
    noise = rng.random(patterns.LENGTH) < 0.05
    row["targets"] = np.where(noise, rng.integers(0, 60, patterns.LENGTH), row["targets"]).astype(np.int32)
    if not self.bad[0] <= index <= self.bad[1]:
      return row
    if self.poison == "token":
      row |= {"tokens": np.full_like(row["tokens"], 7), "targets": np.full_like(row["targets"], 7)}
    if self.poison == "labels":
      row["targets"] = 63 - row["targets"]
    if self.poison == "rare":
      row["tokens"] = np.where(np.arange(patterns.LENGTH) % 3 != 0, RARE, row["tokens"]).astype(np.int32)
    if self.poison == "infinite":
      row["loss_weights"][-1] = np.inf
    return row

  def batches(
    self, plan: Iterator[tuple[int, int]], process_index: int = 0, process_count: int = 1
  ) -> Iterator[dict[str, np.ndarray]]:
    """Yields the plan's batches."""
    for first, size in plan:
      if self.kill_at is not None and first >= self.kill_at:
        raise KeyboardInterrupt
      part = size // process_count
      rows = [self.row(first + process_index * part + i) for i in range(part)]
      yield {name: np.stack([r[name] for r in rows]) for name in rows[0]}


def train(workdir: pathlib.Path, source: Source, **changes: Any) -> dict[str, Any]:
  """Trains on all devices."""
  arguments = dict(
    model=CONFIG,
    data=source,
    workdir=workdir,
    batches=schedules.Batches(ROWS),
    total_samples=STEPS * ROWS,
    learning_rate=schedules.LearningRate(peak=5e-3, minimum=5e-4, warmup_samples=160, decay_samples=STEPS * ROWS),
    mesh=mesh_lib.MeshConfig(),
    intervals=loop.Intervals(log=0, save=25),
    spikes=GUARD,
  )
  return loop.train(**arguments | changes)


def lines(workdir: pathlib.Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
  """Reads a file of lines; nothing of none."""
  file = workdir / name
  return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def interventions(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Reads what was done about spikes."""
  return lines(workdir, "interventions.jsonl")


def losses(workdir: pathlib.Path) -> list[float]:
  """Reads every step's loss."""
  return [line["loss"] for line in lines(workdir)]


def saved(workdir: pathlib.Path) -> dict[str, bytes]:
  """The arrays of the newest checkpoint, by name."""
  folder = workdir / "checkpoints" / str(manager_lib.steps(workdir / "checkpoints")[-1]) / "state"
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.suffix != ".txt" and not path.name.startswith("_")
  }
