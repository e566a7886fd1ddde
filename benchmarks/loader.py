"""How fast training rows come out of a token cache: python benchmarks/loader.py [--cache DIR]

Measures tokens (places of a row) a second with span corruption and packing, for no, one and two worker
processes, and the time from opening the cache to the first batch at sample 0 and at sample 1,000,000,000.
Then what hosts 0, 31 and 63 of 64 do, one after the other, each in a process of its own: rows a second of their
parts of GLM-130B's batch (4,224 rows of 2,048 tokens, 66 each), the time to the first batch and to one far away,
what they read and how much memory they take; beside it one host that has 66 rows to itself.
Without --cache it makes a synthetic one: two languages and 5 % instructions, 8 million tokens. Writes
benchmarks/results/loader.json and prints a Markdown table of the hosts.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from glmjax import tokens
from glmjax.io import publish
from glmjax.data import builder
from glmjax.data import loader
from glmjax.data import rows
from glmjax.data import shards

SPECIALS = tokens.icetk(0, 20_000)
ROWS = 66  # of a batch that each host has: GLM-130B's 4,224 over 64
HOSTS = ((0, 1), (0, 64), (31, 64), (63, 64))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cache", help="token cache to read; without it a synthetic one is made")
  parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
  parser.add_argument("--repeats", type=int, default=5, help="measurements of each setting")
  parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "loader.json"))
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    directory = pathlib.Path(options.cache) if options.cache else make_cache(pathlib.Path(scratch) / "cache")
    result = {
      "what": "rows out of a token cache",
      "machine": machine(),
      "date": datetime.datetime.now().isoformat(timespec="seconds"),
      "command": " ".join(["python", "benchmarks/loader.py", *sys.argv[1:]]),
      "cache": "synthetic, 8M tokens" if not options.cache else directory.name,
      "tokens_per_second": throughput(directory, options.seconds, options.repeats),
      "seconds_to_first_batch": first_batches(directory),
      "hosts": hosts(directory, options.seconds, options.repeats),
    }
  path = pathlib.Path(options.out)
  path.parent.mkdir(parents=True, exist_ok=True)
  publish.write_json(path, result)
  print(json.dumps(result, indent=1))
  print(table(result["hosts"]))


def machine() -> dict:
  """Describes the processor, and what else was going on."""
  model = platform.processor()
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
  return {
    "cpu": model,
    "cores": len(os.sched_getaffinity(0)),
    "load_average_before": os.getloadavg()[0],
    "python": platform.python_version(),
    "numpy": np.__version__,
  }


def make_cache(directory: pathlib.Path) -> pathlib.Path:
  """Makes random documents of the lengths that news articles have, and short pairs."""
  about = {"fingerprint": "synthetic", "vocab_size": SPECIALS.dblock + 1, "specials": dataclasses.asdict(SPECIALS)}
  rates = {"en": 0.475, "zh": 0.475, "qa": 0.05}
  tasks = {
    name: {"kind": "instruction" if name == "qa" else "text", "rate": rate, "splits": {"train": {"source": ""}}}
    for name, rate in rates.items()
  }

  def documents(shard: builder.Shard) -> Iterator[shards.Document]:
    rng = np.random.default_rng([shard.index, ord(shard.task[0])])
    left = 100_000 if shard.task == "qa" else 950_000
    while left > 0:
      inputs = int(rng.integers(20, 300)) if shard.task == "qa" else 0
      ids = rng.integers(10, 20_000, inputs + int(rng.lognormal(3 if inputs else 6, 1)) + 2)
      ids[-1] = SPECIALS.eos
      left -= len(ids)
      yield shards.Document(ids, 4 * len(ids), inputs)

  with builder.CacheBuilder(directory, builder.make_plan("synthetic", 4, about, tasks)) as making:
    for shard in making.missing():
      builder.write_shard(making.partial, shard, documents(shard), about["vocab_size"])
    making.finish()
  return directory


def endless(first: int, size: int) -> Iterator[tuple[int, int]]:
  """Yields the batches of a training that does not end."""
  while True:
    yield first, size
    first += size


def throughput(directory: pathlib.Path, seconds: float, repeats: int) -> list[dict]:
  """Returns median and range of each setting; settings take turns, so that the machine's moods meet all of them."""
  settings = [(seq_length, workers) for seq_length in (512, 2048) for workers in (0, 1, 2)]
  measured = {setting: [] for setting in settings}
  for _ in range(repeats):
    for seq_length, workers in settings:
      measured[seq_length, workers].append(measure(directory, seq_length, workers, seconds))
  return [
    {
      "seq_length": seq_length,
      "workers": workers,
      "median": round(statistics.median(speeds)),
      "min": round(min(speeds)),
      "max": round(max(speeds)),
    }
    for (seq_length, workers), speeds in measured.items()
  ]


def measure(directory: pathlib.Path, seq_length: int, workers: int, seconds: float) -> float:
  """Measures places a second, once the workers run."""
  source = loader.CachedMixture(directory, infilling(directory, seq_length), num_workers=workers)
  batch_size = 64 * 512 // seq_length
  batches = source.batches(endless(0, batch_size))
  for _ in range(2 + 2 * source.prefetch * workers):  # what was made while the workers started
    next(batches)
  start, count = time.perf_counter(), 0
  while (elapsed := time.perf_counter() - start) < seconds:
    next(batches)
    count += 1
  if workers:
    batches.close()
  return count * batch_size * seq_length / elapsed


def infilling(directory: pathlib.Path, seq_length: int) -> rows.BlankInfilling:
  """Returns the original recipe's rows: 30 % [MASK], four samples in each, and 70 % [gMASK]."""
  return rows.BlankInfilling(seq_length, shards.TokenCache.open(directory).specials)


def first_batches(directory: pathlib.Path) -> list[dict]:
  """Measures seconds from nothing to the first batch of 64 x 512, by the sample it starts at."""
  found = []
  for workers in (0, 1):
    for first in (0, 10**9):
      times = []
      for _ in range(5):
        start = time.perf_counter()
        source = loader.CachedMixture(directory, infilling(directory, 512), num_workers=workers)
        batches = source.batches(endless(first, 64))
        next(batches)
        times.append(time.perf_counter() - start)
        if workers:
          batches.close()
      found.append({"first_sample": first, "workers": workers, "median": round(statistics.median(times), 4)})
  return found


def hosts(directory: pathlib.Path, seconds: float, repeats: int) -> list[dict]:
  """Returns medians of each host of HOSTS; they take turns, each in a fresh process."""
  found: dict[tuple[int, int], list[dict]] = {host: [] for host in HOSTS}
  for _ in range(repeats):
    for host, count in HOSTS:
      with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        found[host, count].append(fresh.submit(one_host, directory, host, count, seconds).result())
  return [
    {"host": host, "hosts": count}
    | {name: round(statistics.median(one[name] for one in measured), 4) for name in measured[0]}
    for (host, count), measured in found.items()
  ]


def one_host(directory: pathlib.Path, host: int, count: int, seconds: float) -> dict:
  """Measures what one host's own part of each batch takes, made in this process."""
  start = time.perf_counter()
  source = loader.CachedMixture(directory, infilling(directory, 2048), num_workers=0)
  batches = source.batches(endless(0, ROWS * count), host, count)
  assert len(next(batches)["tokens"]) == ROWS
  first = time.perf_counter() - start
  start = time.perf_counter()
  next(source.batches(endless(10**9, ROWS * count), host, count))
  seek = time.perf_counter() - start
  read, start, used, made = of_process("io", "rchar"), time.perf_counter(), time.process_time(), 0
  while (elapsed := time.perf_counter() - start) < seconds:
    next(batches)
    made += ROWS
  used = time.process_time() - used  # what others take of the processors does not count
  return {
    "rows_per_second": made / elapsed,
    "rows_per_cpu_second": made / used,
    "seconds_to_first_batch": first,
    "seconds_to_batch_at_1e9": seek,
    "bytes_read_per_row": (of_process("io", "rchar") - read) / made,
    "memory_mb": of_process("status", "VmHWM") / 1000,
  }


def of_process(file: str, name: str) -> int:
  """Returns a number that Linux keeps of this process: bytes read, the most memory it had (kB)."""
  with open(f"/proc/self/{file}", encoding="ascii") as lines:
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def table(found: list[dict]) -> str:
  """Returns the results as a Markdown table."""
  lines = [
    "| host | rows/s | rows a CPU second | of one host's | first batch, s | batch at 10^9, s | "
    "read, bytes a row | memory, MB |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for one in found:
    lines.append(
      f"| {one['host']} of {one['hosts']} | {one['rows_per_second']:,.0f} | "
      f"{one['rows_per_cpu_second']:,.0f} | "
      f"{one['rows_per_cpu_second'] / found[0]['rows_per_cpu_second']:.2f} | "
      f"{one['seconds_to_first_batch']:.2f} | "
      f"{one['seconds_to_batch_at_1e9']:.2f} | {one['bytes_read_per_row']:,.0f} | {one['memory_mb']:.0f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  main()
