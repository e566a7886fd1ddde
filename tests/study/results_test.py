"""What is read of a study's runs: losses, spikes in episodes, which part was first; and pictures of all of it."""

import json
import math

import numpy as np
import pytest

from glmjax import display
from glmjax.study import differences
from glmjax.study import grid as grid_lib
from glmjax.study import pictures
from glmjax.study import report
from glmjax.study import results as results_lib

GRID = grid_lib.Grid({"NORM": ["pre", "post"], "EGS": [1.0, 0.1], "RATE": [1e-3, 1e-2], "SEED": [0, 1]}, "RATE", "SEED")
POINT = next(GRID.points())


def read(folder, records, layers=(), status=0, point=POINT, tail="", spikes=()):
  (folder / "run").mkdir(parents=True, exist_ok=True)
  (folder / "result.json").write_text(json.dumps({"status": status, "seconds": 36.0}))
  (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records) + tail)
  if spikes:
    (folder / "run" / "interventions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in spikes))
  if layers:
    (folder / "run" / "layers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in layers))
  return results_lib.read(point, folder / "result.json", folder / "run")


def steps(losses, **figures):
  return [{"step": i, "loss": loss, **figures} for i, loss in enumerate(losses, 1)]


def test_last_loss_is_the_mean_of_the_last_twentieth(tmp_path):
  run = read(tmp_path, steps(np.linspace(9, 5, 100).tolist()))
  assert run.last_loss == pytest.approx(np.linspace(9, 5, 100)[-5:].mean()) and not run.has_failed
  assert run.line == f"loss {run.last_loss:.4f}"


def test_steps_that_a_loss_scale_passes_over_have_no_part_in_the_last_loss(tmp_path):
  losses = np.linspace(9, 5, 100).tolist()
  losses[97] = None
  records = steps(losses, grad_norm=1.0)
  records[0]["grad_norm"] = records[97]["grad_norm"] = None
  run = read(tmp_path, records)
  assert run.last_loss == pytest.approx(np.mean([losses[i] for i in (95, 96, 98, 99)])) and not run.has_failed
  assert run.overflows == 2


def test_runs_are_grouped_by_what_their_axes_have(tmp_path):
  grid = grid_lib.Grid({"A": [[1], [2]], "B": ["x", "y"], "RATE": [1e-3, 1e-2]}, "RATE")
  runs = [read(tmp_path, steps([9.0, 8.0]), point=point) for point in grid.points()]
  found = results_lib.grouped(runs, grid.others)
  assert {*found} == {*grid_lib.choices(grid, grid.others)}
  for key, choice in grid_lib.choices(grid, grid.others).items():
    assert found[key] == [run for run in runs if (run.point.labels["A"], run.point.labels["B"]) == choice]
  assert [*results_lib.grouped(runs, ()).values()] == [runs]


@pytest.mark.parametrize(
  "losses, status, failed", [([9, 5], 3, True), ([9, 9.5], 0, True), ([9, 8], 0, False), ([9, None], 0, True)]
)
def test_runs_that_learned_nothing_count_with_their_first_loss(tmp_path, losses, status, failed):
  run = read(tmp_path, steps(losses), status=status)
  assert run.has_failed == failed and (run.last_loss == 9) == failed


def test_a_run_whose_outputs_are_alike_everywhere_is_uniform(tmp_path):
  spread, alike = [
    {"step": step, "log_z_max": 9.0 + above, "log_z_mean": 9.0} for step, above in ((20, 0.5), (40, 1e-3))
  ]
  assert read(tmp_path, steps([9, 7.4]), [spread, alike]).is_uniform
  for recovered in ([alike, spread], [], [{"step": 20, "log_z_max": None, "log_z_mean": None}]):
    assert not read(tmp_path / str(len(recovered)), steps([9, 7.4]), recovered).is_uniform


def test_what_is_no_record_is_left_out(tmp_path):
  end = json.dumps({"step": 4, "loss": None, "diverged": "the loss", "first_sample": 3, "last_sample": 4}) + "\n"
  run = read(tmp_path, steps([9, 8, 7], word="text"), tail='"half\n[]\n{"step": "x"}\n' + end + '{"step": 5, "lo')
  assert run.steps.tolist() == [1, 2, 3] and run.figures["loss"].tolist() == [9, 8, 7]
  empty = results_lib.read(POINT, tmp_path / "missing.json", tmp_path / "missing")
  assert math.isnan(empty.last_loss) and empty.has_diverged and empty.has_failed and not empty.episodes


def spike(step, *names, **more):
  return {"step": step, "above": {name: {"value": 2.0, "limit": 1.0} for name in names}, "action": "log", **more}


def test_spikes_that_follow_one_another_are_an_episode(tmp_path):
  records = steps([9.0] * 100)
  spikes = spike(20, "update_norm_mlp"), spike(22, "grad_norm", "grad_norm_mlp"), spike(60, "loss", "grad_norm")
  run = read(tmp_path, records, spikes=spikes)
  first, second = run.episodes
  assert first.first == {"update_norm_mlp": 20, "grad_norm": 22, "grad_norm_mlp": 22}
  assert first.leaders == ["update_norm_mlp"] and sorted(second.leaders) == ["grad_norm", "loss"]
  counts = report._leaders([run])
  assert counts["episodes"] == 2 and counts["parts"]["grad_norm"] == {"in": 2, "first": 1, "alone": 0}
  assert counts["parts"]["update_norm_mlp"] == {"in": 1, "first": 1, "alone": 1}


def test_every_way_back_is_a_spike_and_so_is_the_one_too_many(tmp_path):
  """metrics.jsonl has no line of steps that were gone back before, and of the last spike how the run ended."""
  back = {"action": "roll_back", "back_to_step": 100}
  end = spike(111, "loss", "grad_norm") | {"loss": None, "diverged": "loss"}
  spikes = spike(111, "grad_norm", **back), spike(105, "grad_norm", **back)
  run = read(tmp_path, [*steps([9.0] * 104), end], status=3, spikes=spikes)
  assert [dict(each.first) for each in run.episodes] == [
    {"grad_norm": 111},
    {"grad_norm": 105},
    {"loss": 111, "grad_norm": 111},
  ]
  assert run.line == "diverged behind step 104, 3 spikes"
  assert report._leaders([run])["parts"]["loss"] == {"in": 1, "first": 1, "alone": 0}


def test_the_last_of_spikes_that_follow_one_another_is_of_their_episode(tmp_path):
  spikes = [spike(step, "grad_norm", action="skip") for step in (101, 102)]
  end = spike(103, "grad_norm", "loss") | {"loss": None, "diverged": "grad_norm"}
  (episode,) = read(tmp_path, [*steps([9.0] * 102), end], status=3, spikes=spikes).episodes
  assert episode.first == {"grad_norm": 101, "loss": 103}


def test_a_step_that_is_not_finite_is_no_spike(tmp_path):
  end = {"step": 3, "loss": None, "diverged": "the loss", "first_sample": 2, "last_sample": 2}
  damaged = [{"step": 1}, {"step": 1, "above": "grad_norm"}, {"step": 1, "above": {}}]
  run = read(tmp_path, [*steps([9.0] * 2), end], status=3, spikes=damaged)
  assert not run.episodes and run.line == "diverged behind step 2"


def runs(folder):
  found = []
  for i, point in enumerate(GRID.points()):
    is_bad = point.labels["RATE"] == 1e-2 and point.labels["NORM"] == "pre"
    records = steps(np.linspace(9, 5 + 0.1 * i, 1000).tolist(), grad_norm=1.0, grad_norm_embedding=2.0 + i)
    layers = [
      {"step": step, "attention_logit_max": [step, 2.0, None if is_bad else 3.0], "residual_rms": [1.0, 2.0, 3.0, 4.0]}
      for step in (10, 20)
    ]
    found.append(read(folder / str(i), records, layers, status=3 * is_bad, point=point))
  return found


def test_a_report_has_every_group_and_its_pictures(tmp_path):
  report.write(tmp_path, GRID, runs(tmp_path))
  found = json.loads((tmp_path / "report.json").read_text())
  assert [group["labels"] for group in found["groups"]] == [
    {"NORM": norm, "EGS": shrink} for norm in ("pre", "post") for shrink in (1.0, 0.1)
  ]
  assert [group["diverged"] for group in found["groups"]] == [2, 2, 0, 0]
  assert [group["largest_that_learns"] for group in found["groups"]] == [1e-3, 1e-3, 1e-2, 1e-2]
  of_one = found["groups"][0]["sensitivity"]
  assert of_one["repeats"] == 2 and of_one["low"] <= of_one["mean"] <= of_one["high"]
  text = (tmp_path / "report.md").read_text()
  assert "| pre | 1.0 | 4 | 2 | 0 | 0 | 0 |" in text
  for name in ("sensitivity", "curves", "embedding", "gradient", "logits", "residual"):
    assert f"({name}.png)" in text and (tmp_path / f"{name}.png").stat().st_size < 200_000


def test_runs_that_are_alike_but_for_one_axis_are_compared(tmp_path):
  effects, noise = {"pre": 0.0, "post": 0.5}, iter(np.random.default_rng(0).normal(0, 0.01, 16))
  found = []
  for i, point in enumerate(GRID.points()):
    labels = point.labels
    last = (
      6 + effects[labels["NORM"]] - 0.1 * (labels["EGS"] == 0.1) + 30 * labels["RATE"] + labels["SEED"] + next(noise)
    )
    fails = labels == {"NORM": "post", "EGS": 0.1, "RATE": 1e-2, "SEED": 1}
    found.append(read(tmp_path / str(i), steps([9.0, *[last] * 99]), point=point, status=3 * fails))
  norm, shrink = differences.between(GRID, found)
  assert norm["axis"] == "NORM" and (norm["value"], norm["against"], norm["pairs"]) == ("post", "pre", 7)
  assert abs(norm["mean"] - 0.5) < 0.02 and 0 < norm["half"] < 0.05 and [at["pairs"] for at in norm["at"]] == [4, 3]
  assert abs(shrink["mean"] + 0.1) < 0.02 and 0 < shrink["half"] < 0.05 and shrink["pairs"] == 7
  report.write(tmp_path, GRID, found)
  assert f"| norm post | pre | 7 | {norm['mean']:+.3f} ± {norm['half']:.3f} |" in (tmp_path / "report.md").read_text()


def test_the_interval_of_a_difference_is_students():
  assert differences._estimate([1.0]) == {"pairs": 1, "mean": 1.0, "half": None}
  found = differences._estimate([1.0, 2.0, 3.0])
  assert found["mean"] == 2 and found["half"] == pytest.approx(4.30265 / 3**0.5, rel=1e-5)  # t of 2 degrees of freedom


def test_a_figure_that_no_run_has_is_no_picture(tmp_path):
  found = [read(tmp_path, steps([9.0, 8.0]))]
  assert pictures.over_steps(GRID, found, "grad_norm_embedding") is None
  assert pictures.over_layers(GRID, found, "residual_rms") is None
  assert isinstance(pictures.over_axis(GRID, found), display.Picture)


def test_thinned_curves_keep_their_spikes():
  y = np.ones(10_000)
  y[4321], y[77] = 50.0, np.nan
  x, thin = pictures._thin(np.arange(10_000.0), y)
  assert len(x) <= 400 and np.nanmax(thin) == 50 and 4321 in x
