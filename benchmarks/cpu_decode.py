"""ChatGLM-6B's shape on an ordinary CPU: tokens a second, prompts, memory; beside llama.cpp's llama-bench.

  python benchmarks/cpu_decode.py --peer=llama.cpp/build/bin/llama-bench --peer_q4=q4_0.gguf --peer_q8=q8_0.gguf

Random weights of ChatGLM-6B's sizes (6.2 thousand million), bfloat16 computation, one request, behind 32 and 512
tokens; several requests together behind 32. Every way is a process of its own, so that memory is its own; ways and peer
take turns. The peer's models are yours, of equal size (28 layers, width 4,096, 6.2 thousand million parameters);
without --peer only ours run. Writes benchmarks/results/cpu_decode.json.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import resource
import shlex
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import loader
import numpy as np

from glmjax.infer import decode
from glmjax.infer import prompt
from glmjax.infer import runner
from glmjax.infer import sampling
from glmjax.kernels.cpu import library
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.quantize import qarray

CONFIG = config_lib.GLMConfig(
  vocab_size=130_528,
  num_layers=28,
  embed_dim=4_096,
  num_heads=32,
  mlp_dim=16_384,
  positions="rotary_2d",
  mlp="gelu_tanh",
  tie_embeddings=False,
  dtype="bfloat16",
  param_dtype="bfloat16",
)
ALONE = ", XLA alone"  # of ways without the C++ library
# Bits of the kernels, of activations and of the head (None: bfloat16).
WAYS = {
  "int4": (4, None, None),
  "int4, activations 8": (4, 8, None),
  "int4, activations 8, head 4": (4, 8, 4),
  "int8": (8, None, None),
  "int8, activations 8, head 8": (8, 8, 8),
  "bfloat16": (None, None, None),
}
WAYS |= {way + ALONE: bits for way, bits in WAYS.items()}
CONTEXTS, TOGETHER, NEW, RUNS = (32, 512), (4, 16), 16, 5  # tokens, rows, tokens of a run, runs


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--peer", help="llama-bench")
  parser.add_argument("--peer_q4", help="its model of 4 bits")
  parser.add_argument("--peer_q8", help="its model of 8 bits")
  parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
  parser.add_argument("--turns", type=int, default=2)
  parser.add_argument("--layers", type=int, default=CONFIG.num_layers, help="fewer, to try it out")
  parser.add_argument("--child", help=argparse.SUPPRESS)
  parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "cpu_decode.json"))
  options = parser.parse_args()
  if options.child is not None:
    print(json.dumps(measure(options.child, options.layers)))
    return
  result = {
    "what": "ChatGLM-6B's shape, random weights, tokens/s; peak memory in GiB (running: of one request alone)",
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "machine": loader.machine(),
    "command": shlex.join(["python", "benchmarks/cpu_decode.py", *sys.argv[1:]]),
    "jax": jax.__version__,
    "library": library.status().words,
    "read_gb_per_second": round(library.read_bandwidth() / 1e9, 1),
    "layers": options.layers,
    "glmjax": {way: [] for way in options.ways},
    "llama.cpp": {},
  }
  for turn in range(options.turns):
    for way in options.ways:
      command = [sys.executable, __file__, f"--child={way}", f"--layers={options.layers}"]
      environment = os.environ | ({library.ISA: "none"} if way.endswith(ALONE) else {})
      done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
      result["glmjax"][way].append(json.loads(done.stdout.splitlines()[-1]))
      print(f"turn {turn + 1}, {way}: {result['glmjax'][way][-1]}", flush=True)
    for name, model in (("q4", options.peer_q4), ("q8", options.peer_q8)):
      if options.peer and model:
        result["llama.cpp"].setdefault(name, []).append(ask_peer(options.peer, model))
        print(f"turn {turn + 1}, llama.cpp {name}: {result['llama.cpp'][name][-1]}", flush=True)
  result |= ratios(result)
  pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


def ratios(result: dict[str, Any]) -> dict[str, Any]:
  """Returns the figures that stand for all: the fastest way of each kind over the peer, the share of memory's speed."""

  def of(way: str, name: str) -> float:
    return statistics.median(turn[name] for turn in result["glmjax"][way])

  found: dict[str, Any] = {}
  fastest = {"int4": "int4, activations 8, head 4", "int8": "int8, activations 8, head 8"}
  there = {kind: way for kind, way in fastest.items() if way in result["glmjax"]}
  for kind, way in there.items():
    peer = result["llama.cpp"].get(f"q{kind[3:]}")
    if peer:
      found[f"{kind}_ratio"] = round(of(way, "behind_32") / statistics.median(turn["behind_32"] for turn in peer), 2)
  if "int4" in there:
    way = there["int4"]
    share = of(way, "behind_32") * of(way, "weight_gb") / result["read_gb_per_second"]
    found |= {"int4_bandwidth_share": round(share, 2), "peak_bytes": int(of(way, "peak_gib") * 2**30)}
    if peer := result["llama.cpp"].get("q4"):
      theirs = statistics.median(turn["prompt_512_seconds"] for turn in peer)
      found["prefill_ratio"] = round(theirs / of(way, "prompt_512_seconds"), 2)
  return found


def measure(way: str, layers: int) -> dict[str, Any]:
  """Returns the figures of one way."""
  bits, activation_bits, head_bits = WAYS[way]
  config = dataclasses.replace(CONFIG, num_layers=layers, activation_bits=activation_bits, head_bits=head_bits)
  model = runner.Runner(config, random_weights(config, bits), given_away=True)
  making = peak_gib()
  forget_peak()
  weights = sum(x.nbytes for x in jax.tree.leaves(model.params)) - model.params["embedding"]["table"].nbytes
  found: dict[str, Any] = {"weight_gb": round(weights / 1e9, 3)}
  for context in CONTEXTS:
    state, rows, seconds = read(model, 1, context)
    found[f"prompt_{context}_seconds"] = round(seconds, 3)
    found[f"behind_{context}"] = round(speed(model, rows, state, NEW), 2)
    if context == CONTEXTS[0]:
      found["streamed"] = round(speed(model, rows, read(model, 1, context)[0], 1), 2)
  found["running_gib"] = peak_gib()
  for rows_together in TOGETHER:
    state, rows, _ = read(model, rows_together, CONTEXTS[0])
    found[f"{rows_together}_together"] = round(rows_together * speed(model, rows, state, NEW), 2)
  return found | {"peak_gib": max(making, peak_gib())}


def peak_gib() -> float:
  """Returns the most memory that this process had at a time since `forget_peak`."""
  return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def forget_peak() -> None:
  """Makes the kernel count this process's peak anew, where it can (Linux, proc_pid_clear_refs(5))."""
  with contextlib.suppress(OSError):
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def random_weights(config: config_lib.GLMConfig, bits: int | None) -> dict[str, Any]:
  """Returns parameters, layers apart, of random codes or small floats."""
  pool = np.random.default_rng(0).integers(-128, 128, 1 << 24, dtype=np.int8)
  flat = {}
  for path, param in params_lib.apart(config):
    if param.quantizes and bits:
      like = qarray.abstract(param.shape, bits, param.inputs)
      values = jnp.asarray(np.resize(pool, like.values.shape))
      flat[path] = dataclasses.replace(like, values=values, scale=jnp.full(like.scale.shape, 0.002, jnp.float16))
    elif param.init == "normal":
      flat[path] = jnp.asarray(np.resize(pool, param.shape)).astype(jnp.bfloat16) * 0.0003
    else:
      flat[path] = jnp.full(param.shape, float(param.init == "ones"), jnp.float32)
  return params_lib.nest(flat)


def read(model: runner.Runner, rows: int, context: int) -> tuple[decode.State, decode.Rows, float]:
  """Reads random prompts, twice; returns the state behind them, the rows, and the second time's seconds."""
  ids = np.random.default_rng(1).integers(10, 1000, context + 1).tolist()
  one = prompt.Prompt(ids, np.zeros((2, context + 1), np.int32), context, (0, 1))
  batch, known = decode.make_rows([one] * rows, [NEW * (RUNS + 2)] * rows, 3)
  for _ in range(2):
    begun = time.perf_counter()
    state = jax.block_until_ready(model.run(decode.prefill, batch, known, new_tokens=NEW * (RUNS + 2)))
    seconds = time.perf_counter() - begun
  return state, known, seconds


def speed(model: runner.Runner, rows: decode.Rows, state: decode.State, count: int) -> float:
  """Returns the tokens a second of one row, `count` a call: the median of some runs behind a first one."""
  size = len(rows.limit_B)
  draws = sampling.draws([sampling.Sampling()] * size, [0] * size)
  none = np.zeros(model.config.vocab_size, bool)
  times = []
  for _ in range(RUNS + 1):
    begun = time.perf_counter()
    state = jax.block_until_ready(model.run(decode.decode, rows, state, draws, none, none, np.int32(count)))
    times.append(time.perf_counter() - begun)
  return count / statistics.median(times[1:])


def ask_peer(program: str, model: str) -> dict[str, float]:
  """Returns the same figures of llama-bench, as far as it has them."""
  command, runs = [program, "-m", model, "-t", "2", "-r", "3", "-o", "json"], []
  for asked in (["-p", "512", "-n", "0"], ["-p", "0", "-n", str(NEW), "-d", ",".join(map(str, CONTEXTS))]):
    runs += json.loads(subprocess.run([*command, *asked], capture_output=True, text=True, check=True).stdout)
  found = {}
  for run in runs:
    if run["n_gen"] and run["n_depth"]:
      found[f"behind_{run['n_depth']}"] = round(run["avg_ts"], 2)
    elif run["n_prompt"] and not run["n_depth"]:
      found["prompt_512_seconds"] = round(512 / run["avg_ts"], 3)
  return found


if __name__ == "__main__":
  main()
