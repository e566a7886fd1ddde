"""What a bucket costs against the local disk: python benchmarks/buckets.py

The bucket is tests/bucket_server.py in a process of its own on the loopback, which answers after --latency seconds (a
cloud's first byte takes 20 to 50 ms); its process shares the processors with what is measured. Every part runs in a
fresh process, on the disk and in the bucket in turns:

  bare        64 MiB pieces written and read by eight threads: what the disk and the server themselves give
  cache       a token cache of 8 million tokens is built
  rows        batches of 16 rows of 2,048 places come out of it, with nothing on this machine's disk yet, and then again
  training    the share of a step of --step seconds that waits for the next batch, both ways
  checkpoint  a state of 1.2 GB, split over eight virtual devices, is saved and restored
  export      a 98 M parameter model is exported in float16 from a run, written as THUDM's files, and imported again

Writes benchmarks/results/buckets.json and prints a Markdown table; figures are medians.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
import urllib.request

import loader
import numpy as np

from glmjax.io import paths
from glmjax.io import publish

PARTS = ("bare", "cache", "rows", "training", "checkpoint", "export")
_PIECE = 64 << 20
_BATCH, _BATCHES = 16, 40
_SERVER = pathlib.Path(__file__).parent.parent / "tests" / "bucket_server.py"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--scheme", choices=("gs", "s3"), default="gs")
  parser.add_argument("--latency", type=float, default=0.03, help="seconds before the server answers")
  parser.add_argument("--step", type=float, default=0.25, help="seconds of a step without its waiting")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
  parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "buckets.json"))
  parser.add_argument("--one", nargs=2, metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.one:
    part, folder = options.one
    print(json.dumps(globals()[f"_{part}"](paths.named(folder), options.step)))
    return
  machine, found = loader.machine(), []
  with tempfile.TemporaryDirectory() as scratch, _serving(options.latency) as address:
    for part in options.parts:
      for repeat in range(options.repeats):
        for kind, root in (("disk", f"{scratch}/disk"), ("bucket", f"{options.scheme}://bucket")):
          folder = f"{root}/{0 if part in ('cache', 'rows', 'training') else part}-{repeat}"
          if part in ("rows", "training"):
            folder = f"{root}/0-0"  # the cache that was built first
          environment = {"GLMJAX_CACHE_DIR": f"{scratch}/nearby-{part}-{repeat}"}
          found.append(_measured(part, kind, folder, address, environment, options.step))
          print(found[-1], flush=True)
          if part in ("bare", "checkpoint", "export"):
            shutil.rmtree(folder, ignore_errors=True)
  result = {
    "what": "a bucket on the loopback against the local disk",
    "machine": machine,
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "command": " ".join(["python", "benchmarks/buckets.py", *sys.argv[1:]]),
    "measured": found,
  }
  publish.write_json(options.out, result)
  print(_table(found))


@contextlib.contextmanager
def _serving(latency: float) -> Iterator[str]:
  """Yields the address of a server of buckets, and leads this process and its children there."""
  command = [sys.executable, str(_SERVER), "--bucket=bucket", f"--latency={latency}"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
    try:
      address = server.stdout.readline().strip()
      os.environ.update(STORAGE_EMULATOR_HOST=address, AWS_ENDPOINT_URL=address, AWS_REGION="us-east-1")
      os.environ.update(AWS_ACCESS_KEY_ID="someone", AWS_SECRET_ACCESS_KEY="anything")
      yield address
    finally:
      server.terminate()


def _requests(address: str) -> int:
  with urllib.request.urlopen(f"{address}/-/requests") as answer:
    return sum(json.load(answer).values())


def _measured(part: str, kind: str, folder: str, address: str, environment: dict[str, str], step: float) -> dict:
  """Runs one part in a process of its own."""
  before = _requests(address)
  command = [sys.executable, __file__, "--one", part, folder, f"--step={step}"]
  environment |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
  about = {"part": part, "where": kind, "requests": _requests(address) - before}
  return about | json.loads(done.stdout.splitlines()[-1])


def _timed(action) -> float:
  began = time.perf_counter()
  action()
  return time.perf_counter() - began


def _bare(folder: paths.Path, step: float) -> dict:
  """Writes and reads pieces, in MB/s."""
  del step
  data, names = np.random.default_rng(0).bytes(_PIECE), [str(i) for i in range(8)]
  folder.mkdir(parents=True, exist_ok=True)

  def write(name: str) -> None:
    with publish.file(folder / name) as file:
      file.write(data)

  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    write_seconds = _timed(lambda: list(threads.map(write, names)))
    read_seconds = _timed(lambda: list(threads.map(lambda name: len((folder / name).read_bytes()), names)))
  megabytes = len(names) * _PIECE / 1e6
  publish.remove(folder)
  return {"write_mb_s": megabytes / write_seconds, "read_mb_s": megabytes / read_seconds}


def _cache(folder: paths.Path, step: float) -> dict:
  del step
  seconds = _timed(lambda: loader.make_cache(folder))
  return {"build_mb_s": 16.0 / seconds}  # 8 million ids of two bytes


def _batches(folder: paths.Path, workers: int):
  from glmjax.data import loader as loader_lib

  source = loader_lib.CachedMixture(folder, loader.infilling(folder, 2048), num_workers=workers)
  return source.batches((i * _BATCH, _BATCH) for i in range(_BATCHES))


def _rows(folder: paths.Path, step: float) -> dict:
  """Makes the same batches twice, in this process."""
  del step
  tokens = _BATCH * _BATCHES * 2048
  cold = _timed(lambda: sum(1 for _ in _batches(folder, 0)))
  warm = _timed(lambda: sum(1 for _ in _batches(folder, 0)))
  return {"cold_tokens_s": tokens / cold, "warm_tokens_s": tokens / warm}


def _training(folder: paths.Path, step: float) -> dict:
  """Waits for each batch as a step would that takes `step` seconds on its devices."""
  found = {}
  for name in ("cold", "warm"):
    batches, waited = _batches(folder, 1), 0.0
    next(batches)
    for _ in range(_BATCHES - 1):
      time.sleep(step)
      waited += _timed(lambda batches=batches: next(batches))
    found[f"{name}_waiting"] = waited / (waited + step * (_BATCHES - 1))
  return found


def _checkpoint(folder: paths.Path, step: float) -> dict:
  """Saves and restores a training state."""
  del step
  import checkpoint
  import jax

  from glmjax.checkpoint import manager as manager_lib

  state, abstract = checkpoint.a_state()
  megabytes = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
  manager = manager_lib.Manager(folder)
  manager.save(1, state, {"samples_seen": 0})  # which compiles the sums
  manager.wait()
  before = loader.of_process("status", "VmHWM") / 1000
  began = time.perf_counter()
  manager.save(2, state, {"samples_seen": 0})
  blocked = time.perf_counter() - began
  manager.wait()
  saved = time.perf_counter() - began
  memory = loader.of_process("status", "VmHWM") / 1000
  del state
  restored = _timed(lambda: jax.block_until_ready(manager.restore(abstract)))
  manager.close()
  publish.remove(folder)
  return {
    "megabytes": megabytes,
    "save_mb_s": megabytes / saved,
    "blocked_s": blocked,
    "restore_mb_s": megabytes / restored,
    "memory_mb": memory,
    "more_memory_for_the_second_save_mb": memory - before,
  }


def _export(folder: paths.Path, step: float) -> dict:
  """Exports a model from a run, writes it in THUDM's files, and imports those."""
  del step
  import jax

  from glmjax.checkpoint import export
  from glmjax.checkpoint import folder as folder_lib
  from glmjax.checkpoint import manager as manager_lib
  from glmjax.checkpoint import recorded
  from glmjax.models import config as config_lib
  from glmjax.models import glm
  from glmjax.thudm import load
  from glmjax.thudm import write

  config = config_lib.GLMConfig(
    vocab_size=16_384,
    num_layers=12,
    embed_dim=768,
    num_heads=12,
    mlp_dim=3_072,
    positions="rotary_2d",
    mlp="gelu_tanh",
    tie_embeddings=False,
    residual_alpha=56**0.5,  # as that format asks
  )
  (folder / "run").mkdir(parents=True, exist_ok=True)
  params = glm.init_params(config, jax.random.key(0))
  folder_lib.write_config(folder / "run", folder_lib.FolderConfig(config))
  manager = manager_lib.Manager(folder / "run" / folder_lib.CHECKPOINTS)
  manager.save(1, {"params": params}, recorded.of(config))
  manager.wait()
  manager.close()
  del params
  before = loader.of_process("status", "VmHWM") / 1000
  exported = _timed(lambda: export.export(folder / "run", folder / "float16", dtype="float16"))
  hub = write.write_format("chatglm-hf")
  written = _timed(lambda: export.export(folder / "float16", folder / "hub", write_format=hub))
  about: dict = {}
  imported = _timed(
    lambda: about.update(load.import_model("chatglm-6b", folder / "hub", folder / "back", bits=8, tokenizer="none"))
  )
  memory = loader.of_process("status", "VmHWM") / 1000
  megabytes = 2 * about["parameters"] / 1e6
  publish.remove(folder)
  return {
    "export_mb_s": megabytes / exported,
    "hub_mb_s": megabytes / written,
    "import_mb_s": megabytes / imported,
    "memory_mb": memory,
    "more_memory_than_training_mb": memory - before,
  }


def _table(found: list[dict]) -> str:
  """Returns Markdown."""
  lines = ["| | disk | bucket | of the disk |", "|---|---:|---:|---:|"]
  for part in PARTS:
    of_part = {
      kind: [one for one in found if (one["part"], one["where"]) == (part, kind)] for kind in ("disk", "bucket")
    }
    for name in of_part["disk"][0] if of_part["disk"] else ():
      if name in ("part", "where"):
        continue
      disk, there = (statistics.median(one[name] for one in of_part[kind]) for kind in ("disk", "bucket"))
      ratio = f"{there / disk:.2f}" if disk else ""
      lines.append(f"| {part}: {name} | {disk:,.4g} | {there:,.4g} | {ratio} |")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
