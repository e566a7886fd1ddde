"""Real compilers of hardware that is not here: where the plan extra is installed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

SMALL = ["--gin.GLMConfig.num_layers=2", "--gin.GLMConfig.embed_dim=256", "--gin.GLMConfig.num_heads=8",
         "--gin.GLMConfig.mlp_dim=512", "--gin.GLMConfig.vocab_size=1024"]


def plan(name: str, *more: str) -> dict:
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  done = subprocess.run([sys.executable, "-m", "glmjax", "plan", "--json", f"--gin_file=plans/{name}.gin",
                         *[s.replace("GLMConfig.", "glmjax.models.config.GLMConfig.") for s in SMALL], *more],
                        env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout)


@pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="pip install 'glmjax[plan]'")
def test_gpus():
  found = plan("glm_130b_int4_rtx3090_4")
  assert found["fits"] and found["devices"] == 4 and found["peak_bytes_per_device"] == sum(found["memory"].values())
  assert found["tokens_per_second"] > 0 and found["memory"]["kv_cache"] == 2 * 2 * 2048 * 256 * 2 // 4


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="pip install 'glmjax[plan]'")
def test_tpus():
  found = plan("glm_130b_train_v5p_4x8x8", "--target=v5p:2x2x2", "--gin.glmjax.parallel.mesh.MeshConfig.fsdp=2",
               "--gin.glmjax.parallel.mesh.MeshConfig.tensor=4", "--gin.glmjax.plan.programs.Train.batch_size=8")
  assert found["fits"] and found["devices"] == 8 and 0 < found["mfu"] <= found["hfu"] * 1.05


def test_what_is_missing_is_told():
  if importlib.util.find_spec("jax_plugins"):
    pytest.skip("the compilers are here")
  done = subprocess.run([sys.executable, "-m", "glmjax", "plan", "--gin_file=plans/glm_130b_int4_rtx3090_4.gin"],
                        capture_output=True, text=True, check=False)
  assert done.returncode == 2 and "glmjax[plan]" in done.stderr and done.stderr.count("\n") == 1
