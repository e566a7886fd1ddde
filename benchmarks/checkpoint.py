"""How fast a training state is saved and restored, against the bare disk: python benchmarks/checkpoint.py

Weights and AdamW's moments of a 98 M parameter model (1.2 GB of float32), split over eight virtual devices of one
process, and of two: the trainer's own saving, with checksums, asynchronous writing and the rename, and its restoring,
which recomputes every checksum. Beside it, in turns and in the same folder, as many bytes are written to plain files
of 16 MiB by eight threads, with fsync, and read again. What is read was put out of the page cache first
(posix_fadvise; a virtual disk may still have it in its host's memory). Writes benchmarks/results/checkpoint.json and
prints a Markdown table.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import loader
import numpy as np

from glmjax.io import publish

DEVICES = 8
_BLOCK = 16 << 20


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--repeats", type=int, default=3, help="saves and restores that are timed, behind a first one")
  parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
  parser.add_argument("--folder", help="on the disk to measure; default: where temporary files are")
  parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "checkpoint.json"))
  parser.add_argument("--join", nargs=3, metavar=("COORDINATOR", "PROCESSES", "NUMBER"), help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.join:
    coordinator, count, number = options.join
    measure(coordinator, int(count), int(number), options.repeats, pathlib.Path(options.folder))
    return
  machine = loader.machine()
  cases = []
  for count in options.processes:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
      cases.append(run(count, options.repeats, folder))
    print(cases[-1], flush=True)
  result = {
    "what": "saving and restoring a training state",
    "machine": machine,
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "command": " ".join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]]),
    "cases": cases,
  }
  publish.write_json(options.out, result)
  print(table(cases))


def run(count: int, repeats: int, folder: str) -> dict:
  """Returns what process 0 of `count` has measured."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    coordinator = f"localhost:{free.getsockname()[1]}"
  flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
  command = [sys.executable, __file__, f"--repeats={repeats}", f"--folder={folder}", "--join", coordinator, str(count)]
  started = [
    subprocess.Popen(
      [*command, str(i)],
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    for i in range(count)
  ]
  said = [process.communicate()[0] for process in started]
  if any(process.returncode for process in started):
    sys.exit("a process failed")
  return json.loads(said[0].splitlines()[-1])


def measure(coordinator: str, count: int, number: int, repeats: int, folder: pathlib.Path) -> None:
  """Does one process's part; the first one times, and prints what it has found."""
  import jax  # pylint: disable=g-import-not-at-top

  from glmjax.parallel import distributed
  from glmjax.parallel import host

  distributed.join(coordinator, count, number)
  host.keep_freed_memory()  # as the trainer does
  state, abstract = a_state()
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  found: dict[str, list[float]] = {"write": [], "read": [], "blocked": [], "save": [], "restore": []}
  for repeat in range(repeats + 1):
    if number == 0:
      raw = plain_files(folder / "plain", size)
      os.sync()
    times = save_and_restore(folder / str(repeat), state, abstract, number == 0)
    if number == 0:
      files = sum(path.is_file() for path in (folder / str(repeat)).rglob("*"))
      shutil.rmtree(folder / str(repeat))
      if repeat:  # the first one compiles the checksums' programs
        for name, value in (raw | times).items():
          found[name].append(value)
  if number == 0:
    print(
      json.dumps(
        {"processes": count, "devices": DEVICES, "bytes": size, "files": files}
        | {f"{name}_seconds": [round(value, 3) for value in values] for name, values in found.items()}
      )
    )


def a_state():
  """Makes a state of which nothing is zero, and its shapes and shardings."""
  import jax  # pylint: disable=g-import-not-at-top

  from glmjax.models import config as config_lib
  from glmjax.parallel import mesh as mesh_lib
  from glmjax.train import optimizer
  from glmjax.train import state as state_lib

  config = config_lib.GLMConfig(vocab_size=16_384, num_layers=12, embed_dim=768, num_heads=12, mlp_dim=2_048)
  tx = optimizer.AdamW().make()
  abstract = state_lib.abstract(config, tx, mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, fsdp=DEVICES)))
  state = state_lib.create(config, tx, 0, abstract)
  noise = jax.jit(
    lambda state: jax.tree.map(  # a new run's moments are zeros, which a disk may not store
      lambda x: jax.random.uniform(jax.random.key(x.size), x.shape) if x.ndim > 1 else x, state
    ),
    out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
  )
  return jax.block_until_ready(noise(state)), abstract


def save_and_restore(folder: pathlib.Path, state, abstract, is_first: bool) -> dict[str, float]:
  """Saves the state and restores it, all processes together; returns the seconds of each."""
  import jax  # pylint: disable=g-import-not-at-top
  from jax.experimental import multihost_utils

  from glmjax.checkpoint import manager as manager_lib

  def together():
    return multihost_utils.sync_global_devices("benchmark")

  together()
  manager = manager_lib.Manager(folder)
  began = time.perf_counter()
  manager.save(1, state, {"samples_seen": 0})
  blocked = time.perf_counter() - began
  manager.wait()
  together()
  saved = time.perf_counter() - began
  if is_first:
    forget(folder)
  together()
  began = time.perf_counter()
  restored = jax.block_until_ready(manager.restore(abstract))
  together()
  seconds = time.perf_counter() - began
  assert restored is not None
  manager.close()
  return {"blocked": blocked, "save": saved, "restore": seconds}


def plain_files(folder: pathlib.Path, size: int) -> dict[str, float]:
  """Returns the seconds to write that many bytes with fsync, and to read them again when they are no longer in
  memory.
  """
  folder.mkdir()
  paths = [folder / str(i) for i in range(-(-size // _BLOCK))]
  block = np.random.default_rng(0).integers(0, 256, _BLOCK, np.uint8)

  def write(path: pathlib.Path) -> None:
    with open(path, "wb", buffering=0) as file:
      file.write(block[: size - int(path.name) * _BLOCK])
      os.fsync(file.fileno())

  def read(path: pathlib.Path) -> None:
    own = np.zeros_like(block)
    with open(path, "rb", buffering=0) as file:
      while file.readinto(own):
        pass

  times = {}
  with concurrent.futures.ThreadPoolExecutor(DEVICES) as threads:
    for what in (write, read):
      forget(folder)
      os.sync()  # what was deleted before, too
      began = time.perf_counter()
      list(threads.map(what, paths))
      times[what.__name__] = time.perf_counter() - began
  shutil.rmtree(folder)
  return times


def forget(folder: pathlib.Path) -> None:
  """Puts a folder's files out of the page cache."""
  for file in [child for child in folder.rglob("*") if child.is_file()]:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)  # what is not written yet stays
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def table(cases: list[dict]) -> str:
  """Returns Markdown; figures are medians."""
  lines = [
    "| processes | disk: write, MB/s | save, MB/s | of the disk | training waits, s | disk: read, MB/s | "
    "restore, MB/s | of the disk |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for case in cases:
    rate = {
      name: case["bytes"] / 1e6 / statistics.median(case[f"{name}_seconds"])
      for name in ("write", "save", "read", "restore")
    }
    lines.append(
      f"| {case['processes']} | {rate['write']:,.0f} | {rate['save']:,.0f} | "
      f"{rate['save'] / rate['write']:.2f} | {statistics.median(case['blocked_seconds']):.2f} | "
      f"{rate['read']:,.0f} | {rate['restore']:,.0f} | {rate['restore'] / rate['read']:.2f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  main()
