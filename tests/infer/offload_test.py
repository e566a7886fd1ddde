"""Weights in the host's memory: the same tokens, and where the arrays lie."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax import tokens
from glmjax.checkpoint import load as load_lib
from glmjax.checkpoint import folder
from glmjax.infer import decode
from glmjax.infer import engine
from glmjax.infer import offload
from glmjax.infer import prompt
from glmjax.infer import sampling
from glmjax.infer import score
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.quantize import tree

CONFIG = config_lib.GLMConfig(vocab_size=96, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=64)
SPECIALS = tokens.icetk(0, 80)
KERNELS = 4  # of a layer


@functools.cache
def params(bits: int | None = None) -> dict:
  found = glm.init_params(CONFIG, jax.random.key(1))
  return found if bits is None else tree.quantize_params(found, bits)


def placed(found: dict) -> list[str]:
  """Names of the arrays in the host's memory."""
  leaves = jax.tree_util.tree_leaves_with_path(found)
  return [jax.tree_util.keystr(path, simple=True, separator="/") for path, x in leaves
          if x.sharding.memory_kind == offload.HOST]


@functools.cache
def plain(bits: int | None = None) -> np.ndarray:
  """Tokens without offloading."""
  return generate(*engine.prepare(CONFIG, params(bits)))


def generate(config: config_lib.GLMConfig, found: dict) -> np.ndarray:
  texts = [5, 6, 7, SPECIALS.mask], [9, SPECIALS.gmask]
  some = [prompt.fill(text, SPECIALS, "rotary") for text in texts]
  rows = decode.make_rows(some, [8, 6], SPECIALS.pad)
  none = jnp.zeros(config.vocab_size, bool)
  state = decode.prefill(config, found, rows, 8)
  draws = sampling.draws([sampling.Sampling(1.0)] * 2, [0, 1])
  return np.asarray(decode.decode(config, found, rows, state, draws, none, none, jnp.int32(8)).generated_BT)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_tokens_are_the_same(bits):
  config, found = engine.prepare(CONFIG, params(bits), offload_layers=1)
  arrays = KERNELS * (1 if bits is None else 2)  # codes and scales
  names = placed(found)
  assert len(names) == arrays and all(name.startswith("layers_1/") and "/kernel" in name for name in names)
  np.testing.assert_array_equal(generate(config, found), plain(bits))


def test_scores_are_the_same():
  rows = score.window_rows([5, 6, 7, 8, 9], SPECIALS, "rotary", CONFIG.max_length)
  here, away = (engine.prepare(CONFIG, params(), layers) for layers in (0, 2))
  wanted, found = (score.score_rows(*model, rows, SPECIALS.pad)[0].log_probs for model in (here, away))
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("bits", [None, 4])
def test_on_a_tensor_mesh(bits):
  """Each device's host memory holds its parts; `place` leaves them split as they were."""
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(tensor=2), jax.devices()[:2])
  boxed = jax.eval_shape(lambda: glm.init(CONFIG, jax.random.key(1)))
  with partitioning.use(mesh):
    split = jax.device_put(params(), partitioning.shardings(boxed, mesh))
    split = split if bits is None else tree.quantize_params(split, bits)
    config, found = engine.prepare(CONFIG, split, offload_layers=1)
    np.testing.assert_array_equal(generate(config, found), plain(bits))
  assert len(placed(found)) == KERNELS * (1 if bits is None else 2)
  wo = jax.tree.leaves(found["layers_1"]["mlp"]["wo"]["kernel"])[0]
  assert wo.sharding.shard_shape(wo.shape)[0] == wo.shape[0] // 2


def test_compiled_programs_take_them_from_the_host():
  config, found = engine.prepare(CONFIG, params(), offload_layers=2)
  rows = decode.make_rows([prompt.fill([5, SPECIALS.gmask], SPECIALS, "rotary")], [8], SPECIALS.pad)
  text = decode.prefill.lower(config, found, rows, 8).compile().as_text()
  entry = text[:text.index("\n")]  # the layout of the arguments; S(5) is the host's memory
  assert entry.count("S(5)") == 2 * KERNELS - 3  # of a prompt's last layer only keys and values are used


class Letters:
  """Tokenizer of a model that is never asked."""

  num_image_tokens, vocab_size, specials = 0, 96, SPECIALS

  @classmethod
  def load(cls, path: pathlib.Path) -> "Letters":
    return cls()

  def check_fits(self, size: int) -> None:
    assert size == self.vocab_size


@pytest.mark.parametrize("bits", [None, 4])
def test_loading_reads_them_by_the_cpu(bits, monkeypatch, tmp_path):
  """Never all of them on the device: they are read into the CPU's memory, and go from there one by one."""
  read = []

  def load(checkpoint: pathlib.Path, shardings: jax.sharding.Sharding | None) -> load_lib.LoadedModel:
    read.append(shardings)
    there = params(bits) if shardings is None else jax.device_put(params(bits), shardings)
    return load_lib.LoadedModel(CONFIG, there, tmp_path, bits, {})

  monkeypatch.setattr(load_lib, "load", load)
  monkeypatch.setattr(folder, "read_config", lambda path: folder.FolderConfig(CONFIG, {}, {}, {}))
  monkeypatch.setattr("glmjax.tokenizer.Tokenizer", Letters)
  here, away = (engine.Engine.load(tmp_path, offload_layers=layers) for layers in (0, 1))
  assert read[0] is None and read[1].device_set == {jax.local_devices(backend="cpu")[0]}
  assert len(placed(away.params)) == KERNELS * (1 if bits is None else 2)
  jax.tree.map(np.testing.assert_array_equal, away.params, here.params)
  with pytest.raises(errors.InputError, match="offload_layers is 3, and the model has 2"):
    engine.Engine.load(tmp_path, offload_layers=3)
  assert len(read) == 2  # the mistake is told before anything is read


def test_mistakes_and_platforms_without_host_memory(monkeypatch):
  for layers in (-1, 3):
    with pytest.raises(errors.InputError, match=f"offload_layers is {layers}"):
      engine.prepare(CONFIG, params(), layers)
  monkeypatch.setattr(offload, "HOST", "no_such_kind")
  with pytest.raises(errors.InputError, match="no no_such_kind memory for cpu"):
    engine.prepare(CONFIG, params(), 1)
