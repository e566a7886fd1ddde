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
# # What hardware does it take?
#
# How much memory does a model need, to answer and to be trained; which cards have it; what do four bits change, and
# what does a longer context? Most of that is arithmetic on a handful of numbers, and arithmetic is instant. What it
# leaves out, a **plan** finds: it compiles the very program that would run, for cards that are not here.
#
# *Takes* two minutes on two cores (one of them compiling) and 1 GB of memory, once things are installed; about ten
# seconds where the compilers of GPUs are not installed. No GPU, no network, no TensorFlow. (docs/... are files of
# glmjax's checkout; where its wheel alone is installed, `glmjax --help` names the commands.)

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
# A model of your own: rows of its vocabulary, layers, width, heads, inner width of its networks, longest text.
OWN = {"vocab_size": 50_304, "num_layers": 24, "embed_dim": 2_048, "num_heads": 16, "mlp_dim": 5_504}
OWN["max_length"] = 2_048
CONTEXT = 2_048  # tokens of question and answer together
ROWS = 16  # texts that are trained on at a time
LAYERS = None  # of the plans that are compiled; None: all of each model's
PYTHON = os.environ.get("GLMJAX_PLAN_PYTHON")  # of an environment with the compilers; None: this one, if it has them

# %% [markdown]
# ## Three models
#
# Yours, and two that were published. The sizes are all that memory depends on.

# %%
import dataclasses

from IPython.display import HTML, display
from matplotlib import ticker

import glmjax
from glmjax import display as drawing
from glmjax import errors, show
from glmjax.models import params
from glmjax.models.config import GLMConfig
from glmjax.parallel.mesh import MeshConfig
from glmjax.plan import memory, programs, targets

MODELS = {
  "your own": GLMConfig(**OWN, dtype="float16"),
  "ChatGLM-6B": GLMConfig(130_528, 28, 4_096, 32, 16_384, positions="rotary_2d", mlp="gelu_tanh", dtype="float16"),
  "GLM-130B": GLMConfig(150_528, 70, 12_288, 96, 32_768, dtype="float16"),
}
GIB = targets.GIB
counts = {name: params.count(model) for name, model in MODELS.items()}
assert counts["ChatGLM-6B"] == 6_173_286_400
for name, count in counts.items():
  print(f"{name:12} {count / 1e9:7.2f} billion parameters")

# %% [markdown]
# ## To answer: weights and cache
#
# A weight takes two bytes in 16 bits, one in INT8, half a byte in INT4. Only the large matrices of the layers are
# quantized; the embedding table keeps its 16 bits, which is why a model with few layers gains less.
#
# Besides there is the **KV cache**: what each layer keeps of every token it has read, so as not to read it again. It
# is in 16 bits whatever the weights are in. Here is one conversation of `CONTEXT` tokens:


# %%
def answering(model, bits, context=CONTEXT, cards=1):
  """What a card holds while it answers."""
  work = programs.Decode(context=context, bits=None if bits == 16 else bits)
  return memory.decoding(model, work, MeshConfig(data=1, tensor=cards))


def gib(each):
  """The parts of a memory, in GiB."""
  return {part: size / GIB for part, size in each.parts.items()}


PRECISIONS = {16: "16 bits", 8: "INT8", 4: "INT4"}
for name, model in MODELS.items():
  bars = {f"{name}, {label}": gib(answering(model, bits)) for bits, label in PRECISIONS.items()}
  display(show.stacked(bars, "memory, GiB"))

# %% [markdown]
# The same as numbers, for your own model in INT4:

# %%
answering(MODELS["your own"], 4)

# %% [markdown]
# ## The cards
#
# By their makers' figures: GPUs, and from `v4` on Google's TPUs. The memory says *whether* a model runs; the bandwidth
# says how fast it can answer at most, since every token reads all weights once; the products (TFLOP/s) matter for
# training and for reading long prompts. Of a GPU's memory 6 % is set aside here (CUDA's own, fragments). Of a TPU's
# nothing is, as its compiler lays out all of it beforehand; that is not verified on a TPU, so leave some room.

# %%
head = ("card", "memory, GiB", "usable", "bandwidth, GB/s", "TFLOP/s, 16 bits", "GB/s to its neighbours", "watts")
HTML(
  drawing.table(
    head,
    [
      (
        name,
        f"{chip.memory_bytes / GIB:,.1f}",
        f"{targets.room(chip) / GIB:,.1f}",
        f"{chip.memory_bandwidth / 1e9:,.0f}",
        f"{chip.peak_flops / 1e12:,.0f}",
        f"{chip.inner_links / 1e9:,.0f}",
        "" if chip.watts is None else f"{chip.watts:,.0f}",
      )
      for name, chip in targets.CHIPS.items()
    ],
  )
)

# %% [markdown]
# ## Which card runs which model?
#
# How many of a card, of 1, 2, 4, ..., hold weights and cache of one conversation of `CONTEXT` tokens. **By
# arithmetic**: what the program takes besides is left out (up to 1.4 GiB, or a tenth, in the programs that were
# compiled), so that a card that is nearly full may be one too few. `glmjax plan --fits` compiles what arithmetic does
# not rule out; of the sets in docs/hardware.md its answer differed for one, GLM-10B in INT8 on one RTX 2080 Ti.

# %%
CARDS = [name for name, chip in targets.CHIPS.items() if chip.platform == "cuda"]
sets = {
  (name, bits): [
    memory.smallest(model, programs.Decode(context=CONTEXT, bits=None if bits == 16 else bits), card) for card in CARDS
  ]
  for name, model in MODELS.items()
  for bits in PRECISIONS
}
assert sets["GLM-130B", 4][CARDS.index("rtx3090")] == 4  # as its authors ran it
shown = [(name, bits, *(count or "-" for count in row)) for (name, bits), row in sets.items()]
HTML(drawing.table(("model", "bits", *CARDS), shown))

# %% [markdown]
# ## A longer context
#
# Weights are there once, the cache grows with every token of every conversation. Each line is a model, read from left
# to right; where it crosses a dashed line, that card is full. (What a model was trained for is another matter:
# ChatGLM-6B and GLM-130B end at 2,048 tokens.)


# %%
def line(axes, card, along):
  """Draws what is usable of a card as a dashed line across the axes "x" or "y", its name beyond the frame."""
  room = targets.room(targets.CHIPS[card]) / GIB
  draw = axes.axvline if along == "x" else axes.axhline
  draw(room, color="#777777", linestyle=(0, (4, 3)), linewidth=0.9)
  if along == "x":
    axes.text(room, 1.02, card, transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
  else:
    axes.text(1.01, room, card, transform=axes.get_yaxis_transform(), va="center", fontsize=8)


def in_gib(axis):
  """Counts an axis in powers of two."""
  axis.axes.set(**{f"{axis.axis_name}scale": "log"})
  axis.set_major_locator(ticker.LogLocator(base=4))
  axis.set_minor_locator(ticker.NullLocator())
  axis.set_major_formatter(lambda gib, _: f"{gib:g}")


contexts = [1 << i for i in range(9, 17)]
figure = drawing.figure(10, 3.6)
for place, bits in enumerate((16, 4), 1):
  axes = figure.add_subplot(1, 2, place)
  for mark, (name, model) in zip("so^", reversed(MODELS.items())):
    sizes = [answering(model, bits, context).total / GIB for context in contexts]
    axes.plot(contexts, sizes, color=drawing.INK, marker=mark, markersize=4, linewidth=1, label=name)
  for card in ("rtx2080ti", "rtx3090", "a100-80"):
    line(axes, card, "y")
  axes.set_xscale("log", base=2)
  axes.set_xticks(contexts, [f"{context:,}" for context in contexts], fontsize=7)
  in_gib(axes.yaxis)
  axes.set_ylim(0.5, 1_024)
  axes.set_xlabel("context, tokens", color=drawing.INK)
  axes.set_ylabel("weights and cache, GiB", color=drawing.INK)
  axes.set_title(PRECISIONS[bits], loc="left", color=drawing.INK, fontsize=11)
  drawing.plain(axes)
axes.legend(frameon=False, fontsize=8, labelcolor=drawing.INK, loc="upper left")
drawing.grey_picture(figure)

# %% [markdown]
# Any context and precision. Right of each point: its size, and how many of two cards hold it. Where ipywidgets is
# installed, sliders choose.


# %%
def needs(context, bits):
  """Draws what each model needs, and how many RTX 3090 or A100 hold it."""
  figure = drawing.figure(9, 2.3)
  axes = figure.add_subplot()
  work = programs.Decode(context=context, bits=None if bits == 16 else bits)
  for name, model in MODELS.items():
    size = answering(model, bits, context).total / GIB
    held = ", ".join(f"{memory.smallest(model, work, card) or 'no'} x {card}" for card in ("rtx3090", "a100-80"))
    axes.plot([size], [name], color=drawing.INK, marker="o", markersize=7)
    axes.text(1.02, name, f"{size:,.1f} GiB: {held}", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
  for card in ("rtx3090", "a100-80"):
    line(axes, card, "x")
  in_gib(axes.xaxis)
  axes.set_xlim(0.5, 1_024)
  axes.margins(y=0.3)
  axes.grid(axis="y", color=drawing.FAINT, linewidth=0.6)
  axes.set_xlabel(f"memory for {context:,} tokens in {PRECISIONS[bits]}, GiB", color=drawing.INK)
  axes.invert_yaxis()
  drawing.plain(axes)
  return drawing.grey_picture(figure)


display(needs(CONTEXT, 4))
if importlib.util.find_spec("ipywidgets"):
  import ipywidgets

  lengths = ipywidgets.SelectionSlider(options=contexts, value=4_096, description="context")
  ipywidgets.interact(needs, context=lengths, bits=ipywidgets.SelectionSlider(options=[4, 8, 16], description="bits"))
else:
  print("the sliders need ipywidgets (pip install ipywidgets); call needs(8_192, 16) meanwhile")

# %% [markdown]
# ## To train
#
# Training holds the weights in 32 bits, two moments of each for the optimizer AdamW (one for Muon, another optimizer),
# a gradient of each, and of every token what backward will need: its **activations**. Four ways to train your own
# model on `ROWS` rows of text (an RTX 3090 has room for 22.3 GiB, an A100 of 80 GB for 74.4):
#
# - all on one card;
# - with `remat="full"` (*rematerialization*), where backward computes the layers again from their inputs, which is all
#   that is kept;
# - on eight cards that split the weights and all that goes with them (*FSDP*);
# - with both.

# %%
work = programs.Train(ROWS, OWN["max_length"])
kept, again = (dataclasses.replace(MODELS["your own"], remat=remat) for remat in ("dots", "full"))
one, eight = MeshConfig(data=1), MeshConfig(data=1, fsdp=8)
ways = {
  "one card": memory.training(kept, work, one),
  "remat": memory.training(again, work, one),
  "8 cards": memory.training(kept, work, eight),
  "8 cards, remat": memory.training(again, work, eight),
}
assert ways["8 cards, remat"].total == min(each.total for each in ways.values())
show.stacked({name: gib(each) for name, each in ways.items()}, "memory of a card, GiB, at least")

# %% [markdown]
# *At least*: a step also needs room for what it is computing just now. GLM-130B's compiled steps took 1.2 to 2.1 times
# as much (docs/hardware.md). So:
#
# ## Compile it
#
# A plan asks the real compiler, on this machine's processor, for a card that is elsewhere, and reads how much memory
# the program takes, and how fast it can be at best. Plans are gin files, text files of settings; these come with
# glmjax. First ChatGLM-6B in INT4 on one RTX 2080 Ti, behind `CONTEXT` tokens:


# %%
def planned(file, model, least, card, settings):
  """The compiled plan's picture; the arithmetic's (`least`), and a line, where there is no compiler."""
  settings = {"config.GLMConfig.num_layers": model.num_layers} | settings
  try:
    plan = glmjax.plan(file, bindings=[f"{name} = {value!r}" for name, value in settings.items()], python=PYTHON)
  except errors.InputError as error:
    if "pip install" not in str(error):
      raise
    print(f"not compiled, so this is arithmetic: {error}")
    return least.plot(card)
  found = plan.figures["peak_bytes_per_device"]
  print(f"{found / GIB:.2f} GiB; {least.total / GIB:.2f} of it by arithmetic")
  print(
    f"at best {plan.figures['tokens_per_second']:,.0f} tokens/s; compiled in {plan.figures['compile_seconds']:.0f} s"
  )
  assert least.total <= found * 1.001
  return plan.plot()


deep = {name: dataclasses.replace(model, num_layers=LAYERS or model.num_layers) for name, model in MODELS.items()}
model = deep["ChatGLM-6B"]
planned(
  "plans/chatglm_6b_int4_rtx2080ti_1.gin", model, answering(model, 4), "rtx2080ti", {"programs.Decode.context": CONTEXT}
)

# %% [markdown]
# *At best* is a bound: a program that reads every four-bit number once, as fast as the card's memory gives them. For
# cards of this kind glmjax has no kernel that multiplies them; a product of few rows is a sum, which XLA compiles into
# a loop without a float copy of the matrix (docs/hardware.md).
#
# GLM-130B in INT4 on four RTX 3090, each of which holds a quarter of every matrix. For these there is a kernel:

# %%
model = deep["GLM-130B"]
planned(
  "plans/glm_130b_int4_rtx3090_4.gin",
  model,
  answering(model, 4, cards=4),
  "rtx3090",
  {"programs.Decode.context": CONTEXT},
)

# %% [markdown]
# And your own model in training, `ROWS` rows a step on one H100. The plan's file is of another model; yours takes its
# place by *bindings*, settings that are given beside the file:

# %%
model = dataclasses.replace(deep["your own"], dtype="bfloat16", remat="full")
planned(
  "plans/gpt_1b_train_h100_1.gin",
  model,
  memory.training(model, work),
  "h100",
  {"programs.Train.batch_size": work.batch_size, "programs.Train.length": work.length}
  | {f"config.GLMConfig.{name}": value for name, value in OWN.items() if name != "num_layers"}
  | {"config.GLMConfig.remat": "full", "config.GLMConfig.scan_layers": True},
)

# %% [markdown]
# ## What to try next
#
# - Change `OWN`, `CONTEXT` and `ROWS`, and run all cells again.
# - `glmjax.plan(..., target="rtx3090:8", bindings=["TENSOR = 8"])` plans the same for other cards; `.figures` has the
#   exchanges between them, the FLOPs, and what would help where it does not fit (docs/hardware.md).
# - `glmjax plan --search` tries meshes, `glmjax plan --fits` compiles the table of cards.
# - The compilers come with `pip install '.[plan]'` in a checkout, best into an environment of its own (`PYTHON` above).
# - Notebook 03 runs ChatGLM's architecture here; docs/scaling.md says how meshes split a model.
