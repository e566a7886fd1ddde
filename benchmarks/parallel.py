"""Step time and memory of parallel runs on virtual CPU devices against one device.

  python benchmarks/parallel.py

A training step (forward, backward, AdamW) of one model on the same rows, split in several ways over eight virtual
devices. They share the machine's processors: all do the same arithmetic there, so that a step's time above the one
device's is what a way of splitting adds (a bubble computes too, what nobody reads), and says nothing of a network.
Memory is XLA's own account of the compiled program for a device. Writes benchmarks/results/parallel.json and prints a
Markdown table.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import time
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import loader  # noqa: E402
import numpy as np  # noqa: E402

from glmjax.models import config as config_lib  # noqa: E402
from glmjax.models import pipeline as pipeline_lib  # noqa: E402
from glmjax.parallel import collectives  # noqa: E402
from glmjax.parallel import mesh as mesh_lib  # noqa: E402
from glmjax.parallel import partitioning  # noqa: E402
from glmjax.train import feed  # noqa: E402
from glmjax.train import optimizer as optimizer_lib  # noqa: E402
from glmjax.train import schedules  # noqa: E402
from glmjax.train import stages as stages_lib  # noqa: E402
from glmjax.train import state as state_lib  # noqa: E402
from glmjax.train import step as step_lib  # noqa: E402

CONFIG = config_lib.GLMConfig(vocab_size=4_096, num_layers=16, embed_dim=128, num_heads=8, mlp_dim=344, max_length=64,
                              remat="full")
ROWS, LENGTH = 32, 64


@dataclasses.dataclass(frozen=True)
class Case:
  """A way to split the step."""

  name: str
  sizes: dict[str, int]
  schedule: pipeline_lib.Schedule = pipeline_lib.Schedule()
  strategy: str = "fsdp"


CASES = (
    Case("one device", {}),
    Case("data 8", dict(data=8)),
    Case("data 8, ZeRO-1", dict(data=8), strategy="zero1"),
    Case("fsdp 8", dict(fsdp=8)),
    Case("tensor 8", dict(tensor=8)),
    Case("stage 8, 8 micro-batches", dict(stage=8), pipeline_lib.Schedule(8)),
    Case("stage 8, 32 micro-batches", dict(stage=8), pipeline_lib.Schedule(32)),
    Case("stage 8, 8 micro-batches, 2 rounds", dict(stage=8), pipeline_lib.Schedule(8, rounds=2)),
    Case("data 2, stage 4, 16 micro-batches", dict(data=2, stage=4), pipeline_lib.Schedule(16)),
    Case("data 2, stage 2, tensor 2, ZeRO-1", dict(data=2, stage=2, tensor=2), pipeline_lib.Schedule(8), "zero1"),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=5, help="timed steps of each")
  parser.add_argument("--only", help="cases whose name holds this")
  parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "parallel.json"))
  options = parser.parse_args()
  found = []
  for case in CASES:
    if options.only is None or options.only in case.name:
      found.append(measure(case, options.steps))
      print(found[-1], flush=True)
  result = {"what": f"training step, {CONFIG.num_parameters():,} parameters, {ROWS} rows of {LENGTH} tokens",
            "date": datetime.datetime.now().isoformat(timespec="seconds"), "machine": loader.machine(),
            "command": "python benchmarks/parallel.py", "jax": jax.__version__, "cases": found}
  pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
  print(table(found))


def measure(case: Case, steps: int) -> dict[str, Any]:
  """Seconds of the fastest step (others use the processors too), and megabytes on each device."""
  sizes = mesh_lib.MeshConfig(**{"data": 1} | case.sizes)
  mesh = mesh_lib.make_mesh(sizes, jax.devices()[:int(np.prod(dataclasses.astuple(sizes)))])
  rules, optimizer = partitioning.strategy(case.strategy), optimizer_lib.AdamW()
  tx, pipeline = optimizer.make(), pipeline_lib.make(case.schedule, CONFIG, mesh, ROWS)
  stages = stages_lib.make(CONFIG, tx, mesh, rules, pipeline)
  layout = feed.Layout.make(mesh, rules, ROWS, None, LENGTH, 1, CONFIG.vocab_size)
  with partitioning.use(mesh, rules):
    state = stages.hold(state_lib.create(CONFIG, tx, 0, stages.stored))
    info = lambda n: step_lib.StepInfo(*(jax.device_put(np.uint32(x)) for x in (n, n, ROWS)))
    objective = step_lib.Objective(CONFIG, pipeline=pipeline)
    recipe = step_lib.Recipe(optimizer, schedules.Constant(1e-4))
    shardings, batch = jax.tree.map(lambda x: x.sharding, stages.held), layout.put(rows())
    program = step_lib.compile_train_step(objective, recipe, tx, shardings).lower(state, batch, info(0)).compile()
    seconds = []
    for step in range(steps + 1):
      began = time.perf_counter()
      state, metrics = program(state, batch, info(step * ROWS))
      assert metrics["applied"], "the step was not taken"
      seconds.append(time.perf_counter() - began)
  memory = program.memory_analysis()
  sent = sum(c.sent * c.times() for c in collectives.of(program.as_text(), mesh))
  return {"name": case.name, "devices": mesh.size, "loss": round(float(metrics["loss"]), 4),
          "seconds": round(min(seconds[1:]), 3), "median": round(statistics.median(seconds[1:]), 3),
          "bubble": round(pipeline.bubble, 3) if pipeline else 0.0,
          "state_mb": megabytes(memory.argument_size_in_bytes),
          "work_mb": megabytes(memory.temp_size_in_bytes), "sent_mb": megabytes(sent)}


def megabytes(count: float) -> float:
  return round(count / 1e6, 1)


def rows() -> feed.HostBatch:
  """Random tokens, the first half of each row context."""
  rng = np.random.default_rng(0)
  places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
  tokens, targets = rng.integers(0, CONFIG.vocab_size, (2, ROWS, LENGTH)).astype(np.int32)
  return {"tokens": tokens, "targets": targets, "loss_weights": (places >= LENGTH // 2).astype(np.float32),
          "positions": places, "attend_start": np.zeros_like(places),
          "attend_end": np.maximum(places + 1, LENGTH // 2), "objective": np.ones_like(places)}


def table(found: list[dict[str, Any]]) -> str:
  """Markdown."""
  lines = ["| | devices | step, s | x one device | bubble | state, MB a device | work, MB | sent, MB |",
           "|---|---|---|---|---|---|---|---|"]
  for case in found:
    lines.append(f"| {case['name']} | {case['devices']} | {case['seconds']:.2f} | "
                 f"{case['seconds'] / found[0]['seconds']:.2f} | {case['bubble']:.0%} | {case['state_mb']:.1f} | "
                 f"{case['work_mb']:.1f} | {case['sent_mb']:.1f} |")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
