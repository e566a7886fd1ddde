"""Step time and memory of parallel runs on virtual CPU devices against one device.

  python benchmarks/parallel.py

A training step (forward, backward, AdamW) of one model on the same rows, split in several ways over eight virtual
devices. They share the machine's processors: all do the same arithmetic there, so that a step's time above the one
device's is what a way of splitting adds (a bubble computes too, what nobody reads), and says nothing of a network.
Memory is XLA's own account of the compiled program for a device. Writes benchmarks/results/parallel.json and prints a
Markdown table.

  python benchmarks/parallel.py --compiled

What strategies hold and send on several meshes, of a larger model and four micro-batches: only compiled, not run.
Writes benchmarks/results/strategies.json.
"""

import argparse
import dataclasses
import datetime
import os
import pathlib
import statistics
import sys
import time
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import loader  # noqa: E402
import numpy as np  # noqa: E402
import random_rows  # noqa: E402

from glmjax.io import publish  # noqa: E402
from glmjax.models import config as config_lib  # noqa: E402
from glmjax.models import params as params_lib  # noqa: E402
from glmjax.parallel import collectives  # noqa: E402
from glmjax.parallel import hlo  # noqa: E402
from glmjax.parallel import mesh as mesh_lib  # noqa: E402
from glmjax.parallel import partitioning  # noqa: E402
from glmjax.train import feed  # noqa: E402
from glmjax.train import objective as objective_lib  # noqa: E402
from glmjax.train import optimizer as optimizer_lib  # noqa: E402
from glmjax.train import pipeline as pipeline_lib  # noqa: E402
from glmjax.train import schedules  # noqa: E402
from glmjax.train import state as state_lib  # noqa: E402
from glmjax.train import step as step_lib  # noqa: E402
from glmjax.train.pipeline import stage_layout  # noqa: E402

CONFIG = config_lib.GLMConfig(
  vocab_size=4_096, num_layers=16, embed_dim=128, num_heads=8, mlp_dim=344, max_length=64, remat="full"
)
ROWS, LENGTH = 32, 64
LARGER = config_lib.GLMConfig(
  vocab_size=16_384, num_layers=8, embed_dim=512, num_heads=8, mlp_dim=1_408, max_length=512, remat="full"
)
MICRO_BATCHES, MICRO_BATCH = 4, 16


@dataclasses.dataclass(frozen=True)
class Case:
  """A way to split the step."""

  name: str
  sizes: dict[str, int]
  schedule: pipeline_lib.PipelineConfig = pipeline_lib.PipelineConfig()
  strategy: str = "fsdp"
  remat: str = "full"  # 1F1B computes forward twice with "dots", as the others do with "full"


CASES = (
  Case("one device", {}),
  Case("data 8", dict(data=8)),
  Case("data 8, ZeRO-1", dict(data=8), strategy="zero1"),
  Case("fsdp 8", dict(fsdp=8)),
  Case("tensor 8", dict(tensor=8)),
  Case("stage 8, 8 micro-batches", dict(stage=8), pipeline_lib.PipelineConfig(8), remat="dots"),
  Case("stage 8, 32 micro-batches", dict(stage=8), pipeline_lib.PipelineConfig(32), remat="dots"),
  Case("stage 8, 32 micro-batches, gpipe", dict(stage=8), pipeline_lib.PipelineConfig(32, kind="gpipe")),
  Case("stage 8, 8 micro-batches, gpipe, 2 rounds", dict(stage=8), pipeline_lib.PipelineConfig(8, 2, "gpipe")),
  Case("data 2, stage 4, 16 micro-batches", dict(data=2, stage=4), pipeline_lib.PipelineConfig(16), remat="dots"),
  Case(
    "data 2, stage 2, tensor 2, ZeRO-1",
    dict(data=2, stage=2, tensor=2),
    pipeline_lib.PipelineConfig(8),
    "zero1",
    "dots",
  ),
)
COMPILED = (
  Case("one device", {}),
  Case("data 8", dict(data=8)),
  Case("data 8", dict(data=8), strategy="zero1"),
  Case("fsdp 8", dict(fsdp=8)),
  Case("data 2, fsdp 4", dict(data=2, fsdp=4)),
  Case("tensor 8", dict(tensor=8)),
  Case("context 8", dict(context=8)),
  Case("data 2, fsdp 2, tensor 2", dict(data=2, fsdp=2, tensor=2)),
  Case("data 2, fsdp 2, tensor 2", dict(data=2, fsdp=2, tensor=2), strategy="zero1"),
  Case("data 2, tensor 2, context 2", dict(data=2, tensor=2, context=2), strategy="zero1"),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--compiled", action="store_true", help="memory and bytes sent of the strategies; no step is run")
  parser.add_argument("--steps", type=int, default=5, help="timed steps of each")
  parser.add_argument("--only", help="cases whose name holds this")
  parser.add_argument("--out", help="default: benchmarks/results/parallel.json, or strategies.json")
  options = parser.parse_args()
  config, length = (LARGER, LARGER.max_length) if options.compiled else (CONFIG, LENGTH)
  num_rows = MICRO_BATCHES * MICRO_BATCH if options.compiled else ROWS
  found = []
  for case in COMPILED if options.compiled else CASES:
    if options.only is None or options.only in case.name:
      found.append(compiled(case) if options.compiled else measure(case, options.steps))
      print(found[-1], flush=True)
  result = {
    "what": f"training step, {params_lib.count(config):,} parameters, {num_rows} rows of {length} tokens",
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "machine": loader.machine(),
    "command": " ".join(["python", "benchmarks/parallel.py", *sys.argv[1:]]),
    "jax": jax.__version__,
    "cases": found,
  }
  name = "strategies.json" if options.compiled else "parallel.json"
  publish.write_json(options.out or pathlib.Path(__file__).parent / "results" / name, result)
  print(compiled_table(found) if options.compiled else table(found))


class Step:
  """A case's training step, as the trainer makes it, and what it needs."""

  def __init__(self, case: Case, config: config_lib.GLMConfig, rows: int, micro_batch: int | None, length: int):
    sizes = mesh_lib.MeshConfig(**{"data": 1} | case.sizes)
    self.mesh = mesh_lib.make_mesh(sizes, jax.devices()[: int(np.prod(dataclasses.astuple(sizes)))])
    self.rules, self.optimizer = partitioning.strategy(case.strategy), optimizer_lib.AdamW()
    self.tx, self.config = self.optimizer.make(), config
    self.layout = feed.Layout.make(
      self.mesh, self.rules, rows, micro_batch, length, config.position_kind, config.vocab_size
    )
    self.pipeline = pipeline_lib.make(case.schedule, config, self.mesh, self.layout.rows)
    self.stages = stage_layout.make(config, self.tx, self.mesh, self.rules, self.pipeline)

  def compile(self) -> jax.stages.Compiled:
    """Compiles (state, batch, info) -> (state, metrics); within partitioning.use."""
    objective = objective_lib.Objective(self.config, pipeline=self.pipeline)
    recipe = step_lib.Recipe(self.optimizer, schedules.Constant(1e-4))
    scalar = jax.ShapeDtypeStruct((), np.uint32, sharding=partitioning.named(self.mesh, self.rules))
    step = step_lib.compile_train_step(
      objective, recipe, self.tx, jax.tree.map(lambda x: x.sharding, self.stages.in_stages)
    )
    return step.lower(
      self.stages.in_stages, self.layout.abstract(), step_lib.StepInfo(scalar, scalar, scalar)
    ).compile()

  def sizes(self, program: jax.stages.Compiled) -> dict[str, float]:
    """Returns the bytes of a device: its state, what XLA sets aside, what it sends in a step."""
    memory = program.memory_analysis()
    sent = sum(c.sent * c.times(self.layout.num_micro) for c in collectives.of(hlo.read(program.as_text()), self.mesh))
    return {"state": memory.argument_size_in_bytes, "work": memory.temp_size_in_bytes, "sent": sent}


def measure(case: Case, steps: int) -> dict[str, Any]:
  """Measures seconds of the fastest step (others use the processors too), and megabytes on each device."""
  made = Step(case, dataclasses.replace(CONFIG, remat=case.remat), ROWS, None, LENGTH)
  with partitioning.use(made.mesh, made.rules):
    state = made.stages.put_in_stages(state_lib.create(CONFIG, made.tx, 0, made.stages.as_checkpointed))
    everywhere = partitioning.named(made.mesh, made.rules)

    def info(n):
      return step_lib.StepInfo(*(jax.device_put(np.uint32(x), everywhere) for x in (n, n, ROWS)))

    program, batch = (
      made.compile(),
      made.layout.put(random_rows.make(ROWS, LENGTH, CONFIG.vocab_size, context=LENGTH // 2)),
    )
    seconds = []
    for step in range(steps + 1):
      began = time.perf_counter()
      state, metrics = program(state, batch, info(step * ROWS))
      assert metrics["applied"], "the step was not taken"
      seconds.append(time.perf_counter() - began)
  return {
    "name": case.name,
    "devices": made.mesh.size,
    "loss": round(float(metrics["loss"]), 4),
    "seconds": round(min(seconds[1:]), 3),
    "median": round(statistics.median(seconds[1:]), 3),
    "bubble": round(made.pipeline.bubble, 3) if made.pipeline else 0.0,
    **{f"{name}_mb": megabytes(size) for name, size in made.sizes(program).items()},
  }


def compiled(case: Case) -> dict[str, Any]:
  """Returns MiB on each device, and sent by it in a step."""
  made = Step(case, LARGER, MICRO_BATCHES * MICRO_BATCH, MICRO_BATCH, LARGER.max_length)
  with partitioning.use(made.mesh, made.rules):
    sizes = made.sizes(made.compile())
  return {
    "name": case.name,
    "strategy": case.strategy,
    "devices": made.mesh.size,
    **{f"{name}_mib": round(size / 2**20, 1) for name, size in sizes.items()},
  }


def megabytes(count: float) -> float:
  return round(count / 1e6, 1)


def table(found: list[dict[str, Any]]) -> str:
  """Returns the results as a Markdown table."""
  lines = [
    "| | devices | step, s | x one device | bubble | state, MB a device | work, MB | sent, MB |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for case in found:
    lines.append(
      f"| {case['name']} | {case['devices']} | {case['seconds']:.2f} | "
      f"{case['seconds'] / found[0]['seconds']:.2f} | {case['bubble']:.0%} | {case['state_mb']:.1f} | "
      f"{case['work_mb']:.1f} | {case['sent_mb']:.1f} |"
    )
  return "\n".join(lines)


def compiled_table(found: list[dict[str, Any]]) -> str:
  """Returns what compilers say as a Markdown table."""
  lines = ["| mesh | strategy | state, MiB | work, MiB | sent, MiB |", "|---|---|---|---|---|"]
  for case in found:
    lines.append(
      f"| {case['name']} | {case['strategy']} | {case['state_mib']:,.1f} | {case['work_mib']:,.1f} | "
      f"{case['sent_mib']:,.1f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  main()
