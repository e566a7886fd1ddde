"""Greedy decoding, batch 1, against the original PyTorch code on the same machine.

  python benchmarks/decode.py --baseline_python TORCH_VENV/bin/python --baseline_script torch_reference.py

Both decode 128 tokens behind a prompt of 64, prefill included, in float32, then in bfloat16: 6 layers, width 512, 8
heads, GeGLU 1365, vocabulary 20480 (29.4 M parameters, random). The two take turns. Runs during which other
processes used the processors are marked busy, and count only where there are no quiet ones. Without the
baseline's flags only ours runs. The original's code is not part of glmjax: the script is yours, around it, and
prints a last line of JSON, {"median": tokens/s}, when it is called with `decode --runs N --dtype fp32`, or bf16.
Writes benchmarks/results/decode.json.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import loader
import numpy as np

from glmjax import tokens
from glmjax.infer import decode
from glmjax.infer import prompt
from glmjax.infer import runner
from glmjax.infer import sampling
from glmjax.models import config as config_lib
from glmjax.models import glm

CONFIG = config_lib.GLMConfig(vocab_size=20480, num_layers=6, embed_dim=512, num_heads=8, mlp_dim=1365, max_length=1024)
SPECIALS = tokens.icetk(0, 20_000)
PROMPT, NEW = 64, 128
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}  # as the original's script has them
BUSY = 0.12  # share of a processor used by others, above which a run does not count as quiet


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--baseline_python", help="interpreter that has the original's packages")
  parser.add_argument("--baseline_script", help="yours, around the original's code, as above")
  parser.add_argument("--rounds", type=int, default=3, help="turns of each")
  parser.add_argument("--runs", type=int, default=8, help="quiet runs in a turn")
  parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "decode.json"))
  options = parser.parse_args()
  result = {
    "what": f"greedy decode, batch 1, {PROMPT} + {NEW} tokens, tokens/s",
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "machine": loader.machine(),
    "command": " ".join(["python", "benchmarks/decode.py", *map(os.path.basename, sys.argv[1:])]),
    "jax": jax.__version__,
  }
  result |= {dtype: compare(dtype, options) for dtype in DTYPES}
  pathlib.Path(options.out).parent.mkdir(parents=True, exist_ok=True)
  pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(result, indent=1))


def compare(dtype: str, options: argparse.Namespace) -> dict:
  """Returns the figures of both, which take turns, in one dtype."""
  run, compile_seconds = prepare(dtype)
  ours, theirs = [], []
  for turn in range(options.rounds):
    ours.append(measure(run, options.runs))
    print(f"{dtype}, turn {turn + 1}: glmjax {ours[-1]}", flush=True)
    if options.baseline_python:
      command = [options.baseline_python, options.baseline_script, "decode", "--runs", str(options.runs)]
      done = subprocess.run([*command, "--dtype", DTYPES[dtype]], capture_output=True, text=True, check=True)
      theirs.append(json.loads(done.stdout.splitlines()[-1]))
      print(f"{dtype}, turn {turn + 1}: original {theirs[-1]}", flush=True)

  def median(turns):
    return statistics.median(turn["median"] for turn in turns)

  found = {"compile_seconds": compile_seconds, "glmjax": ours, "original": theirs, "glmjax_median": median(ours)}
  if theirs:
    found |= {"original_median": median(theirs), "ratio": round(median(ours) / median(theirs), 2)}
  return found


def prepare(dtype: str) -> tuple[Callable[[], float], float]:
  """Returns a function that decodes once and returns tokens/s, warmed up; and the seconds that compiling took."""
  config = dataclasses.replace(CONFIG, dtype=dtype)
  model = runner.Runner(config, glm.init_params(config, jax.random.key(0)))
  text = np.random.default_rng(0).integers(4, 20_000, PROMPT - 2).tolist()
  first = prompt.fill([*text, SPECIALS.gmask], SPECIALS, CONFIG.position_kind)
  batch, rows = decode.make_rows([first], [NEW], SPECIALS.pad)
  draws, none = sampling.draws([sampling.Sampling()], [0]), np.zeros(CONFIG.vocab_size, bool)

  def run() -> float:
    start = time.perf_counter()
    state = model.run(decode.prefill, batch, rows, new_tokens=NEW)
    state = model.run(decode.decode, rows, state, draws, none, none, np.int32(NEW))
    assert len(decode.generated(state, 1)[0]) == NEW
    return NEW / (time.perf_counter() - start)

  start = time.perf_counter()
  run()
  return run, round(time.perf_counter() - start, 1)


def measure(run: Callable[[], float], runs: int) -> dict:
  """Returns median, least and most of `runs` quiet runs, of three times as many tries."""
  quiet, rates = [], []
  while len(rates) < 3 * runs and len(quiet) < runs:
    others, start = busy_seconds() - time.process_time(), time.perf_counter()
    rates.append(run())
    others = busy_seconds() - time.process_time() - others
    if others <= BUSY * (time.perf_counter() - start):
      quiet.append(rates[-1])
  used = quiet or rates
  return {
    "quiet_runs": len(quiet),
    "median": round(statistics.median(used), 1),
    "min": round(min(used), 1),
    "max": round(max(used), 1),
  }


def busy_seconds() -> float:
  """Returns the processor time that this machine has spent working; 0 where it does not tell."""
  if not os.path.exists("/proc/stat"):
    return 0.0
  with open("/proc/stat", encoding="utf-8") as file:
    fields = [int(x) for x in file.readline().split()[1:9]]
  return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
  main()
