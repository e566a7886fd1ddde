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
# # ChatGLM-6B: import, INT4, chat, blanks, scores
#
# THUDM published ChatGLM-6B as a folder of files. This notebook reads such a folder, writes its weights in four bits,
# and talks with the result; then it fills blanks and scores texts, which is what a GLM does besides chatting.
#
# Without a folder it **makes one**: a GLM of ChatGLM's architecture, seven thousand times smaller, learns a dozen
# answers in a minute and is written in THUDM's layout. All cells after that are the same for both.
#
# *Takes* one to two minutes on two cores (half of it the stand-in) and 0.8 GB of memory, once things are installed; no
# GPU, no network, no TensorFlow. With ChatGLM-6B itself, 13.4 GB of files: measured with random weights of its size on
# two CPU cores (`benchmarks/results/import_drill.json`), import in 16 bits took 76 seconds and 1.2 GiB, the INT4 model
# is 3.9 GB on the disk, and a first answer came after 78 seconds, in 10.8 GiB. On a GPU of Turing's kind INT4 takes 4.8
# GiB to write an answer and 5.3 to read a prompt of 2,048 tokens, by plans (docs/hardware.md). We have not run it on
# Colab. (docs/... are files of glmjax's checkout; where its wheel alone is installed, `glmjax --help` names the
# commands.)

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
# Folder of ChatGLM-6B's files, as `git clone https://huggingface.co/THUDM/chatglm-6b` gives (git-lfs installed); None:
# a stand-in.
FOLDER = None
COMPARE = True  # with the float weights; False where they are too large: ChatGLM-6B's take 11.5 GiB, and as much disk
# The stand-in knows those of PAIRS below, and makes something up for others.
QUESTIONS = ["What is the capital of France?", "And of Italy?", "天空为什么是蓝色的？"]
STEPS = 150  # that the stand-in is trained for

# %% [markdown]
# ## A stand-in, where there is no folder
#
# These are all that it will know. In the texts, `{...}` is what may become a blank.

# %%
import math
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np
from IPython.display import display

import glmjax
from glmjax import rounds, show, tokenizer, tokens
from glmjax.data import rows, spans
from glmjax.display import Figures
from glmjax.models.config import GLMConfig
from glmjax.train import loop, optimizer, schedules

PAIRS = [
  ("Who are you?", "I am a stand-in: a very small GLM that knows a dozen answers."),
  ("What is the capital of France?", "The capital of France is Paris."),
  ("And of Italy?", "The capital of Italy is Rome."),
  ("Why is the sky blue?", "Air scatters blue light more than red light."),
  ("What does a GLM do?", "It fills blanks, and it sees the text on both sides of them."),
  ("How many legs has a spider?", "A spider has eight legs."),
  ("Thank you!", "You are welcome."),
  ("你是谁？", "我是一个很小的模型，只会回答十几个问题。"),
  ("中国的首都是哪里？", "中国的首都是北京。"),
  ("天空为什么是蓝色的？", "因为空气更容易散射蓝光。"),
  ("蜘蛛有几条腿？", "蜘蛛有八条腿。"),
  ("谢谢！", "不客气。"),
]
TEXTS = [
  "Tsinghua University is in {Beijing}, and it was founded in {1911}.",
  "{Paris} is the capital of {France}, and {Rome} is the capital of {Italy}.",
  "A spider has {eight} legs, and a {dog} has four.",
  "清华大学位于{北京}，成立于{1911年}。",
]
scratch = tempfile.TemporaryDirectory()  # of all that is written here
work = pathlib.Path(scratch.name)
is_stand_in = FOLDER is None
folder = work / "chatglm-tiny" if is_stand_in else pathlib.Path(FOLDER)
if is_stand_in:
  seen = [text.replace("{", "").replace("}", "") for text in TEXTS]
  seen += [rounds.prompt(PAIRS[:1], question) + answer for question, answer in PAIRS]
  words = tokenizer.train(seen, work / "tokenizer", vocab_size=640, character_coverage=1.0)
  print(rounds.prompt(PAIRS[:1], PAIRS[1][0]) + "[gMASK]", "->", PAIRS[1][1])

# %% [markdown]
# That is how ChatGLM reads a conversation: as a text whose rounds are numbered, with a `[gMASK]` where the next answer
# belongs. So an answer is the filling of a blank, and training is blank infilling (notebook 01 shows it place by
# place). A *data source* is any object with `seq_length`, `describe` and `batches` (and `save_tokenizer`, so that the
# run keeps a copy); row number `i` of this one is a few conversations and texts, drawn anew for each `i`:


# %%
class Lessons:
  """Rows of conversations of one to three rounds, and of texts with blanks."""

  def __init__(self) -> None:
    self.making = rows.BlankInfilling(128, words.specials, positions="rotary_2d", packing="greedy")
    self.seq_length = self.making.seq_length

  def describe(self) -> dict:
    return {"source": "a dozen answers"}

  def save_tokenizer(self, folder: str) -> None:
    words.save(folder)

  def conversation(self, rng: np.random.Generator) -> spans.Sample:
    *past, (question, answer) = [PAIRS[i] for i in rng.integers(len(PAIRS), size=rng.integers(1, 4))]
    prompt = words.encode(rounds.prompt(past, question))
    text = np.array(prompt + words.encode(answer))
    return spans.corrupt_suffix(text, len(prompt), words.specials.gmask, words.specials, eop=True)

  def blanks(self, rng: np.random.Generator) -> spans.Sample:
    parts = [words.encode(part) for part in TEXTS[rng.integers(len(TEXTS))].replace("}", "{").split("{")]
    ends = np.cumsum([len(part) for part in parts])
    hideable = np.arange(1, len(parts), 2)  # the parts that stood in braces
    hidden = np.sort(rng.choice(hideable, size=rng.integers(1, len(hideable) + 1), replace=False))
    where = np.stack([ends[hidden - 1], ends[hidden]], axis=1)
    return spans.corrupt(np.concatenate(parts), where, words.specials.mask, words.specials)

  def row(self, i: int) -> rows.Row:
    rng, samples = np.random.default_rng(i), []
    while True:
      sample = self.blanks(rng) if rng.random() < 0.3 else self.conversation(rng)
      if sum(len(each.tokens) for each in [*samples, sample]) > self.seq_length:
        return self.making.pack(samples, tokens.OBJECTIVE_INSTRUCTION)
      samples.append(sample)

  def batches(self, plan: Iterable, process_index: int = 0, process_count: int = 1) -> Iterator[dict]:
    for first, size in plan:
      made = [self.row(i) for i in range(first, first + size)]
      yield {name: np.stack([row[name] for row in made]) for name in made[0]}


# %% [markdown]
# A model of ChatGLM's architecture learns them, and is written as THUDM writes its files:

# %%
if is_stand_in:
  small = GLMConfig(
    vocab_size=words.vocab_size,
    num_layers=4,
    embed_dim=128,
    num_heads=4,
    mlp_dim=512,
    max_length=256,
    positions="rotary_2d",
    mlp="gelu_tanh",
    residual_alpha=math.sqrt(2 * 28),  # ChatGLM-6B's, which has 28 layers
  )
  samples = 8 * STEPS
  run = glmjax.train(
    model=small,
    data=Lessons(),
    workdir=work / "run",
    batches=schedules.Batches(8),
    total_samples=samples,
    learning_rate=schedules.PiecewiseLinear((0, samples // 10, samples * 3 // 4, samples), (0.0, 3e-3, 3e-3, 1e-4)),
    optimizer=optimizer.AdamW(weight_decay=0.0),
    intervals=loop.Intervals(save=0, log=STEPS // 4),
  )
  glmjax.run("export", checkpoint=work / "run", out=folder, dtype="float16", format="chatglm-hf")
  assert run.figures["loss"] < 0.05
  display(run.plot())

# %% [markdown]
# ## What the folder holds
#
# From here on it makes no difference where the folder came from. `inspect` reads the beginnings of its files: which
# model, how many weights in which precision, and whether anything is missing or cut short.

# %%
found = glmjax.run("inspect", path=folder)
assert found["problem"] is None, found["problem"]
print(f"{found['parameters']:,} parameters")
for file in found["files"]:
  print(f"{file['bytes']:>14,} bytes  {file['name']}")

# %% [markdown]
# ## Import, in 16 bits and in 4
#
# Import checks every tensor's shape before it writes anything, and goes through the weights in blocks, so that it
# takes the same memory for any model. With `bits=4` each row of a layer's matrices becomes integers from -7 to 7 and
# one scale; the embedding table, norms and biases stay as they are (in so small a model they are a larger share).
# THUDM's files hold that table a second time, as the output's head; where the two are equal, one is kept.

# %%
imported = {"INT4": glmjax.run("import", family="chatglm-6b", source=folder, out=work / "int4", bits=4)}
if COMPARE:
  imported["float"] = glmjax.run("import", family="chatglm-6b", source=folder, out=work / "float")
Figures(
  {"THUDM's files": {"weights, bytes": found["array_bytes"], "on the disk, bytes": found["file_bytes"]}}
  | {
    name: {"weights, bytes": each["array_bytes"], "on the disk, bytes": each["disk_bytes"]}
    for name, each in imported.items()
  }
)

# %% [markdown]
# Of ChatGLM-6B itself, by arithmetic (notebook 04 has more of it): what INT4 leaves of its 6.2 billion weights, part
# by part, with the cache of a conversation of 2,048 tokens.

# %%
from glmjax.plan import memory, programs

chatglm_6b = GLMConfig(130_528, 28, 4_096, 32, 16_384, positions="rotary_2d", mlp="gelu_tanh", dtype="float16")
memory.decoding(chatglm_6b, programs.Decode(context=2_048, bits=4)).plot("rtx2080ti")

# %% [markdown]
# ## Load it
#
# What the process holds is read from Linux (`VmRSS`: all of Python and JAX too, which outweighs the stand-in); on a GPU
# the weights are there instead, and JAX counts them.


# %%
def held() -> dict:
  """Megabytes of this process, and of JAX's first device where that keeps count."""
  import jax

  status = pathlib.Path("/proc/self/status")
  lines = status.read_text().splitlines() if status.exists() else []
  process = [int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS")]
  device = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use")
  sizes = {"process, MB": process[0] if process else None, "device, MB": device and device / 1e6}
  return {name: round(size) for name, size in sizes.items() if size is not None}


before = held()
model = glmjax.load(work / "int4")
Figures({"before": before, "with the INT4 model": held()})

# %% [markdown]
# ## Chat
#
# `ask` yields the answer piece by piece, as the tokens come. The conversation remembers: "And of Italy?" means nothing
# without the round before.

# %%
talk = model.chat(seed=1)
for question in QUESTIONS:
  print(f"> {question}")
  for piece in talk.ask(question):
    print(piece, end="", flush=True)
  print()
if is_stand_in:
  assert [each.reply for each in talk.rounds] == [dict(PAIRS).get(each.query, each.reply) for each in talk.rounds]

# %%
display(talk)

# %% [markdown]
# ## Fill blanks
#
# A `[MASK]` may stand anywhere in a text, and any number of them: they are filled from left to right, each with the
# text on both sides in view, the later blanks included.

# %%
model.fill("清华大学位于[MASK]，成立于1911年。", max_tokens=8)

# %%
filled = model.fill("Tsinghua University is in [MASK], and it was founded in [MASK].", max_tokens=8)
if is_stand_in:
  assert filled.pieces == ["Beijing", "1911"]
display(filled)

# %% [markdown]
# ## Score
#
# How likely is a text? Each token of an answer is shown as dark as it is unexpected behind its question (the pointer
# shows the numbers): what the model would say itself is light. Probabilities are given by their natural logarithms,
# *nats*: 0 is certain, and -0.7 is one half; pictures use bits, of which 1 is one half.

# %%
question = "What is the capital of France?"
likely, unlikely = model.score(
  ["The capital of France is Paris.", "The capital of France is Rome."], contexts=[question, question]
)
if is_stand_in:
  assert likely.total > unlikely.total
display(likely, unlikely)

# %% [markdown]
# And which of several fillings is the likeliest? That is how multiple-choice benchmarks ask a GLM.

# %%
choices = ["Italy", "France", "bread"]
[scored] = model.score_choices(["Paris is the capital of [MASK], and Rome is the capital of Italy."], [choices])
if is_stand_in:
  assert choices[scored.best] == "France"
Figures({"log-probability, nats": {choice: score.total for choice, score in zip(choices, scored.scores)}})

# %% [markdown]
# ## What four bits cost
#
# The same answers by both models, and the wrong one from above, drawn: how unexpected each token is. Where the two
# marks lie on one another, INT4 has changed nothing; what is near 0 bits would be said by either.

# %%
texts = [answer for _, answer in PAIRS] + ["The capital of France is Rome."]
contexts = [asked for asked, _ in PAIRS] + [question]
by_model = {"INT4": model.score(texts, contexts)}
if COMPARE:
  by_model["float"] = glmjax.load(work / "float").score(texts, contexts)
  unlike = [abs(a.total - b.total) / a.count for a, b in zip(*by_model.values())]
  print(f"averaged over an answer's tokens, log-probabilities differ by at most {max(unlike):.4f} nats")
  if is_stand_in:
    assert max(unlike) < 0.3
show.scores({name: scores[-1] for name, scores in by_model.items()})

# %%
scratch.cleanup()  # the imports too: to keep them, import to a folder of your own

# %% [markdown]
# ## What to try next
#
# - `FOLDER` above, with ChatGLM-6B's files; on Colab, keep them on Drive. Then ask it what you like, with
#   `talk.ask(...)`.
# - The same in a terminal (docs/chat.md): import once, `glmjax import chatglm-6b FOLDER runs/chatglm-6b-int4 --bits=4`,
#   then `glmjax chat --checkpoint=runs/chatglm-6b-int4`.
# - Other answers in `PAIRS`, or your own: a real fine-tuning of ChatGLM-6B is `gin/runs/chatglm_6b.gin`.
# - `glmjax.run("export", ..., format="chatglm-hf")` gives a model back to THUDM's code, bit for bit
#   (docs/import.md), as the stand-in was.
# - `model.chat(sampling=sampling.Sampling(temperature=0.0))`, of `glmjax.infer`, takes the likeliest token each time.
# - What hardware a larger model needs: notebook 04.
