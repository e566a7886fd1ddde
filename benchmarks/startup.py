"""From nothing to the first training step, and what importing costs: python benchmarks/startup.py --cache DIR

Makes an empty virtual environment outside the checkout, installs glmjax without extras in it, and trains one
step of gin/models/tiny.gin on a token cache, by the commands that a user types. Then imports each part in a
fresh process, five times, beside numpy and jax alone. Writes benchmarks/results/startup.json.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

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
  parser.add_argument("--cache", required=True, help="token cache, as make quickstart leaves it")
  parser.add_argument("--out", default=str(CHECKOUT / "benchmarks" / "results" / "startup.json"))
  options = parser.parse_args()
  machine = loader.machine()
  with tempfile.TemporaryDirectory() as scratch:
    environment = pathlib.Path(scratch) / "venv"
    seconds = {
      "venv": timed([sys.executable, "-m", "venv", str(environment)]),
      "pip install .": timed([str(environment / "bin" / "pip"), "install", "-q", str(CHECKOUT)]),
      "first step": timed(first_step(environment / "bin" / "glmjax", options.cache, pathlib.Path(scratch) / "run")),
    }
    size = int(subprocess.run(["du", "-sm", str(environment)], check=True, capture_output=True).stdout.split()[0])
  result = {
    "what": "install to first training step; imports",
    "machine": machine,
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "command": "python benchmarks/startup.py --cache runs/quickstart/cache",
    "seconds": seconds,
    "environment_megabytes": size,
    "import_seconds": {part: importing(part) for part in PARTS},
  }
  pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
  print(json.dumps(result, indent=1))


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
