"""compute.jsonl: what each session of a run cost, whatever ends it."""

import dataclasses
import json
import pathlib
import shutil

import jax
import pytest

from glmjax import errors
from glmjax.cards import compute as cost
from glmjax.models import params
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import compute
from glmjax.train import energy
from glmjax.train import loop
from glmjax.train import schedules

STEP = {"tokens": 64, "seconds": 2.0, "model_flops_per_second": 8e9}  # of a line of metrics.jsonl


def train(workdir: pathlib.Path, model, source, steps: int, **settings) -> None:
  """Trains for so many steps of 8 rows, or goes on."""
  given = dict(
    model=model,
    data=source,
    workdir=workdir,
    batches=schedules.Batches(8),
    total_samples=8 * steps,
    learning_rate=schedules.Constant(1e-2),
    intervals=loop.Intervals(log=0, save=2),
    mesh=mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2),
  )
  loop.train(**given | settings)


def lines(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def last_of_each(workdir: pathlib.Path) -> list[dict]:
  return [*{line["session"]: line for line in lines(workdir / "compute.jsonl")}.values()]


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self) -> float:
    return self.now


@pytest.fixture(name="session")
def _session(tmp_path):
  """Makes sessions of one device, and closes them."""
  made = []

  def make(clock: Clock = Clock(), path: pathlib.Path = tmp_path / "compute.jsonl") -> compute.Session:
    made.append(compute.Session(path, mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1), jax.devices()[:1]), clock))
    return made[-1]

  yield make
  for each in made:
    each._meter.close()
    each._lines.close()


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory, tiny, source):
  """A run stopped at step 3 and gone on with to step 5, a line torn between; and what was there behind each save."""
  folder, seen = tmp_path_factory.mktemp("run"), []
  with pytest.MonkeyPatch.context() as patch:
    save = compute.Session.save
    patch.setattr(compute.Session, "save", lambda self: save(self) or seen.append(lines(folder / "compute.jsonl")[-1]))
    train(folder, tiny, source, 5, stop_at_step=3)
    with open(folder / "compute.jsonl", "a") as file:
      file.write('{"session": "half a li')
    train(folder, tiny, source, 5)
  return folder, seen


def test_a_run_records_its_sessions(run, tiny):
  """What they did is what metrics.jsonl has, and the model's own FLOPs."""
  folder, _ = run
  first, second = last_of_each(folder)
  assert [(each["first_step"], each["step"], each["ended"]) for each in (first, second)] == [(0, 3, True), (3, 5, True)]
  records, flops = lines(folder / "metrics.jsonl"), params.train_flops_per_token(tiny, 16)
  for each, steps in ((first, records[:3]), (second, records[3:])):
    done = each["done"]
    assert (done["steps"], done["samples"], done["tokens"]) == (len(steps), 8 * len(steps), 8 * 16 * len(steps))
    assert done["model_flops"] == pytest.approx(done["tokens"] * flops, rel=1e-9)
    assert done["step_seconds"] == pytest.approx(sum(step["seconds"] for step in steps))
    assert done["step_seconds"] < each["seconds"]
    assert each["devices"] == [{"count": 8, "platform": "cpu", "kind": "cpu"}] and each["mfu"] is None
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(each["versions"])
    assert each["host"]["processor"] and each["host"]["cpus"] == energy.cpus() <= each["host"]["cpus_of_host"]
    assert each["peak_bytes"]["host"] > 1 << 26
  assert first["started"] <= second["started"] and first["started"].endswith("Z")


def test_a_card_has_what_was_kept_and_what_was_done(run, tiny):
  """Here the same: five steps, whose model FLOPs are those of the code's own estimate."""
  found = cost.total(run[0])
  assert (found.sessions, found.restarts, found.killed, found.step, found.unrecorded_steps) == (2, 1, 0, 5, 0)
  assert (found.kept.steps, found.kept.samples, found.kept.tokens) == (5, 40, 640)
  assert found.kept.model_flops == pytest.approx(640 * params.train_flops_per_token(tiny, 16), rel=1e-9)
  assert dataclasses.astuple(found.done) == pytest.approx(dataclasses.astuple(found.kept))
  assert found.device_hours == {"cpu": pytest.approx(8 * found.wall_hours)} and found.mfu is None
  assert 0 < found.energy.low_kwh < found.energy.high_kwh and not found.energy.meters and not found.changes


def test_a_session_that_is_killed_has_told_nearly_all(run):
  """Behind each save a line has its step, as long as so much time has passed: here it has."""
  _, seen = run
  assert [(each["step"], each["ended"]) for each in seen] == [(2, False), (4, False)]


def test_whatever_meters_do_losses_have_the_same_bits(run, tmp_path, tiny, source, monkeypatch):
  """A meter that cannot be made ends nothing. A run begun anew begins its costs anew; one that diverges tells them."""

  def broken(*arguments: object) -> None:
    raise RuntimeError("no such thing")

  shutil.copytree(run[0], tmp_path / "run")
  (tmp_path / "run" / "compute-3.jsonl").write_text("of another process\n")
  monkeypatch.setattr(energy, "_Rapl", broken)
  with pytest.raises(errors.Diverged):
    train(tmp_path / "run", tiny, dataclasses.replace(source, infinite=20), 4, overwrite=True)
  losses, before = ([line["loss"] for line in lines(each / "metrics.jsonl")] for each in (tmp_path / "run", run[0]))
  assert losses == [*before[:2], None]
  [line] = last_of_each(tmp_path / "run")
  assert line["ended"] and (line["step"], line["done"]["steps"]) == (2, 2)
  assert line["energy"]["parts"][0]["problem"] == "RAPL: no such thing"
  assert not (tmp_path / "run" / "compute-3.jsonl").exists()


def test_lines_are_few(session, tmp_path):
  """Saved every second for a year, a session has some two thousand lines; it is never without one for long."""
  clock = Clock()
  here = session(clock)
  here.begin(0)
  written = []
  here._write = lambda: written.append(clock.now) or setattr(here, "_written", clock.now)
  while clock.now < 365 * 86_400:
    clock.now = max(clock.now + 1, 1.001 * clock.now)
    here.save()
  assert len(written) < 2200 and all(b <= 1.02 * a + 2 for a, b in zip(written, written[1:]))


def test_counts_ways_back(session, tmp_path):
  """A step that is done again counts again; the line has the step of the state."""
  clock = Clock()
  here = session(clock)
  here.begin(4)
  for step in (5, 6, 5, 6, 7):
    here.add(STEP | {"step": step}, 4)
  clock.now = 20
  here.close()
  begun, ended = lines(tmp_path / "compute.jsonl")
  assert (begun["step"], begun["done"]["steps"], begun["ended"]) == (4, 0, False)
  assert (ended["first_step"], ended["step"], ended["seconds"]) == (4, 7, 20)
  done = {"steps": 5, "samples": 20, "tokens": 320, "model_flops": 80e9, "step_seconds": 10}
  assert ended["done"] == done and ended["energy"]["low_kwh"] > 0


def test_a_session_that_never_began_writes_nothing(session, tmp_path):
  session().close()
  assert not (tmp_path / "compute.jsonl").exists() or not (tmp_path / "compute.jsonl").read_text()


def test_mfu_of_known_devices_alone():
  h200, unknown = ({"count": count, "platform": "gpu", "kind": kind} for count, kind in ((2, "NVIDIA H200"), (1, "X")))
  assert compute.mfu(989.4e12 * 10, 10, [h200]) == pytest.approx(0.5)
  assert compute.mfu(1e15, 10, [h200, unknown]) is compute.mfu(1e15, 0, [h200]) is None
