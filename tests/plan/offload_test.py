"""Plans of decoding with weights in the host's memory: bytes held, bytes moved, the bound that they set."""

import json
import os
import subprocess
import sys

import pytest

from glmjax import errors
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import hlo
from glmjax.plan import cost
from glmjax.plan import estimate
from glmjax.plan import planner
from glmjax.plan import programs
from glmjax.plan import targets

PYTHON = os.environ.get("GLMJAX_PLAN_PYTHON", sys.executable)
LOOP = """%body (p: (s32[], f16[64,16])) -> (s32[], f16[64,16]) {
  %p = (s32[], f16[64,16]{1,0:S(5)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f16[64,16]{1,0:S(5)} get-tuple-element(%p), index=1
  %copy-start = (f16[64,16]{1,0}, f16[64,16]{1,0:S(5)}, u32[]) copy-start(%w)
  %copy-done = f16[64,16]{1,0} copy-done(%copy-start)
  %copy = f16[64,16]{0,1} copy(%copy-done)
  ROOT %out = (s32[], f16[64,16]{1,0:S(5)}) tuple(%i, %w)
}
ENTRY %main (a: s32[], b: f16[64,16]) -> (s32[], f16[64,16]) {
  %a = s32[] parameter(0)
  %b = f16[64,16]{1,0:S(5)} parameter(1)
  %t = (s32[], f16[64,16]{1,0:S(5)}) tuple(%a, %b)
  ROOT %while.1 = (s32[], f16[64,16]{1,0:S(5)}) while(%t), condition=%cond, body=%body, metadata={op_name="turns/while"}
}
"""


def test_what_a_loop_fetches_counts_at_every_turn():
  assert cost.fetched(hlo.read(LOOP), {"turns": 3}) == 3 * 64 * 16 * 2
  assert cost.fetched(hlo.read(LOOP), {}) == 64 * 16 * 2


def test_the_link_to_the_host_bounds_a_step():
  chip = targets.CHIPS["v100-32"]
  rates = estimate.roofline(0.0, 0.0, [], chip, fetched=chip.host_link)
  assert rates["host_seconds"] == rates["step_seconds"] == 1.0
  assert all(chip.host_link > 0 for chip in targets.CHIPS.values())


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_bytes_of_the_host_are_exact(here, tiny, bits):
  """On a mesh of two: half of each kernel; norms, biases, embedding and the other layers' stay."""
  plans = [
    planner.plan(
      tiny, programs.Decode(context=32, bits=bits, offload_layers=layers), "v100-32:2", mesh_lib.MeshConfig(tensor=2)
    )
    for layers in (0, 3)
  ]
  config, codes = tiny, {None: 4.0, 8: 1.0, 4: 0.5}[bits]
  d, f, branches = config.embed_dim, config.mlp_dim, config.mlp_branches
  layer = codes * (4 * d * d + (branches + 1) * d * f) / 2
  if bits:  # float16 scales, one of each output; those of out and wo are not split
    layer += 2 * ((3 * d + branches * f) / 2 + 2 * d)
  assert plans[0]["host_bytes_per_device"] == 0 and plans[1]["host_bytes_per_device"] == 3 * layer
  assert plans[0]["memory"]["parameters"] - plans[1]["memory"]["parameters"] == 3 * layer
  assert plans[1]["memory"]["kv_cache"] == plans[0]["memory"]["kv_cache"]


def test_more_layers_than_there_are(here, tiny):
  with pytest.raises(errors.InputError, match="offload_layers is 5, and the model has 4"):
    planner.plan(tiny, programs.Decode(offload_layers=5), "v100-32:1")


@pytest.mark.parametrize("bits, devices", [(None, 2), (4, 1)])
def test_the_real_compiler_copies_each_weight_once_a_token(bits, devices):
  """What the compiled program moves is what the host holds, and the device's peak is smaller by it."""
  here = "import importlib.util as u; assert u.find_spec('jax_plugins')"
  if "GLMJAX_PLAN_PYTHON" not in os.environ and subprocess.run([PYTHON, "-c", here], capture_output=True).returncode:
    pytest.skip("pip install 'glmjax[plan]', or GLMJAX_PLAN_PYTHON=ENVIRONMENT/bin/python")
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  small = [
    f"--gin.glmjax.models.config.GLMConfig.{size}"
    for size in ("num_layers=4", "embed_dim=512", "num_heads=8", "mlp_dim=1024", "vocab_size=1024")
  ]
  done = subprocess.run(
    [
      PYTHON,
      "-m",
      "glmjax",
      "plan",
      "--json",
      "--gin_file=plans/glm_130b_fp16_offload_v100_8.gin",
      *small,
      f"--target=v100-32:{devices}",
      f"--gin.TENSOR={devices}",
      f"--gin.glmjax.plan.programs.Decode.bits={bits}",
      "--gin.glmjax.plan.programs.Decode.offload_layers=3",
    ],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout)
  layer = (4 * 512 * 512 + 3 * 512 * 1024) * (2 if bits is None else 0.5) / devices
  layer += 2 * (3 * 512 + 2 * 1024 + 2 * 512) if bits else 0
  assert found["host_bytes_moved"] == found["host_bytes_per_device"] == 3 * layer
  assert found["host_seconds"] == pytest.approx(3 * layer / 16e9) and found["step_seconds"] >= found["host_seconds"]
  assert found["peak_bytes_per_device"] == sum(found["memory"].values())
  if bits is None:  # of codes XLA makes floats
    assert found["memory"]["temporaries"] < 3 * layer  # not all of them are on the device at a time
