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
# # What a GLM is trained on: blank infilling, in pictures
#
# A GPT reads from left to right and predicts the next word. A GLM is shown a text with **blanks** and predicts what
# stands in them, one token after another, **with the text on both sides of the blank in view**. This notebook takes
# one sentence and draws all that the model sees of it; each picture is of arrays made by the very functions that
# training calls.
#
# A few words first. A **span** is a stretch of tokens that is hidden together. A **row** is what the model reads at a
# time: so many **places**, a token in each. The **loss** is how surprised the model is by the tokens that were hidden;
# training makes it smaller.
#
# *Takes* less than a minute (3 seconds on two cores) and 120 MB of memory, once things are installed; no GPU, no
# network, no TensorFlow. (docs/... are files of glmjax's checkout; where its wheel alone is installed, `glmjax --help`
# names the commands.)

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
SENTENCE = "The library has moved into the old bakery. It still smells of bread on wet mornings."
HIDDEN = ["the old bakery", "bread"]  # what the first sample hides
SEED = 1
ROWS = 200  # rows to count spans in

# %% [markdown]
# ## Tokens
#
# A model reads numbers. A tokenizer cuts the text into pieces that it knows, and each has an id. A real one has 8,192
# (quickstart) to 150,000 (GLM-130B) ids and has seen megabytes of text; here is one trained on a handful of
# sentences. A dot stands for a space.

# %%
import tempfile

import numpy as np

from glmjax import positions, show, tokenizer
from glmjax.data import rows, spans

TEXTS = [
  SENTENCE,
  "The library has moved. The old bakery still smells of bread. It has moved into the old library.",
  "Anna keeps bees behind the school. She sells honey on wet mornings, and it still smells of bread.",
  "The old mill has a wheel. It turns on wet mornings. The bakery has bread. Anna has moved into the mill.",
  "What has moved into the old bakery? The library. What does it still smell of? Bread.",
  "图书馆搬进了老面包房。下雨的早晨，那里还有面包的香味。",
]
with tempfile.TemporaryDirectory() as folder:
  words = tokenizer.train(TEXTS, f"{folder}/tokenizer", vocab_size=500)
ids = words.encode(SENTENCE)
assert words.decode(ids) == SENTENCE
show.tokens(ids, words)

# %% [markdown]
# ## One sample: two blanks
#
# Two spans are hidden. What is left is the **context**: the text, with one `[MASK]` where a span was. Behind it come
# the hidden spans themselves, each begun by `<sop>` (start of piece). There the model **predicts**: the place of
# `<sop>` predicts the span's first token, that token's place the second, and the last one predicts `<eop>` (end of
# piece), by which the model says that the blank is full.
#
# Line by line, for each place: its number; the token read there; its position; the token predicted there, if any.
# Light: the context. Dark: its blanks. Grey: the spans; below each, what is predicted there, and counted in the loss.


# %%
def span_of(text: str) -> tuple[int, int]:
  """Tells which tokens of the sentence stand for a part of it."""
  ends = [len(words.decode(ids[:n])) for n in range(len(ids) + 1)]
  first = SENTENCE.index(text)
  begin = max(n for n, end in enumerate(ends) if end <= first)
  return begin, next(n for n, end in enumerate(ends) if end >= first + len(text))


hidden = np.array([span_of(text) for text in HIDDEN])
sample = spans.corrupt(np.array(ids), hidden, words.specials.mask, words.specials)
by_hand = rows.pack(
  [sample], positions.ROTARY, positions.Counting.AT_MASK, length=len(sample.tokens), pad=words.specials.pad
)
assert (by_hand["tokens"] == words.specials.mask).sum() == len(HIDDEN)
show.row(by_hand, words)

# %% [markdown]
# A *place* is where a token is written in the row; its **position** tells the model where it belongs in the text. In
# such a blank, a short one, all have the position of their `[MASK]`: what is predicted here stands *there*, between its
# neighbours, though it is written at the end. So the context does not show how long a blank is. Nor does the position
# tell the order within it; that follows from which place sees which alone: each sees one token more of the span than
# the one before.
#
# ## Which place sees which
#
# One line of the picture is one place. What it sees is grey, in the same greys as above; white is what it does not see.
#
# - The **context** (light) is seen by all, the context's own places included: a word left of a blank knows the words
#   to the right of it. That is why both sides are visible. Nothing of the context is predicted, so that nothing is
#   given away.
# - The **spans** (grey) are seen only by what comes after them: a place sees what was filled in before it, never what
#   it is to predict. So the steps in the lower right corner.
#
# A GPT's picture would be steps from corner to corner: no place knows what is to the right of it.

# %%
show.attention(by_hand, words)

# %% [markdown]
# No matrix is ever stored. The two numbers of a place, from where to where it sees (an *interval*), say all of it:

# %%
context = sample.context_length
for place in (0, context - 1, context, len(sample.tokens) - 1):
  print(f"place {place:2} sees [{by_hand['attend_start'][place]}, {by_hand['attend_end'][place]})")
assert (by_hand["attend_end"][:context] == context).all()
assert (by_hand["attend_end"][context:] == np.arange(context, len(sample.tokens)) + 1).all()

# %% [markdown]
# ## [MASK]: short blanks, drawn
#
# In training a random generator hides the spans, 15 % of the text, and `BlankInfilling` makes the rows. Row 19 of a
# run is always the same: it follows from the seed and the number 19 alone, whatever machine asks for it. A row begins
# anywhere in the text, also in the middle of a sentence. The spans are predicted in a shuffled order, so that the model
# learns to fill any blank with any others filled already.

# %%
infilling = rows.BlankInfilling(
  seq_length=48, specials=words.specials, gmask_rate=0.0, samples_per_sequence=1, short_sequence_rate=0.0
)
text = np.array(words.encode(" ".join(TEXTS[:5])))[: infilling.window_length]
masked = infilling.text_row(text, SEED, index=19)
again = infilling.text_row(text, SEED, index=19)
assert all((masked[name] == again[name]).all() for name in masked)
show.row(masked, words)

# %% [markdown]
# How long are the spans? Mostly a few tokens: Poisson's distribution with mean 3 (dots); the bars are what was drawn.

# %%
drawing = rows.BlankInfilling(seq_length=512, specials=words.specials, gmask_rate=0.0, samples_per_sequence=1)
long_text = np.resize(text, drawing.window_length)
drawn: list[int] = []
for index in range(ROWS):
  made = drawing.text_row(long_text, SEED, index)
  begins = np.flatnonzero((made["tokens"] == words.specials.sop) & (made["loss_weights"] > 0))
  ends = np.append(begins[1:], np.flatnonzero(made["loss_weights"]).max() + 1)
  drawn += (ends - begins - 1).tolist()
expected = spans.span_length_pmf(drawing.mean_span_length, drawing.max_span_length)
assert abs(np.mean(drawn) - np.arange(1, len(expected) + 1) @ expected) < 0.2
show.lengths(drawn, expected)

# %% [markdown]
# ## [gMASK]: one blank at the end
#
# 70 % of GLM-130B's rows have one blank only, from some place to the end of the text: `[gMASK]`. That is a GPT's task
# with a context that is read from both sides, and it is how the model continues a text or answers. Positions go on
# counting here, since the text does; there is no `<eop>`, as the text went on behind the *window*, the stretch of it
# that the row is made of.

# %%
ends_open = rows.BlankInfilling(seq_length=48, specials=words.specials, gmask_rate=1.0, samples_per_sequence=1)
continued = ends_open.text_row(text, SEED, index=3)
show.row(continued, words)

# %%
show.attention(continued, words)

# %% [markdown]
# ## Three kinds of positions
#
# GLM-130B has the one number that was shown; attention turns what it compares by an angle for each position, so that it
# sees their distance (*rotary*). ChatGLM-6B has **two**, and turns by both: the position is that of the blank, and the
# *block position* counts 1, 2, 3, ... inside of it. GLM-10B has the same two numbers, but does not turn: each has a
# learned vector in a table, which is added to the token's. The first sample again, as those two see it:

# %%
two = rows.pack(
  [sample], positions.ROTARY_2D, positions.Counting.AT_MASK, length=len(sample.tokens), pad=words.specials.pad
)
assert two["positions"].shape == (2, len(sample.tokens))
show.row(two, words)

# %% [markdown]
# ## Packing: several samples in a row
#
# Short samples would waste a long row. So `[MASK]` samples lie side by side, four in GLM-130B's rows of 2,048, and
# their intervals keep them apart: the picture falls into four blocks, and each is the one that you know.

# %%
packing = rows.BlankInfilling(seq_length=96, specials=words.specials, gmask_rate=0.0, samples_per_sequence=4)
long_text = np.resize(text, packing.window_length)
packed = packing.text_row(long_text, SEED, index=0)
starts = sorted(set(packed["attend_start"][packed["loss_weights"] > 0].tolist()))
assert len(starts) == 4
show.attention(packed, words)

# %% [markdown]
# ## Instructions
#
# A question and its answer are the same thing again: the question is the context, the answer is what stands in the
# blank. The answer's place is marked by `[MASK]` in GLM-130B's rows, by `[gMASK]` in ChatGLM-6B's. With either,
# positions go on counting as behind `[gMASK]`, and `<eop>` is predicted, since an answer ends. Here are two pairs in
# one row, each right behind the other.

# %%
teaching = rows.BlankInfilling(seq_length=64, specials=words.specials, packing="greedy", samples_per_sequence=2)
pairs = [("What has moved into the old bakery?", "The library."), ("What does it still smell of?", "Bread.")]
asked = teaching.instruction_row([tuple(np.array(words.encode(part)) for part in pair) for pair in pairs])
assert (asked["targets"][asked["loss_weights"] > 0] == words.specials.eop).sum() == len(pairs)
show.row(asked, words)

# %%
show.attention(asked, words)

# %% [markdown]
# ## The same as text
#
# `rows.describe_row` prints any row, in a terminal too, in any writing system. `weight` is what a place counts in the
# loss, 1 where something is predicted; `sees` is its interval.

# %%
chinese = np.array(words.encode(TEXTS[-1]))
print(rows.describe_row(ends_open.text_row(chinese, SEED, index=5), lambda some: words.decode(some, show_special=True)))

# %% [markdown]
# ## What to try next
#
# - Change `SENTENCE`, `HIDDEN` and `SEED` above, and run all cells again.
# - `samples_per_sequence`, `mean_span_length`, `packing` and the other fields of `rows.BlankInfilling` are what a gin
#   file (a text file of settings) sets of it; docs/data.md says what they were for GLM-130B.
# - Notebook 02 trains a model on such rows. So does `make quickstart` in a checkout, and then, from this folder,
#   `glmjax.load("../runs/quickstart/int4").fill("The [MASK] of Britain")` fills blanks with it (docs/api.md).
