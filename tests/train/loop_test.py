"""The loop: resuming is exact, runs are not lost, and what goes wrong is said in one line."""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import warnings

import numpy as np
import pytest

from glmjax import errors
from glmjax.checkpoint import manager as manager_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import loop
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import workdir

RATE = schedules.LearningRate(peak=1e-2, minimum=1e-3, warmup_samples=32, decay_samples=160)
DEVICES = mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2)


def train(workdir, config, source, **changes):
  """Ten steps of 16 rows on eight devices."""
  arguments = dict(
    model=config,
    data=source,
    workdir=workdir,
    batches=schedules.Batches(16),
    total_samples=160,
    learning_rate=RATE,
    mesh=DEVICES,
    micro_batch=8,
    intervals=loop.Intervals(log=5, save=4),
  )
  return loop.train(**arguments | changes)


def lines(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved(workdir) -> dict:
  """The arrays of the newest checkpoint, by name."""
  folder = workdir / "checkpoints" / str(manager_lib.steps(workdir / "checkpoints")[-1]) / "state"
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.suffix != ".txt" and not path.name.startswith("_")
  }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny, source):
  """A run from start to end, for the others to be compared with."""
  folder = tmp_path_factory.mktemp("unbroken")
  result = train(folder, tiny, source, validation=source, intervals=loop.Intervals(save=4, evaluate=5, eval_samples=20))
  return folder, result


def test_writes_what_it_promises(unbroken, tiny, source):
  folder, result = unbroken
  assert (result["step"], result["samples_seen"]) == (10, 160)
  records = lines(folder)
  assert [r["step"] for r in records] == list(range(1, 11))
  assert set(records[0]) >= {
    "samples_seen",
    "tokens_seen",
    "loss",
    "loss_mask",
    "loss_gmask",
    "loss_tokens",
    "grad_norm",
    "grad_norm_embedding",
    "learning_rate",
    "embedding_alpha",
    "data_wait_seconds",
    "tokens_per_second",
    "model_flops_per_second",
  }
  assert records[9]["loss"] < records[0]["loss"]
  assert [r["step"] for r in records if "eval_loss" in r] == [5, 10]
  config = json.loads((folder / "config.json").read_text())
  assert config["model"]["num_layers"] == tiny.num_layers and config["data"] == source.describe()
  assert manager_lib.steps(folder / "checkpoints")[-1] == 10
  recorded = manager_lib.newest_metadata(folder / "checkpoints")
  assert (recorded["model"], recorded["data"]) == (config["model"], config["data"])  # by which config.json is told


def test_loss_scale_moves_as_it_was_told(tmp_path, tiny, source):
  """A resumed run goes on from its own scale, and by the window that it is given then."""
  half = dataclasses.replace(tiny, dtype="float16")
  train(tmp_path, half, source, loss_scale=state_lib.DynamicLossScale(start=64, window=2), stop_at_step=5)
  train(tmp_path, half, source, loss_scale=state_lib.DynamicLossScale(window=3), stop_at_step=9)
  assert [line["loss_scale"] for line in lines(tmp_path)] == [64, 64, 128, 128, 256, 256, 256, 512, 512]


def test_resumed_is_unbroken_bit_for_bit(unbroken, tmp_path, tiny, source):
  assert train(tmp_path, tiny, source, stop_at_step=3)["step"] == 3
  with open(tmp_path / "metrics.jsonl", "a") as file:  # a killed run that had gone further than its checkpoint
    file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
  train(tmp_path, tiny, source)
  here, there = lines(tmp_path), lines(unbroken[0])
  assert [r["step"] for r in here] == list(range(1, 11))
  assert [r["loss"] for r in here] == [r["loss"] for r in there]
  assert [r["step"] for r in here if r.get("resumed")] == [4]
  assert saved(tmp_path) == saved(unbroken[0])
  before = saved(tmp_path)
  assert train(tmp_path, tiny, source)["step"] == 10  # nothing left to do
  assert saved(tmp_path) == before and len(lines(tmp_path)) == 10


def test_another_run_is_not_touched(unbroken, tiny, source):
  folder, _ = unbroken
  before = saved(folder)
  message = 'another run: data.name is "patterns" there and "else" here.*overwrite'
  with pytest.raises(errors.InputError, match=message):
    train(folder, tiny, dataclasses.replace(source, name="else"))
  with pytest.raises(errors.InputError, match="model.num_layers is 2 there and 3 here"):
    train(folder, dataclasses.replace(tiny, num_layers=3), source)
  assert saved(folder) == before


def test_two_at_once_do_not_touch_each_other(unbroken, tiny, source):
  folder, _ = unbroken
  before = saved(folder)
  with workdir.Workdir(folder).locked(), pytest.raises(errors.InputError, match="in use: another process is training"):
    train(folder, tiny, source, overwrite=True)
  assert saved(folder) == before


def test_overwrite_starts_anew(tmp_path, tiny, source):
  train(tmp_path, tiny, source, stop_at_step=2)
  train(tmp_path, tiny, dataclasses.replace(source, name="else"), stop_at_step=1, overwrite=True)
  assert manager_lib.steps(tmp_path / "checkpoints") == [1] and len(lines(tmp_path)) == 1


def test_training_leaves_its_host_as_it_was(tmp_path, tiny, source):
  """Called from a notebook or a script of the user's."""

  def settings():
    loggers = [logging.getLogger(name) for name in ("", "absl", "glmjax")]
    return (
      dict(os.environ),
      [signal.getsignal(number) for number in range(1, 32)],
      sys.unraisablehook,
      list(warnings.filters),
      (sys.stdin, sys.stdout, sys.stderr),
      [(logger.level, logger.propagate, list(logger.handlers), list(logger.filters)) for logger in loggers],
    )

  before = settings()
  train(tmp_path, tiny, source, stop_at_step=2)
  assert settings() == before


def test_sigterm_saves_and_leaves(tmp_path, tiny, source, unbroken):
  timer = threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGTERM))

  class Slow(type(source)):
    def batches(self, plan, *where):
      for i, batch in enumerate(super().batches(plan, *where)):
        if i == 5:
          timer.start()
          timer.join()
        yield batch

  with pytest.raises(SystemExit) as caught:
    train(tmp_path, tiny, Slow())
  assert caught.value.code == 143
  steps = manager_lib.steps(tmp_path / "checkpoints")
  assert 0 < steps[-1] < 10 and len(lines(tmp_path)) == steps[-1]
  train(tmp_path, tiny, source)
  assert saved(tmp_path) == saved(unbroken[0])


def test_not_finite_stops_with_one_line(tmp_path, tiny, source):
  bad = dataclasses.replace(source, infinite=100)
  with pytest.raises(errors.Diverged) as caught:
    train(tmp_path, tiny, bad)
  message = str(caught.value)
  assert "\n" not in message
  assert "step 7 (samples 96 to 111)" in message and "the loss" in message and "step 4" in message
  assert [line["step"] for line in lines(tmp_path)] == list(range(1, 8)) and "diverged" in lines(tmp_path)[-1]
  train(tmp_path, tiny, bad, batches=schedules.Batches(16, skip=[(100, 100)]))  # as it advises
  assert lines(tmp_path)[-1]["samples_seen"] >= 160


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(mesh=mesh_lib.MeshConfig(data=16)), "mesh data=16 needs 16 devices, here are 8"),
    (dict(micro_batch=6), "micro_batch 6 does not divide over the mesh's 4 batch shards"),
    (dict(batches=schedules.Batches(6), micro_batch=None), "batch size 6 does not divide"),
    (dict(mesh=mesh_lib.MeshConfig(data=1, tensor=8)), "num_heads 4 does not divide over tensor=8"),
  ],
)
def test_mistakes_in_the_mesh(tmp_path, tiny, source, changes, message):
  with pytest.raises(errors.InputError, match=message):
    train(tmp_path / "run", tiny, source, **changes)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(profile=(3,)), r"Intervals.profile is \(3,\): give \(first, last\)"),
    (dict(profile=(5, 4)), "Intervals.profile"),
    (dict(eval_samples=0), "Intervals.eval_samples is 0"),
    (dict(save=-1), "Intervals.save is -1"),
  ],
)
def test_mistakes_in_the_intervals(changes, message):
  with pytest.raises(errors.InputError, match=message):
    loop.Intervals(**changes)


def test_mistake_in_the_loss_mean(tmp_path, tiny, source):
  with pytest.raises(errors.InputError, match="loss_mean_of is 'row': use one of tokens, rows"):
    train(tmp_path / "run", tiny, source, loss_mean_of="row")
  assert not (tmp_path / "run").exists()


def test_mean_of_rows_trains(tmp_path, tiny, source):
  result = train(tmp_path, tiny, source, loss_mean_of="rows", stop_at_step=2)
  assert result["loss_tokens"] == sum(np.count_nonzero(b["loss_weights"]) for b in source.batches(iter([(16, 16)])))


@pytest.mark.parametrize("infinite", [None, 40])
def test_profile_of_some_steps(tmp_path, tiny, source, infinite):
  with contextlib.suppress(errors.Diverged):  # it is written also where the run ends in the middle
    train(
      tmp_path,
      tiny,
      dataclasses.replace(source, infinite=infinite),
      stop_at_step=4,
      intervals=loop.Intervals(profile=(2, 3)),
    )
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_source_that_ends_before_the_run(tmp_path, tiny, source):
  """What was done is saved as at any other mistake, and the run is not told as done."""
  with pytest.raises(errors.InputError, match="the source ends before sample 32, and the run goes on"):
    train(tmp_path, tiny, dataclasses.replace(source, last=32))


def test_tokens_beyond_the_vocabulary(tmp_path, tiny, source):
  with pytest.raises(errors.InputError, match="token .* the model has vocab_size 32"):
    train(tmp_path, dataclasses.replace(tiny, vocab_size=32), source)


def test_unrolled_layers_train_alike(tmp_path, tiny, source, unbroken):
  train(tmp_path, dataclasses.replace(tiny, scan_layers=False), source, stop_at_step=4)
  scanned = [r["loss"] for r in lines(unbroken[0])][:4]
  np.testing.assert_allclose([r["loss"] for r in lines(tmp_path)], scanned, rtol=1e-4)
  assert saved(tmp_path).keys() == saved(unbroken[0]).keys()
