"""Correctness and speed on one accelerator, in one command.

  python benchmarks/gpu.py --out benchmarks/results/gpu_h100.json

Needs jax, flax, optax, orbax-checkpoint, pytest and numpy; neither seqio nor TensorFlow nor gin-config. Each
case of CASES runs in a process of its own, so that its peak memory is its own and one that runs out of memory leaves
the others alone; then the golden, quantization, inference and model tests run on the accelerator, in float32:

- train: the trainer's step in bfloat16 on random tokens: tokens/s, model FLOP/s and their share of the device's peak;
- decode: ChatGLM-6B with random weights, batch 1, 128 tokens behind a prompt: tokens/s, and weight bytes read per
  second; prefill apart.

Peak memory and time stand beside what `glmjax plan` says of the same program. `--small` runs everything in miniature,
on any machine.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import random_rows  # noqa: E402

from glmjax import tokens  # noqa: E402
from glmjax.cli import inference  # noqa: E402
from glmjax.infer import decode  # noqa: E402
from glmjax.infer import prompt  # noqa: E402
from glmjax.infer import rows as rows_lib  # noqa: E402
from glmjax.infer import runner  # noqa: E402
from glmjax.infer import sampling  # noqa: E402
from glmjax.models import config as config_lib  # noqa: E402
from glmjax.models import glm  # noqa: E402
from glmjax.models import params as params_lib  # noqa: E402
from glmjax.parallel import hlo  # noqa: E402
from glmjax.parallel import mesh as mesh_lib  # noqa: E402
from glmjax.parallel import partitioning  # noqa: E402
from glmjax.plan import cost  # noqa: E402
from glmjax.plan import estimate  # noqa: E402
from glmjax.plan import programs  # noqa: E402
from glmjax.plan import targets  # noqa: E402
from glmjax.models import weights  # noqa: E402
from glmjax.train import feed  # noqa: E402
from glmjax.train import state as state_lib  # noqa: E402
from glmjax.train import step as step_lib  # noqa: E402

TESTS = ("tests/golden_test.py", "tests/quantize", "tests/infer", "tests/kernels", "tests/models")
PARALLEL = ("-n", "8") if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) > 8 else ()
CHATGLM_6B = config_lib.GLMConfig(
  vocab_size=130_528,
  num_layers=28,
  embed_dim=4_096,
  num_heads=32,
  mlp_dim=16_384,
  positions="rotary_2d",
  mlp="gelu_tanh",
  dtype="bfloat16",
  param_dtype="bfloat16",
)


def gpt(layers: int, width: int, heads: int, length: int, **changes: Any) -> config_lib.GLMConfig:
  """Returns GLM-130B's block at another size, with its vocabulary."""
  return config_lib.GLMConfig(
    vocab_size=150_528,
    num_layers=layers,
    embed_dim=width,
    num_heads=heads,
    dtype="bfloat16",
    mlp_dim=-(-width * 8 // 3 // 128) * 128,
    max_length=length,
    **changes,
  )


@dataclasses.dataclass(frozen=True)
class Train:
  """A training step of `rows` rows, `micro` at a time."""

  config: config_lib.GLMConfig
  rows: int
  micro: int | None = None
  chunk: int = 4096  # tokens whose logits exist at a time

  def small(self) -> "Train":
    return Train(_small(self.config), 4, self.micro and 2)


@dataclasses.dataclass(frozen=True)
class Decode:
  """Greedy decoding, batch 1, behind a prompt of `prompt` tokens."""

  config: config_lib.GLMConfig
  bits: int | None = None
  prompt: int = 1_900
  new: int = 128
  offload: int = 0  # layers whose weights are in the host's memory

  def small(self) -> "Decode":
    return Decode(_small(self.config), self.bits, 40, 16, min(self.offload, 1))


def _small(config: config_lib.GLMConfig) -> config_lib.GLMConfig:
  return dataclasses.replace(
    config, vocab_size=512, num_layers=2, embed_dim=64, num_heads=4, mlp_dim=128, max_length=min(config.max_length, 64)
  )


CASES: dict[str, Train | Decode] = {
  "train_1b_2048": Train(gpt(20, 2_048, 16, 2_048, remat="dots"), 16),
  "train_1b_2048_unrolled": Train(gpt(20, 2_048, 16, 2_048, remat="dots", scan_layers=False), 24),
  "train_1b_2048_dropout": Train(
    gpt(20, 2_048, 16, 2_048, remat="dots", hidden_dropout=0.1, attention_dropout=0.1), 16
  ),
  "train_200m_512": Train(gpt(12, 768, 12, 512, remat="dots"), 64),
  "train_200m_512_unrolled": Train(gpt(12, 768, 12, 512, remat="dots", scan_layers=False), 64),
  "train_500m_1024": Train(gpt(24, 1_024, 16, 1_024, remat="dots"), 16),
  "train_1b_2048_full_remat": Train(gpt(20, 2_048, 16, 2_048, remat="full"), 8),
  "train_1b_2048_micro": Train(gpt(20, 2_048, 16, 2_048, remat="dots"), 32, 8),
  "decode_6b_bf16": Decode(CHATGLM_6B),
  "decode_6b_int8": Decode(CHATGLM_6B, 8),
  "decode_6b_int4": Decode(CHATGLM_6B, 4),
  "decode_6b_bf16_offload": Decode(CHATGLM_6B, offload=7),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", help="JSON file to write")
  parser.add_argument("--small", action="store_true", help="sizes for trying the script itself")
  parser.add_argument("--case", choices=CASES, help="run this one only, in this process")
  parser.add_argument("--skip_tests", action="store_true")
  options = parser.parse_args()
  if options.case:
    case = CASES[options.case].small() if options.small else CASES[options.case]
    print(json.dumps(train(case) if isinstance(case, Train) else generate(case)))
    return
  device = jax.devices()[0].device_kind
  result: dict[str, Any] = {
    "device": device,
    "date": datetime.date.today().isoformat(),
    "jax": jax.__version__,
    "python": sys.version.split()[0],
    "command": " ".join(["python", *sys.argv]),
  }
  work = {name: functools.partial(run_case, name, options.small) for name in CASES}
  if not options.skip_tests:
    work["tests"] = run_tests
  for name, run in work.items():
    result[name] = run()
    print(f"{name}: {json.dumps(result[name])}", flush=True)
    if options.out:  # after every one: what was measured stays, whatever happens next
      pathlib.Path(options.out).parent.mkdir(parents=True, exist_ok=True)
      pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


def run_tests() -> dict[str, Any]:
  """Returns the last lines that pytest prints, and its exit status."""
  environment = os.environ | {
    "JAX_PLATFORMS": "",
    "XLA_FLAGS": "",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", "-p", "no:benchmark"]
  done = subprocess.run(
    [*command, *PARALLEL, *TESTS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )
  lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")) or " passed" in line]
  print(done.stdout[-3000:], flush=True)
  return {"exit": done.returncode, "lines": lines[-25:]}


def run_case(name: str, small: bool) -> dict[str, Any]:
  """Returns one case's figures, or the last line of what went wrong."""
  command = [sys.executable, __file__, "--case", name, *["--small"] * small]
  done = subprocess.run(
    command, capture_output=True, text=True, check=False, env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94", **os.environ}
  )
  if done.returncode:
    return {"error": (done.stderr.strip() or "died").splitlines()[-1][:500]}
  return json.loads(done.stdout.splitlines()[-1])


def train(case: Train) -> dict[str, Any]:
  """Measures a training step; the master weights and AdamW's moments are float32."""
  config, workload = case.config, programs.Train(case.rows, case.config.max_length, case.micro, loss_chunk=case.chunk)
  length, tx, mesh = (
    workload.length,
    workload.optimizer.make(),
    mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1), jax.devices()[:1]),
  )
  layout = feed.Layout.make(
    mesh, partitioning.FSDP, case.rows, case.micro, length, config.position_kind, config.vocab_size
  )
  batch = layout.put(random_rows.make(case.rows, length, config.vocab_size, context=length // 5))
  program = workload.program(config, mesh)
  compiled, seconds = timed(lambda: program.traced.lower().compile())
  with partitioning.use(mesh):
    state = state_lib.create(config, tx, 0, state_lib.abstract(config, tx, mesh))
    zero = jax.device_put(np.uint32(0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    losses = []

    def step() -> None:
      nonlocal state
      first = jax.device_put(np.uint32(state.samples_seen), zero.sharding)
      state, metrics = compiled(state, batch, step_lib.StepInfo(first, first, zero + np.uint32(case.rows)))
      losses.append(float(metrics["loss"]))

    step_seconds = median_seconds(step)
  rate = case.rows * length / step_seconds
  flops = rate * params_lib.train_flops_per_token(config, length)
  return {
    "parameters": params_lib.count(config),
    "rows": case.rows,
    "length": length,
    "remat": config.remat,
    "tokens_per_second": round(rate),
    "model_tflops_per_second": round(flops / 1e12, 1),
    "mfu": of_peak(flops),
    "first_loss": losses[0],
    "last_loss": losses[-1],
    "compile_seconds": seconds,
    "step_seconds": round(step_seconds, 4),
    **planned(program, compiled),
    **peak(),
  }


def planned(program: programs.Program, compiled: Any) -> dict[str, Any]:
  """Returns what `glmjax plan` would say of this program: its memory, and the time below which the device cannot run
  it.
  """
  analysis, found = compiled.memory_analysis(), chip()
  size = (
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    + analysis.temp_size_in_bytes
    - analysis.alias_size_in_bytes
  )
  if found is None:
    return {"planned_bytes": size}
  read = hlo.read(compiled.as_text())
  rates = estimate.roofline(
    cost.flops(program.traced.jaxpr.jaxpr, program.trips),
    cost.traffic(read, program.trips),
    [],
    found,
    cost.fetched(read, program.trips),
  )
  return {
    "planned_bytes": size,
    "planned_seconds": {name: round(rates[f"{name}_seconds"], 6) for name in ("compute", "memory", "host", "step")},
  }


def generate(case: Decode) -> dict[str, Any]:
  """Measures prefill and decode; weights are random, in bfloat16 or quantized from it."""
  inference.Devices(offload_layers=case.offload).prepare()  # XLA's options, as the command gives them
  config, specials = case.config, tokens.icetk(0, case.config.vocab_size - 64)
  params = jax.jit(lambda key: glm.init_params(config, key))(jax.random.key(0))
  if case.bits:
    params = jax.block_until_ready(weights.quantize(params, case.bits))
  model = runner.Runner(config, params, offload_layers=case.offload)
  config, params = model.config, model.params
  text = np.random.default_rng(0).integers(4, config.vocab_size - 64, case.prompt - 2).tolist()
  first = prompt.fill([*text, specials.gmask], specials, config.position_kind)
  batch, rows = decode.make_rows([first], [case.new], specials.pad)
  draws, none = sampling.draws([sampling.Sampling()], [0]), np.zeros(config.vocab_size, bool)
  slots = rows_lib.bucket(case.new)

  def prefill():
    return jax.block_until_ready(model.run(decode.prefill, batch, rows, new_tokens=slots))

  _, compile_prefill = timed(prefill)
  prefill_seconds = median_seconds(prefill)
  states = []

  def body():
    return states.append(
      jax.block_until_ready(model.run(decode.decode, rows, states.pop(), draws, none, none, np.int32(case.new)))
    )

  states.append(prefill())
  _, compile_decode = timed(body)
  times = []
  for _ in range(5):
    states[:] = [prefill()]
    times.append(timed(body)[1])
  seconds, read = statistics.median(times) / case.new, sum(x.nbytes for x in jax.tree.leaves(params))
  program = programs.Decode(context=case.prompt + slots, bits=case.bits, offload_layers=case.offload).program(
    case.config, mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1), jax.devices()[:1])
  )
  return {
    "parameters": params_lib.count(config),
    "bits": case.bits or 16,
    "offload_layers": case.offload,
    "weight_bytes": read,
    "prompt": case.prompt,
    "prefill_seconds": round(prefill_seconds, 4),
    "tokens_per_second": round(1 / seconds, 1),
    "weight_bytes_per_second": round(read / seconds),
    "compile_seconds": [compile_prefill, compile_decode],
    "token_seconds": round(seconds, 6),
    **planned(program, program.traced.lower().compile()),
    **peak(),
  }


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
  """Returns what a call gives, and the seconds it took."""
  began = time.perf_counter()
  result = run()
  return result, round(time.perf_counter() - began, 4)


def median_seconds(run: Callable[[], Any], runs: int = 7) -> float:
  """Returns the median seconds of `runs` runs behind two that warm up."""
  run(), run()
  return statistics.median(timed(run)[1] for _ in range(runs))


def chip() -> targets.Chip | None:
  """Returns what `glmjax plan` knows of this device; None of others."""
  return next((found for found in targets.CHIPS.values() if found.kind == jax.devices()[0].device_kind), None)


def of_peak(flops: float) -> float | None:
  """Returns the share of the device's peak; None where that is not known."""
  found = chip()
  return round(flops / found.peak_flops, 4) if found else None


def peak() -> dict[str, Any]:
  """Returns the device's own account of its memory's peak."""
  return {"peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}


if __name__ == "__main__":
  main()
