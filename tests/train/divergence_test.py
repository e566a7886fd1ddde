"""A run whose numbers are not finite ends with its own kind of error: what, where, since when, and how to go on.

Nothing that is not finite is ever saved.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import cli
from glmjax import errors
from glmjax import positions
from glmjax.checkpoint import manager as manager_lib
from glmjax.cli import run as cli_run
from glmjax.models import glm
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import diagnose
from glmjax.train import divergence
from glmjax.train import evaluation
from glmjax.train import feed
from glmjax.train import loop
from glmjax.train import optimizer
from glmjax.train import run as run_lib
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib

MESH = mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2)
RATE = schedules.Constant(1e-2)
JUMP = schedules.PiecewiseLinear((48, 48), (1e-2, 3e37))  # the fourth step and later


def train(workdir, config, source, **changes) -> dict:
  """Ten steps of 16 rows on eight devices."""
  arguments = dict(
    model=config,
    data=source,
    workdir=workdir,
    batches=schedules.Batches(16),
    total_samples=160,
    learning_rate=RATE,
    mesh=MESH,
    intervals=loop.Intervals(log=0, save=2),
  )
  return loop.train(**arguments | changes)


def diverges(workdir, *arguments, **changes) -> errors.Diverged:
  with pytest.raises(errors.Diverged) as caught:
    train(workdir, *arguments, **changes)
  assert "\n" not in str(caught.value)
  last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
  error = caught.value
  assert (last["step"], last["diverged"], last["loss"]) == (error.step, error.part, None)
  assert (last["first_sample"], last["last_sample"]) == error.samples
  return error


def steps(workdir) -> list[int]:
  return manager_lib.steps(workdir / "checkpoints")


@pytest.mark.parametrize(
  "changes", [dict(stop_at_step=4), dict(total_samples=64), dict(intervals=loop.Intervals(log=0, save=2))]
)
def test_a_state_that_an_update_has_blown_up_is_not_saved(tmp_path, tiny, source, changes):
  """Not when it is time to, nor where the run is to stop, nor at its end."""
  error = diverges(tmp_path, tiny, source, learning_rate=JUMP, **changes)
  assert error.step == 4 and error.samples == (48, 63) and steps(tmp_path) == [2]
  for words in (
    "step 4 (samples 48 to 63, learning rate 3e+37) has left the state not finite",
    "parameters of the emb",
    "larger than 1.8e+19",
    "the last checkpoint is step 2, from which",
    "lower the learning rate",
  ):
    assert words in str(error)
  assert train(tmp_path, tiny, source, stop_at_step=4)["step"] == 4  # as it advises
  assert not any("diverged" in line for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_moments_of_the_optimizer_count_as_well(tiny):
  """Parameters may stay finite where the optimizer divides by infinity for ever."""
  tx = optimizer.AdamW().make()
  params = glm.init_params(tiny, jax.random.key(0))
  opt_state = tx.init(params)
  state = state_lib.TrainState(jnp.int32(1), jnp.uint32(16), params, opt_state, jnp.zeros(2, jnp.uint32), None)
  stages = _Plain()
  assert diagnose.bad_part(stages, state, "float32") is None
  nu = jax.tree.map(lambda x: x, opt_state[0].nu)
  nu["layers"]["mlp"]["wi"]["kernel"] = nu["layers"]["mlp"]["wi"]["kernel"].at[1, 0].set(jnp.inf)
  bad = dataclasses.replace(state, opt_state=(opt_state[0]._replace(nu=nu), *opt_state[1:]))
  assert diagnose.bad_part(stages, bad, "float32") == "the optimizer's nu of layers/mlp/wi/kernel"
  params = jax.tree.map(lambda x: x, params)
  params["layers"]["mlp"]["wo"]["bias"] = params["layers"]["mlp"]["wo"]["bias"].at[1, 0].set(70_000.0)
  large = dataclasses.replace(state, params=params)
  assert diagnose.bad_part(stages, large, "bfloat16") is None
  beyond = "parameters of layer 1 (mlp/wo/bias), some of them larger than 65504"
  assert diagnose.bad_part(stages, large, "float16") == beyond


def test_a_norm_beyond_float32_is_told_from_its_gradients():
  metrics = {
    "loss": np.float32(3),
    "grad_norm": np.float32(np.inf),
    "grad_norm_mlp": np.float32(np.inf),
    "grad_norm_head": np.float32(2),
  }
  found = divergence.in_the_norm(metrics)
  assert found.part == "the gradients' norm (mlp), which is too large for float32"
  assert divergence.in_the_norm(metrics | {"loss": np.float32(np.nan)}) is None
  assert divergence.in_the_norm(metrics | {"grad_norm": np.float32(1)}) is None


class _Plain:
  """Layers in the model's order."""

  def put_back(self, state):
    return state


def test_samples_that_are_not_finite_are_named(tmp_path, tiny, source):
  bad = dataclasses.replace(source, infinite=100)
  error = diverges(tmp_path, tiny, bad, micro_batch=8)
  assert (error.step, error.samples, error.part) == (7, (96, 111), "the loss (the data's loss weights)")
  for words in (
    "of samples 100;",
    "Batches.skip = [(100, 100)]",
    "the last checkpoint is step 6",
    f"(from step 4 once {tmp_path / 'checkpoints' / '6'} is renamed to 6.aside)",
  ):
    assert words in str(error)
  train(tmp_path, tiny, bad, batches=schedules.Batches(16, skip=[(100, 100)]))  # as it advises


def test_fp16_is_diagnosed_on_the_step_that_diverged(tmp_path, tiny, source):
  """With its dropout, its parameters and its scale, though the next step was on its way."""
  half = dataclasses.replace(tiny, dtype="float16", hidden_dropout=0.1)
  bad = dataclasses.replace(source, infinite=100)
  error = diverges(tmp_path, half, bad, loss_scale=state_lib.DynamicLossScale(start=1))
  assert error.step == 7 and error.samples == (96, 111) and "at the smallest loss scale (1)" in str(error)
  assert "Batches.skip = [(100, 100)]" in str(error) and "hardware" not in str(error) and "again" not in error.part


@pytest.mark.parametrize(
  "kind, words",
  [
    ("state", "whatever its samples"),
    ("data", "mend these samples"),
    ("forward", "lower the learning rate, or leave"),
    ("backward", "lower the learning rate, or leave"),
    ("norm", "lower the learning rate"),
    ("rounding", "lower the learning rate"),
    ("machine", "memory or processors make mistakes"),
  ],
)
def test_advice_follows_from_what_is_found(tmp_path, kind, words):
  finding = diagnose.Finding(kind, "somewhere", (0, 1, 5))
  message = str(divergence.of_step(3, 100, 8, {"loss": np.nan}, finding, tmp_path))
  assert words in message and "no checkpoint is there yet" in message
  assert ("machine" in message) == (kind == "machine") and ("skip" in message) == (kind not in ("state", "machine"))
  assert "Batches.skip = [(100, 101), (105, 105)]" in message or kind in ("state", "machine")


def test_a_saved_state_that_is_not_finite_is_not_gone_on_from(tmp_path, tiny, source):
  """As earlier versions saved them: the older step to use is named, and using it works."""
  train(tmp_path, tiny, source, stop_at_step=4)
  manager = manager_lib.Manager(tmp_path / "checkpoints")
  tx = optimizer.AdamW().make()
  abstract = state_lib.abstract(tiny, tx, mesh_lib.make_mesh(MESH))
  state, metadata = manager.restore(abstract)
  state.params["final_norm"]["scale"] = state.params["final_norm"]["scale"].at[0].set(jnp.nan)
  manager.save(4, state, metadata, force=True)
  manager.close()
  with pytest.raises(errors.Diverged) as caught:
    train(tmp_path, tiny, source)
  assert "checkpoint of step 4" in str(caught.value) and "parameters of the final_norm/scale" in str(caught.value)
  assert f"rename {tmp_path / 'checkpoints' / '4'} to 4.aside+, and the same command goes on from step 2" in str(
    caught.value
  )  # saving anew has set the first one aside
  with pytest.raises(errors.NotFiniteError, match="is no model to begin with: not finite in parameters of the f"):
    train(tmp_path / "new", tiny, source, weights=tmp_path)
  (tmp_path / "checkpoints" / "4").rename(tmp_path / "checkpoints" / "4.aside+")
  assert train(tmp_path, tiny, source, stop_at_step=5)["step"] == 5


def test_hardware_is_blamed_only_where_the_same_step_ends_otherwise(tmp_path, tiny, source, monkeypatch):
  """A diagnosis that finds nothing is one of rounding, unless the step itself, run again, is finite."""
  monkeypatch.setattr(diagnose, "first_not_finite", lambda *a, **k: None)
  bad = dataclasses.replace(source, infinite=20)
  assert "which rounds otherwise" in str(diverges(tmp_path / "a", tiny, bad))
  compile = run_lib.Run.compile

  def flaky(run, step):
    compile(run, step)
    exact, calls = run._train_step, []

    def flips_a_bit(state, batch, info):
      calls.append(info)
      if len(calls) == 1:
        batch = batch | {"loss_weights": batch["loss_weights"] * np.inf}
      return exact(state, batch, info)

    run._train_step = flips_a_bit

  monkeypatch.setattr(run_lib.Run, "compile", flaky)
  assert "memory or processors make mistakes" in str(diverges(tmp_path / "b", tiny, source))


# --- evaluating


class _Empty:
  seq_length = 16

  def describe(self):
    raise errors.InputError("cache: no task has a split 'validation'")


def test_nothing_held_out_is_said_before_anything_is_done(tmp_path, tiny, source):
  evaluate = loop.Intervals(evaluate=2, eval_samples=16)
  train(tmp_path, tiny, source, stop_at_step=1)
  for validation, words in (
    (_Empty(), "no task has a split 'validation'"),
    (dataclasses.replace(source, weight=0.0), "have nothing to predict"),
    (dataclasses.replace(source, last=8), "gives 0 of 1 batches"),
  ):
    with pytest.raises(errors.InputError, match=f"{words}.*hold some text out.*Intervals.evaluate = 0"):
      train(tmp_path, tiny, source, validation=validation, intervals=evaluate, overwrite=True)
    assert steps(tmp_path) == [1]  # not deleted
    with pytest.raises(errors.InputError):
      train(tmp_path / "new", tiny, source, validation=validation, intervals=evaluate)
    assert not (tmp_path / "new").exists()
  train(tmp_path, tiny, source, validation=_Empty(), intervals=loop.Intervals(save=0), stop_at_step=2)  # never used


@pytest.mark.parametrize("save", [0, 3])
def test_an_evaluation_that_fails_loses_nothing(tmp_path, tiny, source, monkeypatch, save):
  def fail(self, state):
    raise RuntimeError("no memory left")

  monkeypatch.setattr(evaluation.Evaluation, "_sums", fail)
  intervals = loop.Intervals(evaluate=3, save=save, eval_samples=16)
  with pytest.raises(RuntimeError, match="no memory left"):
    train(tmp_path, tiny, source, validation=source, intervals=intervals)
  assert steps(tmp_path) == [3]
  assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_the_best_step_is_kept(tmp_path, tiny, source, monkeypatch):
  losses = iter([3.0, 1.0, 2.0, 2.5])

  def sums(self, state):
    value = np.array([next(losses), 0, 0, 0])
    return step_lib.losses.Sums(value, np.array([1.0, 0, 0, 0]))

  monkeypatch.setattr(evaluation.Evaluation, "_sums", sums)
  intervals = loop.Intervals(evaluate=2, save=2, keep=1, eval_samples=16)
  train(tmp_path, tiny, source, validation=source, intervals=intervals, stop_at_step=4)
  train(tmp_path, tiny, source, validation=source, intervals=intervals, stop_at_step=8)
  assert steps(tmp_path) == [4, 8]
  assert manager_lib.read_record(tmp_path / "checkpoints" / "4")["metadata"]["metrics"]["eval_loss"] == 1.0


def test_positions_and_objectives_that_the_model_does_not_have(tiny, source):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1), jax.devices()[:1])
  layout = feed.Layout.make(mesh, (), 4, None, 16, positions.LEARNED_2D, 64, num_positions=17)
  host = next(dataclasses.replace(source, wide=True).batches(iter([(0, 4)])))
  layout.check(host, 0, 4)
  for feature, value, words in (
    ("positions", 17, "hold position 17, the model has 17 .max_length . 1."),
    ("positions", -1, "hold position -1"),
    ("tokens", -1, "hold token -1"),
    ("targets", 64, "hold token 64, the model has vocab_size 64"),
    ("objective", 6, "hold objective 6, the model has 6 "),
  ):
    wrong = host | {feature: host[feature].copy()}
    wrong[feature].flat[3] = value
    with pytest.raises(errors.InputError, match=words):
      layout.check(wrong, 0, 4)


def test_the_command_line_ends_with_a_status_of_its_own(monkeypatch, capsys):
  def run(arguments):
    raise errors.Diverged("step 7 is not finite", 7, (96, 111), "the loss")

  monkeypatch.setattr(cli_run, "run", run)
  assert cli._run(["train"]) == 3
  assert capsys.readouterr().err == "glmjax: step 7 is not finite\n"
