"""Tiny models, adapters trained beside them for a few steps, and what they have learned."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import patterns

from glmjax.checkpoint import export
from glmjax.checkpoint import source as source_lib
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import loop
from glmjax.train import schedules
from glmjax.train import trainable

CONFIG = config_lib.GLMConfig(vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=16)
ADAPTERS = {
  "lora": trainable.LoRA(rank=2, dropout=0.1),
  "p_tuning": trainable.PTuning(length=3),
  "projection": trainable.PTuning(length=3, projection=True),
}
TOKENS = np.random.default_rng(0).integers(0, 64, (4, 16), np.int32)


class Patterns:
  """Rows that anybody can make again."""

  seq_length = 16

  def describe(self) -> dict:
    return {"name": "patterns"}

  def batches(self, plan, process_index=0, process_count=1):
    for first, size in plan:
      rows = [patterns.row(first + i) for i in range(size)]
      yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _train(workdir: pathlib.Path, steps: int, **changes: Any) -> None:
  mesh = mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2)
  batches, rate = schedules.Batches(8), schedules.Constant(3e-2)
  loop.train(CONFIG, Patterns(), workdir, batches, 10**6, rate, mesh=mesh, stop_at_step=steps, **changes)


@dataclasses.dataclass(frozen=True)
class Made:
  """Folders of bases and of runs, made when they are first asked for."""

  folder: pathlib.Path

  def base(self, name: str) -> pathlib.Path:
    """The model as float or int4."""
    folder = self.folder / name
    if not folder.exists():
      export.export(self.folder / "run", folder, bits={"float": None, "int4": 4}[name])
    return folder

  def run(self, name: str, base: str) -> pathlib.Path:
    """The run of an adapter beside a base."""
    folder = self.folder / f"{name}_{base}"
    if not folder.exists():
      _train(folder, 4, trainable=ADAPTERS[name], weights=self.base(base))
    return folder

  def trained(self, name: str, base: str) -> tuple[config_lib.GLMConfig, dict[str, Any]]:
    """The model with the adapter as it was trained, without dropout, and what was trained."""
    found = source_lib.use(self.run(name, base), lambda source: source.read(source.targets()))
    config = ADAPTERS[name].adapt(CONFIG)
    return dataclasses.replace(config, lora_dropout=0.0, prefix_dropout=0.0), params_lib.nest(found)


def make(folder: pathlib.Path) -> Made:
  """Trains the model."""
  _train(folder / "run", 4)
  return Made(folder)
