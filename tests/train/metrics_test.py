"""What a run tells about itself may fail, and neither ends the run nor holds it up."""

import json
import os
import math
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import pytest

from glmjax.evaluate import timings
from glmjax.train import metrics
from glmjax.train import profile


def record(step: int) -> dict:
  return {"step": step, "loss": 1 / step, "note": "x" * 50}


def steps(path: pathlib.Path) -> list[int]:
  return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]


@pytest.fixture
def full(monkeypatch):
  """A limit on every file of this process, as a full disk is: a part of a line is taken, the next byte is not."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or limits[0], limits[1]))
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_said_once_and_the_lines_come_later(tmp_path, full, caplog):
  path = tmp_path / "metrics.jsonl"
  caplog.set_level("INFO", "glmjax")
  writer = metrics.Writer(path, tmp_path / "tensorboard")
  for step in (1, 2):
    writer.write(record(step))
  full(path.stat().st_size + 20)
  for step in range(3, 200):
    writer.write(record(step))
    assert steps(path) == [1, 2]  # and no part of a line
  full(None)
  writer.write(record(200))
  assert steps(path) == list(range(1, 201))
  writer.close()
  said = [message for message in caplog.messages if "metrics.jsonl" in message]
  assert len(said) == 2 and "the file may grow no further" in said[0]
  assert said[1].endswith("metrics.jsonl: written again")


def test_lines_that_never_find_room_are_told(tmp_path, full, caplog):
  path = tmp_path / "metrics.jsonl"
  writer = metrics.Writer(path, tmp_path / "tensorboard")
  writer.write(record(1))
  full(path.stat().st_size)
  writer.write(record(2))
  writer.close()
  assert steps(path) == [1] and "the last 1 records are lost" in caplog.text


@pytest.mark.parametrize("place", ["folder", "fifo", "no such folder"])
def test_a_file_that_is_none(tmp_path, place, caplog):
  path = tmp_path / "metrics.jsonl"
  if place == "folder":
    path.mkdir()
  elif place == "fifo":
    os.mkfifo(path)  # opening it would wait for a reader
  else:
    path = tmp_path / "none" / "metrics.jsonl"
  writer = metrics.Writer(path, tmp_path / "tensorboard", 3)
  for step in (4, 5):
    writer.write(record(step))
  if place == "folder":
    path.rmdir()
    writer.write(record(6))
    assert steps(path) == [4, 5, 6]
  writer.close()
  assert caplog.text.count("cannot be written") == 1


def test_goes_on_behind_its_step(tmp_path):
  """Also behind lines that are damaged, however."""
  path = tmp_path / "metrics.jsonl"
  deep = "[" * 100_000
  path.write_text(
    "".join(
      f"{line}\n"
      for line in ('{"step": 1}', '{"step": 2}', '{"step": 3}', deep, '{"step": "4"}', "{", "3", '{"step": 1e999}')
    )
    + '{"st'
  )
  metrics.Writer(path, tmp_path / "tensorboard", 2).close()
  assert steps(path) == [1, 2]


@pytest.mark.parametrize(
  "text, told",
  [
    (None, "steps 1 to 3"),
    ("", "steps 1 to 3"),
    ('{"step": 1}\n{"step": 2}\n{"st', "steps 3 to 3"),
    ('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4}\n', ""),
  ],
)
def test_lines_that_are_lacking_are_told(tmp_path, text, told, caplog):
  path = tmp_path / "metrics.jsonl"
  if text is not None:
    path.write_text(text)
  metrics.Writer(path, tmp_path / "tensorboard", 3).close()
  assert told in caplog.text and bool(told) == ("missing or damaged" in caplog.text)


def test_what_is_not_finite_is_null(tmp_path):
  lines = metrics.Lines(tmp_path / "layers.jsonl")
  lines.write({"step": 1, "norms": {"layers": [1.0, math.nan], "head": math.inf}})
  lines.close()
  assert (tmp_path / "layers.jsonl").read_text() == '{"step": 1, "norms": {"layers": [1.0, null], "head": null}}\n'


def events(folder: pathlib.Path) -> list:
  """What TensorBoard would read in the one file."""
  event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
  [file] = folder.iterdir()
  data, found = file.read_bytes(), []
  while data:
    size = int.from_bytes(data[:8], "little")
    found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  return found


def test_tensorboard_fails_and_comes_back(tmp_path, full, caplog):
  pytest.importorskip("tensorboardX")
  writer = metrics.Writer(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
  writer.write(record(1))
  full(200)
  for step in range(2, 50):  # tensorboardX's own queue holds ten
    writer.write(record(step))
  full(None)
  writer.close()
  assert [event.step for event in events(tmp_path / "tensorboard")[1:]] == list(range(1, 50))
  assert steps(tmp_path / "metrics.jsonl") == list(range(1, 50))
  assert caplog.text.count("cannot be written") == 2


def test_tensorboard_reads_what_is_written(tmp_path):
  writer = metrics.Writer(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
  for step in (1, 2):
    writer.write(record(step))
  writer.close()
  first, *found = events(tmp_path / "tensorboard")
  assert first.file_version == "brain.Event:2"
  assert [(event.step, [(v.tag, v.simple_value) for v in event.summary.value]) for event in found] == [
    (1, [("loss", 1.0)]),
    (2, [("loss", 0.5)]),
  ]
  from tensorboardX import record_writer

  theirs = record_writer.RecordWriter(str(tmp_path / "theirs"))
  for event in (first, *found):
    theirs.write(event.SerializeToString())
  theirs.close()
  [file] = (tmp_path / "tensorboard").iterdir()
  assert file.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensorboard_that_cannot_be_loaded(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)  # not installed: nothing is said
  writer = metrics.Writer(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
  writer.write(record(1))
  writer.close()
  assert not caplog.messages and steps(tmp_path / "metrics.jsonl") == [1]


@pytest.mark.parametrize("part", ["start_trace", "stop_trace"])
def test_a_profile_that_fails(tmp_path, monkeypatch, caplog, part):
  def fails(*arguments):
    raise RuntimeError("no room\nfor it")

  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
  monkeypatch.setattr(jax.profiler, part, fails)
  trace = profile.Trace((2, 3), tmp_path)
  for step in range(1, 5):
    trace.before(step)
    if trace.ends_with(step):
      assert not trace.stop()
  assert not trace.stop()
  assert [message.partition(": ")[2] for message in caplog.messages] == [
    "no profile of steps 2 to 3: no room for it; training goes on"
  ]


def test_progress_of_a_program_without_standard_error(monkeypatch, capsys):
  """It never goes to standard output."""
  monkeypatch.setattr(sys, "stderr", None)
  console = metrics.Console(100, 0)
  console.say("hello")
  console.close()
  assert capsys.readouterr().out == ""


def test_stages_that_cannot_be_noted(tmp_path, full, caplog):
  """The command has done its work: it is said, and the file keeps whole lines."""
  path = tmp_path / "stages.jsonl"
  timings.prepare(path)
  timings.append(path, "train", 0, 1)
  full(path.stat().st_size + 10)
  timings.append(path, "export", 0, 1)
  full(None)
  assert timings.read(path) == {"train": 1.0} and "the seconds of export could not be added" in caplog.text


@pytest.mark.slow
def test_training_on_a_full_disk(tmp_path):
  """Its logs are on a disk without room: it trains to its end, its checkpoints being elsewhere."""
  disk, run = tmp_path / "disk", tmp_path / "run"
  disk.mkdir()
  if subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True, check=False
  ).returncode:
    pytest.skip("may not mount a small disk here")
  try:
    import patterns

    (tmp_path / "p.gin").write_text(patterns.GIN)
    tests = str(pathlib.Path(patterns.__file__).parent)

    def train(*flags: str) -> subprocess.CompletedProcess:
      command = [
        sys.executable,
        "-m",
        "glmjax",
        "train",
        f"--gin_file={tmp_path / 'p.gin'}",
        f"--workdir={run}",
        *flags,
      ]
      environment = os.environ | {"PYTHONPATH": tests}
      return subprocess.run(command, text=True, check=False, capture_output=True, env=environment, timeout=300)

    assert train("--stop_at_step=1").returncode == 0  # makes the run's folder
    shutil.rmtree(run / "tensorboard")
    (run / "metrics.jsonl").unlink()
    for name in ("tensorboard", "profile"):
      (disk / name).mkdir()
      (run / name).symlink_to(disk / name)
    (run / "metrics.jsonl").symlink_to(disk / "metrics.jsonl")
    (disk / "rest").write_bytes(bytes(8192))
    done = train("--gin.loop.Intervals.profile=(2, 3)", "--gin.loop.train.total_samples=480")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("metrics.jsonl: cannot be written: the disk is full") == 1
    assert "Traceback" not in done.stderr
    assert (run / "checkpoints" / "30").is_dir()
  finally:
    subprocess.run(["umount", str(disk)], check=False)
