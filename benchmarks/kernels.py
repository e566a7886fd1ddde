"""The GPU kernels beside what they replace, in one command on one NVIDIA GPU.

  python benchmarks/kernels.py --out benchmarks/results/kernels_h100.json

Attention: forward, and forward with backward, of [gMASK] rows (a fifth context, the rest causal) in bfloat16, against
XLA's dense softmax and cuDNN with the mask as a bias; errors against float32. Quantized products: one row times the
four kernels of a ChatGLM-6B layer, layer after layer, against XLA's and against the same weights in bfloat16.
`--tune` tries other block sizes.
"""

import argparse
import datetime
import functools
import itertools
import json
import operator
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from glmjax.kernels import dropout as dropout_lib  # noqa: E402
from glmjax import target as target_lib  # noqa: E402
from glmjax.kernels import attention  # noqa: E402
from glmjax.kernels import flash  # noqa: E402
from glmjax.kernels import flash_gpu  # noqa: E402
from glmjax.kernels import matmul_gpu  # noqa: E402
from glmjax.kernels import quantized  # noqa: E402
from glmjax.quantize import qarray  # noqa: E402

HERE = target_lib.Target.of(jax.devices()[0])
SHAPES = {"qkv": (4_096, 12_288), "out": (4_096, 4_096), "wi": (4_096, 16_384), "wo": (16_384, 4_096)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="JSON file to write")
  parser.add_argument("--tune", action="store_true", help="try other block sizes too")
  parser.add_argument("--skip_attention", action="store_true")
  parser.add_argument("--rows", type=int, default=4, help="rows of 2,048 tokens")
  options = parser.parse_args()
  result: dict[str, Any] = {
    "device": jax.devices()[0].device_kind,
    "date": datetime.date.today().isoformat(),
    "jax": jax.__version__,
    "command": " ".join(["python", *sys.argv]),
  }
  for heads, width in ((16, 128), (32, 64)) * (not options.skip_attention):
    result[f"attention_{heads}x{width}"] = compare_attention(
      options.rows, 2_048, heads, width, options.tune and width == 128
    )
    print(f"attention_{heads}x{width}", json.dumps(result[f"attention_{heads}x{width}"]), flush=True)
  for bits in (8, 4):
    result[f"int{bits}"] = compare_products(bits, options.tune)
    print(f"int{bits}", json.dumps(result[f"int{bits}"]), flush=True)
  if options.out:
    pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


def seconds(run: Callable[[], Any], calls: int = 10) -> float:
  """Returns the seconds of one call: the median of five turns of `calls`."""
  jax.block_until_ready(run())
  times = []
  for _ in range(5):
    began = time.perf_counter()
    jax.block_until_ready([run() for _ in range(calls)])
    times.append((time.perf_counter() - began) / calls)
  return statistics.median(times)


def intervals(rows: int, length: int) -> tuple[jax.Array, jax.Array]:
  """Returns the intervals of rows whose first fifth is context."""
  places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
  return jnp.zeros_like(places), jnp.maximum(places + 1, length // 5)


def compare_attention(rows: int, length: int, heads: int, width: int, tune: bool) -> dict[str, Any]:
  """Measures milliseconds of each way, and the worst error of the kernel's output and gradients, relative to their
  spread.
  """
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, d = (jax.random.normal(key, (rows, length, heads, width), jnp.bfloat16) for key in keys)
  start, end = intervals(rows, length)

  def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    mask = attention.interval_mask(start, end, length)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")

  dropout = dropout_lib.make(0.1, jax.random.split(jax.random.key(1), rows), heads, length)

  def dense(q, k, v, drops=None):
    return attention.dense(HERE, q, k, v, start, end, drops)

  def by_kernel(q, k, v, drops=None):
    return flash.attend(flash_gpu, HERE, flash.Inputs(q, k, v, start, end, drops))

  dropping = [functools.partial(way, drops=dropout) for way in (dense, by_kernel)]

  def both(way: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.jit(lambda q, k, v: (lambda out, vjp: (out, *vjp(d)))(*jax.vjp(way, q, k, v)))

  found: dict[str, Any] = {}
  for name, way in {
    "dense": dense,
    "cudnn": cudnn,
    "flash": by_kernel,
    "dense_dropout": dropping[0],
    "flash_dropout": dropping[1],
  }.items():
    try:
      found[name] = [round(1e3 * seconds(functools.partial(f, q, k, v)), 3) for f in (jax.jit(way), both(way))]
    except Exception as error:  # a way that this machine does not have
      found[name] = str(error).splitlines()[0][:200]
  found["worst_error"] = [
    round(float(jnp.abs(a - b).max() / jnp.std(b)), 5)
    for a, b in zip(*(map(lambda x: x.astype(jnp.float32), both(way)(q, k, v)) for way in (by_kernel, dense)))
  ]
  found["flops"] = 4 * rows * heads * width * int((end - start).sum() // rows)
  if tune:
    found["tune"] = tune_attention(q, k, v, start, end, d)
  return found


def tune_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, d: jax.Array
) -> dict[str, Any]:
  """Measures milliseconds of each kernel by (queries, keys, warps, stages) of a block; returns the five fastest."""
  out, sums = jax.jit(flash_gpu.forward)(q, k, v, start, end)
  delta = jnp.swapaxes((out.astype(jnp.float32) * d.astype(jnp.float32)).sum(-1), 1, 2)
  runs = {
    "_FORWARD": lambda: jax.jit(lambda *a: flash_gpu.forward(*a)).lower(q, k, v, start, end).compile(),
    "_KEYS": lambda: (
      jax.jit(lambda *a: flash_gpu.backward(HERE, *a)[1:]).lower(q, k, v, start, end, sums, delta, d).compile()
    ),
    "_QUERIES": lambda: (
      jax.jit(lambda *a: flash_gpu.backward(HERE, *a)[0]).lower(q, k, v, start, end, sums, delta, d).compile()
    ),
  }
  found = {}
  for name, build in runs.items():
    before, times = getattr(flash_gpu, name), []
    for sizes in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
      setattr(flash_gpu, name, sizes)
      try:
        run = build()
        inputs = (q, k, v, start, end) if name == "_FORWARD" else (q, k, v, start, end, sums, delta, d)
        times.append((round(1e3 * seconds(functools.partial(run, *inputs), 5), 3), sizes))
      except Exception as error:  # too large for the machine
        times.append((float("inf"), (*sizes, str(error)[:60])))
    setattr(flash_gpu, name, before)
    found[name] = sorted(times, key=lambda t: t[0])[:5]
    print(name, found[name], flush=True)
  return found


def compare_products(bits: int, tune: bool, layers: int = 6) -> dict[str, Any]:
  """Measures microseconds of one product of each kind, bytes per second of the kernel, and its worst error."""
  found: dict[str, Any] = {}
  plain = quantized.PRODUCT.implementations[-1]
  for name, (inputs, outputs) in SHAPES.items():
    stack = jax.random.normal(jax.random.key(1), (layers, inputs, outputs), jnp.bfloat16)
    codes = jax.jit(jax.vmap(lambda w: qarray.quantize(w, bits, (0,))))(stack)
    x = jax.random.normal(jax.random.key(2), (1, inputs), jnp.bfloat16)

    each = functools.partial(layer_after_layer, x, layers)
    ways = {
      "bf16": each(lambda x, w: x @ w, stack),
      "xla": each(lambda x, q: plain.run(HERE, "BI,IO->BO", x, q.values, bits, 1, None), codes),
      "kernel": each(lambda x, q: matmul_gpu.product(x, q.values, bits), codes),
    }
    found[name] = {way: round(1e6 * seconds(run) / layers, 1) for way, run in ways.items()}
    found[name]["bytes_per_second"] = round(codes.values.nbytes / layers / found[name]["kernel"] * 1e6)
    got, want = ways["kernel"](), ways["xla"]()
    found[name]["worst_error"] = float(jnp.abs(got - want).max() / jnp.std(want))
    if tune and name in ("qkv", "wo"):
      times, before = [], dict(matmul_gpu._SIZES)
      for sizes in itertools.product((32, 64), (64, 128, 256), (4, 8), (3, 4), (264, 528)):
        matmul_gpu._SIZES[bits] = sizes
        try:
          run = each(lambda x, q: matmul_gpu.product(x, q.values, bits), codes)
          times.append((round(1e6 * seconds(run, 5) / layers, 1), sizes))
        except Exception as error:  # too large for the machine
          times.append((float("inf"), (*sizes, str(error)[:60])))
      matmul_gpu._SIZES.update(before)
      found[name]["tune"] = sorted(times, key=lambda t: t[0])[:6]
      print(name, found[name]["tune"], flush=True)
  return found


def layer_after_layer(
  x: jax.Array, layers: int, product: Callable[..., jax.Array], stack: Any
) -> Callable[[], jax.Array]:
  """Sums x times each of the stacked weights; unstacked first, for a scan would copy each."""
  weights = [jax.tree.map(operator.itemgetter(i), stack) for i in range(layers)]
  run = jax.jit(lambda x, weights: sum(product(x, w).astype(jnp.float32) for w in weights))
  return functools.partial(run, x, weights)


if __name__ == "__main__":
  main()
