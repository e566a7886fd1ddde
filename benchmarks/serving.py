"""`glmjax serve` under load, and llama.cpp's server beside it: throughput, delays, gaps, what is left behind.

  python benchmarks/serving.py --checkpoint=runs/quickstart/int4 --peer=LLAMA_CPP_BUILD/bin/llama-server

Two models: a trained one, the quickstart's say, and one of 29 million parameters in float32 with random weights
(benchmarks/decode.py has its shape), made here; the peer serves one of equal size and shape (llama_cpp.py says how
to build it). 1, 4, 16 and 64 clients in a process of their own (serving_client.py) ask for 64 tokens behind 32 random
ones, again and again; the servers take turns. Tokens are drawn at temperature 1 from the whole vocabulary: the
likeliest ones of random weights repeat themselves, so that every draft would be right. Gaps: four streams, while
another client sends a prompt of 2,048 tokens each second, which is read by groups of layers, and, by a server that
differs in nothing else, whole. Figures are medians over the repeats. Writes benchmarks/results/serving.json.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import decode
import jax
import jax.numpy as jnp
import loader
import llama_cpp

from glmjax import tokenizer as tokenizer_lib
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import manager
from glmjax.io import tokenizer_folder
from glmjax.models import glm

HERE = pathlib.Path(__file__).parent
CLIENTS = (1, 4, 16, 64)
PROMPT, NEW, LONG, STREAMS = 32, 64, 2048, 4
CONFIG = dataclasses.replace(decode.CONFIG, max_length=LONG + 2 * NEW)
SERVE = "import sys; from glmjax import cli; sys.exit(cli.main())"
WHOLE = "from glmjax.infer import prefill; prefill.layers_at_once = lambda layers, tokens: layers; "
SLOTS = 64 * (PROMPT + NEW) + LONG + NEW  # of the peer's cache, which its requests share


@dataclasses.dataclass(frozen=True)
class Served:
  """How to start a server, and what is asked of it."""

  command: Callable[[int], Sequence[str]]  # on a port
  ready: str  # the route that answers once it takes requests
  ids: int  # prompts are made of ids below it
  body: dict[str, Any]  # of requests


class Server:
  """A server in a process of its own."""

  def __init__(self, served: Served) -> None:
    """Starts it, and waits until it takes requests."""
    with socket.create_server(("127.0.0.1", 0)) as free:
      self._port = free.getsockname()[1]
    self._served, self._log = served, tempfile.TemporaryFile()
    self._process = subprocess.Popen(served.command(self._port), stdout=self._log, stderr=self._log)
    while not self._is_ready():
      if self._process.poll() is not None:
        self._log.seek(0)
        raise SystemExit(self._log.read().decode(errors="replace")[-2000:])
      time.sleep(0.2)

  def stop(self) -> None:
    """Ends it, and waits until it has."""
    self._process.terminate()
    self._process.wait()
    self._log.close()

  def get(self, path: str) -> str:
    """Returns what it answers; raises OSError for no answer, and for a status that is none of success."""
    with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=10) as answer:
      return answer.read().decode()

  def _is_ready(self) -> bool:
    with contextlib.suppress(OSError):
      return bool(self.get(self._served.ready))
    return False

  def ask(self, clients: int, seconds: float, **more: Any) -> subprocess.Popen:
    """Returns clients at work."""
    body = {"max_tokens": NEW, "temperature": 1, **self._served.body}
    seed = random.randrange(1 << 30)  # prompts that nobody has asked with before
    load = {"port": self._port, "body": body, "ids": self._served.ids, "clients": clients, "seconds": seconds}
    client = [sys.executable, str(HERE / "serving_client.py")]
    process = subprocess.Popen(client, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(load | {"prompt": PROMPT, "seed": seed, **more}))
    process.stdin.close()
    return process

  def measure(self, clients: int, seconds: float, **more: Any) -> dict[str, Any]:
    """Returns what clients tell, and processors' time: of the server, its main thread (the event loop), and others."""
    before, (used, main), begun = decode.busy_seconds(), self._used(), time.perf_counter()
    client = self.ask(clients, seconds, **more)
    assert client.stdout is not None
    told = json.loads(client.stdout.read())
    took, (used_now, main_now) = time.perf_counter() - begun, self._used()
    used, main = used_now - used, main_now - main
    others = (decode.busy_seconds() - before - used) / took - told["cores"]
    more = {"server_cores": used / took, "main_thread_share": main / used, "others_cores": others}
    return told | {name: round(value, 3) for name, value in more.items()}

  def _used(self) -> tuple[float, float]:
    """Returns the processor seconds of the process, and of its main thread, which has the event loop."""
    of = (f"/proc/{self._process.pid}/stat", f"/proc/{self._process.pid}/task/{self._process.pid}/stat")
    stats = [pathlib.Path(name).read_text(encoding="utf-8").rpartition(")")[2].split() for name in of]
    process, main = (sum(map(int, stat[11:13])) / os.sysconf("SC_CLK_TCK") for stat in stats)
    return process, main

  def leaked(self) -> int:
    """Returns how many requests have a lane or wait, once all clients have gone, some in the midst of an answer."""
    vanishing = self.ask(16, 60.0)
    time.sleep(1)
    vanishing.kill()
    vanishing.wait()
    time.sleep(3)
    return sum(
      int(float(found)) for found in re.findall(r"^glmjax_(?:running|waiting) (\S+)", self.get("/metrics"), re.M)
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--checkpoint", help="a small trained model's folder")
  parser.add_argument("--peer", help="llama.cpp's llama-server")
  parser.add_argument("--lanes", type=int, default=16, help="as glmjax serve has it")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
  parser.add_argument("--out", default=str(HERE / "results" / "serving.json"))
  options = parser.parse_args()
  machine = loader.machine()
  with tempfile.TemporaryDirectory() as scratch:
    servers = make(pathlib.Path(scratch), options)
    loads = measure_loads({name: each for name, each in servers.items() if name != "29M, prompts whole"}, options)
    gaps = measure_gaps({name: each for name, each in servers.items() if "29M" in name}, options)
  leaked = sum(each.pop("leaked", 0) for each in loads.values())
  rates = {name: {count: told["tokens_per_second"] for count, told in each.items()} for name, each in loads.items()}
  result = {
    "what": f"servers under load, {PROMPT} + {NEW} tokens, streamed; milliseconds at the 50th and 99th percentile",
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "commit": said(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]),
    "machine": machine,
    "command": " ".join(["python", "benchmarks/serving.py", *(re.sub("=.*/", "=", word) for word in sys.argv[1:])]),
    "jax": jax.__version__,
    "peer": said([options.peer, "--version"]) if options.peer else None,
    "throughput_ratio_16": round(rates["29M"]["16"] / rates["29M"]["1"], 2),
    "ratios_16": {name: round(each["16"] / each["1"], 2) for name, each in rates.items()},
    "leaked_slots": leaked,
    "longest_gap_seconds": round(gaps["29M"]["longest_ms"] / 1e3, 3),
    "event_loop_share_16": {
      name: each["16"]["main_thread_share"] for name, each in loads.items() if "llama" not in name
    },
    "tokens_per_second": rates,
    "loads": loads,
    f"gaps of {STREAMS} streams while prompts of {LONG} tokens come": gaps,
  }
  pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
  print(json.dumps(result, indent=1))


def said(command: Sequence[str]) -> str:
  """Returns the first line that a program prints."""
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  return next(iter((done.stdout + done.stderr).splitlines()), "")


def make(scratch: pathlib.Path, options: argparse.Namespace) -> dict[str, Served]:
  """Makes the models, and returns the servers by name."""
  model, file, threads = scratch / "29m", scratch / "29m.gguf", os.cpu_count() or 1
  make_29m(model)
  lanes = f"--lanes={options.lanes}"

  def ours(checkpoint: pathlib.Path, ids: int, before: str = "") -> Served:
    command = [sys.executable, "-c", before + SERVE, "serve", f"--checkpoint={checkpoint}", lanes]
    return Served(lambda port: [*command, f"--port={port}"], "/ready", ids, {})

  served = {"29M": ours(model, CONFIG.vocab_size), "29M, prompts whole": ours(model, CONFIG.vocab_size, WHOLE)}
  if options.checkpoint:
    checkpoint = pathlib.Path(options.checkpoint)
    ids = tokenizer_lib.Tokenizer.load(checkpoint / folder_lib.TOKENIZER).specials.mask
    served["quickstart"] = ours(checkpoint, ids)
  if options.peer:
    llama_cpp.write_gguf(file, CONFIG)
    body = {"ignore_eos": True, "cache_prompt": False, "top_k": 0, "top_p": 1, "min_p": 0}
    served["29M, llama.cpp"] = Served(
      lambda port: llama_cpp.command(options.peer, file, port, max(CLIENTS), SLOTS, threads),
      "/health",
      CONFIG.vocab_size,
      body,
    )
  return served


def make_29m(run: pathlib.Path) -> None:
  """Writes a run of the model of 29 million parameters, with a tokenizer of as many words that nobody knows."""
  draw, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
  text = [" ".join("".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(2000)) for _ in range(100)]
  tokenizer_lib.train(text, run.with_suffix(".tokenizer"), vocab_size=CONFIG.vocab_size)
  described = tokenizer_folder.copy(run.with_suffix(".tokenizer"), run / folder_lib.TOKENIZER)
  folder_lib.write_config(run, folder_lib.FolderConfig(CONFIG, {}, described))
  saver = manager.Manager(run / folder_lib.CHECKPOINTS)
  saver.save(1, {"params": glm.init_params(CONFIG, jax.random.key(0)), "step": jnp.int32(1)}, {"samples_seen": 1})
  saver.close()


@contextlib.contextmanager
def running(served: dict[str, Served]) -> Iterator[dict[str, Server]]:
  """Has all of these servers run."""
  with contextlib.ExitStack() as stack:
    servers = {}
    for name, each in served.items():
      servers[name] = Server(each)
      stack.callback(servers[name].stop)
    yield servers


def measure_loads(served: dict[str, Served], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
  """Returns for each server, for each number of clients what was measured; and what was left behind, as "leaked"."""
  with running(served) as servers:
    found: dict[str, dict[str, list]] = {name: {} for name in servers}
    for turn in range(options.repeats):
      for clients in CLIENTS:
        for name, server in servers.items():
          if turn == 0:
            server.measure(clients, options.seconds / 3)  # compiles, reads files
          found[name].setdefault(str(clients), []).append(server.measure(clients, options.seconds))
          print(turn + 1, name, clients, found[name][str(clients)][-1], flush=True)
    loads = {name: {clients: median(turns) for clients, turns in each.items()} for name, each in found.items()}
    for name, server in servers.items():
      if "llama" not in name:
        loads[name]["leaked"] = server.leaked()
  return loads


def measure_gaps(served: dict[str, Served], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
  """Returns for each server what its streams got while long prompts came, and, as "without", while none did."""
  with running(served) as servers:
    found: dict[str, list] = {name: [] for name in servers}
    without: dict[str, list] = {name: [] for name in servers}
    for turn in range(options.repeats + 1):  # of which the first compiles
      for name, server in servers.items():
        kept = {name: []} if turn == 0 else found
        kept[name].append(server.measure(STREAMS, options.seconds, long_prompt=LONG))
        if turn > 0:
          without[name].append(server.measure(STREAMS, options.seconds))
        print("gaps", turn, name, kept[name][-1], flush=True)
  return {name: median(found[name]) | {"without": median(without[name])} for name in served}


def median(turns: list) -> Any:
  """Returns the medians of figures that are named alike."""
  if isinstance(turns[0], dict):
    return {name: median([turn[name] for turn in turns]) for name in turns[0]}
  return round(statistics.median(turns), 3)


if __name__ == "__main__":
  main()
