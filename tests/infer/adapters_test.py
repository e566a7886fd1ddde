"""Adapters beside a loaded model compute what they did in training, on one device and on a mesh, float or quantized."""

import dataclasses
import functools
import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trained_adapters
import untrained_adapters
from glmjax import errors
from glmjax.checkpoint import adapter as adapter_lib
from glmjax.checkpoint import export
from glmjax.checkpoint import load
from glmjax.infer import adapters
from glmjax.infer import placement as placement_lib
from glmjax.infer import runner as runner_lib
from glmjax.models import glm
from glmjax.models import params as params_lib


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> trained_adapters.Made:
  return trained_adapters.make(tmp_path_factory.mktemp("adapters"))


def loaded(made: trained_adapters.Made, base: str, name: str, mesh: str | None) -> runner_lib.Runner:
  placement = placement_lib.on_mesh(mesh)
  model = runner_lib.read(made.base(base), placement)
  model = adapters.beside(adapter_lib.Adapter.read(made.run(name, base)), model, made.base(base), placement)
  return runner_lib.Runner(model.config, model.params, placement, given_away=True)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens):
  positions = jnp.arange(tokens.shape[1])[None].repeat(len(tokens), 0)
  start, end = jnp.zeros_like(tokens), jnp.full_like(tokens, tokens.shape[1])
  return glm.GLM(config).apply({"params": params}, tokens, positions, start, end)


def hidden(runner: runner_lib.Runner) -> np.ndarray:
  return np.asarray(runner.run(_logits, trained_adapters.TOKENS))


@functools.cache
def trained_logits(made: trained_adapters.Made, base: str, name: str) -> np.ndarray:
  """What the trainer's model computes, with the adapter apart."""
  config, trained = made.trained(name, base)
  params = params_lib.merge(trained, load.load(made.base(base)).params)
  return np.asarray(_logits(config, params, jnp.asarray(trained_adapters.TOKENS)))


@pytest.mark.parametrize("mesh", [None, "tensor=2,data=2"])
@pytest.mark.parametrize("base", ["float", "int4"])
@pytest.mark.parametrize("name", trained_adapters.ADAPTERS)
def test_computes_what_was_trained(name, base, mesh, made):
  expected, found = trained_logits(made, base, name), hidden(loaded(made, base, name, mesh))
  np.testing.assert_allclose(found, expected, atol=2e-4)
  alone = runner_lib.Runner(*_alone(made, base))
  assert np.abs(hidden(alone) - expected).max() > 1e-3, "the adapter changes nothing"


def _alone(made, base):
  model = load.load(made.base(base))
  return model.config, model.params


@pytest.mark.parametrize("base", ["float", "int4"])
@pytest.mark.parametrize("name", trained_adapters.ADAPTERS)
def test_merged_is_unmerged(name, base, made, tmp_path):
  """To rounding: kernels that are quantized anew tell what that changed."""
  told = export.export(made.base(base), tmp_path / "merged", adapter=made.run(name, base))
  placement = placement_lib.on_mesh(None)
  model = runner_lib.read(tmp_path / "merged", placement)
  assert not model.config.lora_rank and model.bits == {"float": None, "int4": 4}[base]
  found = hidden(runner_lib.Runner(model.config, model.params, placement, given_away=True))
  expected = trained_logits(made, base, name)
  if base == "int4" and name == "lora":
    assert 0.01 < told["merge_error"] < 0.15
    np.testing.assert_allclose(found, expected, atol=0.3)
    assert np.abs(found - expected).mean() < np.abs(expected - hidden(runner_lib.Runner(*_alone(made, base)))).mean()
  else:
    assert "merge_error" not in told
    np.testing.assert_allclose(
      found, expected, atol=2e-4 if base == "float" else 2e-3
    )  # floats beside INT4 are float16


def test_a_float_model_is_merged_and_quantized(made, tmp_path):
  told = export.export(made.base("float"), tmp_path / "int8", bits=8, adapter=made.run("lora", "float"))
  assert told["bits"] == 8 and 0 < told["merge_error"] < 0.01
  placement = placement_lib.on_mesh(None)
  model = runner_lib.read(tmp_path / "int8", placement)
  found = hidden(runner_lib.Runner(model.config, model.params, placement, given_away=True))
  np.testing.assert_allclose(found, trained_logits(made, "float", "lora"), atol=0.1)


def test_another_base_is_told(made, caplog):
  placement = placement_lib.on_mesh(None)
  adapter = adapter_lib.Adapter.read(made.run("lora", "int4"))
  with caplog.at_level(logging.WARNING, "glmjax"):
    adapters.beside(adapter, runner_lib.read(made.base("float"), placement), made.base("float"), placement)
  assert "another precision, or another model" in caplog.text and str(made.base("int4")) in caplog.text


@pytest.fixture(scope="module")
def prefixed(made, tmp_path_factory) -> pathlib.Path:
  """A model that a prefix was merged into."""
  out = tmp_path_factory.mktemp("prefixed") / "model"
  export.export(made.base("float"), out, adapter=made.run("p_tuning", "float"))
  return out


def put_beside(adapter: pathlib.Path, base: pathlib.Path) -> runner_lib.Runner:
  placement = placement_lib.on_mesh(None)
  model = runner_lib.read(base, placement, adapter=adapter)
  return runner_lib.Runner(model.config, model.params, placement, given_away=True)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("lora", "beside another model than .*: prefix_length is 0 there and 3 here"),
    ("p_tuning", r"holds a prefix \(P-Tuning\), and .*model has one of 3 already"),
    ("projection", r"holds a prefix \(P-Tuning\), and .*model has one of 3 already"),
  ],
)
def test_no_adapter_takes_the_place_of_a_models_prefix(name, message, made, prefixed, tmp_path):
  """It was trained beside a model without; whether it is merged or put beside, it is refused by name."""
  with pytest.raises(errors.InputError, match=message):
    export.export(prefixed, tmp_path / "out", adapter=made.run(name, "float"))
  assert not (tmp_path / "out").exists()
  with pytest.raises(errors.InputError, match=message):
    put_beside(made.run(name, "float"), prefixed)


def test_factors_that_were_trained_beside_a_prefix_leave_it_there(made, prefixed, tmp_path):
  lora = untrained_adapters.write_one(prefixed, tmp_path / "lora", 3, untrained_adapters.LORA["wide"])
  export.export(prefixed, tmp_path / "merged", adapter=lora)
  merged = runner_lib.read(tmp_path / "merged", placement := placement_lib.on_mesh(None))
  assert merged.config.prefix_length == 3 and not merged.config.lora_rank
  found = hidden(runner_lib.Runner(merged.config, merged.params, placement, given_away=True))
  np.testing.assert_allclose(found, hidden(put_beside(lora, prefixed)), atol=2e-4)
  with pytest.raises(errors.InputError, match="prefix_length is 3 there and 0 here"):
    export.export(made.base("float"), tmp_path / "no", adapter=lora)


def test_mistakes(made, tmp_path):
  with pytest.raises(errors.InputError, match="holds a model, not an adapter: give it as --checkpoint"):
    adapter_lib.Adapter.read(made.base("float"))
  placement = placement_lib.on_mesh(None)
  model = runner_lib.read(made.base("float"), placement)
  other = dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=99, mlp_dim=50))
  with pytest.raises(errors.InputError, match="beside another model than .*: mlp_dim is 48 there and 50 here"):
    adapters.beside(adapter_lib.Adapter.read(made.run("lora", "float")), other, made.base("float"), placement)
  with pytest.raises(errors.InputError, match="holds an adapter of .*float: give that as --checkpoint"):
    load.load(made.run("lora", "float"))
  assert json.loads((made.run("lora", "float") / "config.json").read_text())["base"]["bits"] is None
