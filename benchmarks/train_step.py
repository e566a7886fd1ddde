"""A training step against the original PyTorch code on the same machine, float32 and bfloat16.

  python benchmarks/train_step.py --baseline_python TORCH_VENV/bin/python --baseline_script torch_reference.py

Both train 6 layers, width 512, 8 heads, GeGLU 1365, vocabulary 20480 (29.4 M parameters) on 8 rows of 512
tokens, loss on the second half, forward, backward and AdamW; tokens/s counts all 4,096. Ours is the trainer's
own step: clipping, gradient norms per part and the master weights' update included. They take turns. Runs
during which other processes used the processors are marked busy, and count only where there are no quiet
ones. Without the baseline's flags only ours runs. The original's code is not part of glmjax: the script is yours,
around it, and prints a last line of JSON, {"median": tokens/s}, when it is called with `train --dtype D --runs N`.
Writes benchmarks/results/train_step.json.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from glmjax.parallel import host

host.keep_freed_memory()  # before JAX starts its threads, as the trainer does

import decode  # noqa: E402
import jax  # noqa: E402
import loader  # noqa: E402
import random_rows  # noqa: E402
import numpy as np  # noqa: E402

from glmjax.models import config as config_lib  # noqa: E402
from glmjax.parallel import mesh as mesh_lib  # noqa: E402
from glmjax.parallel import partitioning  # noqa: E402
from glmjax.train import feed  # noqa: E402
from glmjax.train import objective as objective_lib  # noqa: E402
from glmjax.train import optimizer as optimizer_lib  # noqa: E402
from glmjax.train import schedules  # noqa: E402
from glmjax.train import state as state_lib  # noqa: E402
from glmjax.train import step as step_lib  # noqa: E402

CONFIG = config_lib.GLMConfig(
  vocab_size=20480, num_layers=6, embed_dim=512, num_heads=8, mlp_dim=1365, max_length=512, scan_layers=False
)
BATCH, LENGTH = 8, 512
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}  # ours, and what the baseline calls them


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--baseline_python", help="interpreter that has the original's packages")
  parser.add_argument("--baseline_script", help="yours, around the original's code, as above")
  parser.add_argument("--rounds", type=int, default=3, help="turns of each")
  parser.add_argument("--runs", type=int, default=4, help="quiet runs in a turn")
  parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "train_step.json"))
  options = parser.parse_args()
  result = {
    "what": f"training step, {BATCH} x {LENGTH} tokens, loss on the second half, AdamW, tokens/s",
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "machine": loader.machine(),
    "command": " ".join(["python", "benchmarks/train_step.py", *map(os.path.basename, sys.argv[1:])]),
    "jax": jax.__version__,
  }
  for dtype in DTYPES:
    run, compile_seconds = prepare(dtype)
    ours, theirs = [], []
    for turn in range(options.rounds):
      ours.append(decode.measure(run, options.runs))
      print(f"{dtype} turn {turn + 1}: glmjax {ours[-1]}", flush=True)
      if options.baseline_python:
        theirs.append(baseline(options, dtype))
        print(f"{dtype} turn {turn + 1}: original {theirs[-1]}", flush=True)

    def median(turns):
      return statistics.median(turn["median"] for turn in turns)

    result[dtype] = {
      "compile_seconds": compile_seconds,
      "glmjax": ours,
      "original": theirs,
      "glmjax_median": median(ours),
    }
    if theirs:
      result[dtype] |= {"original_median": median(theirs), "ratio": round(median(ours) / median(theirs), 2)}
  pathlib.Path(options.out).parent.mkdir(parents=True, exist_ok=True)
  pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(result, indent=1))


def baseline(options: argparse.Namespace, dtype: str) -> dict:
  """Runs one turn of the original."""
  command = [
    options.baseline_python,
    options.baseline_script,
    "train",
    "--dtype",
    DTYPES[dtype],
    "--runs",
    str(options.runs),
  ]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def prepare(dtype: str) -> tuple[Callable[[], float], float]:
  """Returns a function that takes one step and returns tokens/s, warmed up; and the seconds that compiling took."""
  config = dataclasses.replace(CONFIG, dtype=dtype)
  optimizer = optimizer_lib.AdamW()
  tx, mesh = optimizer.make(), mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1), jax.devices()[:1])
  layout = feed.Layout.make(mesh, partitioning.FSDP, BATCH, None, LENGTH, config.position_kind, config.vocab_size)
  batch = layout.put(random_rows.make(BATCH, LENGTH, 20_000, context=LENGTH // 2))
  with partitioning.use(mesh):
    abstract = state_lib.abstract(config, tx, mesh)
    state = state_lib.create(config, tx, 0, abstract)
    objective = objective_lib.Objective(config)
    recipe = step_lib.Recipe(optimizer, schedules.Constant(1e-4))
    info = step_lib.StepInfo(*(jax.device_put(np.uint32(n)) for n in (0, 0, BATCH)))
    began = time.perf_counter()
    compiled = (
      step_lib.compile_train_step(objective, recipe, tx, jax.tree.map(lambda x: x.sharding, abstract))
      .lower(state, batch, info)
      .compile()
    )
    compile_seconds = round(time.perf_counter() - began, 1)
  host.reserve_huge_pages(compiled.memory_analysis().temp_size_in_bytes * 5 // 4)

  def run() -> float:
    nonlocal state
    began = time.perf_counter()
    position = jax.device_put(np.uint32(state.samples_seen))
    state, metrics = compiled(state, batch, step_lib.StepInfo(position, position, info.size))
    assert metrics["applied"], "the step was not taken"
    return BATCH * LENGTH / (time.perf_counter() - began)

  run(), run()
  return run, compile_seconds


if __name__ == "__main__":
  main()
