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
# # A card for a model: what it is, what it cost, what it takes, what may be trusted
#
# Whoever downloads a model wants to know where it comes from, and few cards say. Here a small model is trained, and
# glmjax writes its card from what the run recorded while it happened. What nothing shows is listed as not known; what
# only its owner can know is for them to state.
#
# *Takes* two minutes on two cores, once things are installed; no GPU. We have not run it on Colab. (docs/... are files
# of glmjax's checkout; where its wheel alone is installed, `glmjax --help` names the commands.)

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
STEPS = 800  # of training; the curve asks for more than five hundred

# %% [markdown]
# ## A model to speak of
#
# Text that is made up here, a tokenizer, a token cache, a run and its export, as in notebook 02, where they are
# explained.

# %%
import json
import os
import pathlib
import random
import tempfile

from IPython.display import Markdown

import glmjax
from glmjax import display

home, scratch = pathlib.Path.cwd(), tempfile.TemporaryDirectory()
os.chdir(scratch.name)
draw = random.Random(0)
words = ["bread", "fish", "rice", "Monday", "Friday", "London", "York", "a baker", "a farmer", "a sailor"]
texts = [
  " ".join(f"On {draw.choice(words)} {draw.choice(words)} has {draw.choice(words)}." for _ in range(12))
  for _ in range(600)
]
pathlib.Path("en.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
pathlib.Path("mine.gin").write_text(
  f"""
from __gin__ import dynamic_registration
from glmjax.evaluate import heldout
from glmjax.models import config
from glmjax.train import loop
from glmjax.train import schedules

include "runs/quickstart.gin"

TEXT_FILES = {{"en": "en.jsonl"}}
RATES = {{"en": 1.0}}
TOKENIZER = "tokenizer"
CACHE = "cache"
WORKDIR = "train"
VOCAB_SIZE = 400
SEQ_LENGTH = 64
config.GLMConfig:
  num_layers = 2
  embed_dim = 64
  num_heads = 2
  mlp_dim = 128
BATCH_SIZE = 8
TOTAL_SAMPLES = {8 * STEPS}
schedules.LearningRate.warmup_samples = 160
loop.Intervals.log = 0
heldout.evaluate.max_fills = 50
""",
  encoding="utf-8",
)
glmjax.run("tokenizer", "mine.gin")
glmjax.run("cache", "mine.gin")
glmjax.train("mine.gin")
glmjax.run("export", "mine.gin", out="model")
figures = glmjax.run("evaluate", "mine.gin", checkpoint="model", out="heldout.json")
display.Figures(figures)

# %% [markdown]
# ## Its card
#
# The folder alone says something: the architecture, the weights' fingerprint, the tokenizer. Beside it are named the
# run that it was made from, the token cache that this read, and what it was measured to do. Each must belong to the
# model: another run, another cache, an evaluation of other weights are refused.

# %%
beside = {"run": "train", "cache": "cache", "evaluation": ["heldout.json"]}
card = glmjax.run("card", folder="model", **beside)


def report(card: dict) -> Markdown:
  """Shows the integrity report."""
  rows = [f"| {each['name']} | {each['verdict']} | {'; '.join(each['missing'])} |" for each in card["integrity"]]
  return Markdown("\n".join(["| criterion | | missing for full marks |", "|---|---|---|", *rows]))


report(card)

# %% [markdown]
# ## What its owner states
#
# A licence, a name, who answers for it: no file shows these. They go into `about.yaml` in the model's folder
# (docs/cards.md has all keys). A statement is shown as one; it is no evidence of anything else.

# %%
pathlib.Path("model/about.yaml").write_text(
  """
name: Who has what on Monday
version: 1.0.0
summary: A very small GLM that knows who has bread.
owner: you
contact: you@example.org
license: cc0-1.0
languages: [en]
architecture: "GLM, arXiv 2103.10360, with DeepNorm as in GLM-130B, arXiv 2210.02414"
tokenizer: SentencePiece, trained on the same text
data: {pretrain_en: {source: made up in this notebook, license: cc0-1.0}}
grid: {kg_co2_per_kwh: 0.581, source: "GLM-130B's paper, appendix H, for its data centre", year: 2022}
""",
  encoding="utf-8",
)
pathlib.Path("model/LICENSE").write_text("CC0 1.0 Universal\n", encoding="utf-8")
card = glmjax.run("card", folder="model", **beside)
report(card)

# %% [markdown]
# What is still missing is told: a meter of energy where there is none that a program may read, and a report on the
# text (`glmjax data`). What the run cost, as it recorded it:

# %%
cost = card["compute"]
display.Figures(
  {
    "steps done": cost["done"]["steps"],
    "hours": round(cost["wall_hours"], 3),
    "model FLOPs": f"{cost['done']['model_flops']:.2e}",
    "kWh, at least": round(cost["energy"]["low_kwh"], 5),
    "kWh, at most": round(cost["energy"]["high_kwh"], 5),
    "jax": cost["versions"]["jax"],
  }
)

# %% [markdown]
# ## The page
#
# `card.html` is one file that loads nothing; `README.md` is the same for the Hugging Face Hub, with its metadata in
# front.

# %%
print(pathlib.Path("model/README.md").read_text(encoding="utf-8")[:600])

# %% [markdown]
# ## Is it trained to the end?
#
# The card continues the run's curve: what would twice the tokens bring, and how sure is that?

# %%
from glmjax.cards import curve

fitted = curve.fit("train/metrics.jsonl")
print("\n".join(fitted.sentences()))

# %%
curve.drawn(fitted)

# %% [markdown]
# ## What changed
#
# Two checkpoints side by side: what is other, how far each part of the weights has moved, and which number of the
# version rises. Quantizing changes the form and little else.

# %%
glmjax.run("export", "mine.gin", out="small", bits=4)
changes = glmjax.run("compare", weights=True, runs=["model", "small"])
print(f"raises the {changes['raises']} part of the version's number")
display.Figures({part: own for part, own in changes["parts"].items()})

# %% [markdown]
# ## The check
#
# `glmjax card --check model` is for CI: its status is 1 where the card is of other weights than are there, or a
# criterion is not evidenced. Here the weights change behind the card's back.

# %%
(pathlib.Path("model") / "about.yaml").write_text("name: Something else\n", encoding="utf-8")
problems = glmjax.run("card", folder="model", check=True)["problems"]
assert any("says other things than the card" in problem for problem in problems)
print("\n".join(problems))

# %%
os.chdir(home)
scratch.cleanup()

# %% [markdown]
# ## What to try next
#
# - the card of an imported model, with what its authors published: `glmjax card FOLDER --about=chatglm-6b`
#   (docs/import.md says how to import one)
# - `glmjax data` on your text before you train on it, and its report in the card (docs/data.md)
# - `glmjax plan --fits --html=calculator.html`: which cards hold which model, as a page (docs/hardware.md)
