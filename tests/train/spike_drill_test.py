"""The drill: poisoned samples, a poisoned state and an overflow are caught; the run ends as if they were not there."""

import ast
import dataclasses
import pathlib
from typing import Any

import numpy as np
import poisoned
import pytest

from glmjax import errors
from glmjax.checkpoint import manager as manager_lib
from glmjax.config import gin_files
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import schedules
from glmjax.train import state as state_lib

LAST = 20  # steps whose mean loss is compared
NO_DECAY = optimizer_lib.AdamW(weight_decay=0.0)


def guard(action: str, **changes: Any):
  return dataclasses.replace(poisoned.GUARD, action=action, **changes)


def last_loss(workdir: pathlib.Path) -> float:
  return float(np.mean(poisoned.losses(workdir)[-LAST:]))


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> list[pathlib.Path]:
  """Two runs of sound samples, of different seeds."""
  folders = [tmp_path_factory.mktemp(f"clean{seed}") for seed in (0, 1)]
  for seed, folder in enumerate(folders):
    poisoned.train(folder, poisoned.Source(), seed=seed)
  return folders


def is_as_clean(workdir: pathlib.Path, clean: list[pathlib.Path]) -> bool:
  """Tells whether a run ends within the noise of the clean ones: what a seed does, or the last steps' samples."""
  losses = poisoned.losses(clean[0])[-LAST:]
  noise = max(abs(last_loss(clean[0]) - last_loss(clean[1])), float(np.std(losses)) / LAST**0.5)
  return abs(last_loss(workdir) - last_loss(clean[0])) < 2 * noise


def fragment(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads the values that interventions.gin binds, once it was looked at as a command does."""
  path = workdir / "interventions.gin"
  gin_files.check([str(path)])
  pairs = (line.split(" = ") for line in path.read_text().splitlines() if " = " in line)
  return {name: ast.literal_eval(value) for name, value in pairs}


def replay(workdir: pathlib.Path, source: poisoned.Source, **changes: Any) -> pathlib.Path:
  """Trains another run by what interventions.gin says, without any limit."""
  found = fragment(workdir)
  assert found.pop("spikes.Guard.action") == "log"
  skip, left_out = found.pop("spikes.Guard.skip", ()), found.pop("schedules.Batches.skip", ())
  assert not found
  other = workdir.with_name(f"{workdir.name}_again")
  batches = schedules.Batches(poisoned.ROWS, skip=left_out)
  poisoned.train(other, source, batches=batches, spikes=guard("log", skip=skip, least=48, sigmas=1e3), **changes)
  return other


def test_sound_samples_raise_no_alarm(clean):
  for folder in clean:
    assert not (folder / "interventions.jsonl").exists() and not (folder / "interventions.gin").exists()
    assert len(poisoned.lines(folder)) == poisoned.STEPS and last_loss(folder) < 1


@pytest.mark.parametrize(
  "poison, action",
  [
    ("token", "skip"),
    ("labels", "roll_back"),
    pytest.param("token", "roll_back", marks=pytest.mark.slow),
    pytest.param("labels", "skip", marks=pytest.mark.slow),
  ],
)
def test_poisoned_samples_leave_no_trace(clean, tmp_path, poison, action):
  source = poisoned.Source(poison)
  poisoned.train(tmp_path / "run", source, spikes=guard(action))
  found = poisoned.interventions(tmp_path / "run")
  assert [(line["first_sample"], line["last_sample"]) for line in found] == [(1760, 1775), (1776, 1791)]
  assert {line["action"] for line in found} == {action}
  assert all(each["value"] > each["limit"] for line in found for each in line["above"].values())
  assert ("loss" if poison == "labels" else "grad_norm") in found[0]["above"]
  if action == "roll_back":
    assert [(line["step"], line["back_to_step"]) for line in found] == [(111, 100), (111, 100)]
  else:
    assert [line["step"] for line in found] == [111, 112]
  assert not any("resumed" in line for line in poisoned.lines(tmp_path / "run"))  # a way back is no stop
  assert is_as_clean(tmp_path / "run", clean)
  again = replay(tmp_path / "run", source)
  assert poisoned.losses(again) == poisoned.losses(tmp_path / "run")
  assert poisoned.saved(again) == poisoned.saved(tmp_path / "run")


@pytest.mark.parametrize("action", ["log", "clip"])
def test_what_only_tells_or_clips(clean, tmp_path, action):
  """Without a clip_norm of the optimizer's, so that the guard alone clips; by the same guard it does so again."""
  source, loose = poisoned.Source("token"), optimizer_lib.AdamW(clip_norm=1e9)
  last = None if action == "clip" else 115  # behind the spikes
  poisoned.train(tmp_path / "run", source, spikes=guard(action), optimizer=loose, stop_at_step=last)
  found = poisoned.interventions(tmp_path / "run")
  assert [(line["step"], line["action"]) for line in found][:2] == [(111, action), (112, action)]
  if action == "clip":
    assert is_as_clean(tmp_path / "run", clean)
    poisoned.train(tmp_path / "again", source, spikes=guard(action), optimizer=loose)
    assert poisoned.saved(tmp_path / "again") == poisoned.saved(tmp_path / "run")
    assert fragment(tmp_path / "run")["spikes.Guard.action"] == "clip"


def enlarge_row(workdir: pathlib.Path) -> None:
  """Makes the embedding row, in the newest checkpoint, ten thousand times as large that poisoned samples alone read."""
  manager = manager_lib.Manager(workdir / "checkpoints")
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig())
  state, metadata = manager.restore(state_lib.abstract(poisoned.CONFIG, NO_DECAY.make(), mesh))
  embedding = state.params["embedding"]
  embedding["table"] = embedding["table"].at[poisoned.RARE].mul(1e4)
  manager.save(int(state.step), state, metadata, force=True)
  manager.close()


@pytest.mark.parametrize("action", [pytest.param("skip", marks=pytest.mark.slow), "roll_back"])
def test_a_huge_embedding_row(clean, tmp_path, action):
  source = poisoned.Source("rare")
  poisoned.train(tmp_path, source, spikes=guard(action), optimizer=NO_DECAY, stop_at_step=100)
  enlarge_row(tmp_path)
  poisoned.train(tmp_path, source, spikes=guard(action), optimizer=NO_DECAY)
  found = poisoned.interventions(tmp_path)
  assert [(line["first_sample"], line["action"]) for line in found] == [(1760, action), (1776, action)]
  assert [line["step"] for line in poisoned.lines(tmp_path) if "resumed" in line] == [101]  # was stopped there, once
  assert is_as_clean(tmp_path, clean)


def test_what_comes_with_every_step_is_a_divergence(tmp_path):
  """Weight decay moves the huge row at every step: no update is applied, until there were too many."""
  source = poisoned.Source()
  poisoned.train(tmp_path, source, stop_at_step=100)
  enlarge_row(tmp_path)
  with pytest.raises(errors.Diverged) as caught:
    poisoned.train(tmp_path, source, spikes=guard("skip", most=5))
  assert (caught.value.step, caught.value.part) == (106, "update_norm_embedding")
  for words in (
    "spike at step 106 (samples 1680 to 1695): update_norm_embedding",
    "more than 5 (Guard.most) within 48 steps",
    "the last checkpoint is step 100",
    "Batches.skip = [(1680, 1695)]",
  ):
    assert words in str(caught.value)
  last = poisoned.lines(tmp_path)[-1]
  assert last["diverged"] == "update_norm_embedding" in last["above"]  # the last spike, one too many
  assert all(each["value"] > each["limit"] for each in last["above"].values())
  assert [line["step"] for line in poisoned.interventions(tmp_path)] == [101, 102, 103, 104, 105]
  before = manager_lib.steps(tmp_path / "checkpoints")
  with pytest.raises(errors.Diverged):  # the same command comes to the same end
    poisoned.train(tmp_path, source, spikes=guard("skip", most=5))
  assert manager_lib.steps(tmp_path / "checkpoints") == before


@pytest.mark.filterwarnings("ignore:invalid value")  # infinity by infinity, in the loss of an objective
def test_an_overflow_of_float16_is_the_loss_scale_s_matter(tmp_path):
  """It is passed over as ever, and is no spike; the poisoned steps behind it are."""

  class Both(poisoned.Source):
    def row(self, index: int) -> dict[str, np.ndarray]:
      row = super().row(index)
      if index == 1700:  # of step 107
        row["loss_weights"][-1] = np.inf
      return row

  model = dataclasses.replace(poisoned.CONFIG, dtype="float16")
  scale = state_lib.DynamicLossScale(start=256)  # with room above: the poisoned gradients do not overflow
  poisoned.train(tmp_path, Both("token"), model=model, loss_scale=scale, spikes=guard("skip"))
  lines = poisoned.lines(tmp_path)
  assert [line["step"] for line in lines if line["grad_norm"] is None] == [107]
  assert [line["step"] for line in poisoned.interventions(tmp_path)] == [111, 112]
  assert lines[-1]["step"] == poisoned.STEPS and last_loss(tmp_path) < 1
