"""The parameter table is what Linen makes: paths, shapes, logical axes, initial spreads, counts."""

import dataclasses
import functools
import itertools
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.infer import placement
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.plan import advice
from glmjax.plan import memory
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import state as state_lib

BASE = config_lib.GLMConfig(vocab_size=80, num_layers=3, embed_dim=32, num_heads=4, mlp_dim=48, max_length=16)
MODELS = {
  "glm-130b": {},
  "chatglm-6b": dict(positions="rotary_2d", mlp="gelu_tanh", tie_embeddings=False),
  "glm-10b": dict(positions="learned_2d", mlp="gelu_tanh", norm="pre"),
  "sandwich": dict(norm="sandwich", causal=True),
  "embedding norm": dict(norm="post", embedding_norm=True),
  "prefix": dict(prefix_length=5),
}


@pytest.fixture(params=MODELS)
def config(request) -> config_lib.GLMConfig:
  return dataclasses.replace(BASE, **MODELS[request.param])


def boxed(config: config_lib.GLMConfig) -> dict:
  tree = jax.eval_shape(lambda: glm.init(config, jax.random.key(0)))

  def is_box(x):
    return isinstance(x, nn.LogicallyPartitioned)

  return {
    "/".join(str(key.key) for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
  }


def test_stacked_and_apart_are_what_linen_makes(config):
  found = boxed(config)
  table = params_lib.table(config)
  assert {path: (box.value.shape, box.names) for path, box in found.items()} == {
    path: (param.shape, param.axes) for path, param in table.items()
  }
  found = boxed(dataclasses.replace(config, scan_layers=False))
  assert {path: (box.value.shape, box.names) for path, box in found.items()} == {
    path: (param.shape, param.axes) for path, param in params_lib.apart(config)
  }
  assert all(param.part in params_lib.PARTS for param in table.values())


def test_spreads(config):
  wide = dataclasses.replace(config, embed_dim=256, mlp_dim=512, vocab_size=512)
  flat = arrays.named_leaves(glm.init_params(wide, jax.random.key(1)))
  for path, param in params_lib.table(wide).items():
    x = np.asarray(flat[path])
    if param.init == "normal":
      each = np.moveaxis(x, param.gains_axis, 0) if param.gains else x[None]
      for part, gain in zip(each, param.gains or (1.0,), strict=True):
        assert part.std() == pytest.approx(param.std * gain, rel=0.08), path
    else:
      assert (x == {"ones": 1, "zeros": 0}[param.init]).all(), path


def test_counts(config):
  """By arithmetic that knows nothing of the table."""
  n, d, f, branches = config.num_layers, config.embed_dim, config.mlp_dim, 2 if config.mlp == "geglu" else 1
  kernels = n * (4 * d * d + (branches + 1) * d * f)
  assert params_lib.count_of_matmuls(config) == kernels + config.vocab_size * d
  vectors = 4 * d + branches * f + d + 2 * d * (4 if config.norm == "sandwich" else 2) + 2 * config.prefix_length * d
  tables = config.vocab_size * d * (1 if config.tie_embeddings else 2)
  positions = 2 * (config.max_length + 1) * d if config.positions == "learned_2d" else 0
  norms = 2 * d * (2 if config.embedding_norm else 1)
  assert params_lib.count(config) == kernels + n * vectors + tables + positions + norms


def test_what_is_known_without_a_model(config):
  """Is what the model's own table says, but for sizes and spreads."""

  def facts(param):
    return (param.part, param.axes, param.inputs, param.matrix, param.decays, param.quantizes, param.cut)

  for path, param in [*params_lib.table(config).items(), *params_lib.apart(config)]:
    assert facts(params_lib.known(path)) == facts(param), path
  for path in ("layers/attention/gate/kernel", "layers_0/mlp/wi/scale", "layers_x/mlp/wi/kernel", "mlp/wi/kernel", ""):
    with pytest.raises(errors.InputError, match=f"{path} is no parameter of any model"):
      params_lib.known(path)


def test_figures_of_the_originals():
  """130B by the paper's sizes, ChatGLM-6B with a head of its own."""
  glm_130b = config_lib.GLMConfig(150_528, 70, 12_288, 96, 32_768)
  assert params_lib.count(glm_130b) == 128_697_794_560
  assert jnp.dtype(jnp.float16).itemsize * params_lib.count(glm_130b) / 1e9 == pytest.approx(257.4, abs=0.1)


def abstract(mesh: jax.sharding.Mesh, config: config_lib.GLMConfig) -> state_lib.TrainState:
  return state_lib.abstract(config, optimizer_lib.AdamW().make(), mesh)


def test_sizes_that_do_not_divide_over_a_mesh(config):
  """Whoever asks hears the same: training's and inference's layout, and a plan's tables."""
  sizes = params_lib.sizes(config)
  assert (sizes["heads"], sizes["mlp"], sizes["vocab"], sizes["embed"], sizes["layers"]) == (4, 48, 80, 32, 3)
  assert memory.sets(config) == [1, 2, 4]
  for tensor, fsdp in itertools.product((1, 2, 3, 4, 8), (1, 2, 3)):
    if tensor * fsdp > 8:
      continue
    devices = jax.devices()[: tensor * fsdp]
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, fsdp=fsdp, tensor=tensor), devices)
    divides = tensor in (1, 2, 4) and fsdp in (1, 2)
    assert advice._splits(config, tensor, fsdp) == divides
    said = [] if divides else ["does not divide over"] * 2
    found = []
    for check in (placement.Placement(mesh).check, functools.partial(abstract, mesh)):
      try:
        check(config)
      except errors.InputError as error:
        found.append(re.search("does not divide over", str(error))[0])
    assert found == said, (tensor, fsdp)
  names = [found.name for found in partitioning.uneven(sizes, {"stage": 2, "tensor": 64})]
  assert names == ["num_heads", "mlp_dim", "vocab_size", "num_layers"]
