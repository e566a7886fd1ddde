"""Adapters beside a loaded model compute what they did in training, on one device and on a mesh, float or quantized."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trained_adapters
from glmjax import errors
from glmjax.checkpoint import load
from glmjax.infer import adapters
from glmjax.infer import placement as placement_lib
from glmjax.infer import runner as runner_lib
from glmjax.models import glm
from glmjax.models import lowrank
from glmjax.models import params as params_lib


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> trained_adapters.Made:
  return trained_adapters.make(tmp_path_factory.mktemp("adapters"))


def loaded(made: trained_adapters.Made, base: str, name: str, mesh: str | None) -> runner_lib.Runner:
  placement = placement_lib.on_mesh(mesh)
  model = runner_lib.read(made.base(base), placement)
  model = adapters.Adapter.read(made.run(name, base)).beside(model, made.base(base), placement)
  return runner_lib.Runner(model.config, model.params, placement, given_away=True)


def hidden(runner: runner_lib.Runner) -> np.ndarray:
  def program(config, params, tokens):
    positions = jnp.arange(tokens.shape[1])[None].repeat(len(tokens), 0)
    start, end = jnp.zeros_like(tokens), jnp.full_like(tokens, tokens.shape[1])
    return glm.GLM(config).apply({"params": params}, tokens, positions, start, end)

  return np.asarray(runner.run(jax.jit(program, static_argnums=0), trained_adapters.TOKENS))


def trained_logits(made: trained_adapters.Made, base: str, name: str) -> np.ndarray:
  """What the trainer's model computes, with the adapter apart."""
  config, trained = made.trained(name, base)
  params = params_lib.merge(trained, load.load(made.base(base)).params)
  tokens = jnp.asarray(trained_adapters.TOKENS)
  positions = jnp.arange(tokens.shape[1])[None].repeat(len(tokens), 0)
  start, end = jnp.zeros_like(tokens), jnp.full_like(tokens, tokens.shape[1])
  return np.asarray(jax.jit(glm.GLM(config).apply)({"params": params}, tokens, positions, start, end))


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


def test_merged_is_unmerged(made):
  config, trained = made.trained("lora", "float")
  params, factors = params_lib.flatten(load.load(made.base("float")).params), params_lib.flatten(trained)
  for path in config.adapted:
    kernel, at = f"layers/{path}/kernel", f"layers/{path}/lora_"
    parts = zip(params[kernel], factors[f"{at}a"], factors[f"{at}b"], strict=True)
    params[kernel] = jnp.stack([lowrank.merged(*each, config.lora_scale) for each in parts])
  plain = dataclasses.replace(config, lora_rank=0, lora_kernels="")
  merged = hidden(runner_lib.Runner(plain, params_lib.nest(params)))
  np.testing.assert_allclose(merged, trained_logits(made, "float", "lora"), atol=2e-4)


def test_another_base_is_told(made, caplog):
  placement = placement_lib.on_mesh(None)
  adapter = adapters.Adapter.read(made.run("lora", "int4"))
  with caplog.at_level(logging.WARNING, "glmjax"):
    adapter.beside(runner_lib.read(made.base("float"), placement), made.base("float"), placement)
  assert "another precision, or another model" in caplog.text and str(made.base("int4")) in caplog.text


def test_mistakes(made, tmp_path):
  with pytest.raises(errors.InputError, match="holds a model, not an adapter: give it as --checkpoint"):
    adapters.Adapter.read(made.base("float"))
  placement = placement_lib.on_mesh(None)
  model = runner_lib.read(made.base("float"), placement)
  other = dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=99, mlp_dim=50))
  with pytest.raises(errors.InputError, match="beside another model than .*: mlp_dim is 48 there and 50 here"):
    adapters.Adapter.read(made.run("lora", "float")).beside(other, made.base("float"), placement)
  with pytest.raises(errors.InputError, match="holds an adapter of .*float: give that as --checkpoint"):
    load.load(made.run("lora", "float"))
  assert json.loads((made.run("lora", "float") / "config.json").read_text())["base"]["bits"] is None
