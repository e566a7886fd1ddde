# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Many devices: the same model, split
#
# A model that does not fit one device, or takes too long on it, is split over many. glmjax lays devices out as a
# **mesh** of named axes, and each axis splits something else. Here are eight *virtual* devices in this computer's
# processor: slower than one, but they show all that eight chips would do. You will see the same losses whatever the
# mesh, what lies on which device, what devices send one another, and how a pipeline fills and empties.
#
# *Takes* two minutes on two cores (145 seconds of processor time) and 1.4 GB of memory, once things are installed; no
# GPU, no network, no TensorFlow. (docs/... are files of glmjax's checkout; where its wheel alone is installed, `glmjax
# --help` names the commands.)

# %%
# @title Install {display-mode: "form"}
# Installs what is missing: nothing where glmjax is installed; on Colab two minutes. There, upload glmjax's wheel
# first, to beside this notebook (`make dist` in a checkout makes it).
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

if missing := [name for name in ("glmjax", "sentencepiece", "matplotlib") if importlib.util.find_spec(name) is None]:
  here = pathlib.Path.cwd()
  checkouts = [str(folder) for folder in (here, here.parent) if (folder / "glmjax" / "show.py").is_file()]
  sources = checkouts + sorted(map(str, here.glob("glmjax-*.whl")), key=os.path.getmtime, reverse=True)
  if not sources:
    raise SystemExit(f"{', '.join(missing)} missing: put glmjax's wheel (glmjax-*.whl) beside this notebook")
  has_gpu = pathlib.Path("/dev/nvidia0").exists()
  has_tpu = any(name.startswith("TPU_") for name in os.environ) or pathlib.Path("/dev/accel0").exists()
  jax = "jax[cuda12]" if has_gpu else "jax[tpu]" if has_tpu else "jax"
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"{sources[0]}[report]", jax], check=True)
  importlib.invalidate_caches()
imported = getattr(sys.modules.get("jax"), "__version__", None)
if imported not in (None, importlib.metadata.version("jax")):
  raise SystemExit("jax was imported before it was upgraded: restart the session, then run all cells")

# %% tags=["parameters"]
STEPS = 8  # of training on each mesh
MESHES = {  # name: sizes of axes; a product of eight
  "data 8": dict(data=8),
  "fsdp 8": dict(data=1, fsdp=8),
  "data 2, tensor 4": dict(data=2, tensor=4),
  "data 2, stage 4": dict(data=2, stage=4),
  "data 2, context 4": dict(data=2, context=4),
  "data 2, fsdp 2, tensor 2": dict(data=2, fsdp=2, tensor=2),
}

# %% [markdown]
# ## Eight devices out of one processor
#
# JAX is told so before it starts. Where it has started in this session (on Colab: when a cell above has computed
# something), the cell says that it is too late: restart the session, and run this notebook from its top. On a machine
# that has eight real devices leave the cell out.

# %%
import jax

try:
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  started = jax.device_count() != 8
except RuntimeError:
  started = True
if started:
  raise SystemExit("JAX has started already: restart the session, then run this notebook from its top")

# %% [markdown]
# ## Something to learn
#
# A small model, and rows made out of a few sentences as in notebook 01. Any Python object with these three members can
# feed a run: each step asks it for the rows of some sample numbers, and it must give the same ones each time.

# %%
import tempfile
from collections.abc import Iterator

import numpy as np

import glmjax
from glmjax import display, show, tokenizer
from glmjax.data import rows
from glmjax.models import config
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import loop, pipeline, schedules

TEXTS = [
  "The library has moved into the old bakery. It still smells of bread on wet mornings.",
  "Anna keeps bees behind the school. She sells honey on wet mornings, and it still smells of bread.",
  "The old mill has a wheel. It turns on wet mornings. The bakery has bread. Anna has moved into the mill.",
]
scratch = tempfile.TemporaryDirectory()
words = tokenizer.train(TEXTS, f"{scratch.name}/tokenizer", vocab_size=480)


class Sentences:
  """Rows of 64 tokens with blanks, of the sentences over and over."""

  seq_length = 64

  def __init__(self) -> None:
    self._infilling = rows.BlankInfilling(self.seq_length, words.specials, samples_per_sequence=1)
    self._ids = np.resize(words.encode(" ".join(TEXTS)), 4 * self.seq_length)

  def describe(self) -> dict:
    return {"sentences": TEXTS}

  def batches(
    self, plan: Iterator[tuple[int, int]], process_index: int = 0, process_count: int = 1
  ) -> Iterator[dict[str, np.ndarray]]:
    window = self._infilling.window_length
    for first, size in plan:
      starts = [(7 * n % (len(self._ids) - window), n) for n in range(first, first + size)]
      made = [self._infilling.text_row(self._ids[start : start + window], seed=1, index=n) for start, n in starts]
      yield {name: np.stack([row[name] for row in made]) for name in made[0]}


MODEL = config.GLMConfig(
  vocab_size=480, num_layers=4, embed_dim=64, num_heads=4, mlp_dim=176, max_length=64, hidden_dropout=0.1
)
ROWS = 16  # of a step

# %% [markdown]
# ## The same losses on every mesh
#
# | axis | what is split |
# |---|---|
# | `data` | rows; every device has a copy of the model |
# | `fsdp` | rows, and weights and the optimizer's memory too: a layer's weights are gathered when it is computed |
# | `tensor` | heads, the mlp's width and the vocabulary: all devices of it work on each product |
# | `stage` | layers: rows flow from stage to stage |
# | `context` | the tokens of a row |
#
# The run is the same but for its mesh. Even dropout is, as what is dropped depends on the row and the layer, not on
# who computes them. So a run may go on tomorrow on other devices than today's. With `stage` the *strategy* is `zero1`,
# as docs/scaling.md advises for a pipeline: weights and the optimizer's memory are split over `data` too, and gathered
# once a step, not in every tick of the pipeline.

# %%
strategies = {name: "zero1" if "stage" in sizes else "fsdp" for name, sizes in MESHES.items()}
runs = {}
for name, sizes in MESHES.items():
  runs[name] = glmjax.train(
    model=MODEL,
    data=Sentences(),
    workdir=f"{scratch.name}/{name}",
    batches=schedules.Batches(ROWS),
    total_samples=ROWS * STEPS,
    learning_rate=schedules.Constant(3e-3),
    intervals=loop.Intervals(log=0),
    mesh=mesh_lib.MeshConfig(**sizes),
    strategy=strategies[name],
    pipeline=pipeline.PipelineConfig(microbatches=4),
  )

# %%
losses = {name: [step["loss"] for step in run.metrics] for name, run in runs.items()}
first = next(iter(losses))
for name, found in losses.items():
  np.testing.assert_allclose(found, losses[first], rtol=2e-4, err_msg=name)
assert losses[first][-1] < losses[first][0]
display.Figures({f"step {n + 1}": {name: f"{found[n]:.5f}" for name, found in losses.items()} for n in range(STEPS)})

# %% [markdown]
# Where they differ at all it is in the last digits: sums of the same numbers in another order.
#
# ## What lies where
#
# `plan.here.step` compiles the step for a mesh without running it, and reads what came out. First the second weight
# matrix of the mlp, [layers, mlp's width, model's width]: a panel for each layer, and in it the numbers of the devices
# that hold the part. With `data` alone all devices hold all of it:

# %%
from glmjax.plan import here, programs

steps = {}
for name, sizes in MESHES.items():
  four = pipeline.PipelineConfig(microbatches=4)
  work = programs.Train(batch_size=ROWS, length=64, strategy=strategies[name], pipeline=four)
  steps[name] = here.step(MODEL, work, mesh_lib.MeshConfig(**sizes))
kernels = {name: step.parameters["layers"]["mlp"]["wo"]["kernel"] for name, step in steps.items()}
AXES = ("layer", "mlp's width", "model's width")
show.shards(kernels["data 8"], AXES)

# %% [markdown]
# With `fsdp` each holds an eighth of each layer, cut along the model's width. Nobody can compute a product with that;
# the layer is gathered when its turn comes, and forgotten after.

# %%
show.shards(kernels["fsdp 8"], AXES)

# %% [markdown]
# With `tensor` each holds a fourth along the mlp's width, and computes with it where it lies; `data` makes copies.

# %%
show.shards(kernels["data 2, tensor 4"], AXES)

# %% [markdown]
# With `stage` each holds a fourth of the layers. (And half of each, by `zero1`: the two devices of `data` share what
# both would hold, until the step gathers it.)

# %%
show.shards(kernels["data 2, stage 4"], AXES)

# %% [markdown]
# ## What a device needs
#
# `parameters` are the float32 weights, `optimizer` AdamW's two numbers for each of them, `temporaries` what the step
# works with. Axes that split weights make the first two smaller; `data` and `context` leave them whole, and only share
# out the work (but for `data` with `zero1`, here beside `stage`).

# %%
show.stacked(
  {name: {part: size / 1e6 for part, size in step.memory.items()} for name, step in steps.items()},
  "memory of a device, MB",
)

# %% [markdown]
# ## What devices send
#
# Nothing is for nothing: what is split must be brought together. These are the *collectives* of the compiled program,
# in MB that a device sends in one step, by the axes they go over; `data x context` are those among all devices of the
# two axes at once.

# %%
show.stacked(
  {name: {axes: size / 1e6 for axes, size in step.sent().items()} for name, step in steps.items()},
  "sent by a device in a step, MB",
)

# %% [markdown]
# And what they are, the three largest of each mesh: an `all-gather` puts parts together on all devices, an `all-reduce`
# sums over all, an `all-to-all` deals out parts to all, a `collective-permute` hands on to the next, as from stage to
# stage.

# %%
most = {f"{name}: {each.name}": each for name, step in steps.items() for each in step.exchanges[:3]}
display.Figures(
  {
    "times a step": {name: each.times for name, each in most.items()},
    "kB a step": {name: round(each.bytes / 1000, 1) for name, each in most.items()},
  }
)

# %%
sent = {name: step.sent() for name, step in steps.items()}
assert set(sent["data 8"]) == {"data"}  # gradients alone
assert not [each for each in steps["data 8"].exchanges if each.kind == "all-gather"]
assert steps["fsdp 8"].memory["optimizer"] < steps["data 8"].memory["optimizer"] / 4
assert [each for each in steps["fsdp 8"].exchanges if each.kind == "all-gather"]

# %% [markdown]
# This decides which axis goes where. `tensor` and `context` send at every layer and need the fastest links, those
# within a machine. `stage` hands on once for all layers of a stage, nine of them in GLM-130B, and is what one lays over
# slow links between machines.
#
# ## A pipeline fills, runs, and empties
#
# With stages a step's rows are cut into micro-batches. The first stage begins with micro-batch 0 while the others wait,
# and at the end it waits itself: that is the **bubble**. Two schedules differ in when a micro-batch goes backward. In
# `gpipe` all go forward first, so that what they need for going backward is kept for all of them:

# %%
from glmjax.train.pipeline import timeline

gpipe, one_f_one_b = (
  pipeline.Pipeline(stages=4, microbatches=8, rounds=1, num_layers=4, kind=kind) for kind in ("gpipe", "1f1b")
)
show.timeline(timeline.of(gpipe))

# %% [markdown]
# In `1f1b` a micro-batch goes backward as soon as the last stage has it. A stage then does one forward and one backward
# in a tick (upper and lower half), and keeps a few micro-batches only, at most 7 with four stages, however many follow.
# GLM-130B was trained so.

# %%
show.timeline(timeline.of(one_f_one_b))


# %% [markdown]
# How much is lost is the same with both: in `1f1b` the first and last ticks, in which nothing goes backward or nothing
# forward, are shorter, and counted by time both schedules lose 3 of 11. It is less the more micro-batches there are:


# %%
def waiting(schedule: pipeline.Pipeline) -> float:
  """Counts the share of the ticks in which something goes forward that a stage waits."""
  forward = [turn for turn in timeline.of(schedule) if not turn.backward]
  return 1 - len(forward) / (schedule.stages * len({turn.tick for turn in forward}))


for count in (4, 8, 16, 64, 176):
  schedule = pipeline.Pipeline(stages=4, microbatches=count, rounds=1, num_layers=4, kind="1f1b")
  assert abs(waiting(schedule) - schedule.bubble) < 1e-9
  print(f"4 stages, {count:3} micro-batches: {schedule.bubble:.0%} of the time waiting")
scratch.cleanup()

# %% [markdown]
# ## What to try next
#
# - Other sizes in `MESHES`, as `dict(data=1, tensor=8)`: it is told in one line that 4 heads do not divide by 8.
# - Two times around with `gpipe`: `pipeline.Pipeline(stages=4, microbatches=8, rounds=2, num_layers=8, kind="gpipe")`,
#   and its bubble.
# - On real devices a mesh is a gin file, a text file of settings: `glmjax train --gin_file=mine.gin
#   --gin_file=meshes/fsdp.gin` (docs/scaling.md; on clusters docs/launch.md).
# - Which mesh for 130 billion parameters, and how long a step takes: notebook 04, and `glmjax plan --search`.
