"""How long a command takes to begin: python benchmarks/startup.py [--cache DIR] [--checkpoint FOLDER ...]

With --cache: makes an empty virtual environment outside the checkout, installs glmjax without extras in it, and trains
one step of gin/models/tiny.gin on the token cache, by the commands that a user types. Then imports each part in a
fresh process, five times, beside numpy and jax alone.

With --checkpoint: one-line `glmjax generate`, each in a fresh process, in turn: with an empty folder of compiled
programs, with the one that this has filled, and with none (GLMJAX_PROGRAMS=off); beside them a process that does
nothing but import jax, and a folder that is no model. The least of `--repeats` is what the machine allows, the median
what it gave.

What was measured replaces its part of benchmarks/results/startup.json; the other part stays.
"""

import argparse
import datetime
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import loader

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
PARTS = (
  "numpy",
  "jax",
  "glmjax",
  "glmjax.tokenizer",
  "glmjax.data.loader",
  "glmjax.models.glm",
  "glmjax.infer.engine",
  "glmjax.checkpoint.load",
  "glmjax.train.loop",
  "glmjax.evaluate.heldout",
)
RUNS = 5


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cache", help="token cache, as make quickstart leaves it")
  parser.add_argument("--checkpoint", action="append", default=[], help="model to be asked (repeatable)")
  parser.add_argument("--repeats", type=int, default=RUNS, help="answers of each kind")
  parser.add_argument("--out", type=pathlib.Path, default=CHECKOUT / "benchmarks" / "results" / "startup.json")
  options = parser.parse_args()
  result = json.loads(options.out.read_text()) if options.out.exists() else {}
  about = {
    "machine": loader.machine(),
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "command": " ".join(["python", "benchmarks/startup.py", *sys.argv[1:]]),
  }
  if options.cache:
    result["install"] = about | install(options.cache)
  if options.checkpoint:
    result["answers"] = about | {
      pathlib.Path(folder).name: answers(folder, options.repeats) for folder in options.checkpoint
    }
  options.out.write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(result, indent=1))


def install(cache: str) -> dict[str, Any]:
  """Goes from nothing to the first step, and imports."""
  with tempfile.TemporaryDirectory() as scratch:
    environment = pathlib.Path(scratch) / "venv"
    seconds = {
      "venv": timed([sys.executable, "-m", "venv", str(environment)]),
      "pip install .": timed([str(environment / "bin" / "pip"), "install", "-q", str(CHECKOUT)]),
      "first step": timed(first_step(environment / "bin" / "glmjax", cache, pathlib.Path(scratch) / "run")),
    }
    size = int(subprocess.run(["du", "-sm", str(environment)], check=True, capture_output=True).stdout.split()[0])
  return {
    "seconds": seconds,
    "environment_megabytes": size,
    "import_seconds": {part: importing(part) for part in PARTS},
  }


def answers(checkpoint: str, repeats: int) -> dict[str, dict[str, float]]:
  """Asks a model in fresh processes, the kinds in turn."""
  generate = [
    str(pathlib.Path(sys.executable).with_name("glmjax")),  # what is installed, not what lies in this folder
    "generate",
    "--prompt=The capital of France is [MASK].",
    "--max_tokens=16",
  ]
  ask = [*generate, f"--checkpoint={checkpoint}"]
  runs: dict[str, list[Run]] = {}
  for _ in range(repeats):
    with tempfile.TemporaryDirectory() as caches:
      kept = {"XDG_CACHE_HOME": caches, "GLMJAX_PROGRAMS": ""}
      for name, command, environment in (
        ("import jax alone", [sys.executable, "-c", "import jax"], kept),
        ("first, its programs compiled and kept", ask, kept),
        ("second, its programs found", ask, kept),
        ("without programs on disk", ask, {"GLMJAX_PROGRAMS": "off"}),
        ("refused: no such folder", [*generate, f"--checkpoint={caches}/none"], kept),
      ):
        runs.setdefault(name, []).append(run(command, environment))
  return {
    name: {
      "least_seconds": round(min(each.seconds for each in some), 2),
      "median_seconds": round(statistics.median(each.seconds for each in some), 2),
      "least_processor_seconds": round(min(each.processor_seconds for each in some), 2),
    }
    for name, some in runs.items()
  }


class Run(NamedTuple):
  """A command that has ended."""

  seconds: float
  processor_seconds: float


def run(command: list[str], environment: dict[str, str]) -> Run:
  """Runs a command, whatever it returns."""
  before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
  subprocess.run(command, env=os.environ | environment, check=False, capture_output=True)
  seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
  return Run(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def first_step(command: pathlib.Path, cache: str, workdir: pathlib.Path) -> list[str]:
  """Runs the command that trains one step and saves it."""
  return [
    str(command),
    "train",
    "--gin_file=runs/pretrain.gin",
    "--gin_file=models/tiny.gin",
    "--gin_file=meshes/cpu.gin",
    f"--workdir={workdir}",
    f"--gin.CACHE={str(pathlib.Path(cache).resolve())!r}",
    "--gin.BATCH_SIZE=32",
    "--gin.TOTAL_SAMPLES=6400",
    "--gin.PEAK_LEARNING_RATE=3e-3",
    "--gin.MIN_LEARNING_RATE=3e-4",
    "--gin.WARMUP_SAMPLES=320",
    "--stop_at_step=1",
  ]


def timed(command: list[str]) -> float:
  """Returns the seconds of a command that must succeed."""
  began = time.perf_counter()
  subprocess.run(command, check=True, cwd=tempfile.gettempdir(), stdout=subprocess.DEVNULL)
  return round(time.perf_counter() - began, 2)


def importing(part: str) -> dict[str, float | bool]:
  """Returns the median seconds of a fresh process that imports the part, and whether TensorFlow or seqio came along."""
  code = f"import sys, {part}; sys.exit(any(name in sys.modules for name in ('tensorflow', 'seqio')))"
  times, heavy = [], False
  for _ in range(RUNS):
    began = time.perf_counter()
    heavy |= bool(subprocess.run([sys.executable, "-c", code], check=False).returncode)
    times.append(time.perf_counter() - began)
  return {"seconds": round(statistics.median(times), 2), "loads_tensorflow_or_seqio": heavy}


if __name__ == "__main__":
  main()
