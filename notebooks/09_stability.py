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
# # Stability: which models break down at which learning rates, and what shows it first
#
# GLM-130B's authors failed more than thirty times before training held; DeepNorm and the shrinking of the embedding's
# gradient are what they credit. This notebook asks the same of small models: every norm, with the shrink and without,
# at learning rates that are too small, right and too large, a run for each, and a report of all.
#
# *Takes* four minutes on two cores, once things are installed, with 14 MB of text from the package index; no GPU.
# We have not run it on Colab. (docs/... are files of glmjax's checkout; where its wheel alone is installed,
# `glmjax --help` names the commands.)

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
SAMPLE = True  # fetch English and Chinese text; False: sentences made up here
NORMS = {"Pre-LN": "pre", "Post-LN": "post", "DeepNorm": "deepnorm"}  # label -> GLMConfig.norm
SHRINKS = {"1": (1.0,), "0.1": (0.1,)}  # label -> what the embedding's gradient is multiplied with
RATES = [1e-3, 1e-2, 1e-1]  # peak learning rates
STEPS = 80  # of each run
WORKERS = 2  # runs at a time

# %% [markdown]
# ## Text, tokenizer, cache
#
# As in notebook 02, where they are explained.

# %%
import json
import os
import pathlib
import random
import tempfile

import glmjax
from glmjax import display

home, scratch = pathlib.Path.cwd(), tempfile.TemporaryDirectory()
os.chdir(scratch.name)
if SAMPLE:
  files = {language: str(path) for language, path in glmjax.run("text", directory="text").items()}
else:
  draw = random.Random(0)
  words = ["bread", "fish", "rice", "Monday", "Friday", "London", "York", "a baker", "a farmer", "a sailor"]
  texts = [" ".join(f"On {draw.choice(words)} {draw.choice(words)} has {draw.choice(words)}." for _ in range(12))]
  texts += [" ".join(draw.choice(words) for _ in range(60)) for _ in range(600)]
  pathlib.Path("en.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
  files = {"en": "en.jsonl"}
pathlib.Path("text.gin").write_text(
  f"""
from __gin__ import dynamic_registration
include "runs/quickstart.gin"
TEXT_FILES = {files}
RATES = { ({language: 1.0 for language in files}) }
TOKENIZER = "tokenizer"
CACHE = "cache"
VOCAB_SIZE = {4096 if SAMPLE else 400}
""",
  encoding="utf-8",
)
vocabulary = glmjax.run("tokenizer", "text.gin").vocab_size
cached = glmjax.run("cache", "text.gin")
vocabulary

# %% [markdown]
# ## A grid
#
# `studies/stability/run.gin` comes with glmjax: one run of GLM-130B's recipe at a very small size. A file of your own
# includes it, makes it smaller still, and names what is tried with what. An axis is a setting with its values, or
# labels with what each of them binds.

# %%
pathlib.Path("mine.gin").write_text(
  f"""
from __gin__ import dynamic_registration
from glmjax.study import grid
from glmjax.study import run
from glmjax.train import loop

include "studies/stability/run.gin"

CACHE = "cache"
VOCAB_SIZE = {vocabulary}
EMBED_DIM = 32
TOTAL_SAMPLES = {16 * STEPS}
WARMUP_SAMPLES = {max(16 * STEPS // 10, 1)}
loop.Intervals.layers = {max(STEPS // 8, 1)}

run.run.grid = @grid.Grid()
grid.Grid:
  axes = {{
    "norm": { ({label: {"NORM": norm} for label, norm in NORMS.items()}) },
    "shrink": { ({label: {"EGS_VALUES": values} for label, values in SHRINKS.items()}) },
    "PEAK_LEARNING_RATE": {RATES},
  }}
  over = "PEAK_LEARNING_RATE"
""",
  encoding="utf-8",
)
figures = glmjax.run("study", "mine.gin", workdir="study", workers=WORKERS)
assert figures["done"] == figures["points"], figures["failed"]
figures

# %% [markdown]
# A study that is stopped goes on where it was with the same call, and does anew what has other settings. Each run is
# an ordinary one, in `study/points`.
#
# ## Which break down
#
# *Sensitivity* is how many nats a token a wrong learning rate costs on average (docs/stability.md). A cross in the
# picture is a run that has diverged, or learned nothing.

# %%
report = json.loads(pathlib.Path("study/report.json").read_text(encoding="utf-8"))
display.Figures(
  {
    ", ".join(map(str, group["labels"].values())): {
      "diverged": group["diverged"],
      "learned nothing": group["learned_nothing"],
      "spikes": group["spikes"],
      "sensitivity": group["sensitivity"]["mean"],
      "best learning rate": group["best"],
      "its loss": group["best_loss"]["mean"],
    }
    for group in report["groups"]
  }
)


# %%
def picture(name: str) -> display.Picture:
  """Reads one of the report's pictures."""
  return display.Picture((pathlib.Path("study") / f"{name}.png").read_bytes())


picture("sensitivity")

# %% [markdown]
# ## Over the steps
#
# The darker, the larger the learning rate. The paper's account is that the embedding's gradient is larger than all
# others, and spikes first: here is its norm.

# %%
picture("embedding")

# %% [markdown]
# ## Over the layers
#
# Every few steps a run looks into its layers (`loop.Intervals.layers`): how large the largest attention logit is, which
# the softmax turns into a choice of one token where it is far above the others, and how large what each layer reads.

# %%
picture("logits")

# %% [markdown]
# ## What spikes first
#
# A guard watches loss, gradients and updates part by part (docs/reliability.md), and here only tells. Of each episode
# of spikes: what was above its limit at all, and among the first.

# %%
display.Figures(report["spikes"]["parts"] or {"episodes of spikes": report["spikes"]["episodes"]})

# %%
os.chdir(home)
scratch.cleanup()

# %% [markdown]
# ## What to try next
#
# - `NORMS` with `"Sandwich-LN": "sandwich"`, and `SHRINKS` with `"0.01": (0.01,)`.
# - `spikes.Guard.action = "clip"` in `mine.gin`: does it save the runs that break down?
# - A seed as an axis: `"SEED": [0, 1, 2]`, with `repeats = "SEED"`, so that the table has ranges.
# - `studies/stability/small.gin` on the quickstart's text takes 25 minutes; docs/stability.md has what it showed.
