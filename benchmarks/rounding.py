"""What inference loses by rounding: int8 keys and values, activations of 8 bits, a quantized head, in bits per byte.

  python benchmarks/rounding.py --checkpoint=runs/quickstart/int4 --text=held_out.txt

Windows of a text are read as a context that is seen whole and a continuation, token by token through the cache, as
decoding goes; the bits are those of the continuation's bytes. All ways read the same windows and take turns. Writes
benchmarks/results/rounding.json.
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

import jax
import jax.numpy as jnp
import loader
import numpy as np

import glmjax
from glmjax.infer import decode
from glmjax.infer import engine as engine_lib
from glmjax.infer import lanes
from glmjax.infer import prompt as prompt_lib
from glmjax.models import config as config_lib

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
