"""Losses of pairs of answers: those of dense logits on any mesh, learned beside a frozen base, and mistakes."""

import dataclasses
import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from answer_pairs import Pairs
import pytest

from glmjax import errors
from glmjax import tokens as tokens_lib
from glmjax.checkpoint import export
from glmjax.checkpoint import load
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.train import loop
from glmjax.train import losses
from glmjax.train import objective as objective_lib
from glmjax.train import preference
from glmjax.train import schedules
from glmjax.train import trainable

MESH = mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2)
METHODS = {"dpo": preference.DPO(beta=0.7), "orpo": preference.ORPO(weight=0.5)}


@pytest.mark.parametrize("sizes", [{}, dict(data=2, fsdp=2, tensor=2), dict(data=2, tensor=2, context=2)])
def test_entropies_of_tokens_are_the_plain_ones(sizes):
  r = np.random.default_rng(0)
  kernel, x = r.normal(size=(16, 40)).astype(np.float32), r.normal(size=(8, 12, 16)).astype(np.float32)
  targets, weights = r.integers(0, 40, (8, 12)), (r.random((8, 12)) < 0.4).astype(np.float32)
  want = np.where(weights, losses.cross_entropy(x @ kernel, targets), 0)
  with partitioning.use(mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes or dict(data=8)))):
    for chunk in (5, 100):
      have = jax.jit(losses.of_tokens, static_argnums=4)(kernel, x, targets, weights, chunk)
      np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


def dense(method, model, base, params, batch) -> jax.Array:
  """The loss as its paper has it, from all logits."""

  def log_probs(config) -> list[jax.Array]:
    whole = glm.unstack_layers(params) if not config.scan_layers else params
    args = [batch[name] for name in ("tokens", "positions", "attend_start", "attend_end")]
    logits = glm.GLM(config).apply({"params": whole}, *args)
    each = -losses.cross_entropy(logits, batch["targets"])
    kinds = (tokens_lib.OBJECTIVE_CHOSEN, tokens_lib.OBJECTIVE_REJECTED)
    masks = [(batch["objective"] == kind) * batch["loss_weights"] for kind in kinds]
    return [(each * mask).sum(-1) for mask in masks] + [mask.sum(-1) for mask in masks]

  chosen, rejected, chosen_tokens, rejected_tokens = log_probs(model)
  if isinstance(method, preference.DPO):
    of_base = jax.lax.stop_gradient(log_probs(base))
    return -jax.nn.log_sigmoid(method.beta * (chosen - of_base[0] - rejected + of_base[1])).sum()
  p, q = jnp.exp(chosen / chosen_tokens), jnp.exp(rejected / rejected_tokens)
  ratio = p / (1 - p) / (q / (1 - q))
  return (-chosen / chosen_tokens - method.weight * jax.nn.log_sigmoid(jnp.log(ratio))).sum()


@pytest.fixture(scope="module")
def wanted(tiny):
  """Of a method: (the model, its base, parameters, a batch, the dense loss and its gradient); once for all meshes."""
  base = dataclasses.replace(tiny, scan_layers=True)
  model = trainable.LoRA(rank=2).adapt(base)
  params = partitioning.unbox(glm.init(model, jax.random.key(0)))
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  batch = next(Pairs().batches(iter([(0, 8)]))) | {"rows": np.arange(8, dtype=np.int32)}

  @functools.cache
  def found(name: str) -> tuple:
    of_params = jax.jit(jax.value_and_grad(lambda params: dense(METHODS[name], model, base, params, batch)))
    return model, base, params, batch, of_params(params)

  return found


@pytest.mark.parametrize("sizes", [{}, dict(data=2, fsdp=2, tensor=2), dict(data=4, context=2)])
@pytest.mark.parametrize("name", METHODS)
def test_value_and_gradient_are_the_dense_ones(name, sizes, wanted):
  method, (model, base, params, batch, want) = METHODS[name], wanted(name)
  objective = objective_lib.Objective(model, chunk=5, preference=method, reference=base if method.compares else None)
  with partitioning.use(mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes or dict(data=8)))):
    have = jax.jit(jax.value_and_grad(lambda params: objective.loss(params, batch).total))(params)
    sums = jax.jit(objective.sums)(params, batch)
  np.testing.assert_allclose(have[0], want[0], rtol=2e-5)
  adapter = {path for path in params_lib.table(model) if path.endswith(("/lora_a", "/lora_b"))}
  got, wanted = (params_lib.flatten(each[1]) for each in (have, want))
  chex.assert_trees_all_close(
    {path: got[path] for path in adapter}, {path: wanted[path] for path in adapter}, atol=2e-5
  )
  assert float(sums.pairs.count) == 8 and 0 <= float(sums.pairs.ordered) <= 8
  np.testing.assert_allclose(sums.pairs.loss, want[0], rtol=2e-5)


def test_rows_that_are_no_pairs_count_nothing():
  weights, kinds = np.zeros((2, 4), np.float32), np.full((2, 4), tokens_lib.OBJECTIVE_CHOSEN)
  weights[0], kinds[0, 2:] = 1, tokens_lib.OBJECTIVE_REJECTED
  entropies = np.where(weights, 2.0, 0.0)
  for method in METHODS.values():
    pairs, slopes = preference.of_pairs(method, entropies, None, weights, kinds)
    assert float(pairs.count) == 1 and np.isfinite(pairs.loss)
    assert np.all(slopes[1] == 0) and np.all(slopes[0, :2] > 0) and np.all(slopes[0, 2:] < 0)


def test_odds_of_a_certain_answer_are_finite():
  answers = preference.Answers(jnp.zeros(1), jnp.ones(1), jnp.zeros(1))
  unlikely = answers._replace(log_prob=jnp.full(1, -1e4))
  for pair in ((answers, unlikely), (unlikely, answers), (answers, answers)):
    slopes = jax.grad(lambda own, other: METHODS["orpo"].loss(own, other)[0].sum(), argnums=(0, 1))(*pair)
    chex.assert_tree_all_finite((METHODS["orpo"].loss(*pair), slopes))


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny, source):
  """A run, and its INT4 export."""
  folder = tmp_path_factory.mktemp("bases")
  batches, constant = schedules.Batches(16), schedules.Constant(1e-2)
  loop.train(tiny, source, folder / "float", batches, 10**6, constant, stop_at_step=2, mesh=MESH)
  export.export(folder / "float", folder / "int4", bits=4)
  return folder


def train(
  workdir, tiny, method, weights, adapter=trainable.LoRA(rank=4), data=Pairs(few=32), mesh=MESH, **changes
) -> list[dict]:
  loop.train(
    tiny,
    data,
    workdir,
    schedules.Batches(16),
    10**6,
    schedules.Constant(1.0 if isinstance(adapter, trainable.PTuning) else 2e-2),
    weights=weights,
    trainable=adapter,
    preference=method,
    mesh=mesh,
    intervals=changes.pop("intervals", loop.Intervals(log=1)),
    **{"stop_at_step": 2} | changes,
  )
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", [trainable.LoRA(rank=4), trainable.PTuning(length=3, dropout=0.0)])
@pytest.mark.parametrize("name", METHODS)
def test_it_learns_what_is_preferred(name, adapter, bases, tmp_path, tiny):
  before = load.fingerprint(bases / "int4")
  intervals = loop.Intervals(log=1, evaluate=10, eval_samples=16)
  lines = train(
    tmp_path,
    tiny,
    METHODS[name],
    bases / "int4",
    adapter,
    intervals=intervals,
    validation=Pairs(few=32),
    stop_at_step=30,
  )
  if name == "dpo" and isinstance(adapter, trainable.LoRA):
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
  assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["ordered"] >= 0.8
  assert lines[-1]["eval_ordered"] >= 0.8 and {"loss_chosen", "eval_loss_rejected"} <= lines[-1].keys()
  assert load.fingerprint(bases / "int4") == before


@pytest.mark.emitters
def test_a_policy_that_is_its_reference_prefers_nothing(bases, tmp_path, tiny):
  """The scores of both are equal to the bit, so that no pair is in order."""
  (line,) = train(tmp_path, tiny, METHODS["dpo"], bases / "int4", stop_at_step=1)
  assert line["ordered"] == 0


def test_micro_batches_and_one_device_are_the_whole(bases, tmp_path, tiny):
  ways = {"whole": {}, "cut": {"micro_batch": 8}, "other": {"mesh": mesh_lib.MeshConfig(data=4, context=2)}}
  ways["zero1"] = {"strategy": "zero1"}
  found = {
    name: train(tmp_path / name, tiny, METHODS["dpo"], bases / "int4", stop_at_step=4, **changes)
    for name, changes in ways.items()
  }
  losses_of = {name: [line["loss"] for line in lines] for name, lines in found.items()}
  for name in ways:
    chex.assert_trees_all_close(losses_of[name], losses_of["whole"], rtol=2e-4)


def test_whole_models_learn_without_a_reference(bases, tmp_path, tiny):
  lines = train(tmp_path / "run", tiny, METHODS["orpo"], bases / "float", None, stop_at_step=10)
  assert lines[-1]["loss"] < lines[0]["loss"]


def test_mistakes(bases, tmp_path, tiny, source):
  def fails(message: str, method, weights=bases / "float", adapter=trainable.LoRA(), **changes) -> None:
    with pytest.raises(errors.InputError, match=message):
      train(tmp_path / "run", tiny, method, weights, adapter, **changes)
    assert not (tmp_path / "run").exists()

  fails("give loop.train.trainable, or use preference.ORPO", METHODS["dpo"], adapter=None)
  fails("loop.train.data is of pairs of answers: give loop.train.preference", None)
  fails("give loop.train.data such", METHODS["dpo"], data=source)
  fails("do not go through pipelines", METHODS["dpo"], mesh=mesh_lib.MeshConfig(data=4, stage=2))
  intervals = loop.Intervals(evaluate=1, eval_samples=16)
  fails("give loop.train.validation such", METHODS["dpo"], validation=source, intervals=intervals)
  train(tmp_path / "dpo", tiny, METHODS["dpo"], bases / "float", stop_at_step=1)
  with pytest.raises(errors.InputError, match='preference is "DPO" there and "ORPO" here'):
    train(tmp_path / "dpo", tiny, METHODS["orpo"], bases / "float")
  for method, wrong in ((preference.DPO, {"beta": 0}), (preference.ORPO, {"weight": -1})):
    with pytest.raises(errors.InputError, match=method.__name__):
      method(**wrong)
