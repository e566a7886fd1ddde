"""The CPU library's products beside the speed of memory and what XLA alone makes of them, on ChatGLM-6B's shapes.

  python benchmarks/cpu_products.py --out benchmarks/results/cpu_products.json

A layer's four kernels and the head in one program, each product's rows taken from the one before; above 16 rows without
the head, which prefill needs for one row. The weights are many times the caches. Gigabytes of weights a second, and
thousand millions of operations (two for each weight and row): medians of turns that the library and XLA take one after
the other, of quiet ones where there are any (decode.py). XLA's way is that of an installation without the library. The
speed of memory is that of summing a gigabyte by as many threads.
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import decode  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import loader  # noqa: E402
import numpy as np  # noqa: E402

from glmjax.kernels.cpu import by_xla  # noqa: E402
from glmjax.kernels.cpu import library  # noqa: E402
from glmjax.kernels.cpu import product as product_lib  # noqa: E402

WAYS = {"library": product_lib, "xla": by_xla}
LAYER = ((12_288, 4_096), (4_096, 4_096), (16_384, 4_096), (4_096, 16_384))  # outputs, inputs
HEAD = (130_528, 4_096)
MOST_ROWS_WITH_HEAD = 16
# Kind: bits of a weight, dtype of the rows, whether these become bytes.
KINDS = {
  "int4_fast": (4, jnp.float32, True),
  "int4_bfloat16": (4, jnp.bfloat16, False),
  "int4_float32": (4, jnp.float32, False),
  "int8_fast": (8, jnp.float32, True),
  "int8_bfloat16": (8, jnp.bfloat16, False),
  "int8_float32": (8, jnp.float32, False),
  "bfloat16": (16, jnp.bfloat16, False),
  "float32": (32, jnp.float32, False),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="JSON file to write")
  parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
  parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
  parser.add_argument("--turns", type=int, default=5)
  options = parser.parse_args()
  status = library.status()
  if not status.available:
    sys.exit(f"the library is not there: {status.words}")
  result: dict[str, Any] = {
    "what": "products of ChatGLM-6B's shapes: GB/s of weights (one row: decoding), GOP/s, by kind and rows",
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "machine": loader.machine(),
    "command": " ".join(["python", "benchmarks/cpu_products.py", *map(os.path.basename, sys.argv[1:])]),
    "jax": jax.__version__,
    "instruction_set": status.isa,
    "kinds": {},
  }
  for kind in options.kinds:
    result["kinds"][kind] = found = measure(kind, options.rows, options.turns)
    print(kind, json.dumps(found), flush=True)
  if options.out:
    pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


def measure(kind: str, rows: list[int], turns: int) -> dict[str, Any]:
  """Measures one kind at each number of rows, the library, XLA and memory in turns."""
  bits, dtype, fast = KINDS[kind]
  weights = [random_weight(bits, outputs, inputs) for outputs, inputs in (*LAYER, HEAD)]
  runs = {name: functools.partial(multiplied, way, bits, fast) for name, way in WAYS.items()}
  found: dict[str, Any] = {}
  for count in rows:
    shapes = shapes_of(count)
    x = jax.random.normal(jax.random.key(0), (count, LAYER[0][1]), dtype)
    ways = {
      way: functools.partial(seconds_of, jax.jit(functools.partial(chain, run)), x, weights[: len(shapes)])
      for way, run in runs.items()
    }
    if count == 1:
      ways["memory"] = seconds_of_a_byte
    seconds, quiet = in_turns(ways, turns)
    num_weights = sum(outputs * inputs for outputs, inputs in shapes)
    found[f"{count}_rows"] = {
      way: {
        "gb_per_second": round(num_weights * bits / 8 / seconds[way] / 1e9, 2),
        "gop_per_second": round(2 * num_weights * count / seconds[way] / 1e9, 1),
        "quiet_turns": quiet[way],
      }
      for way in runs
    }
    if count == 1:
      found["memory_gb_per_second"] = round(1e-9 / seconds["memory"], 1)
      found["share_of_memory"] = round(num_weights * bits / 8 / seconds["library"] * seconds["memory"], 3)
  return found


def seconds_of(run: Callable[..., jax.Array], *arguments: Any) -> float:
  """Returns the seconds of a call, of as many calls as take a third of a second: the system counts in hundredths."""
  began, calls = time.perf_counter(), 0
  while time.perf_counter() - began < 1 / 3:
    run(*arguments).block_until_ready()
    calls += 1
  return (time.perf_counter() - began) / calls


def seconds_of_a_byte() -> float:
  return 1 / library.read_bandwidth(turns=1)


def in_turns(ways: dict[str, Callable[[], float]], turns: int) -> tuple[dict[str, float], dict[str, int]]:
  """Returns the median seconds of each way, which take turns, and how many of them were quiet: of those alone where
  there are any. Up to three times as many turns are tried.
  """
  all_turns: dict[str, list[float]] = {name: [] for name in ways}
  quiet: dict[str, list[float]] = {name: [] for name in ways}
  for measured in ways.values():
    measured()  # compiles
  for turn in range(3 * turns):
    if turn >= turns and min(map(len, quiet.values())) >= turns:
      break
    for name, measured in ways.items():
      others, began = decode.busy_seconds() - time.process_time(), time.perf_counter()
      all_turns[name].append(measured())
      others = decode.busy_seconds() - time.process_time() - others
      if others <= decode.BUSY * (time.perf_counter() - began):
        quiet[name].append(all_turns[name][-1])
  return (
    {name: statistics.median(quiet[name] or all_turns[name]) for name in ways},
    {name: len(quiet[name]) for name in ways},
  )


def shapes_of(rows: int) -> tuple[tuple[int, int], ...]:
  return LAYER + (HEAD,) * (rows <= MOST_ROWS_WITH_HEAD)


def chain(run: Callable[..., jax.Array], x: jax.Array, weights: list[Any]) -> jax.Array:
  """Multiplies by one weight after another: each takes as many outputs of the one before as it has inputs; all are
  computed.
  """
  inputs = [shape[1] for shape in shapes_of(x.shape[0])]
  y = x
  for number, weight in zip(inputs, weights):
    y = jax.lax.optimization_barrier(run(y[:, :number].astype(x.dtype), weight))
  return y


def random_weight(bits: int, outputs: int, inputs: int) -> tuple[jax.Array, ...]:
  """Makes a weight whose product keeps the rows' size: floats, bfloat16 as its bits, or codes and their scales."""
  rng = np.random.default_rng(0)
  if bits > 8:
    weight = rng.standard_normal((outputs, inputs), np.float32) / np.sqrt(inputs)
    return (jnp.asarray(weight if bits == 32 else weight.astype(jnp.bfloat16).view(np.uint16)),)
  codes = rng.integers(-128, 128, (outputs, inputs * bits // 8), np.int8)
  spread = 4.6 if bits == 4 else 74  # of codes that are all alike likely
  return jnp.asarray(codes), jnp.full((1, outputs), 1 / (spread * np.sqrt(inputs)), jnp.float16)


def multiplied(way: ModuleType, bits: int, fast: bool, x: jax.Array, weight: tuple[jax.Array, ...]) -> jax.Array:
  return way.float_product(x, *weight) if bits > 8 else way.product(x, *weight, bits, fast)


if __name__ == "__main__":
  main()
