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
# # Text to a model that answers: train a small GLM
#
# All that happens to GLM-130B, at a size that takes minutes: text becomes tokens, tokens become rows with blanks
# (notebook 01 draws them), a model learns to fill the blanks, is stopped and goes on, is measured on text that it has
# never seen, made small, and asked. Each step is one command of glmjax (`glmjax train` and so on), called from Python.
#
# *Takes* four minutes on two cores (360 seconds of processor time) and 1.3 GB of memory, once things are installed, and
# 41 MB from the package index for the sample text; no GPU, no TensorFlow. (docs/... are files of glmjax's checkout;
# where its wheel alone is installed, `glmjax --help` names the commands.)

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
FILES = {}  # text of your own by language, as {"en": "my/english/*.txt", "zh": ["a.jsonl", "b.jsonl"]}
SAMPLE = True  # where FILES is empty: fetch English and Chinese text; False: sentences made up here
FOLDER = ""  # where all of it is kept; "": a temporary folder, gone at the end
VOCABULARY = 4096  # ids of the tokenizer; a small text bears fewer, and the tokenizer says so
LAYERS = 4  # of the model
WIDTH = 128
STEPS = 400  # of training
BLANKS = 500  # to fill in each language when the model is measured
ASK = [  # what it is asked at the end: to fill a blank, or to go on
  "The government said the new [MASK] would help people in Britain.",
  "中国政府[MASK]发展经济。",
  "The company said that its",
  "这家酒店的服务",
]

# %% [markdown]
# ## Text
#
# In a `.txt` file an empty line ends a document, a `.jsonl` file has one in each line, as `{"text": "..."}`. Yours: put
# them beside this notebook (on Colab by the folder symbol on the left), and name them in `FILES` above, by language.
# Without, 14 MB of news and reviews are fetched: enough to learn how words follow one another, and far too little to
# know anything.

# %%
import json
import os
import pathlib
import random
import tempfile

import glmjax
from glmjax import display, show

PATTERNS = {
  "en": "{name} is a {job} in {town}. On {day} the {job} has {food}.",
  "zh": "{name}是{town}的{job}。{day}{job}吃{food}。",
}
WORDS = {
  "name": {"en": ["Anna", "Ben", "Clara", "David"], "zh": ["王明", "李华", "张丽", "陈红"]},
  "job": {"en": ["baker", "farmer", "teacher", "sailor"], "zh": ["面包师", "农民", "老师", "水手"]},
  "town": {"en": ["London", "York", "Leeds"], "zh": ["北京", "上海", "广州"]},
  "day": {"en": ["Monday", "Friday"], "zh": ["星期一", "星期五"]},
  "food": {"en": ["bread", "fish", "rice"], "zh": ["面包", "鱼", "米饭"]},
}


def make_up(language: str, number: int) -> str:
  """Writes a document of eight pairs of sentences, the same for the same number."""
  draw = random.Random(number)
  pairs = [{kind: draw.choice(words[language]) for kind, words in WORDS.items()} for _ in range(8)]
  return " ".join(PATTERNS[language].format(**words) for words in pairs)


if "here" not in globals():  # running all cells again begins in the same folder
  here, scratch = pathlib.Path.cwd(), tempfile.TemporaryDirectory()

# %%
folder = here / (FOLDER or scratch.name)
folder.mkdir(parents=True, exist_ok=True)
os.chdir(folder)  # where the paths below begin
if FILES:
  files = {
    language: [str(here / each) for each in ([some] if isinstance(some, str) else some)]
    for language, some in FILES.items()
  }
elif SAMPLE:
  files = {language: str(path) for language, path in glmjax.run("text", directory="text").items()}
else:
  files = {}
  for language in PATTERNS:
    files[language] = f"{language}.jsonl"
    lines = [json.dumps({"text": make_up(language, number)}) for number in range(600)]
    pathlib.Path(files[language]).write_text("\n".join(lines), encoding="utf-8")

# %% [markdown]
# ## One gin file says what is done
#
# A gin file is a text file of settings. `runs/quickstart.gin` comes with glmjax and describes all steps from text to
# results; its blanks are shorter than GLM-130B's and more: of Poisson's mean 1 instead of 3, and 25 % of the text
# instead of 15 %. Here is a file of your own that includes it and sets some things anew: a smaller model, which takes
# minutes. Change what you like, and run this cell and those below again; another model or text is another run, so give
# `WORKDIR` another name too. How settings are called is told by `runs/quickstart.gin` and docs/recipe.md, and a name
# that there is not is answered by the nearest.

# %%
MINE = f"""
from __gin__ import dynamic_registration
from glmjax.evaluate import heldout
from glmjax.models import config
from glmjax.train import loop

include "runs/quickstart.gin"

TEXT_FILES = {files}
TOKENIZER = "tokenizer"
CACHE = "cache"
WORKDIR = "train"

VOCAB_SIZE = {VOCABULARY}
SEQ_LENGTH = 128  # tokens of a row
config.GLMConfig.num_layers = {LAYERS}
config.GLMConfig.embed_dim = {WIDTH}
config.GLMConfig.num_heads = {WIDTH // 64}
config.GLMConfig.mlp_dim = {WIDTH * 21 // 8}

BATCH_SIZE = 24  # rows of a step
TOTAL_SAMPLES = {24 * STEPS}
loop.Intervals.log = 0  # no line for every tenth step: the picture shows them
heldout.evaluate.max_fills = {BLANKS}
heldout.evaluate.max_tokens = 40_000  # of each language
"""
with open("mine.gin", "w", encoding="utf-8") as file:
  file.write(MINE)

# %% [markdown]
# ## Tokenizer
#
# One vocabulary for both languages, of the pieces that save most tokens. A dot stands for a space.

# %%
words = glmjax.run("tokenizer", "mine.gin")
ids = [token for some in ASK[-2:] for token in words.encode(some)]
show.tokens(ids, words)

# %% [markdown]
# Where the picture's font has no Chinese it shows the id alone; here are the pieces as text:

# %%
for some in ASK[-2:]:
  print(" | ".join(words.decode([token]) for token in words.encode(some)))

# %% [markdown]
# ## Token cache
#
# The text is tokenized once, into files that training reads from any place. Every fiftieth document is held out
# (`validation`): the model never learns from it, and is measured on it.

# %%
cached = glmjax.run("cache", "mine.gin")
assert all(splits["validation"]["tokens"] > 0 for splits in cached.values()), "too little text to hold any out"
display.Figures({f"{task}, {split}": about for task, splits in cached.items() for split, about in splits.items()})

# %% [markdown]
# ## Devices
#
# This cell alone is different on one CPU, one GPU and eight TPU cores, and it finds out by itself. On several devices
# each computes its own rows and holds its own part of the weights (`meshes/fsdp.gin`); notebook 05 shows what that
# means.

# %%
import jax

devices = jax.devices()
mesh = "meshes/cpu.gin" if len(devices) == 1 else "meshes/fsdp.gin"
dtype = "bfloat16" if devices[0].platform == "tpu" else "float32"
RUN = ("mine.gin", mesh)
DTYPE = f"DTYPE = '{dtype}'"
print(f"{len(devices)} x {devices[0].device_kind}: {mesh}, {dtype}")

# %% [markdown]
# ## Train, half of it
#
# The curve is drawn while the model learns: the *loss* says how surprised the model is by the token that really stands
# in a blank, in nats; a blind guess among all ids costs ln(vocabulary). `[MASK]` are short blanks, `[gMASK]` is what
# goes on to the end of a row.

# %%
import math

import numpy as np

half = glmjax.train(*RUN, bindings=DTYPE, live=True, stop_at_step=STEPS // 2)
blind, losses = math.log(VOCABULARY), [step["loss"] for step in half.metrics]
now = np.mean(losses[-10:])  # of ten steps: one alone goes up and down with its rows
assert len(losses) >= STEPS // 2 and now < blind < losses[0] + 0.5, "it has learned too little; more STEPS"
print(f"blind: {blind:.2f}   first step: {losses[0]:.2f}   last ten steps: {now:.2f}")

# %% [markdown]
# ## Stop and go on
#
# The run was stopped, and lies in its folder as a *checkpoint*: weights, the optimizer's memory, how many samples were
# seen. The same call goes on from there, on this machine or another. (The stop button does the same: the step under
# way is finished and saved first.)

# %%
whole = glmjax.train(*RUN, bindings=DTYPE, live=True)
losses = [step["loss"] for step in whole.metrics]
assert len(losses) == STEPS
before, behind = (np.mean(losses[n : n + 10]) for n in (STEPS // 2 - 10, STEPS // 2))
assert behind < (before + losses[0]) / 2  # the loss goes on where it was, and does not begin anew
print(f"mean loss of ten steps before the stop: {before:.3f}, of ten behind it: {behind:.3f}")

# %% [markdown]
# Was anything lost by it? A second run, stopped after 5 steps, does 5 more, and must have had the losses of the first
# run's first ten, which were done in one go:

# %%
for stop in (5, 10):
  again = glmjax.train(*RUN, bindings=DTYPE, workdir="again", stop_at_step=stop)
differences = np.abs([step["loss"] for step in again.metrics] - np.array(losses[:10]))
assert differences.max() < 1e-4
print("largest difference of a step's loss:", differences.max())

# %% [markdown]
# ## Measure
#
# *Bits per byte*: into how many bits the model could pack a byte of text that it has not seen, reading from the left.
# *Blanks*: how many of the hidden tokens are its first guess, once with the text on both sides in view, once with the
# left side alone. What the right side adds is what a GLM is about, and it is learned last: after these few minutes it
# is little in English, and in Chinese none; there the difference is within its error. README.md has what the quickstart
# makes of it, with three times as many steps, a larger model and a larger vocabulary.

# %%
measured = glmjax.run("evaluate", *RUN, bindings=DTYPE, checkpoint=whole.workdir)
for language, found in measured.items():
  assert found["bits_per_byte"] < found["unigram_bits_per_byte"], f"{language}: it has learned too little; more STEPS"
show.heldout(measured)

# %% [markdown]
# The same as numbers; docs/evaluation.md says what each is, and `..._se` is a standard error. (The bar above counts
# more tokens: each window's context is read again, and so is the text around each blank.)

# %%
display.Figures(measured)

# %% [markdown]
# ## Make it small
#
# For answering no optimizer is needed, and weights of 8 or 4 bits will do: each row of a weight matrix keeps small
# integers and one scale. What that costs is measured on a part of the same text.

# %%
LITTLE = ["heldout.evaluate.max_fills = 0", "heldout.evaluate.max_tokens = 20_000"]  # enough to see a difference
sizes = {}
for name, bits in (("float32", None), ("INT8", 8), ("INT4", 4)):
  export = glmjax.run("export", checkpoint=whole.workdir, out=name.lower(), bits=bits, overwrite=True)
  found = glmjax.run("evaluate", *RUN, bindings=[DTYPE, *LITTLE], checkpoint=name.lower())
  sizes[name] = {"kB": round(export["array_bytes"] / 1000)} | {
    f"{language}, bits per byte": round(figures["bits_per_byte"], 3) for language, figures in found.items()
  }
assert sizes["INT4"]["kB"] < sizes["INT8"]["kB"] < sizes["float32"]["kB"]
display.Figures(sizes)

# %% [markdown]
# `float32` has 32 bits for every number. In the other two the embeddings are float16, as they are looked up and not
# multiplied; in a model as small as this they are a good part of all, and of GLM-130B a seventieth.
#
# ## Ask it
#
# It fills blanks with both sides in view; what was filled in is marked. (So small a model has learned which words are
# frequent and which go together, and nothing of what they mean.)

# %%
from IPython import display as ipython

from glmjax.infer import sampling

model = glmjax.load("int4")
for prompt in ASK:
  if "[MASK]" in prompt:
    ipython.display(model.fill(prompt, max_tokens=8))

# %% [markdown]
# And it goes on with texts. `temperature` is how bold it is: the likeliest words of so small a model go round in
# circles.

# %%
BOLD = sampling.Sampling(temperature=0.8, top_k=30, min_tokens=10)
for prompt in ASK:
  if "[MASK]" not in prompt:
    [answer] = model.generate([prompt], max_tokens=40, sampling=BOLD, seed=1)
    assert answer.text.startswith(prompt)
    ipython.display(answer)

# %%
os.chdir(here)
scratch.cleanup()

# %% [markdown]
# ## What to try next
#
# - More steps and a larger model: `VOCABULARY = 8192`, `STEPS = 1280` and the lines `config.GLMConfig...` taken out is
#   `make quickstart`, whose results are in README.md. Give `FOLDER` a name to keep it all; on Colab, one in your Drive.
# - Text of your own, in `FILES`. docs/data.md says how a short one is held out.
# - The same file from a terminal: with `FOLDER` set, `cd` to that folder, then `glmjax train --gin_file=mine.gin`; and
#   on a cluster (docs/launch.md).
# - Notebook 04 tells what a larger model would take, notebook 05 how it is split over devices.
