"""A step that trains an adapter, against forward and backward of all parameters without an optimizer, in turns.

  python benchmarks/adapter_step.py

The model, but for one more place of its MLPs, and the rows are those of train_step.py: 29.4 M parameters, 8 rows of 512
tokens, loss on the second half, float32. A step of an adapter is the trainer's own, whole, with AdamW; beside a frozen
base in float32, and in INT8 and INT4 with the codes as they are. Seconds are medians of the turns. Writes
benchmarks/results/adapter_step.json.
"""

import argparse
from collections.abc import Callable
import dataclasses
import datetime
import functools
import json
import pathlib
import shlex
import statistics
import sys
import time

from glmjax.parallel import host

host.keep_freed_memory()  # before JAX starts its threads, as the trainer does

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import loader  # noqa: E402
import numpy as np  # noqa: E402
import random_rows  # noqa: E402
import train_step  # noqa: E402

from glmjax.models import config as config_lib  # noqa: E402
from glmjax.models import params as params_lib  # noqa: E402
from glmjax.parallel import mesh as mesh_lib  # noqa: E402
from glmjax.parallel import partitioning  # noqa: E402
from glmjax.quantize import qarray  # noqa: E402
from glmjax.train import feed  # noqa: E402
from glmjax.train import gradient  # noqa: E402
from glmjax.train import objective as objective_lib  # noqa: E402
from glmjax.train import optimizer as optimizer_lib  # noqa: E402
from glmjax.train import schedules  # noqa: E402
from glmjax.train import state as state_lib  # noqa: E402
from glmjax.train import step as step_lib  # noqa: E402
from glmjax.train import trainable  # noqa: E402

# INT4 has two inputs of a kernel in a byte: an even number of them.
CONFIG = dataclasses.replace(train_step.CONFIG, mlp_dim=train_step.CONFIG.mlp_dim + 1)
BATCH, LENGTH = train_step.BATCH, train_step.LENGTH
LORA, QKV, PREFIX = trainable.LoRA(), trainable.LoRA(kernels=["attention/qkv"]), trainable.PTuning(length=16)
STEPS = {
  "LoRA, float32 base": (LORA, None),
  "LoRA, INT8 base": (LORA, 8),
  "LoRA, INT4 base": (LORA, 4),
  "LoRA of qkv alone, INT4 base": (QKV, 4),
  "P-Tuning, INT4 base": (PREFIX, 4),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--turns", type=int, default=7)
  parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "adapter_step.json"))
  options = parser.parse_args()
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1), jax.devices()[:1])
  with partitioning.use(mesh):
    runs = {"forward and backward of all": whole(mesh)} | {
      name: adapter(mesh, *settings) for name, settings in STEPS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.turns):
      for name, run in runs.items():
        seconds[name].append(timed(run))
  medians = {name: statistics.median(each) for name, each in seconds.items()}
  base = medians["forward and backward of all"]
  result = {
    "what": f"seconds of a step, {BATCH} x {LENGTH} tokens, 29.4 M parameters, float32",
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "machine": loader.machine(),
    "command": shlex.join(["python", "benchmarks/adapter_step.py", *sys.argv[1:]]),
    "seconds": {name: [round(x, 3) for x in each] for name, each in seconds.items()},
    "of forward and backward": {name: round(median / base, 2) for name, median in medians.items()},
  }
  pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(result, indent=1))


def timed(run: Callable[[], None]) -> float:
  """Returns the seconds that a call takes."""
  began = time.perf_counter()
  run()
  return time.perf_counter() - began


def rows(mesh: jax.sharding.Mesh, config: config_lib.GLMConfig) -> objective_lib.Batch:
  """Puts the rows on the device."""
  layout = feed.Layout.make(mesh, partitioning.FSDP, BATCH, None, LENGTH, config.position_kind, config.vocab_size)
  return layout.put(random_rows.make(BATCH, LENGTH, 20_000, context=LENGTH // 2))


def whole(mesh: jax.sharding.Mesh) -> Callable[[], None]:
  """Returns what computes loss and gradients of all parameters."""
  state, objective = state_lib.init(CONFIG, optimizer_lib.AdamW().make(), 0), objective_lib.Objective(CONFIG)
  params, batch = partitioning.unbox(state.params), rows(mesh, CONFIG)

  @jax.jit
  def both(params: dict, batch: objective_lib.Batch) -> gradient.Found:
    factor = 1.0 / objective.weight(batch)
    work = objective_lib.Work(batch, jnp.float32(1), jax.random.key(0), factor)
    return gradient.of_step(objective, params, {}, work, jnp.int32(1))

  run = functools.partial(both, params, batch)
  jax.block_until_ready(run())
  return lambda: jax.block_until_ready(run())


def adapter(mesh: jax.sharding.Mesh, kind: trainable.Trainable, bits: int | None) -> Callable[[], None]:
  """Returns what takes a step that trains an adapter."""
  config, optimizer = kind.adapt(CONFIG), optimizer_lib.AdamW()
  tx, batch = optimizer.make(), rows(mesh, config)
  abstract = state_lib.abstract(config, tx, mesh, is_trained=kind.is_trained, frozen_bits=bits)
  state = partitioning.unbox(state_lib.init(config, tx, 0, is_trained=kind.is_trained))
  frozen = {}
  for path, x in params_lib.flatten(state.frozen).items():
    param = params_lib.known(path)
    quantizes = bits and param.quantizes
    frozen[path] = jax.jit(qarray.quantize, static_argnums=(1, 2))(x, bits, param.inputs) if quantizes else x
  state = dataclasses.replace(state, frozen=params_lib.nest(frozen))
  recipe = step_lib.Recipe(optimizer, schedules.Constant(1e-4))
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  step = step_lib.compile_train_step(objective_lib.Objective(config), recipe, tx, shardings)

  def run() -> None:
    nonlocal state
    position = jax.device_put(np.uint32(state.samples_seen))
    state, metrics = step(state, batch, step_lib.StepInfo(position, position, jax.device_put(np.uint32(BATCH))))
    assert metrics["applied"], "the step was not taken"
    jax.block_until_ready(state)

  run()
  return run


if __name__ == "__main__":
  main()
