"""Frozen parameters never change, and the others are trained as if the frozen ones' updates were zero."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pipelined
from pipelined import Case, change
import pytest

from glmjax.models import params as params_lib
from glmjax.parallel import partitioning
from glmjax.quantize import qarray
from glmjax.train import diagnose
from glmjax.train import feed
from glmjax.train import objective as objective_lib
from glmjax.train import pipeline as pipeline_lib
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib
from glmjax.train.pipeline import stage_layout

CONFIG = change(hidden_dropout=0.0, attention_dropout=0.0)
ONE = Case(config=CONFIG)
CASES = {
  "plain": ONE,
  "zero1": Case((("data", 2),), strategy="zero1", config=CONFIG),
  "1f1b": Case((("stage", 2),), pipeline_lib.PipelineConfig(4), config=CONFIG),
  "gpipe": Case((("stage", 2),), pipeline_lib.PipelineConfig(4, kind="gpipe"), config=CONFIG),
}
STEPS = 2


def not_embedding(path: str, param: params_lib.Param) -> bool:
  return param.part != "embedding"


def not_kernels(path: str, param: params_lib.Param) -> bool:
  return not param.quantizes


def freezing(tx: optax.GradientTransformation, is_trained: params_lib.Predicate) -> optax.GradientTransformation:
  """The optimizer, with zeros as the updates of what is not trained."""

  def update(grads, state, params=None):
    updates, state = tx.update(grads, state, params)
    trained, frozen = params_lib.split(updates, is_trained)
    return params_lib.merge(trained, jax.tree.map(jnp.zeros_like, frozen)), state

  return optax.GradientTransformation(tx.init, update)


def train(case: Case, tx, stages, state: state_lib.TrainState) -> tuple[state_lib.TrainState, dict]:
  """Steps from a state in the model's order; the last state in that order, and the last metrics."""
  rules = partitioning.STRATEGIES[case.strategy]
  rows = pipelined.MICRO * pipelined.ROWS
  layout = feed.Layout.make(
    case.mesh, rules, rows, pipelined.ROWS, pipelined.LENGTH, case.config.position_kind, case.config.vocab_size
  )
  recipe = step_lib.Recipe(pipelined.OPTIMIZER, schedules.Constant(1e-2))
  objective = objective_lib.Objective(case.config, chunk=case.chunk, pipeline=case.pipeline)
  with partitioning.use(case.mesh, rules):
    state = stages.put_in_stages(jax.device_put(state, jax.tree.map(lambda x: x.sharding, stages.as_checkpointed)))
    shardings = jax.tree.map(lambda x: x.sharding, stages.in_stages)
    step = step_lib.compile_train_step(objective, recipe, tx, shardings)
    for i in range(STEPS):
      info = step_lib.StepInfo(*map(jnp.uint32, (i * rows, i * rows, rows)))
      state, metrics = step(state, layout.put(pipelined.rows()), info)
    assert metrics["applied"]
    return jax.device_get(stages.put_back(state)), jax.device_get(metrics)


@functools.cache
def first(is_trained: params_lib.Predicate) -> state_lib.TrainState:
  """The state that every case begins with, in the model's order."""
  one = state_lib.abstract(CONFIG, pipelined.TX, ONE.mesh, is_trained=is_trained)
  return jax.device_get(state_lib.create(CONFIG, pipelined.TX, 0, one, is_trained=is_trained))


def start(case: Case, is_trained: params_lib.Predicate) -> tuple[stage_layout.StageLayout, state_lib.TrainState]:
  rules = partitioning.STRATEGIES[case.strategy]
  return stage_layout.make(CONFIG, pipelined.TX, case.mesh, rules, case.pipeline, is_trained), first(is_trained)


@functools.cache
def with_zeroed_updates(is_trained: params_lib.Predicate) -> tuple[state_lib.TrainState, dict]:
  """The same steps of a state that is trained as a whole, on one device."""
  stages, state = start(ONE, params_lib.always)
  return train(ONE, freezing(pipelined.TX, is_trained), stages, state)


@pytest.mark.parametrize(
  "name, is_trained",
  [(name, not_kernels) for name in CASES] + [(name, not_embedding) for name in ("plain", "zero1", "1f1b")],
)
def test_training_the_rest_is_training_with_zeroed_updates(name, is_trained):
  case = CASES[name]
  stages, before = start(case, is_trained)
  assert before.frozen and not {*params_lib.flatten(before.params)} & {*params_lib.flatten(before.frozen)}
  after, metrics = train(case, pipelined.TX, stages, before)
  chex.assert_trees_all_equal(after.frozen, before.frozen)
  chex.assert_trees_all_equal_structs(after.opt_state, before.opt_state)
  moments = [x for x in jax.tree.leaves(before.opt_state) if x.ndim]
  assert len(moments) == 2 * len(jax.tree.leaves(before.params))  # none of frozen parameters
  want, whole = with_zeroed_updates(is_trained)
  chex.assert_trees_all_close(after.model_params, want.params, atol=2e-5)
  np.testing.assert_allclose(metrics["loss"], whole["loss"], rtol=2e-5)
  left = "grad_norm_norms" if is_trained is not_kernels else "grad_norm_mlp"
  np.testing.assert_allclose(metrics[left], whole[left], rtol=2e-4)


def quantized(frozen):
  """Frozen kernels as INT8 codes."""
  return params_lib.nest(
    {
      path: qarray.quantize(jnp.asarray(x), 8, params_lib.known(path).inputs)
      for path, x in params_lib.flatten(frozen).items()
    }
  )


@functools.cache
def on_floats() -> tuple[Any, state_lib.TrainState]:
  """(Frozen kernels as INT8 codes, the state that was trained, on one device, on the floats that these stand for)."""
  stages, state = start(ONE, not_kernels)
  codes = jax.device_get(quantized(state.frozen))
  floats = params_lib.nest({path: qarray.dequantize(x) for path, x in params_lib.flatten(codes).items()})
  return codes, train(ONE, pipelined.TX, stages, dataclasses.replace(state, frozen=floats))[0]


@pytest.mark.parametrize("name", ["plain", "1f1b"])
def test_the_rest_is_trained_on_quantized_kernels(name):
  """As on the floats that the codes stand for."""
  case, (codes, want) = CASES[name], on_floats()
  stages, state = start(case, not_kernels)

  def split_as(x, sharded):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharded.sharding), x)

  def with_codes(layout):
    flat = params_lib.flatten(layout.frozen)
    return dataclasses.replace(
      layout, frozen=params_lib.nest({path: split_as(x, flat[path]) for path, x in params_lib.flatten(codes).items()})
    )

  stages = dataclasses.replace(
    stages, as_checkpointed=with_codes(stages.as_checkpointed), in_stages=with_codes(stages.in_stages)
  )
  after, _ = train(case, pipelined.TX, stages, dataclasses.replace(state, frozen=codes))
  chex.assert_trees_all_equal(after.frozen, codes)
  chex.assert_trees_all_close(after.params, want.params, atol=2e-4)


def test_checkpoints_have_what_is_trained_alone():
  _, state = start(ONE, not_kernels)
  assert not state.trained().frozen and jax.tree.leaves(state.trained()) != []
  whole = state_lib.abstract(CONFIG, pipelined.TX, ONE.mesh)
  assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(whole) if "frozen" in jax.tree_util.keystr(path)]


def diagnosed(state: state_lib.TrainState, **changes) -> diagnose.Finding | None:
  """Where a step from this state is first not finite, on one device."""
  rows = pipelined.rows() | changes
  layout = feed.Layout.make(
    ONE.mesh,
    partitioning.FSDP,
    len(rows["tokens"]),
    pipelined.ROWS,
    pipelined.LENGTH,
    CONFIG.position_kind,
    CONFIG.vocab_size,
  )
  with partitioning.use(ONE.mesh):
    return diagnose.first_not_finite(
      objective_lib.Objective(CONFIG, chunk=24), state, layout.put(rows), pipelined.MICRO, jnp.float32(1)
    )


def test_a_step_on_quantized_kernels_is_diagnosed():
  _, state = start(ONE, not_kernels)
  state = dataclasses.replace(state, frozen=quantized(state.frozen))
  assert diagnosed(state) is None
  scale = state.params["final_norm"]["scale"]
  params = state.params | {"final_norm": {**state.params["final_norm"], "scale": scale * np.inf}}
  assert diagnosed(dataclasses.replace(state, params=params)).part == "parameters of the final_norm/scale"
  params = state.params | {"final_norm": {**state.params["final_norm"], "scale": scale * np.float32(3e38)}}
  assert diagnosed(dataclasses.replace(state, params=params)).kind == "forward"


def test_a_state_without_trained_layers_is_looked_at():
  stages, state = start(ONE, lambda path, param: path.startswith("final_norm"))
  assert diagnosed(state) is None
  with partitioning.use(ONE.mesh):
    assert diagnose.bad_part(stages, jax.device_put(state), "float32") is None
    norm = {name: np.full_like(x, np.inf) for name, x in state.params["final_norm"].items()}
    bad = jax.device_put(dataclasses.replace(state, params={"final_norm": norm}))
    assert "the final_norm" in diagnose.bad_part(stages, bad, "float32")
