"""Real compilers of hardware that is not here: those of the environment whose Python GLMJAX_PLAN_PYTHON names."""

import functools
import json
import os
import subprocess
import sys

import pytest

PYTHON = os.environ.get("GLMJAX_PLAN_PYTHON", sys.executable)  # set by `make test`, which installs them
SMALL = [
  f"--gin.glmjax.models.config.GLMConfig.{size}"
  for size in ("num_layers=2", "embed_dim=256", "num_heads=8", "mlp_dim=512", "vocab_size=1024")
]


def glmjax(*arguments: str) -> subprocess.CompletedProcess:
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  return subprocess.run(
    [PYTHON, "-m", "glmjax", *arguments], env=environment, capture_output=True, text=True, check=False
  )


def plan(name: str, *more: str) -> dict:
  done = glmjax("plan", "--json", f"--gin_file=plans/{name}.gin", *SMALL, *more)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout)


@functools.cache
def has(module: str) -> bool:
  return not subprocess.run(
    [PYTHON, "-c", f"import importlib.util as u; assert u.find_spec({module!r})"], capture_output=True, check=False
  ).returncode


def needs(module: str) -> None:
  """Leaves a test out where a compiler is missing; never in `make test`."""
  if "GLMJAX_PLAN_PYTHON" not in os.environ and not has(module):
    pytest.skip("pip install 'glmjax[plan]', or GLMJAX_PLAN_PYTHON=ENVIRONMENT/bin/python")


def test_gpus():
  needs("jax_plugins")
  found = plan("glm_130b_int4_rtx3090_4")
  assert found["fits"] and found["devices"] == 4 and found["peak_bytes_per_device"] == sum(found["memory"].values())
  assert found["tokens_per_second"] > 0 and found["memory"]["kv_cache"] == 2 * 2 * 2048 * 256 * 2 // 4


def test_an_evaluation():
  needs("jax_plugins")
  found = plan("glm_130b_int4_rtx3090_4_mmlu")
  assert found["fits"] and "kv_cache" not in found["memory"]
  assert found["days"] * 86_400 == pytest.approx(14_042 / 4 * found["step_seconds"])


@pytest.mark.parametrize("bits, target, devices", [(8, "v100-32", 1), (4, "rtx2080ti", 1), (4, "rtx2080ti", 8)])
def test_gpus_without_triton_decode_without_copies(bits: int, target: str, devices: int):
  """Neither of weights, in floats or with another layout, nor of the cache: besides XLA's workspace for the head's
  product, of 4 MiB, temporaries are smaller than any of these.
  """
  needs("jax_plugins")
  found = plan(
    "glm_130b_int4_rtx2080ti_8",
    f"--target={target}:{devices}",
    f"--gin.TENSOR={devices}",
    f"--gin.glmjax.plan.programs.Decode.bits={bits}",
    "--gin.glmjax.models.config.GLMConfig.embed_dim=4096",
    "--gin.glmjax.models.config.GLMConfig.mlp_dim=4096",
  )
  codes, values = 4096 * 4096 * bits // 8 // devices, 2048 * 4096 * 2 // devices
  assert found["memory"]["temporaries"] - 2**22 < min(codes, values), found["memory"]
  assert found["memory_seconds"] * 616e9 < 3 * (found["memory"]["parameters"] + found["memory"]["kv_cache"])


def test_tpus():
  needs("libtpu")
  found = plan(
    "glm_130b_train_v5p_4x8x8",
    "--target=v5p:2x2x1",
    *[
      f"--gin.glmjax.{size}"
      for size in (
        "parallel.mesh.MeshConfig.fsdp=2",
        "parallel.mesh.MeshConfig.tensor=2",
        "plan.programs.Train.batch_size=4",
        "plan.programs.Train.length=256",
      )
    ],
  )
  assert found["fits"] and found["devices"] == 4 and 0 < found["mfu"] <= found["hfu"] * 1.05


def test_the_smallest_set(tmp_path):
  """ChatGLM-6B in INT4: 3.8 GiB of weights and cache, a GiB at most for the rest, from a program of one layer."""
  needs("jax_plugins")
  out = tmp_path / "fits.jsonl"
  done = glmjax(
    "plan",
    "--fits",
    "--model=6b",
    "--bits=4",
    "--context=512",
    "--gpu=rtx2080ti",
    "--layers=1",
    "--json",
    f"--out={out}",
  )
  assert done.returncode == 0, done.stderr[-2000:]
  [row] = json.loads(done.stdout)
  assert row["count"] == 1 and 3.8 < row["peak_bytes_per_device"] / 2**30 < 4.8 and out.read_text().count("\n") == 3


def test_what_is_missing_is_told():
  if has("jax_plugins"):
    pytest.skip("the compilers are here")
  done = glmjax("plan", "--gin_file=plans/glm_130b_int4_rtx3090_4.gin")
  assert done.returncode == 2 and "glmjax[plan]" in done.stderr and done.stderr.count("\n") == 1


def test_other_programs_beside_the_compilers_run_on_what_is_here():
  """JAX without JAX_PLATFORMS finds both plug-ins, neither's hardware, and computes on the processor."""
  code = "import jax; from glmjax.models import glm; print(jax.numpy.ones(2).sum(), jax.devices()[0].platform)"
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  done = subprocess.run([PYTHON, "-c", code], env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0 and done.stdout.startswith("2.0 "), done.stderr[-2000:]
