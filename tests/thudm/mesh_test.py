"""An imported checkpoint needs no mesh of its own: any mesh reads its parts of the blocks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.checkpoint import load as load_lib
from glmjax.models import glm
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.thudm import load

LINE = jnp.arange(8)[None]


def inputs(positions: str) -> tuple[jax.Array, ...]:
  return LINE, LINE if positions == "rotary" else jnp.stack([LINE, 0 * LINE], 1), 0 * LINE, LINE + 1


@pytest.mark.parametrize("family, bits, prefix", [("glm-130b", None, 0), ("glm-130b", 4, 0), ("chatglm-6b", None, 4)])
def test_loads_on_eight_devices(make, tmp_path, family, bits, prefix):
  """fsdp 4 x tensor 2: each array is split as the model says, holds the same numbers, and gives the same logits."""
  extra = {"prefix_length": prefix} if prefix else {}
  make(tmp_path / "source", family, **({"degree": 2} if family == "glm-130b" else {}), dtype="float32", **extra)
  load.import_model(family, tmp_path / "source", tmp_path / "ours", bits=bits, tokenizer="none")
  alone = load_lib.load(tmp_path / "ours")
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
  boxed = jax.eval_shape(lambda key: glm.init(alone.config, key), jax.random.key(0))
  shardings = partitioning.shardings(boxed, mesh)
  spread = load_lib.load(tmp_path / "ours", shardings=shardings)
  chex.assert_trees_all_equal(spread.params, alone.params)
  if bits is None:
    jax.tree.map(lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), spread.params, shardings)
  attention, mlp = spread.params["layers"]["attention"], spread.params["layers"]["mlp"]
  wo = mlp["wo"]["kernel"] if bits is None else mlp["wo"]["kernel"].values  # [N, F, D]: tensor, fsdp
  assert wo.addressable_shards[0].data.shape == (wo.shape[0], wo.shape[1] // 2, wo.shape[2] // 4)
  if prefix:
    assert attention["prefix_key"].addressable_shards[0].data.shape[1] == alone.config.num_heads // 2
  run = jax.jit(lambda params: glm.GLM(alone.config).apply({"params": params}, *inputs(alone.config.positions)))
  with partitioning.use(mesh):
    found = run(spread.params)
  np.testing.assert_allclose(found, run(alone.params), atol=1e-4)
