"""What inference loses by rounding: int8 keys and values, activations of 8 bits, a quantized head, in bits per byte.

  python benchmarks/rounding.py --checkpoint=runs/quickstart/int4 --text=held_out.txt --cache=runs/quickstart/cache

Windows of a text are read as a context that is seen whole and a continuation, token by token through the cache, as
decoding goes; the bits are those of the continuation's bytes. All ways read the same windows and take turns. With
--cache also how many tokens of held-out blanks are guessed (glmjax evaluate). Then, of one layer of ChatGLM-6B's sizes
with random INT4 weights, how far its output is off. Writes benchmarks/results/rounding.json.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import shlex
import statistics
import sys
import time
from typing import Any

import cpu_decode
import jax
import jax.numpy as jnp
import loader
import numpy as np

import glmjax
from glmjax.data import shards
from glmjax.evaluate import heldout
from glmjax.infer import decode
from glmjax.infer import engine as engine_lib
from glmjax.infer import lanes
from glmjax.infer import placement
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import rows as rows_lib
from glmjax.infer import runner as runner_lib
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import weights

PLAIN = "as computed"
WAYS = {
  PLAIN: {},
  "keys and values int8": {"kv_cache_dtype": "int8"},
  "activations 8 bits": {"activation_bits": 8},
  "head 8 bits": {"head_bits": 8},
  "head 4 bits": {"head_bits": 4},
}
MOST, ROWS = 320, 16  # tokens of a window, a fifth of them its context; windows at a time


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--checkpoint", required=True, help="folder of a model")
  parser.add_argument("--text", required=True, help="a file of text that it was not trained on")
  parser.add_argument("--cache", help="a token cache, for blanks")
  parser.add_argument("--windows", type=int, default=64, help="from the text's beginning on")
  parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "rounding.json"))
  options = parser.parse_args()
  models = {way: glmjax.load(options.checkpoint, **how) for way, how in WAYS.items()}
  text = pathlib.Path(options.text).read_text(encoding="utf-8")
  bits: dict[str, list[np.ndarray]] = {way: [] for way in models}
  seconds: dict[str, list[float]] = {way: [] for way in models}
  num_bytes: list[int] = []
  window = min(MOST, models[PLAIN].config.max_length - 2)  # its mask and sop take a place each
  context = window // 5
  for rows in batches(models[PLAIN], text, options.windows, window):
    num_bytes += [len(models[PLAIN].tokenizer.decode(row[context:]).encode()) for row in rows]
    for way, model in models.items():
      found, took = read(model, rows, context)
      bits[way].append(found)
      seconds[way].append(took)
  result = {
    "what": f"{len(num_bytes)} windows of {context} + {window - context} tokens, {ROWS} at a time",
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "machine": loader.machine(),
    "command": shlex.join(["python", "benchmarks/rounding.py", *sys.argv[1:]]),
    "jax": jax.__version__,
    "computes_in": models[PLAIN].config.dtype,
    "ways": {},
  }
  plain = np.concatenate(bits[PLAIN]) / np.array(num_bytes)
  for way, model in models.items():
    per_byte = np.concatenate(bits[way]) / np.array(num_bytes)
    adds = 100 * (per_byte - plain) / plain.mean()
    result["ways"][way] = {
      "bits_per_byte": round(float(per_byte.mean()), 5),
      "adds_percent": round(float(adds.mean()), 4),
      "its_standard_error": round(float(adds.std() / math.sqrt(len(adds))), 4),
      "step_ms": round(1000 * statistics.median(seconds[way][1:]), 3),
      "cache_bytes_per_token": lanes.slot_bytes(model.runner, 1),
    }
  if options.cache:
    result["blanks"] = {way: blanks(options.checkpoint, options.cache, how) for way, how in WAYS.items()}
  result["chatglm_6b_layer"] = layer_error()
  pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(result, indent=1))


def batches(model: engine_lib.Engine, text: str, windows: int, window: int) -> list[list[list[int]]]:
  """Returns batches of windows of so many ids each."""
  ids = model.tokenizer.encode(text[: windows * window * 8])
  rows = [ids[first : first + window] for first in range(0, len(ids) - window + 1, window)][:windows]
  return [rows[first : first + ROWS] for first in range(0, len(rows) - ROWS + 1, ROWS)]


def read(model: engine_lib.Engine, rows: list[list[int]], context: int) -> tuple[np.ndarray, float]:
  """Returns each row's bits behind its context, and the seconds of a step."""
  specials, kind = model.tokenizer.specials, model.config.position_kind
  prompts = [prompt_lib.fill(kind.frame([*row[:context], specials.gmask], specials), specials, kind) for row in rows]
  new_BT = np.array([row[context:] for row in rows], np.int32)
  given, known = decode.make_rows(prompts, [new_BT.shape[1]] * len(rows), specials.pad)
  state = model.runner.run(decode.prefill, given, known, new_tokens=new_BT.shape[1])
  jax.block_until_ready(state)
  begin = time.perf_counter()
  bits_B = np.asarray(model.runner.run(through, known, state, new_BT))
  return bits_B, (time.perf_counter() - begin) / new_BT.shape[1]


def blanks(checkpoint: str, cache: str, how: dict[str, Any]) -> dict[str, float]:
  """Returns of each language the share of blanks' tokens that are guessed, and its standard error."""
  place = placement.on_mesh(None)
  model = runner_lib.read(checkpoint, place, placement.Precision(**how))
  settings = heldout.Settings(max_fills=2_000)
  found = heldout.evaluate_model(model, shards.TokenCache.open(cache), settings, place)
  names = ("infill_accuracy", "infill_accuracy_se")
  return {f"{language}_{name}": round(own[name], 4) for language, own in found.items() for name in names}


def layer_error() -> dict[str, float]:
  """Returns how far the output of a layer with activations of 8 bits is from that with floats, as a part of it."""
  config = dataclasses.replace(cpu_decode.CONFIG, num_layers=1, vocab_size=512)
  params = weights.quantize(glm.init_params(config, jax.random.key(0)), 4)
  tokens = np.random.default_rng(0).integers(0, 512, (1, 64)).tolist()
  prompts = [prompt_lib.Prompt(row, np.tile(np.arange(64, dtype=np.int32), (2, 1)), 64, (0, 1)) for row in tokens]
  batch = rows_lib.pad(prompts, 0, 1, 64)
  outputs = []
  for bits in (None, 8):
    model = runner_lib.Runner(dataclasses.replace(config, activation_bits=bits), params)
    outputs.append(np.asarray(model.run(hidden, batch), np.float64))
  plain, rounded = outputs
  return {"relative_error": round(float(np.linalg.norm(rounded - plain) / np.linalg.norm(plain)), 5)}


@functools.partial(jax.jit, static_argnames=("config",))
def hidden(config: config_lib.GLMConfig, params: Any, batch: rows_lib.Batch) -> jax.Array:
  """Returns what the head would read, float32."""
  positions = config.position_kind.of_model(batch.positions)
  x_BLD, _ = glm.GLM(config).apply({"params": params}, batch.tokens, positions, batch.start, batch.end, method="hidden")
  return x_BLD.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("config",))
def through(
  config: config_lib.GLMConfig, params: Any, rows: decode.Rows, state: decode.State, new_BT: jax.Array
) -> jax.Array:
  """Returns how many bits each row's new tokens take, [B]."""

  def step(state: decode.State, token_B: jax.Array) -> tuple[decode.State, jax.Array]:
    logits_BV, cache = decode.next_logits(config, params, rows, state)
    logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], 1)[:, 0]
    state = dataclasses.replace(
      state, cache=cache, length_B=state.length_B + 1, step_B=state.step_B + 1, last_B=token_B
    )
    return state, -logprob_B / math.log(2)

  return jax.lax.scan(step, state, new_BT.T)[1].sum(0)


if __name__ == "__main__":
  main()
