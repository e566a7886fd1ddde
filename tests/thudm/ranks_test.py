"""GLM-130B's INT4 and INT8 files of several ranks, whose kernels have scales for each part of the inputs: inference."""

import pathlib

import compilations
import jax
import numpy as np
import pytest

from glmjax.checkpoint import export
from glmjax.checkpoint import load as ours
from glmjax.infer import ahead
from glmjax.infer import engine
from glmjax.infer import placement
from glmjax.infer import runner
from glmjax.thudm import load

PROMPTS, TOKENS = ["the quick brown fox [gMASK]", "hello [MASK] world"], 6


@pytest.fixture(scope="module")
def folders(make, tmp_path_factory) -> dict[tuple[int, str], pathlib.Path]:
  """Of both precisions the model as it was imported, and its export of the layout "cpu"."""
  found, root = {}, tmp_path_factory.mktemp("ranks")
  for bits in (4, 8):
    there = make(root / f"their{bits}", "glm-130b", 2, bits)
    found[bits, "plain"], found[bits, "cpu"] = root / f"plain{bits}", root / f"cpu{bits}"
    load.import_model("glm-130b", there, found[bits, "plain"], num_heads=8)
    export.export(found[bits, "plain"], found[bits, "cpu"], layout="cpu")
  return found


def precision(mesh: str | None) -> placement.Precision:
  """Returns the model's own; on a mesh float32: XLA's CPU compiler dies of half-precision sums over devices."""
  return placement.Precision(None if mesh is None else "float32")


@pytest.mark.parametrize("mesh", [None, "tensor=2", "tensor=4,data=2"])
@pytest.mark.parametrize("layout", ["plain", "cpu"])
@pytest.mark.parametrize("bits", [4, 8])
def test_inference_loads_it(folders, bits, layout, mesh):
  """As it does what is whole in memory: the same parameters, and the same answers."""
  whole, place = ours.load(folders[bits, layout]), placement.on_mesh(mesh)
  assert whole.params["layers"]["attention"]["out"]["kernel"].scale.shape[1] == 2
  expected = runner.Runner(precision(mesh).of(whole.config), whole.params, place)
  model = engine.Engine.load(folders[bits, layout], precision(mesh), mesh=mesh)
  assert jax.tree.structure(model.runner.params) == jax.tree.structure(expected.params)
  for x, y in zip(jax.tree.leaves(model.runner.params), jax.tree.leaves(expected.params)):
    np.testing.assert_array_equal(x, y)
    assert x.sharding == y.sharding
  assert model.generate(PROMPTS, TOKENS) == engine.Engine(expected, model.tokenizer).generate(PROMPTS, TOKENS)


@pytest.mark.parametrize("mesh", [None, "tensor=2"])
def test_its_programs_are_compiled_while_it_is_read(folders, mesh):
  """Nothing is left to be compiled when it is asked."""
  jax.clear_caches()
  model = engine.Engine.load(folders[4, "cpu"], precision(mesh), mesh=mesh, first=ahead.First(PROMPTS, TOKENS))
  with compilations.noted() as compiled:
    model.generate(PROMPTS, TOKENS)
  assert not compiled
