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
# # Fine-tuning: LoRA over INT4, on pairs of your own
#
# A model that goes on with texts is taught to answer questions, and its weights stay as they are, in INT4: a small
# adapter beside them learns. This notebook writes pairs of questions and answers, tunes a model on them, and shows what
# it answers before and after, on questions that it has not seen, with the adapter on and off.
#
# Without a model it **makes one**: a very small GLM that has read reviews, all good or all bad, and was never told
# which are which.
#
# *Takes* three minutes on two cores (half of it the stand-in), once things are installed; no GPU, no network.
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
FOLDER = None  # of a model: what `glmjax export` or `glmjax import` wrote in float, or a training run; None: a stand-in
STEPS = 300  # that the stand-in is trained for
TUNING = 150  # steps of LoRA
RATE = 5e-3  # the highest learning rate of LoRA; 1e-3 for models of billions

# %% [markdown]
# ## A stand-in, where there is no model
#
# It reads reviews in which all is good or all is bad, with blanks to fill, as notebook 01 draws them. Nobody tells it
# which is which.

# %%
import json
import random
import tempfile

import numpy as np

import glmjax
from glmjax import display as pictures
from glmjax import show, tokenizer
from glmjax.data import in_memory, mixtures, rows
from glmjax.models.config import GLMConfig
from glmjax.train import base, loop, optimizer, schedules

GOOD = "great lovely clean friendly warm quick bright fresh quiet tasty fair cosy".split()
BAD = "awful dirty rude cold slow dark stale noisy bland dull broken damp".split()
THINGS = "room food staff bed soup coffee view lobby bar garden".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TOWNS = "Paris Rome Oslo Lima Cairo Kyoto Quito Delhi".split()
FORMS = (
  "We were in {town} on {day}. The {a} was {x}, the {b} was {y} and the {c} {z}.",
  "The {a} was {x} and {y}. On {day} the {b} was {z} too, as it often is in {town}.",
  "{town}, {day}: {x} {a}, {y} {b}, {z} {c}.",
)


def review(draw: random.Random, words: list[str]) -> str:
  """Writes a review in which all is as the words say."""
  (a, b, c), (x, y, z) = draw.sample(THINGS, 3), draw.sample(words, 3)
  return draw.choice(FORMS).format(a=a, b=b, c=c, x=x, y=y, z=z, day=draw.choice(DAYS), town=draw.choice(TOWNS))


draw = random.Random(0)
texts = [review(draw, draw.choice((GOOD, BAD))) for _ in range(6_000)]
print(*texts[:3], sep="\n")

# %%
scratch = tempfile.TemporaryDirectory()  # of all that is written here
work = pathlib.Path(scratch.name)


def write(name: str, records: list[dict]) -> str:
  """Writes a line of JSON for each record, and returns where."""
  (work / name).write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
  return str(work / name)


TEXT = {"en": write("texts.jsonl", [{"text": text} for text in texts])}


def make_stand_in(folder: pathlib.Path) -> None:
  """Trains a small model on the texts, into a folder."""
  words = tokenizer.train(texts, work / "tokenizer", vocab_size=512, character_coverage=1.0)
  mixture = mixtures.pretraining(TEXT, work / "tokenizer")
  blanks = rows.BlankInfilling(128, words.specials, samples_per_sequence=1, mask_ratio=0.25, mean_span_length=1.0)
  glmjax.train(
    model=GLMConfig(vocab_size=words.vocab_size, num_layers=2, embed_dim=96, num_heads=3, mlp_dim=256, max_length=128),
    data=in_memory.InMemoryMixture(mixture, blanks),
    workdir=folder,
    batches=schedules.Batches(16),
    total_samples=16 * STEPS,
    learning_rate=schedules.PiecewiseLinear((0, 480, 16 * STEPS), (0.0, 4e-3, 4e-4)),
    optimizer=optimizer.AdamW(weight_decay=0.0),
    intervals=loop.Intervals(save=0, log=max(1, STEPS // 3)),
  )


if FOLDER is None:
  make_stand_in(work / "run")
model = str(work / "int4")
exported = glmjax.run("export", checkpoint=FOLDER or work / "run", out=model, bits=4)

# %% [markdown]
# ## Pairs
#
# A line of JSON each: a question and its answer. Three words of each kind (`kept back` below) are in no pair: what the
# model makes of these it has from what it read before, not from the pairs. Put your own pairs in this cell's place;
# docs/data.md says which names and formats are read, conversations among them.

# %%
ENDING = " All in all it was"
VERDICTS = ("bad", "good")
KEPT_BACK = (BAD[:3], GOOD[:3])
TOLD = (BAD[3:], GOOD[3:])


def asked(draw: random.Random, words: tuple[list[str], list[str]], count: int) -> list[dict]:
  """Draws so many questions with their answers, of these words."""
  labels = [draw.randrange(2) for _ in range(count)]
  return [{"inputs": review(draw, words[label]) + ENDING, "targets": VERDICTS[label]} for label in labels]


pairs = asked(draw, TOLD, 2_000)
questions = {"words of the pairs": asked(draw, TOLD, 200), "words kept back": asked(draw, KEPT_BACK, 200)}
files = [write("pairs.jsonl", pairs)]
for pair in pairs[:3]:
  print(json.dumps(pair))

# %% [markdown]
# What a model learns from: a row holds as many pairs as fit, each of which sees itself alone. Of the first one, the
# question is seen, from both sides; predicted, and learned, is the answer, with the token that ends it.

# %%
words = tokenizer.Tokenizer.load(f"{model}/tokenizer")
mixture = mixtures.instruction(files, model)
making = rows.BlankInfilling(
  64,
  words.specials,
  positions=base.positions(model),
  samples_per_sequence=1,
  packing="best_fit",
  instruction_mask="gmask",
  instruction_cut="start",
)
show.row(in_memory.InMemoryMixture(mixture, making).sampler.row(0), words)

# %% [markdown]
# ## Before
#
# Two questions are put: which of the two answers is likelier, and what is written of itself.


# %%
def right(engine, about: list[dict]) -> np.ndarray:
  """Returns by how many nats the right answer is likelier than the wrong one."""
  found = engine.score_choices([one["inputs"] for one in about], [VERDICTS] * len(about), mask="[gMASK]")
  labels = [VERDICTS.index(one["targets"]) for one in about]
  return np.array([each.scores[label].total - each.scores[1 - label].total for each, label in zip(found, labels)])


def bits(engine, number: int = 200) -> float:
  """Returns the bits per byte of reviews that are no questions, read from left to right."""
  own = random.Random(1)
  others = [review(own, own.choice((GOOD, BAD))) for _ in range(number)]
  return -sum(each.total for each in engine.score(others)) / np.log(2) / sum(len(text.encode()) for text in others)


def figures(engine) -> dict:
  """Returns what is right of the questions, in percent, and what the model still knows of the text."""
  shares = {f"right, {name}": f"{100 * np.mean(right(engine, some) > 0):.1f} %" for name, some in questions.items()}
  return shares | {"bits per byte of other text": round(bits(engine), 3)}


examples = [one["inputs"] for some in questions.values() for one in some[:2]]
before = glmjax.load(model)
written = {"before": [answer.pieces[0] for answer in before.generate(examples, max_tokens=6)]}
table = {"before": figures(before)}
pictures.Figures(table)

# %% [markdown]
# ## Tuned
#
# LoRA puts two thin matrices beside each kernel, and trains these alone; the INT4 weights stay as they are, bit for
# bit. In a terminal that is
#
# `glmjax train --gin_file=runs/finetune_lora.gin --workdir=lora --gin.BASE='"int4"' --gin.DATA='["pairs.jsonl"]'`
#
# with what is bound here as further `--gin.NAME=value`. Every 50th pair is held out, and `validation` is of these.


# %%
def tune(name: str, *more_files: str, more: tuple[str, ...] = ()):
  """Trains an adapter into a folder of this name."""
  bindings = [
    f"BASE = {model!r}",
    f"DATA = {files!r}",
    "BATCH_SIZE = 16",
    f"TOTAL_SAMPLES = {16 * TUNING}",
    f"LEARNING_RATE = {RATE}",
    f"schedules.LearningRate.warmup_samples = {min(480, 8 * TUNING)}",
    f"loop.Intervals.evaluate = {max(1, TUNING // 10)}",
    f"loop.Intervals.log = {max(1, TUNING // 3)}",
    "loop.Intervals.save = 0",
  ]
  return glmjax.train("runs/finetune_lora.gin", *more_files, bindings=[*bindings, *more], workdir=work / name)


run = tune("lora")

# %%
run.plot()

# %% [markdown]
# ## After
#
# The same questions, to the same model with the adapter beside it.

# %%
after = glmjax.load(model, adapter=work / "lora")
written["after"] = [answer.pieces[0] for answer in after.generate(examples, max_tokens=6)]
table["after"] = figures(after)
pictures.Figures(table)

# %%
pictures.Figures({name: dict(zip(examples, answers)) for name, answers in written.items()})

# %%
figure = pictures.figure(7, 3)
for axes, (name, about) in zip(figure.subplots(1, 2, sharey=True), questions.items()):
  for engine, own, ink in ((before, "before", "#bbbbbb"), (after, "after", "#333333")):
    axes.hist(right(engine, about), bins=30, color=ink, label=own, alpha=0.85)
  axes.axvline(0, color=pictures.INK, linestyle="--", linewidth=1)
  axes.set_title(name, color=pictures.INK, fontsize=10)
  axes.set_xlabel("nats by which the right answer is likelier")
  pictures.plain(axes)
axes.legend(frameon=False)
pictures.picture(figure)

# %% [markdown]
# ## On and off
#
# The adapter is a folder beside the model's, which was not touched: without it the model says what it said before, to
# the last bit. `--adapter=lora` behind `--checkpoint=int4` switches it on in `glmjax generate`, `chat`, `score`,
# `serve` and `evaluate`.

# %%
again = glmjax.load(model)
about = questions["words of the pairs"]
assert np.array_equal(right(again, about), right(before, about))
assert not np.array_equal(right(after, about), right(before, about))


def size(folder: pathlib.Path) -> int:
  """Returns the bytes of all files below a folder."""
  return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


newest = max((work / "lora" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
pictures.Figures({"INT4 model, bytes": size(pathlib.Path(model) / "params"), "adapter, bytes": size(newest)})

# %% [markdown]
# The adapter's bytes are those of a checkpoint, with both of Adam's averages: three numbers for each that was trained.

# %% [markdown]
# ## What it forgot
#
# The last line of the table: bits per byte of reviews that end without a question. A model that is tuned on answers of
# one word alone forgets how texts go on. Against that, text is mixed in, one row in ten: `data/replay.gin` behind the
# run's gin file.

# %%
blanks = ["rows.BlankInfilling.mask_ratio = 0.25", "rows.BlankInfilling.mean_span_length = 1.0"]  # as the stand-in's
tune("replayed", "data/replay.gin", more=(f"REPLAY = {TEXT!r}", *blanks))
table["after, with text mixed in"] = figures(glmjax.load(model, adapter=work / "replayed"))
pictures.Figures(table)

# %% [markdown]
# The text is kept, and the task learned. What becomes of the words that no pair has goes up and down from run to run:
# there are six of them, and nothing in the loss asks for them. docs/finetuning.md has the quickstart's model on real
# reviews.

# %%
scratch.cleanup()

# %% [markdown]
# ## What to try next
#
# - `FOLDER` above: the quickstart's model (`runs/quickstart/float`), and pairs of your own, in the cell of the pairs.
# - `trainable.LoRA.rank = 2` among the bindings, or `trainable.LoRA.kernels = ["attention/qkv"]`: how few trained
#   parameters do?
# - `runs/finetune_p_tuning.gin` in place of `runs/finetune_lora.gin`, with `trainable.PTuning.length = 16` and
#   `LEARNING_RATE = 2e-2`: a prefix in place of matrices.
# - `runs/finetune.gin` trains all parameters: export the stand-in without `bits`, as it must be float.
# - docs/finetuning.md: each method with its cost on real reviews, and what was forgotten.
