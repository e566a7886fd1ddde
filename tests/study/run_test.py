"""A study's runs: what is done stays done, what is stopped goes on, what fails is said; and a real one in miniature."""

import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from glmjax import cli
from glmjax import errors
from glmjax import tokens
from glmjax.cli import commands
from glmjax.data import shards
from glmjax.io import lock
from glmjax.io import publish
from glmjax.study import grid as grid_lib
from glmjax.study import run as run_lib

TESTS = pathlib.Path(__file__).parent.parent
STUDIES = TESTS.parent / "gin" / "studies" / "stability"
MINIATURE = """
from __gin__ import dynamic_registration
import poisoned
from glmjax.models import config
from glmjax.study import grid
from glmjax.study import run
from glmjax.train import loop

include "studies/stability/run.gin"

loop.train.data = @poisoned.Source()
config.GLMConfig:
  vocab_size = 64
  num_layers = 2
  embed_dim = 16
  mlp_dim = 24
  max_length = 16
TOTAL_SAMPLES = 640
WARMUP_SAMPLES = 64
run.run.grid = @grid.Grid()
grid.Grid:
  over = "PEAK_LEARNING_RATE"
  axes = {"norm": {"DeepNorm": {"NORM": "deepnorm"}}, "PEAK_LEARNING_RATE": [1e-2, 1e30]}
"""
# In place of `glmjax train`: notes that it was called, and does what the point's KIND says.
STUB = """
import json, pathlib, sys, time
given = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:] if "=" in argument)
folder = pathlib.Path(given["workdir"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "calls", "a") as file:
  print("called" if not (folder / "begun").exists() else "go on", file=file)
kind, rate = given["gin.NORM"].strip("'"), float(given["gin.PEAK_LEARNING_RATE"])
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "begun").touch()
if kind == "post":
  print("first line")
  sys.exit("glmjax: no such luck")
if kind == "sandwich":
  time.sleep(60)
losses = [9.0, 8.0, 5.0 + rate] if kind == "pre" else [9.0, 9.5]
with open(folder / "metrics.jsonl", "w") as file:
  for step, loss in enumerate(losses, 1):
    print(json.dumps({"step": step, "loss": loss, "grad_norm": 1.0}), file=file)
sys.exit(0 if kind == "pre" else 3)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
  """Has a small program do what `glmjax train` does; returns where it is."""
  path = tmp_path / "stub.py"
  path.write_text(STUB)
  cached(tmp_path / "cache")
  monkeypatch.setattr(run_lib, "_COMMAND", (sys.executable, str(path)))
  return path


def grid(*norms: str, rates=(1e-3, 1e-2)) -> grid_lib.Grid:
  return grid_lib.Grid({"NORM": [*norms], "PEAK_LEARNING_RATE": [*rates]}, "PEAK_LEARNING_RATE")


FILES = ["studies/stability/run.gin"]


def cached(folder: pathlib.Path, **tokenizer) -> pathlib.Path:
  """Writes a token cache without text."""
  specials = {field.name: i for i, field in enumerate(dataclasses.fields(tokens.SpecialTokens))}
  of = {"specials": specials, "vocab_size": 8192, "fingerprint": "0", "files": []} | tokenizer
  folder.mkdir(exist_ok=True)
  shards.write_manifest(folder, {"format": shards.FORMAT, "dtype": "uint16", "tokenizer": of, "tasks": {}})
  return folder


def settings(folder: pathlib.Path, *bindings: str) -> run_lib.Settings:
  """What runs of a study have in common, whose cache is beside it."""
  return run_lib.Settings(FILES, [f"CACHE={str(folder.parent / 'cache')!r}", *bindings])


def study(folder: pathlib.Path, *norms: str, bindings=(), **given):
  return run_lib.run(folder, grid(*norms), settings(folder, *bindings), **given)


def program(stub: pathlib.Path, folder: pathlib.Path, *norms: str) -> str:
  """The study in a process of its own, which takes signals as the command does."""
  return (
    f"from glmjax.study import grid, run; run._COMMAND = ({sys.executable!r}, {str(stub)!r}); "
    "from glmjax.cli import process; process.begin(); "
    f"run.run({str(folder)!r}, grid.Grid({{'NORM': {[*norms]!r}, 'PEAK_LEARNING_RATE': [0.001, 0.01]}}, "
    f"'PEAK_LEARNING_RATE'), run.Settings({FILES!r}, {settings(folder).bindings!r}), workers=2)"
  )


def calls(folder: pathlib.Path) -> dict[str, list[str]]:
  return {path.parent.name: path.read_text().split("\n")[:-1] for path in folder.glob("points/*/calls")}


def test_points_are_done_once_and_divergence_is_a_result(stub, tmp_path):
  folder = tmp_path / "study"
  figures = study(folder, "pre", "deepnorm", workers=2)
  assert (figures["points"], figures["done"], figures["diverged"], figures["failed"]) == (4, 4, 2, {})
  assert calls(folder).keys() == {p.name for p in grid("pre", "deepnorm").points()}
  assert study(folder, "pre", "deepnorm") == figures
  assert all(each == ["called"] for each in calls(folder).values())
  found = json.loads((folder / "report.json").read_text())
  pre, deepnorm = found["groups"]
  assert pre["labels"] == {"NORM": "pre"} and pre["largest_that_learns"] == pre["best"] * 10 == 1e-2
  assert pre["sensitivity"]["mean"] == pytest.approx((5.001 + 5.01) / 2 - 5.001)
  assert deepnorm["diverged"] == 2 and deepnorm["largest_that_learns"] is None
  assert "| pre | 2 | 0 | 0 | 0 | 0 | 0 |" in (folder / "report.md").read_text()


def test_only_what_changed_is_done_anew(stub, tmp_path):
  study(tmp_path / "study", "pre")
  study(tmp_path / "study", "pre", "deepnorm")
  assert all(len(each) == 1 for each in calls(tmp_path / "study").values())
  study(tmp_path / "study", "pre", bindings=["BATCH_SIZE=8"])
  assert all(each == ["called"] for each in calls(tmp_path / "study").values())  # nothing of other settings is left
  written = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "points").glob("*/calls")}
  study(tmp_path / "study", "pre", "deepnorm", bindings=["BATCH_SIZE=8"])
  again = {path.parent.name for path, time in written.items() if path.stat().st_mtime_ns != time}
  assert again == {point.name for point in grid("deepnorm").points()}


def test_checkpoints_of_done_points_go_unless_they_are_wanted(stub, tmp_path):
  study(tmp_path / "without", "pre")
  assert not list(tmp_path.glob("without/points/*/checkpoints"))
  study(tmp_path / "with", "pre", keep_checkpoints=True)
  assert len(list(tmp_path.glob("with/points/*/checkpoints"))) == 2


def test_checkpoints_that_a_killed_study_left_of_done_points_go(stub, tmp_path):
  """Not those of a point that another process has in hand, nor where they are wanted."""
  study(tmp_path / "study", "pre", keep_checkpoints=True)
  first, second = (run_lib.Task(point, tmp_path / "study", "") for point in grid("pre").points())
  study(tmp_path / "study", "pre", keep_checkpoints=True)
  assert first.checkpoints.is_dir() and second.checkpoints.is_dir()
  with lock.held(lock.beside(first.result), "held"):
    study(tmp_path / "study", "pre")
  assert first.checkpoints.is_dir() and not second.checkpoints.exists()
  study(tmp_path / "study", "pre")
  assert not first.checkpoints.exists() and all(each == ["called"] for each in calls(tmp_path / "study").values())


@pytest.mark.parametrize("at", ["study.json", "points", "results", "logs"])
def test_a_study_that_could_not_begin_may_be_begun_again(stub, tmp_path, monkeypatch, at):
  """A disk that was full, or a kill, at any of what is made first."""
  mkdir, file = pathlib.Path.mkdir, publish.file

  def full_folder(path, *given, **more):
    if path.name == at:
      raise OSError(errno.ENOSPC, "no space")
    mkdir(path, *given, **more)

  def full_file(path):
    if path.name == at:
      path.with_name(f".{path.name}.host.1.tmp").touch()  # as a kill leaves it
      raise OSError(errno.ENOSPC, "no space")
    return file(path)

  with monkeypatch.context() as patched:
    patched.setattr(pathlib.Path, "mkdir", full_folder)
    patched.setattr(publish, "file", full_file)
    with pytest.raises(OSError):
      study(tmp_path / "study", "pre")
  assert study(tmp_path / "study", "pre")["done"] == 2


def test_another_version_of_glmjax_is_said_and_does_nothing_anew(stub, tmp_path, monkeypatch):
  report = tmp_path / "study" / "report.md"
  study(tmp_path / "study", "pre")
  assert "versions" not in report.read_text()
  with monkeypatch.context() as patched:
    patched.setattr(run_lib.glmjax, "__version__", "77.0")
    study(tmp_path / "study", "pre", "deepnorm")
  assert all(each == ["called"] for each in calls(tmp_path / "study").values())
  own = run_lib.glmjax.__version__
  assert f"several versions of glmjax: {own} (2), 77.0 (2)." in report.read_text()
  assert json.loads(report.with_suffix(".json").read_text())["glmjax"] == {own: 2, "77.0": 2}


def test_a_run_that_two_versions_did_is_of_both(stub, tmp_path, monkeypatch):
  with monkeypatch.context() as patched:
    patched.setattr(run_lib.glmjax, "__version__", "0.0.1")
    study(tmp_path / "study", "post")
  stub.write_text(STUB.replace('kind == "post"', "False").replace('kind == "pre"', "True"))
  study(tmp_path / "study", "post")
  report = json.loads((tmp_path / "study" / "report.json").read_text())
  assert report["glmjax"] == {f"0.0.1 and {run_lib.glmjax.__version__}": 2}
  assert "several versions" in (tmp_path / "study" / "report.md").read_text()


def test_other_tokens_at_the_same_place_are_another_study(stub, tmp_path):
  def written():
    return {path: path.stat().st_mtime_ns for path in tmp_path.glob("study/results/*.json")}

  study(tmp_path / "study", "pre")
  before = written()
  cached(tmp_path / "cache")  # the same once more
  study(tmp_path / "study", "pre")
  assert written() == before
  (tmp_path / "cache" / "tokenizer").mkdir()
  (tmp_path / "cache" / "tokenizer" / "more").write_text("x")
  cached(tmp_path / "cache", files=[{"file": "more", "bytes": 1, "sha256": "0" * 64}])
  study(tmp_path / "study", "pre")
  assert all(written()[path] != time for path, time in before.items())


def test_a_cache_that_is_missing_is_said_before_anything_is_done(stub, tmp_path):
  study(tmp_path / "study", "pre")
  (tmp_path / "cache" / "manifest.json").unlink()
  with pytest.raises(errors.InputError, match="no finished token cache here"):
    study(tmp_path / "study", "pre")
  assert len(calls(tmp_path / "study")) == 2  # what is done stays


def test_a_run_that_fails_is_said_and_tried_again(stub, tmp_path):
  for _ in range(2):
    figures = study(tmp_path / "study", "pre", "post")
    assert (figures["done"], len(figures["failed"])) == (2, 2)
    assert all("status 1: glmjax: no such luck" in why for why in figures["failed"].values())
  tried = [each for name, each in calls(tmp_path / "study").items() if "norm=post" in name]
  assert tried == [["called", "go on"]] * 2  # from what it has left


def test_what_another_process_does_is_left_to_it(stub, tmp_path):
  folder = tmp_path / "study"
  (folder / "results").mkdir(parents=True)
  (folder / "study.json").touch()
  first, _ = grid("pre").points()
  with lock.held(lock.beside(folder / "results" / f"{first.name}.json"), "held"):
    figures = study(folder, "pre")
  assert (figures["done"], figures["elsewhere"]) == (1, 1)
  assert study(folder, "pre")["done"] == 2


def test_a_signal_ends_the_runs_and_they_go_on_afterwards(stub, tmp_path):
  folder = tmp_path / "study"
  study(folder, "pre")
  (folder / "report.md").unlink()
  command = [sys.executable, "-c", program(stub, folder, "pre", "sandwich")]
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  try:
    until = time.monotonic() + 60
    while len(list(folder.glob("points/*sandwich*/begun"))) < 2:
      assert process.poll() is None and time.monotonic() < until
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
  finally:
    process.kill()
  endings = [json.loads(path.read_text())["status"] for path in folder.glob("results/*sandwich*.json")]
  assert endings == [None, None]
  assert "2 runs of 4" in (folder / "report.md").read_text()  # of what is done so far
  stub.write_text(STUB.replace("time.sleep(60)", "pass"))
  assert study(folder, "sandwich")["done"] == 2
  assert [each for name, each in calls(folder).items() if "sandwich" in name] == [["called", "go on"]] * 2


def test_two_studies_of_one_folder_divide_its_points(stub, tmp_path):
  folder = tmp_path / "study"
  processes = [subprocess.Popen([sys.executable, "-c", program(stub, folder, "pre", "deepnorm")]) for _ in range(2)]
  assert [process.wait(60) for process in processes] == [0, 0]
  assert all(each == ["called"] for each in calls(folder).values()) and len(calls(folder)) == 4
  assert study(folder, "pre", "deepnorm")["done"] == 4


def test_a_run_that_outlived_its_study_is_left_alone(stub, tmp_path):
  folder = tmp_path / "study"
  first, _ = grid("pre").points()
  (folder / "points" / first.name).mkdir(parents=True)
  (folder / "study.json").touch()
  with lock.held(folder / "points" / first.name / ".lock", "held"):
    figures = study(folder, "pre")
  assert (figures["done"], figures["elsewhere"], figures["failed"]) == (1, 1, {})


def test_any_gin_file_of_a_run_may_have_a_grid(tmp_path):
  settings = run_lib.Settings(
    ["runs/quickstart.gin"], [f"CACHE={str(cached(tmp_path / 'cache'))!r}"], commands.targets()
  )
  rates = grid_lib.Grid({"PEAK_LEARNING_RATE": [1e-3, 1e-2], "loop.train.seed": [0, 1]}, "PEAK_LEARNING_RATE")
  assert len({task.digest for task in run_lib._tasks(tmp_path, rates, settings)}) == 4


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.gin") if path.stem != "run"))
def test_every_point_of_the_studies_that_ship_is_a_run(tmp_path, monkeypatch, capsys, name):
  monkeypatch.setattr(run_lib._Crew, "do", lambda self, tasks, on_stop: {})
  arguments = f"--gin_file=studies/stability/{name}.gin --workdir={tmp_path / 'study'} --json".split()
  assert cli.main(["study", *arguments, f"--gin.CACHE={str(cached(tmp_path / 'cache'))!r}"]) == 0
  figures = json.loads(capsys.readouterr().out)
  assert f"# {figures['points']} runs" in (STUDIES / f"{name}.gin").read_text(), "its first lines say how many"


@pytest.mark.parametrize(
  "rates, bindings, said",
  [
    ((1e-3,), ["NORM='pre'"], "bound by the grid"),
    ((-1.0,), [], "Grid.axes"),
    ((1e-3,), ["NORMS='pre'"], "NORMS"),
    ((1e-3,), ["BATCH_SIZE='many'"], "many"),
  ],
)
def test_mistakes_are_found_before_a_run_begins(stub, tmp_path, rates, bindings, said):
  with pytest.raises(errors.InputError, match=said):
    run_lib.run(tmp_path / "study", grid("pre", rates=rates), settings(tmp_path / "study", *bindings))
  assert not (tmp_path / "study").exists()


def test_other_folders_are_left_alone(stub, tmp_path):
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "config.json").write_text(json.dumps({"model": {"vocab_size": 1, "num_layers": 1, "embed_dim": 1}}))
  with pytest.raises(errors.InputError, match="choose another folder"):
    study(tmp_path, "pre")
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "report.md").write_text("my own")
  with pytest.raises(errors.InputError, match="holds other things"):
    study(tmp_path / "mine", "pre")
  with pytest.raises(errors.InputError, match="on a disk"):
    run_lib.run("gs://bucket/study", grid("pre"), settings(tmp_path / "study"))
  with pytest.raises(errors.InputError, match="run.workers"):
    study(tmp_path / "none", "pre", workers=0)


def test_the_stability_study_in_miniature(tmp_path):
  (tmp_path / "mini.gin").write_text(MINIATURE)
  environment = dict(os.environ, PYTHONPATH=str(TESTS), XLA_FLAGS="")
  command = [sys.executable, "-m", "glmjax", "study", "--gin_file=mini.gin", "--workdir=study", "--workers=2", "--json"]
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  figures = json.loads(done.stdout)
  assert (figures["points"], figures["done"], figures["diverged"]) == (2, 2, 1), done.stderr
  found = json.loads((tmp_path / "study" / "report.json").read_text())
  sound, diverged = sorted(found["runs"], key=lambda run: run["labels"]["PEAK_LEARNING_RATE"])
  assert sound["steps"] == 40 and sound["last_loss"] < sound["first_loss"] == diverged["last_loss"]
  assert found["groups"][0]["largest_that_learns"] == 1e-2
  for name in ("sensitivity", "curves", "embedding", "gradient"):
    assert (tmp_path / "study" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
