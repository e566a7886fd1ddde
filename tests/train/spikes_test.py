"""The spike guard: its limits by their properties, what the step does about them, and runs that are broken off."""

import dataclasses
import functools
import json
import math
import pathlib
import shutil
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pipelined
import poisoned
import pytest

from glmjax import errors
from glmjax.checkpoint import manager as manager_lib
from glmjax.io import paths
from glmjax.parallel import partitioning
from glmjax.train import feed
from glmjax.train import interventions
from glmjax.train import loop
from glmjax.train import objective as objective_lib
from glmjax.train import pipeline as pipeline_lib
from glmjax.train import schedules
from glmjax.train import spikes
from glmjax.train import step as step_lib
from glmjax.train import workdir

GUARD = spikes.Guard(window=16, least=4)
PARAMS = {"embedding": {"table": jax.ShapeDtypeStruct((4, 2), np.float32)}}
NAMES = ("loss", "grad_norm", "grad_norm_embedding", "update_norm_embedding")


def drawn(count: int, seed: int = 0) -> np.ndarray:
  return np.exp(np.random.default_rng(seed).normal(size=count) * 0.3)


# --- the statistic


def test_limits_know_no_scale():
  values = drawn(16)
  for scale in (1e-20, 0.125, 3e10):
    assert GUARD.limit(values * scale, 0.05) == pytest.approx(GUARD.limit(values, 0.05) * scale, rel=1e-9)


def test_limits_rise_with_the_values_and_a_few_large_ones_hardly_move_them():
  for seed in range(20):
    values = drawn(16, seed)
    limit = GUARD.limit(values, 0.05)
    assert limit > np.median(values)
    assert GUARD.limit(values * np.where(np.arange(16) < 9, 1, 1.1), 1.0) >= GUARD.limit(values, 1.0)
    poisoned_values = values.copy()
    poisoned_values[3:5] *= 1e6
    assert GUARD.limit(poisoned_values, 0.05) < 10 * limit


def test_the_floor_is_the_least_that_a_spike_rises():
  assert GUARD.limit(np.full(8, 2.0), 0.05) == pytest.approx(2 * math.exp(6 * 0.05))
  assert GUARD.floor("loss") == 0.05 and GUARD.floor("grad_norm_head") == 0.3 and GUARD.floor("update_norm_mlp") == 0.1


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_no_limit_before_there_are_enough_values(strange):
  values = drawn(4)
  assert GUARD.limit(values[:3], 0.05) == math.inf == GUARD.limit(np.array([]), 0.05)
  assert GUARD.limit(np.array([*values[:3], strange]), 0.05) == math.inf
  assert GUARD.limit(np.array([*values, strange]), 0.05) == GUARD.limit(values, 0.05) < math.inf
  assert GUARD.limit(np.array([1e30, 1e38, 1e-38, 1e38]), 0.05) == math.inf  # beyond float32


# --- the window


def watch(guard: spikes.Guard = GUARD, records=()) -> spikes.Detector:
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  return spikes.Detector(guard, PARAMS, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), records)


def record(step: int, **changes: Any) -> dict[str, Any]:
  values = np.exp(np.random.default_rng(step).normal(size=4) * 0.2).astype(np.float32)
  return {"step": step} | dict(zip(NAMES, values.tolist())) | changes


def applied(found: step_lib.Limits) -> list[float]:
  return np.asarray(found.apply).tolist()


def test_what_is_watched():
  assert step_lib.watched(PARAMS) == NAMES
  everything = step_lib.watched(pipelined.first_state(pipelined.CONFIG).params)
  parts = ("embedding", "attention", "mlp", "norms")
  assert everything == ("loss", "grad_norm", *(f"{kind}_norm_{part}" for kind in ("grad", "update") for part in parts))


def test_limits_lag_two_steps_behind_whenever_figures_are_read():
  """So that they are the same where a step waits for the last one's figures, as at a save, and where it does not."""
  guard = dataclasses.replace(GUARD, action="skip")
  early, late, found = watch(guard), watch(guard), []
  for step in range(1, 40):
    one = applied(early.limits(step, 16 * step, 16))
    early.find(record(step), 0, 15, False)
    found.append(one)
    two = applied(late.limits(step, 16 * step, 16))
    if step > 1:
      late.find(record(step - 1), 0, 15, False)
    assert one == two
  assert found[4] == [math.inf] * 4 and found[5] != [math.inf] * 4  # four steps are read, the fifth is not
  for step in (7, 20, 30):  # gone on with from the lines of the steps before
    resumed = watch(guard, [record(each) for each in range(max(1, step - GUARD.window - 1), step)])
    assert applied(resumed.limits(step, 0, 16)) == found[step - 1]


def test_figures_that_a_line_lacks():
  """Of steps before there was a guard, of steps that overflowed, of a damaged line."""
  old = [{name: value for name, value in record(i).items() if "update" not in name} for i in range(1, 9)]
  assert applied(watch(dataclasses.replace(GUARD, action="skip"), old).limits(10, 0, 16))[3] == math.inf
  for strange in ({"grad_norm": None}, {"grad_norm": math.inf}, {"loss": "a"}):
    found = watch(records=[record(i) for i in range(1, 9)])
    found.limits(10, 0, 16)
    assert found.find(record(10, grad_norm_embedding=1e9) | strange, 0, 15, False) is None


def test_a_level_that_stays_is_no_spike_any_more():
  found, spiked = watch(), []
  for step in range(1, 60):
    found.limits(step, 0, 16)
    each = record(step) if step < 30 else record(step, grad_norm=100.0 + step % 3)
    if found.find(each, 0, 15, False):
      spiked.append(step)
  assert spiked[0] == 30 and len(spiked) < GUARD.window


def test_what_an_action_asks_of_the_step():
  records = [record(i) for i in range(1, 9)]
  none = [math.inf] * 4
  for action in spikes.ACTIONS:
    found = watch(dataclasses.replace(GUARD, action=action, skip=[(48, 63)]), records).limits(10, 64, 16)
    apply, clip = applied(found), np.asarray(found.clip).tolist()
    assert (apply != none) == (action == "skip") and (clip != none) == (action == "clip")
    held = watch(dataclasses.replace(GUARD, action=action, skip=[(48, 64)]), records).limits(10, 64, 16)
    assert applied(held) == [-1] * 4


def test_spikes_in_words():
  found = watch(
    dataclasses.replace(GUARD, action="skip"), [record(1000 + i, loss=1.0, grad_norm=2.0) for i in range(1, 9)]
  )
  found.limits(1010, 0, 16)
  spike = found.find(record(1010, loss=2.0, grad_norm=50.0), 16_144, 16_159, True)
  assert str(spike) == "spike at step 1,010 (samples 16144 to 16159): grad_norm 50, limit 12.1 (1 more)"
  assert spike.action == "skip" and spike.done == "its update is not applied"
  found.limits(1011, 0, 16)
  rounded = found.find(record(1011, loss=1.3498, grad_norm=1.0), 0, 15, True)  # the device has seen 1.35
  assert list(rounded.above) == ["loss"]


# --- the step


@functools.cache
def compiled(case: pipelined.Case):
  """(a maker of states, the step's program with limits, its batch)."""
  rules, stages = partitioning.STRATEGIES[case.strategy], case.stages
  config, rows = pipelined.CONFIG, pipelined.MICRO * pipelined.ROWS
  layout = feed.Layout.make(
    case.mesh, rules, rows, pipelined.ROWS, pipelined.LENGTH, config.position_kind, config.vocab_size
  )
  recipe = step_lib.Recipe(pipelined.OPTIMIZER, schedules.Constant(1e-2), schedules.Constant(0.5))
  shardings = jax.tree.map(lambda x: x.sharding, stages.as_checkpointed)

  def make():
    return stages.put_in_stages(jax.device_put(pipelined.first_state(config), shardings))

  with partitioning.use(case.mesh, rules):
    objective = objective_lib.Objective(config, chunk=case.chunk, pipeline=case.pipeline)
    step = step_lib.compile_train_step(
      objective, recipe, pipelined.TX, jax.tree.map(lambda x: x.sharding, stages.in_stages)
    )
    return make, step, layout.put(pipelined.rows())


def one_step(case: pipelined.Case, apply: dict[str, float] | float = math.inf, clip: float = math.inf):
  """The state behind a step of those limits, the layers in the model's order, and its metrics."""
  make, step, batch = compiled(case)
  names = step_lib.watched(pipelined.first_state(pipelined.CONFIG).params)
  apply = dict.fromkeys(names, apply) if isinstance(apply, float) else dict.fromkeys(names, math.inf) | apply
  limits = step_lib.Limits(jnp.float32(list(apply.values())), jnp.full(len(names), clip, jnp.float32))
  with partitioning.use(case.mesh, partitioning.STRATEGIES[case.strategy]):
    rows = pipelined.MICRO * pipelined.ROWS
    state, metrics = step(make(), batch, step_lib.StepInfo(*map(jnp.uint32, (0, 0, rows)), limits))
    return jax.device_get((case.stages.put_back(state), metrics))


ONE = pipelined.Case()
CASES = [
  pipelined.Case((("data", 2),), strategy="zero1"),
  pipelined.Case((("stage", 2),), pipeline_lib.PipelineConfig(4, kind="1f1b")),
]


@pytest.mark.parametrize("case", CASES, ids=["zero1", "1f1b"])
def test_a_step_is_passed_over_on_any_mesh(case):
  state, metrics = one_step(case)
  _, single = one_step(ONE)
  assert metrics["applied"] and not metrics["held"]
  for name in step_lib.watched(state.params):
    np.testing.assert_allclose(metrics[name], single[name], rtol=2e-3, err_msg=name)
  name = "update_norm_embedding"
  held, found = one_step(case, {name: 0.9 * float(single[name])})
  assert found["held"] and found["advanced"] and not found["applied"]
  first = pipelined.first_state(pipelined.CONFIG)
  chex.assert_trees_all_equal(held.params, first.params)
  chex.assert_trees_all_equal(held.opt_state, first.opt_state)
  assert int(held.step) == 1 and int(held.samples_seen) == pipelined.MICRO * pipelined.ROWS


def test_no_limit_changes_nothing_and_each_is_looked_at():
  state, metrics = one_step(ONE)
  plain = pipelined.run(ONE)
  np.testing.assert_allclose(metrics["grad_norm"], plain.metrics["grad_norm"], rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, plain.stored.params)
  for name in step_lib.watched(state.params):
    value = float(metrics[name])
    assert one_step(ONE, {name: value * 0.99})[1]["held"] and not one_step(ONE, {name: value * 1.01})[1]["held"]
  assert one_step(ONE, -1.0)[1]["held"]


def test_gradients_are_scaled_down_to_their_limits():
  """With epsilon 1e-3 Adam's update is smaller for a smaller gradient."""
  _, loose = one_step(ONE)
  largest = max(float(loose[name]) for name in loose if name.startswith("grad_norm"))
  _, same = one_step(ONE, clip=largest * 1.01)
  _, tight = one_step(ONE, clip=largest / 1e4)
  assert float(same["update_norm_mlp"]) == float(loose["update_norm_mlp"])
  assert float(tight["update_norm_mlp"]) < 0.1 * float(loose["update_norm_mlp"])
  assert float(tight["grad_norm"]) == float(loose["grad_norm"])  # as it was before


# --- runs


def guard(action: str) -> spikes.Guard:
  return dataclasses.replace(poisoned.GUARD, action=action)


@pytest.fixture(scope="module", params=["skip", "roll_back"])
def unbroken(request, tmp_path_factory) -> tuple[str, pathlib.Path]:
  """A run with two spikes, from start to end."""
  folder = tmp_path_factory.mktemp(request.param)
  poisoned.train(folder, poisoned.Source("token"), spikes=guard(request.param))
  assert len(poisoned.interventions(folder)) == 2
  return request.param, folder


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
  """A function of an action: the folder of a run that was killed soon behind the spikes, to be copied."""

  @functools.cache
  def found(action: str) -> pathlib.Path:
    folder = tmp_path_factory.mktemp(f"broken_off_{action}")
    with pytest.raises(KeyboardInterrupt):
      poisoned.train(folder, poisoned.Source("token", kill_at=1824), spikes=guard(action))
    return folder

  return found


def test_broken_off_is_unbroken_bit_for_bit(unbroken, broken_off, tmp_path):
  """Killed soon behind the spikes, so that they come again; and once more, behind a checkpoint that has them."""
  action, folder = unbroken
  shutil.copytree(broken_off(action), tmp_path, dirs_exist_ok=True)
  if action == "roll_back":
    assert len(poisoned.interventions(tmp_path)) == 2
  assert manager_lib.steps(tmp_path / "checkpoints")[-1] == 100
  with pytest.raises(KeyboardInterrupt):
    poisoned.train(tmp_path, poisoned.Source("token", kill_at=2048), spikes=guard(action))
  assert len(poisoned.interventions(tmp_path)) == 2 and manager_lib.steps(tmp_path / "checkpoints")[-1] == 125
  poisoned.train(tmp_path, poisoned.Source("token"), spikes=guard(action))
  assert poisoned.interventions(tmp_path) == poisoned.interventions(folder)
  assert (tmp_path / "interventions.gin").read_text() == (folder / "interventions.gin").read_text()
  assert poisoned.losses(tmp_path) == poisoned.losses(folder)
  assert poisoned.saved(tmp_path) == poisoned.saved(folder)


def test_what_was_left_out_stays_so_without_a_guard(broken_off, tmp_path):
  """Gone back, killed, and gone on with by settings that have no guard."""
  shutil.copytree(broken_off("roll_back"), tmp_path, dirs_exist_ok=True)
  poisoned.train(tmp_path, poisoned.Source("token"), spikes=None, stop_at_step=115)
  line = poisoned.lines(tmp_path)[110]
  assert (line["step"], line["samples_seen"]) == (111, 113 * poisoned.ROWS) and "update_norm_mlp" not in line


def test_overwriting_forgets_them(unbroken, tmp_path):
  poisoned.train(tmp_path, poisoned.Source(), stop_at_step=1)
  for name in ("interventions.jsonl", "interventions.gin"):
    (tmp_path / name).write_text((unbroken[1] / name).read_text())
  poisoned.train(tmp_path, poisoned.Source(), stop_at_step=1, overwrite=True)
  assert not list(tmp_path.glob("interventions.*"))


def test_nothing_to_go_back_to(tmp_path):
  with pytest.raises(errors.Diverged, match="spike at step 111 .*no checkpoint yet.*Intervals.save.*begins anew"):
    poisoned.train(tmp_path, poisoned.Source("token"), spikes=guard("roll_back"), intervals=loop.Intervals(save=0))
  assert manager_lib.steps(tmp_path / "checkpoints") == []
  last = poisoned.lines(tmp_path)[-1]
  assert (last["step"], last["diverged"], last["first_sample"]) == (111, "grad_norm", 1760)
  assert "grad_norm" in last["above"]


def test_what_is_kept_where_a_run_goes_on(tmp_path):
  """Ways back for good, other lines of the steps that a checkpoint has; a file that cannot be written ends nothing."""
  folder, batches = workdir.Workdir(tmp_path), schedules.Batches(16, skip=[(0, 7)])
  journal = interventions.Journal(folder, GUARD, batches)
  for step, action in ((10, "skip"), (20, "roll_back"), (30, "log"), (40, "skip")):
    journal.add(spikes.Spike(step, 16 * step, 16 * step + 15, {"loss": (2.0, 1.0)}, action))
  assert [journal.count(step, 16) for step in (10, 26, 27, 56)] == [3, 2, 2, 0]
  again = interventions.Journal(folder, GUARD, batches)
  again.begin(10)
  assert again.left_out == [(320, 335)] and journal.left_out == again.left_out
  assert [line["step"] for line in poisoned.interventions(tmp_path)] == [10, 20]
  fragment = (tmp_path / "interventions.gin").read_text()
  assert "spikes.Guard.skip = [(160, 175)]\nschedules.Batches.skip = [(0, 7), (320, 335)]\n" in fragment
  (tmp_path / "interventions.jsonl").unlink()
  (tmp_path / "interventions.jsonl").mkdir()
  again.add(spikes.Spike(50, 800, 815, {"loss": (2.0, 1.0)}, "roll_back"))
  assert len(again.left_out) == 2


def test_a_gin_file_of_the_users_stays(tmp_path, caplog):
  folder = workdir.Workdir(tmp_path)
  folder.replay.write_text("schedules.Batches.skip = [(0, 7)]\n")
  journal = interventions.Journal(folder, GUARD, schedules.Batches(16))
  for step in (10, 20):
    journal.add(spikes.Spike(step, 16 * step, 16 * step + 15, {"loss": (2.0, 1.0)}, "skip"))
  assert folder.replay.read_text() == "schedules.Batches.skip = [(0, 7)]\n"
  assert caplog.text.count("no run has written it") == 1 and len(poisoned.interventions(tmp_path)) == 2
  folder.replay.unlink()
  journal.add(spikes.Spike(30, 480, 495, {"loss": (2.0, 1.0)}, "skip"))
  assert "(160, 175), (320, 335), (480, 495)" in folder.replay.read_text()


def test_the_record_in_a_bucket(server):
  folder, batches = workdir.Workdir(paths.named("gs://bucket/run")), schedules.Batches(16)
  journal = interventions.Journal(folder, GUARD, batches)
  assert journal.left_out == []
  journal.add(spikes.Spike(20, 320, 335, {"loss": (2.0, 1.0)}, "roll_back"), back_to=16)
  assert json.loads(server.data("run/interventions.jsonl"))["back_to_step"] == 16
  assert b"schedules.Batches.skip = [(320, 335)]" in server.data("run/interventions.gin")
  assert interventions.Journal(folder, None, batches).left_out == [(320, 335)]


def test_a_damaged_record_is_said(tmp_path):
  poisoned.train(tmp_path, poisoned.Source(), stop_at_step=1)
  good = json.dumps({"step": 1, "first_sample": 0, "last_sample": 15, "above": {}, "action": "skip"})
  for wrong in ("nonsense", "{}", '{"step": "1"}', good.replace("skip", "leap"), good.replace("15", "-1"), "[]"):
    (tmp_path / "interventions.jsonl").write_text(f"{good}\n{wrong}\n")
    with pytest.raises(errors.InputError, match="interventions.jsonl, line 2: damaged"):
      poisoned.train(tmp_path, poisoned.Source(), stop_at_step=2)


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"action": "jump"}, "Guard.action is 'jump': choose one of log, skip, clip, roll_back"),
    ({"window": 16, "least": 17}, "Guard.least is 17: give a whole number from 2 to 16"),
    ({"sigmas": 0}, "Guard.sigmas is 0"),
    ({"skip": [(5, 4)]}, r"Guard.skip\[0\] is \(5, 4\): each range is \(first, last\)"),
    ({"skip": 5}, "Guard.skip is 5: give a list"),
  ],
)
def test_mistakes(wrong, message):
  with pytest.raises(errors.InputError, match=message):
    spikes.Guard(**wrong)
