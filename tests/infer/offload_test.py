"""Weights in the host's memory: the same tokens, and where the arrays lie."""

import functools

import jax
import numpy as np
import pytest

from glmjax import errors
from glmjax import positions as positions_lib
from glmjax import tokens
from glmjax.infer import decode
from glmjax.infer import offload
from glmjax.infer import placement
from glmjax.infer import prompt
from glmjax.infer import runner
from glmjax.infer import sampling
from glmjax.infer import score
from glmjax.infer import scoring
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import weights

CONFIG = config_lib.GLMConfig(vocab_size=96, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=64)
SPECIALS = tokens.icetk(0, 80)
KERNELS = 4  # of a layer


@functools.cache
def params(bits: int | None = None) -> dict:
  found = glm.init_params(CONFIG, jax.random.key(1))
  return found if bits is None else weights.quantize(found, bits)


def placed(found: dict) -> list[str]:
  """Names of the arrays in the host's memory."""
  leaves = jax.tree_util.tree_leaves_with_path(found)
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, x in leaves
    if x.sharding.memory_kind == offload.HOST
  ]


def runner_of(bits: int | None, offload_layers: int, mesh: str | None = None) -> runner.Runner:
  return runner.Runner(CONFIG, params(bits), placement.on_mesh(mesh), offload_layers)


@functools.cache
def plain(bits: int | None = None) -> np.ndarray:
  """Tokens without offloading."""
  return generate(runner_of(bits, 0))


def generate(model: runner.Runner) -> np.ndarray:
  texts = [5, 6, 7, SPECIALS.mask], [9, SPECIALS.gmask]
  some = [prompt.fill(text, SPECIALS, positions_lib.ROTARY) for text in texts]
  batch, rows = decode.make_rows(some, [8, 6], SPECIALS.pad)
  none = np.zeros(model.config.vocab_size, bool)
  state = model.run(decode.prefill, batch, rows, new_tokens=8)
  draws = sampling.draws([sampling.Sampling(1.0)] * 2, [0, 1])
  return np.asarray(model.run(decode.decode, rows, state, draws, none, none, np.int32(8)).generated_BT)


@pytest.mark.parametrize("bits, mesh", [(None, None), (8, None), (4, None), (None, "tensor=2"), (4, "tensor=2")])
def test_tokens_are_the_same(bits, mesh):
  """On a mesh each device's host memory holds its parts."""
  model = runner_of(bits, 1, mesh)
  arrays = KERNELS * (1 if bits is None else 2)  # codes and scales
  names = placed(model.params)
  assert len(names) == arrays and all(name.startswith("layers_1/") and "/kernel" in name for name in names)
  np.testing.assert_array_equal(generate(model), plain(bits))
  wo = jax.tree.leaves(model.params["layers_1"]["mlp"]["wo"]["kernel"])[0]
  assert wo.sharding.shard_shape(wo.shape)[0] == wo.shape[0] // (1 if mesh is None else 2)


def test_scores_are_the_same():
  """Within rounding: on one CPU weights lie otherwise (models/output_rows.py), if they are not elsewhere."""
  rows = score.window_rows([5, 6, 7, 8, 9], SPECIALS, positions_lib.ROTARY, CONFIG.max_length)
  wanted, found = (scoring.score_rows(runner_of(None, layers), rows, SPECIALS.pad)[0].log_probs for layers in (0, 2))
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_compiled_programs_take_them_from_the_host():
  model = runner_of(None, 2)
  first = prompt.fill([5, SPECIALS.gmask], SPECIALS, positions_lib.ROTARY)
  with model.placement.scope():
    text = (
      decode.prefill.lower(model.config, model.params, *decode.make_rows([first], [8], SPECIALS.pad), new_tokens=8)
      .compile()
      .as_text()
    )
  entry = text[: text.index("\n")]  # the layout of the arguments; S(5) is the host's memory
  assert entry.count("S(5)") == 2 * KERNELS - 3  # of a prompt's last layer only keys and values are used


def test_mistakes_and_platforms_without_host_memory(monkeypatch):
  for layers in (-1, 3):
    with pytest.raises(errors.InputError, match=f"offload_layers is {layers}"):
      runner_of(None, layers)
  monkeypatch.setattr(offload, "HOST", "no_such_kind")
  with pytest.raises(errors.InputError, match="no no_such_kind memory for cpu"):
    runner_of(None, 1)
