"""The TPU's attention kernels through the real compiler, for every TPU that plans know."""

import os
import subprocess
import sys

import pytest

PYTHON = os.environ.get("GLMJAX_PLAN_PYTHON", sys.executable)  # of an environment with libtpu, set by `make test`
CODE = """
import jax, jax.numpy as jnp
from glmjax.kernels import attention
from glmjax.kernels import dropout as dropout_lib
from glmjax.parallel import mesh as mesh_lib, partitioning
from glmjax.plan import devices, targets

def gradients(q, k, v, start, end):
  keys = jax.random.split(jax.random.key(0), q.shape[0])
  dropout = dropout_lib.make(0.1, keys, q.shape[2], q.shape[1])
  target = partitioning.target()
  attend = lambda *x: attention.attend(target, *x, start, end, dropout).astype(jnp.float32).sum()
  return jax.grad(attend, (0, 1, 2))(q, k, v)

for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, fsdp=2, tensor=2), devices.of(targets.parse(name)))
  for length, width, dtype in ((2048, 128, "bfloat16"), (8192, 128, "bfloat16"), (512, 256, "float32")):
    with partitioning.use(mesh):
      split = lambda *axes: partitioning.named(mesh, partitioning.FSDP, *axes)
      x = jax.ShapeDtypeStruct((2, length, 2, width), dtype, sharding=split("batch", "length", "act_heads", None))
      place = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=split("batch", "length"))
      text = jax.jit(gradients).lower(x, x, x, place, place).compile().as_text()
    print(name, length, text.count("flash_forward") > 0, text.count("flash_backward") > 0)
"""


def test_compiles_for_every_tpu():
  if (
    "GLMJAX_PLAN_PYTHON" not in os.environ
    and subprocess.run([PYTHON, "-c", "import libtpu"], capture_output=True, check=False).returncode
  ):
    pytest.skip("pip install 'glmjax[plan]', or GLMJAX_PLAN_PYTHON=ENVIRONMENT/bin/python")
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run([PYTHON, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  lines = [line for line in done.stdout.splitlines() if line.startswith("v")]
  assert len(lines) == 12 and all(line.endswith("True True") for line in lines), done.stdout
