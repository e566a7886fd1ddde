"""How fast text becomes tokens: python benchmarks/text_to_tokens.py [--text FOLDER] [--megabytes 60]

Times in turn, `--repeats` times over, on the same text: SentencePiece alone on one thread, our tokenizer on one thread,
and `glmjax cache` on --workers processes, from files to the finished cache, start of the processes included. Each is
given as MB of UTF-8 a second by the clock and a processor second, and as a ratio to SentencePiece's of the same round:
on a machine that others use, the last two say more than the first.

FOLDER holds en.jsonl and zh.jsonl as `glmjax text` makes them (without it they are fetched). Writes
benchmarks/results/text_to_tokens.json.
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from glmjax import tokenizer as tokenizer_lib
from glmjax.data import text
from glmjax.io import publish

CACHE = """
import sys
from glmjax.data import mixtures, token_cache
folder, workers = sys.argv[1], int(sys.argv[2])
mixture = mixtures.pretraining({name: f"{folder}/{name}.jsonl" for name in ("en", "zh")}, f"{folder}/tokenizer")
token_cache.cache_mixture(mixture, sys.argv[3], num_workers=workers)
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--text", help="folder of en.jsonl and zh.jsonl")
  parser.add_argument("--megabytes", type=int, default=60, help="of text that is cached: the files, again and again")
  parser.add_argument("--workers", type=int, default=2, help="processes of the cache")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "text_to_tokens.json"))
  options = parser.parse_args()
  load = os.getloadavg()[0]
  with tempfile.TemporaryDirectory() as scratch:
    here = pathlib.Path(scratch)
    once, repeated = prepare(here, options.text, options.megabytes)
    found = measure(here, once, repeated, options.workers, options.repeats)
  result = {
    "what": "text to tokens, MB of UTF-8 a second",
    "machine": {
      "cores": len(os.sched_getaffinity(0)),
      "load_average_before": load,
      "python": platform.python_version(),
    },
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "command": " ".join(["python", "benchmarks/text_to_tokens.py", *sys.argv[1:]]),
    "documents": len(once),
    "megabytes_cached": round(repeated / 1e6, 1),
    "workers": options.workers,
    "median_of": options.repeats,
    "rates": found,
  }
  publish.write_json(pathlib.Path(options.out), result)
  print(json.dumps(result, indent=1))


def prepare(here: pathlib.Path, folder: str | None, megabytes: int) -> tuple[list[str], int]:
  """Writes text and tokenizer; returns the documents once, and the bytes of text in the files."""
  paths = text.fetch_sample_text(here / "text") if folder is None else None
  documents, size = [], 0
  for name in ("en", "zh"):
    source = pathlib.Path(folder) / f"{name}.jsonl" if paths is None else paths[name]
    of_language = list(text.documents(source))
    documents += of_language
    size += sum(len(document.encode()) for document in of_language)
    lines = source.read_bytes()
    with open(here / f"{name}.jsonl", "wb") as out:
      for _ in range(max(1, round(megabytes / 14))):
        out.write(lines)
  tokenizer_lib.train(documents, here / "tokenizer", 8192)
  return documents, size * max(1, round(megabytes / 14))


def measure(here: pathlib.Path, once: list[str], repeated: int, workers: int, repeats: int) -> dict[str, dict]:
  """Measures rates of each; they take turns."""
  tokenizer = tokenizer_lib.Tokenizer.load(here / "tokenizer")
  size = sum(len(document.encode()) for document in once)

  def cache(number: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", CACHE, str(here), str(workers), str(here / f"cache{number}")]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

  rounds: dict[str, list[dict[str, float]]] = {"sentencepiece": [], "tokenizer": [], "cache": []}
  for number in range(repeats):
    rounds["sentencepiece"].append(timed(size, lambda: tokenizer._processor.encode(once, num_threads=1)))
    rounds["tokenizer"].append(timed(size, lambda: tokenizer.encode_arrays(once)))
    rounds["cache"].append(timed(repeated, functools.partial(cache, number)))
    for each in rounds.values():
      each[-1]["of_sentencepiece"] = each[-1]["per_cpu_second"] / rounds["sentencepiece"][-1]["per_cpu_second"]
  return {
    name: {key: round(statistics.median(one[key] for one in each), 2) for key in each[0]}
    for name, each in rounds.items()
  }


def timed(size: int, run: Callable[[], object]) -> dict[str, float]:
  """Returns MB a second of what turns `size` bytes into tokens; and processor seconds of this process and of those
  that it ends.
  """
  start, used = time.perf_counter(), processor_seconds()
  run()
  return {
    "per_second": size / 1e6 / (time.perf_counter() - start),
    "per_cpu_second": size / 1e6 / (processor_seconds() - used),
  }


def processor_seconds() -> float:
  """Returns the processor seconds of this process and its ended children."""
  each = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  return sum(one.ru_utime + one.ru_stime for one in each)


if __name__ == "__main__":
  main()
