"""Runs in a bucket: what a run on a disk is."""

import dataclasses
import json
import pathlib
import re
import shutil
import time

import bucket_server
import pytest

from glmjax import errors
from glmjax import tokenizer
from glmjax.checkpoint import manager as manager_lib
from glmjax.io import bucket
from glmjax.io import lease
from glmjax.io import paths
from glmjax.io import tokenizer_folder
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import loop
from glmjax.train import schedules
from glmjax.train import workdir as workdir_lib

SCHEMES = pytest.mark.parametrize("scheme", bucket.SCHEMES)
INTERVALS = loop.Intervals(log=0, save=4, evaluate=6, keep=2, eval_samples=8)
DEVICES = mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2)
TIMED = ("seconds", "data_wait_seconds", "tokens_per_second", "model_flops_per_second", "resumed")


@pytest.fixture
def train(tiny, source):
  """Trains a tiny model for so many steps of 8 rows, or goes on with it."""

  def run(workdir, steps: int = 10, **settings):
    given = dict(
      model=tiny,
      data=source,
      workdir=workdir,
      batches=schedules.Batches(8),
      total_samples=8 * steps,
      learning_rate=schedules.Constant(1e-2),
      validation=dataclasses.replace(source, name="others"),
      intervals=INTERVALS,
      mesh=DEVICES,
    )
    return loop.train(**(given | settings))

  return run


def untimed(lines: bytes) -> list[dict]:
  return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines.splitlines()]


def steps_of(root) -> dict[str, dict]:
  """The records of the steps of a run."""
  there = root / "checkpoints"
  return {str(step): manager_lib.read_record(there / str(step)) for step in manager_lib.steps(there)}


@SCHEMES
def test_a_run_in_a_bucket_is_a_run_on_a_disk(train, server, tmp_path, scheme):
  """Unbroken on a disk; in a bucket stopped between two saves and gone on with: the same losses, states and files."""
  root = paths.named(f"{scheme}://bucket/runs/one")
  train(tmp_path / "run")
  train(root, stop_at_step=7)
  assert server.keys(prefix="runs/one/checkpoints/7/metadata/") != []
  train(root)
  disk = tmp_path / "run"
  assert untimed(server.data("runs/one/metrics.jsonl")) == untimed((disk / "metrics.jsonl").read_bytes())
  assert steps_of(root)["10"] == steps_of(disk)["10"]
  assert server.data("runs/one/config.json") == (disk / "config.json").read_bytes()
  top = {key.split("/")[2] for key in server.keys(prefix="runs/one/")}
  assert top - {".lock", "tensorboard"} == {path.name for path in disk.iterdir()} - {"tensorboard"}
  events = [key for key in server.keys() if "/tensorboard/events.out.tfevents." in key]
  assert len(events) == (2 if any(disk.glob("tensorboard/*")) else 0) and all(server.data(key) for key in events)


def test_overwrite_and_weights(train, source, server, tmp_path):
  """--weights from a bucket begins as from a disk; --overwrite deletes what the run wrote, and nothing else."""
  root = paths.named("gs://bucket/run")
  train(root, 4)
  server.put("run/notes.txt", b"mine")
  train(tmp_path / "a", 2, weights=root)
  train("gs://bucket/second", 2, weights="gs://bucket/run")
  assert steps_of(tmp_path / "a")["2"] == steps_of(paths.named("gs://bucket/second"))["2"]
  with pytest.raises(errors.InputError, match="gs://bucket/run holds another run: data.name"):
    train(root, 4, data=dataclasses.replace(source, name="patterns2"))
  train(root, 2, data=dataclasses.replace(source, name="patterns2"), overwrite=True)
  assert manager_lib.steps(root / "checkpoints") == [2] and server.data("run/notes.txt") == b"mine"
  assert [line["step"] for line in untimed(server.data("run/metrics.jsonl"))] == [1, 2]
  with pytest.raises(errors.InputError, match="lies in a training run"):
    train("gs://bucket/run/checkpoints/x")


def test_the_lines_are_there_when_the_step_is(train, server):
  """When a step is published, those up to the step before, and soon its own."""
  seen = {}

  def look(method: str, path: str) -> None:
    if method == "PUT" and (match := re.search(r"checkpoints/(\d+)/metadata/checksums.json", path)):
      seen[int(match[1])] = len(server.objects["bucket"]["run/metrics.jsonl"].data.splitlines())

  server.fault = look
  train("gs://bucket/run", 12, intervals=loop.Intervals(log=0, save=3))
  assert sorted(seen) == [3, 6, 9, 12] and all(step - 1 <= lines <= step + 3 for step, lines in seen.items()), seen


def test_a_profile_is_put_where_it_belongs(train, server):
  train("gs://bucket/run", 4, intervals=loop.Intervals(log=0, profile=(2, 3)))
  assert [key for key in server.keys(prefix="run/profile/") if key.endswith(".xplane.pb")]


def test_metrics_that_cannot_be_put_end_nothing(train, server, caplog):
  def fault(method: str, path: str) -> bucket_server.Fault | None:
    refused = method == "PUT" and re.search("metrics.jsonl|tensorboard|profile", path)
    return bucket_server.Fault(status=403, code="AccessDenied") if refused else None

  server.fault = fault
  train("gs://bucket/run", 8, intervals=loop.Intervals(log=0, save=4, profile=(2, 3)))
  assert manager_lib.steps(paths.named("gs://bucket/run/checkpoints")) == [4, 8]
  said = [message for message in caplog.messages if message.startswith("gs://bucket/run/metrics.jsonl: not written")]
  assert len(said) == 1 and "training goes on" in caplog.text
  server.fault = lambda method, path: None
  train("gs://bucket/run", 10)  # and goes on
  assert [line["step"] for line in untimed(server.data("run/metrics.jsonl"))] == [9, 10]


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_while_without_a_network_loses_nothing(train, server, tmp_path, monkeypatch, seconds):
  """Half-way through a save; less than the lease's time, and than a request's."""
  monkeypatch.setenv(bucket.PATIENCE, str(seconds + 20))
  train(tmp_path / "run", 12)
  done = []

  def fault(method: str, path: str) -> None:
    if method == "PUT" and re.search(r"checkpoints/8/state", path) and not done:
      done.append(True)
      server.down(seconds)

  server.fault = fault
  train("gs://bucket/run", 12)
  assert done
  assert steps_of(paths.named("gs://bucket/run")) == steps_of(tmp_path / "run")
  assert untimed(server.data("run/metrics.jsonl")) == untimed((tmp_path / "run" / "metrics.jsonl").read_bytes())


def test_training_asks_for_nothing_between_saves(train, server):
  """The lease's renewals, and the lines now and then."""
  train("gs://bucket/run", 4, intervals=loop.Intervals(log=0, save=0))
  first = len(server.log)
  train("gs://bucket/other", 40, intervals=loop.Intervals(log=0, save=0))
  assert len(server.log) - first <= first + 12  # at most a renewal and a put every 10 seconds


def test_a_second_run_is_told_who_is_there(train, server):
  root = paths.named("gs://bucket/run")

  def while_running(folder) -> None:
    with pytest.raises(errors.InputError, match=r"gs://bucket/run is in use: .*\(process \d+ on "):
      train(root)

  train(root, 2, on_start=while_running)


def test_a_run_that_was_cut_off_publishes_nothing(train, server, monkeypatch):
  """For longer than its lease: whether the folder is another's by now cannot be known."""
  monkeypatch.setattr(lease, "LEASE", 1.0)
  monkeypatch.setattr(lease, "_RENEW", 0.2)
  done = []

  def fault(method: str, path: str) -> bucket_server.Fault | None:
    if re.search(r"run/\.lock", path) and done:
      return bucket_server.Fault(drop=True)
    if method == "PUT" and "checkpoints/4/state" in path and not done:
      done.append(True)
      time.sleep(2)
    return None

  server.fault = fault
  with pytest.raises(
    errors.InputError, match=r"checkpoint gs://bucket/run/checkpoints/4 could not be written \(no answer"
  ):
    train("gs://bucket/run")
  assert manager_lib.steps(paths.named("gs://bucket/run/checkpoints")) == []


def test_a_service_that_is_gone_for_good_ends_a_run_in_one_patience(train, server, caplog):
  """From the moment when nothing answers any more, at a save: the patience of 3 seconds, and one for what is left."""
  gone = []

  def fault(method: str, path: str) -> bucket_server.Fault | None:
    if method == "PUT" and "checkpoints/4/state" in path and not gone:
      gone.append(time.monotonic())
    return bucket_server.Fault(drop=True) if gone else None

  server.fault = fault
  with pytest.raises(
    errors.InputError, match=r"checkpoints/4 could not be written \(no answer for 3 s.*earlier ones are"
  ):
    train("gs://bucket/run")
  assert time.monotonic() - gone[0] < 14  # the save, the steps, three files and the lock, each for itself: 21 and more


@dataclasses.dataclass(frozen=True)
class WithTokenizer:
  """What Workdir asks of a source."""

  tokenizer: pathlib.Path

  def describe(self) -> dict:
    return {"seed": 1}

  def save_tokenizer(self, folder: str) -> None:
    shutil.copytree(self.tokenizer, folder, dirs_exist_ok=True)


@SCHEMES
def test_the_tokenizer_comes_along(server, tmp_path, tiny, scheme):
  """Whole, also where its writer was killed half-way; another one is refused, and goes with --overwrite."""
  texts = [
    f"On day {i} the quick brown fox jumps over {i * i} lazy dogs; 第{i}天，小河边的柳树发芽了。" for i in range(60)
  ]
  for name, count, size in (("one", 60, 440), ("other", 40, 420)):
    tokenizer.train(texts[:count], tmp_path / name, size)
  one, other = (WithTokenizer(tmp_path / name) for name in ("one", "other"))
  config = dataclasses.replace(tiny, vocab_size=448)
  folder = workdir_lib.Workdir.named(f"{scheme}://bucket/run")

  def begin(source: WithTokenizer, overwrite: bool = False) -> None:
    with folder.locked():
      folder.open(config, source, overwrite)

  begin(one)
  begin(one)
  files = {name: (tmp_path / "one" / name).read_bytes() for name in ("tokenizer.model", "tokenizer.json")}
  assert {key.removeprefix("run/tokenizer/"): server.data(key) for key in server.keys(prefix="run/tokenizer/")} == files
  server.objects["bucket"].pop("run/tokenizer/tokenizer.json")
  server.put("run/tokenizer/.unfinished", b'{"last": "tokenizer.json"}')
  begin(one)
  assert tokenizer_folder.read(folder.root / "tokenizer") == tokenizer_folder.read(tmp_path / "one")
  with pytest.raises(errors.InputError, match="is another tokenizer"):
    begin(other)
  begin(other, overwrite=True)
  assert tokenizer_folder.read(folder.root / "tokenizer") == tokenizer_folder.read(tmp_path / "other")
