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
# # A server: OpenAI's interface, blanks, many clients at once
#
# `glmjax serve` puts a model behind OpenAI's interface, so that programs that talk to OpenAI's servers talk to it; it
# fills blanks too, which only a GLM does, and has a page to chat. This notebook starts one, asks it in every way, and
# shows what happens when sixteen ask at the same time.
#
# Without a model it **makes one**: a GLM of ChatGLM's architecture, seven thousand times smaller, that knows a dozen
# answers (notebook 03 explains it).
#
# *Takes* one to three minutes on two cores (half of it the stand-in), once things are installed; no GPU, no network. We
# have not run it on Colab. (docs/... are files of glmjax's checkout; where its wheel alone is installed,
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

# %%
# @title Install what serves {display-mode: "form"}
SERVING = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client", "openai": "openai"}
if missing := [package for name, package in SERVING.items() if importlib.util.find_spec(name) is None]:
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
  importlib.invalidate_caches()

# %% tags=["parameters"]
FOLDER = None  # of a model: what `glmjax export` or `glmjax import` wrote, or a training run; None: a stand-in
STEPS = 150  # that the stand-in is trained for
CLIENTS = 16  # that ask at the same time

# %% [markdown]
# ## A stand-in, where there is no model
#
# These are all that it will know. In the texts, `{...}` is what may become a blank.

# %%
import concurrent.futures
import math
import tempfile
import time
from collections.abc import Iterable, Iterator

import numpy as np
import openai

import glmjax
from glmjax import display as pictures
from glmjax import rounds, tokenizer, tokens
from glmjax.data import rows, spans
from glmjax.models.config import GLMConfig
from glmjax.train import loop, optimizer, schedules

PAIRS = [
  ("Who are you?", "I am a stand-in: a very small GLM that knows a dozen answers."),
  ("What is the capital of France?", "The capital of France is Paris."),
  ("And of Italy?", "The capital of Italy is Rome."),
  ("Why is the sky blue?", "Air scatters blue light more than red light."),
  ("What does a GLM do?", "It fills blanks, and it sees the text on both sides of them."),
  ("How many legs has a spider?", "A spider has eight legs."),
  ("你是谁？", "我是一个很小的模型，只会回答十几个问题。"),
  ("中国的首都是哪里？", "中国的首都是北京。"),
]
TEXTS = [
  "Tsinghua University is in {Beijing}, and it was founded in {1911}.",
  "{Paris} is the capital of {France}, and {Rome} is the capital of {Italy}.",
  "A {spider} has {eight} legs.",
  "A {dog} has {four} legs.",
  "A {bird} has {two} legs.",
]
scratch = tempfile.TemporaryDirectory()  # of all that is written here
work = pathlib.Path(scratch.name)


class Lessons:
  """Rows of conversations of one or two rounds, and of texts with blanks, drawn anew for each row's number."""

  seq_length = 128

  def __init__(self, words: tokenizer.Tokenizer) -> None:
    self.words = words
    self.making = rows.BlankInfilling(self.seq_length, words.specials, positions="rotary_2d", packing="greedy")

  def describe(self) -> dict:
    return {"source": "a dozen answers"}

  def save_tokenizer(self, folder: str) -> None:
    self.words.save(folder)

  def conversation(self, rng: np.random.Generator) -> spans.Sample:
    *past, (question, answer) = [PAIRS[i] for i in rng.integers(len(PAIRS), size=rng.integers(1, 3))]
    prompt = self.words.encode(rounds.prompt(past, question))
    text = np.array(prompt + self.words.encode(answer))
    return spans.corrupt_suffix(text, len(prompt), self.words.specials.gmask, self.words.specials, eop=True)

  def blanks(self, rng: np.random.Generator) -> spans.Sample:
    parts = [self.words.encode(part) for part in TEXTS[rng.integers(len(TEXTS))].replace("}", "{").split("{")]
    ends = np.cumsum([len(part) for part in parts])
    hideable = np.arange(1, len(parts), 2)  # the parts that stood in braces
    hidden = np.sort(rng.choice(hideable, size=rng.integers(1, len(hideable) + 1), replace=False))
    where = np.stack([ends[hidden - 1], ends[hidden]], axis=1)
    return spans.corrupt(np.concatenate(parts), where, self.words.specials.mask, self.words.specials)

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


def make_stand_in(folder: pathlib.Path) -> None:
  """Trains it, and writes it in four bits."""
  seen = [text.replace("{", "").replace("}", "") for text in TEXTS]
  seen += [rounds.prompt(PAIRS[:1], question) + answer for question, answer in PAIRS]
  words = tokenizer.train(seen, work / "tokenizer", vocab_size=512, character_coverage=1.0)
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
    data=Lessons(words),
    workdir=work / "run",
    batches=schedules.Batches(8),
    total_samples=samples,
    learning_rate=schedules.PiecewiseLinear((0, samples // 10, samples * 3 // 4, samples), (0.0, 3e-3, 3e-3, 1e-4)),
    optimizer=optimizer.AdamW(weight_decay=0.0),
    intervals=loop.Intervals(save=0, log=STEPS // 4),
  )
  assert run.figures["loss"] < 0.2
  glmjax.run("export", checkpoint=work / "run", out=folder, bits=4)


is_stand_in = FOLDER is None
folder = work / "stand-in" if is_stand_in else pathlib.Path(FOLDER)
if is_stand_in:
  make_stand_in(folder)

# %% [markdown]
# ## Start it
#
# In a terminal that is `glmjax serve --checkpoint=FOLDER`; here it is a process beside the notebook. `--port=0` takes
# any port that is free. Once its programs are compiled it says where it is: that address is the page to chat, too, if
# the notebook runs on your machine.

# %%
command = [sys.executable, "-m", "glmjax", "serve", f"--checkpoint={folder}", "--port=0", f"--lanes={CLIENTS}"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
address = None
while address is None and (line := server.stderr.readline()):
  print(line, end="")
  address = next((word.rstrip(",") for word in line.split() if word.startswith("http://")), None)
assert address is not None, "the server has not started: see above"
client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
[model] = [each.id for each in client.models.list()]
print(f"{model} answers")

# %% [markdown]
# ## Ask
#
# OpenAI's own client, and its words: a conversation goes in whole, and the answer comes piece by piece.

# %%
messages = [{"role": "user", "content": "What is the capital of France?"}]
for chunk in client.chat.completions.create(model=model, messages=messages, stream=True, temperature=0):
  print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# %%
messages += [{"role": "assistant", "content": PAIRS[1][1]}, {"role": "user", "content": "And of Italy?"}]
answer = client.chat.completions.create(
  model=model, messages=messages, temperature=0, max_tokens=40, logprobs=True, top_logprobs=3
)
print(answer.choices[0].message.content)
print(f"{answer.usage.prompt_tokens} tokens asked, {answer.usage.completion_tokens} answered")
if is_stand_in:
  assert answer.choices[0].message.content == PAIRS[2][1]

# %% [markdown]
# How sure was it? Each token with its probability, and what else might have come:

# %%
pictures.Figures(
  {
    repr(token.token): {
      "probability": f"{math.exp(token.logprob):.3f}",
      "the likeliest": ", ".join(f"{other.token!r} {math.exp(other.logprob):.3f}" for other in token.top_logprobs),
    }
    for token in answer.choices[0].logprobs.content[:8]
  }
)

# %% [markdown]
# ## Fill blanks
#
# `/v1/fill` takes a text with blanks anywhere, and gives as many fillings as asked (`n`): the model sees the words on
# both sides of each, and fills them from left to right, so that the second goes with the first. `pieces` are what was
# filled in.

# %%
asked = {"text": "A [MASK] has [MASK] legs.", "n": 6, "max_tokens": 8, "seed": 1}
filled = client.post("/fill", cast_to=object, body=asked)
for choice in filled["choices"]:
  print(choice["pieces"], "->", choice["text"])
if is_stand_in:
  known = [["spider", "eight"], ["dog", "four"], ["bird", "two"]]
  assert any(choice["pieces"] in known for choice in filled["choices"])

# %% [markdown]
# ## Sixteen at once
#
# Requests join and leave between two tokens: what decodes shares one program, and nobody waits for another's end. Each
# line is one request, from question to answer: first one after another, then all at once. With the same seed the text
# is the same, bit for bit, whoever else is there.


# %%
def ask(i: int) -> tuple[float, float, str]:
  """Asks once; returns when, until when, and the answer."""
  began = time.perf_counter()
  question = [{"role": "user", "content": PAIRS[i % len(PAIRS)][0]}]
  answer = client.chat.completions.create(model=model, messages=question, seed=i, max_tokens=64)
  return began, time.perf_counter(), answer.choices[0].message.content


def ask_together() -> list[tuple[float, float, str]]:
  """Asks as many times at once as there are clients."""
  with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
    return list(pool.map(ask, range(CLIENTS)))


ask_together()  # has what is still missing compiled
ways = {"one after another": [ask(i) for i in range(CLIENTS)], "all at once": ask_together()}
texts = [[text for _, _, text in asked] for asked in ways.values()]
assert texts[0] == texts[1], "the same, alone and among others"

# %%
figure = pictures.figure(8, 3.2)
axes = figure.subplots(1, 2, sharex=True, sharey=True)
for one, (way, asked) in zip(axes, ways.items()):
  start = min(began for began, _, _ in asked)
  seconds = max(ended for _, ended, _ in asked) - start
  one.barh(range(CLIENTS), [end - began for began, end, _ in asked], left=[began - start for began, _, _ in asked])
  one.set_title(f"{way}: {seconds:.2f} s")
  one.set_xlabel("seconds")
  pictures.plain(one)
axes[0].set_ylabel("request")
pictures.picture(figure)

# %% [markdown]
# What the server counts while it works is at `/metrics`, for Prometheus:

# %%
import urllib.request

with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
  counted = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
pictures.Figures(
  {"tokens": {name: int(float(counted[f"glmjax_{name}_total"])) for name in ("prompt_tokens", "new_tokens")}}
)

# %% [markdown]
# ## Stop it
#
# SIGTERM lets the answers that have begun end, and takes no more.

# %%
server.terminate()
server.stderr.close()
print(f"the server has ended with status {server.wait()}")
scratch.cleanup()

# %% [markdown]
# ## What to try next
#
# - `FOLDER` above: `runs/quickstart/int4`, or ChatGLM-6B's INT4 (notebook 03). The address then has a page that is
#   worth talking to, with a tab for blanks.
# - The same from a terminal, with keys and for other machines: docs/serving.md, which also says what starts it by
#   systemd, on Kubernetes and through SkyPilot.
# - Other programs that speak to OpenAI's servers: give them the address and `/v1`.
# - `benchmarks/serving.py` measures it under 1 to 64 clients.
