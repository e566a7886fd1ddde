"""Training in several real processes on this machine: the same run as in one, and what happens when one goes."""

import collections
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import bucket_server
import numpy as np
import patterns
import pytest
import xla_flags

from glmjax.checkpoint import arrays
from glmjax.checkpoint import manager as manager_lib
from glmjax.io import paths
from glmjax.parallel import peers

SLOW = ("--gin.patterns.Source.seconds=0.5",)
SPLIT = [f"--gin.mesh.MeshConfig.{size}" for size in ("data=1", "fsdp=2", "tensor=2")]  # each process has its part
MAIN = [sys.executable, "-c", "import sys; from glmjax import cli; sys.exit(cli.main())"]


@pytest.fixture(scope="module")
def gin_file(tmp_path_factory) -> pathlib.Path:
  file = tmp_path_factory.mktemp("gin") / "patterns.gin"
  file.write_text(patterns.GIN)
  return file


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


class Started:
  """`count` processes of `devices` devices each that train in `workdir`."""

  def __init__(
    self,
    gin_file: pathlib.Path,
    workdir: pathlib.Path,
    count: int,
    devices: int,
    *flags: str,
    join: list[list[str]] | None = None,
  ):
    self.workdir = workdir
    path = os.pathsep.join([str(pathlib.Path(patterns.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": xla_flags.on(devices), "JAX_PLATFORMS": "cpu"}
    port = free_port()
    if join is None:
      join = [
        [] if count == 1 else [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={i}"]
        for i in range(count)
      ]
    command = [*MAIN, "train", f"--gin_file={gin_file}", f"--workdir={workdir}", *flags]
    self.processes = [
      subprocess.Popen([*command, *where], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
      for where in join
    ]

  def results(self, seconds: float = 240) -> list[tuple[int, str, str]]:
    """(status, standard output, standard error) of each."""
    ends = time.monotonic() + seconds
    results = []
    for process in self.processes:
      out, err = process.communicate(timeout=max(ends - time.monotonic(), 1))
      results.append((process.returncode, out, own_lines(err)))
    return results

  def wait_for_step(self, step: int, seconds: float = 180) -> None:
    ends = time.monotonic() + seconds
    while len(losses(self.workdir)) < step:
      assert time.monotonic() < ends and all(process.poll() is None for process in self.processes), self.kill()
      time.sleep(0.1)

  def kill(self) -> list[tuple[int, str, str]]:
    for process in self.processes:
      process.kill()
    return self.results()


@pytest.fixture
def start(gin_file) -> Iterator:
  """Starts processes; none outlives the test."""
  started = []

  def begin(*arguments, **settings) -> Started:
    started.append(Started(gin_file, *arguments, **settings))
    return started[-1]

  yield begin
  for run in started:
    for process in run.processes:
      with contextlib.suppress(ProcessLookupError):
        process.kill()
      process.communicate()


def losses(workdir: pathlib.Path) -> list[float]:
  file = workdir / "metrics.jsonl"
  lines = file.read_text().splitlines(True) if file.exists() else []
  return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def own_lines(text: str) -> str:
  """Messages without what XLA's plugins say of themselves and what Gloo does, from several threads at once: a line
  of its may be cut anywhere, and end with another's number alone."""
  foreign = re.compile(r"\[Gloo\]|peer ranks|^\s*\d*$|^[IWE]\d{4} |^WARNING: All log messages before absl")
  return "".join(line for line in text.splitlines(True) if not foreign.search(line))


def errors_of(err: str) -> list[str]:
  return [line for line in err.splitlines() if not line.startswith("step ") and "parameters on" not in line]


def check_read_once(folder: pathlib.Path, samples: int) -> None:
  """Every sample of the steps trained was read, each by one process; some were read ahead."""
  read = [set(sum(map(json.loads, file.read_text().splitlines()), [])) for file in folder.iterdir()]
  counts = collections.Counter(number for numbers in read for number in numbers)
  assert set(range(samples)) <= set(counts) and set(counts.values()) == {1}
  assert len({len(numbers) for numbers in read}) == 1


def test_two_are_as_one_and_stop_together(start, tmp_path):
  """Two processes of two devices train as one of four, bit for bit up to rounding; a signal to one stops both."""
  one, two, read = tmp_path / "one", tmp_path / "two", tmp_path / "read"
  read.mkdir()
  alone = start(one, 1, 4)
  together = start(two, 2, 2, f"--gin.patterns.Source.batches_read={str(read)!r}", *SLOW)
  together.wait_for_step(3)
  together.processes[1].send_signal(signal.SIGTERM)
  (first, _, said), (second, nothing, silent) = together.results()
  assert (first, second) == (128 + signal.SIGTERM,) * 2, (said, silent)
  steps = manager_lib.steps(two / "checkpoints")
  assert 3 < steps[-1] < 10 and len(losses(two)) == steps[-1]
  assert f"SIGTERM: stopped and saved at step {steps[-1]}" in said
  assert not nothing and not silent  # process 0 alone speaks
  [(status, _, err)] = alone.results()
  assert status == 0, err
  np.testing.assert_allclose(losses(two), losses(one)[: steps[-1]], rtol=1e-5)
  check_read_once(read, 16 * steps[-1])


def test_an_adapter_beside_one_model(start, tmp_path):
  """Two processes adapt as one does; they begin together, or say together what is wrong."""
  base, one, two = tmp_path / "base", tmp_path / "one", tmp_path / "two"
  stop = ["--stop_at_step=3"]
  [(status, _, err)] = start(base, 1, 2, *stop).results()
  assert status == 0, err
  adapted = tmp_path / "adapted.gin"
  adapted.write_text(
    f"{patterns.GIN}\nfrom glmjax.train import trainable\nloop.train.trainable = @trainable.LoRA()\n"
    f"loop.train.weights = {str(base)!r}\n"
  )
  more = [f"--gin_file={adapted}", *stop]
  runs = [start(one, 1, 4, *more), start(two, 2, 2, *more)]
  for results in [run.results() for run in runs]:
    assert all(status == 0 for status, _, _ in results), results
  np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


def catches(process: subprocess.Popen, number: int) -> bool:
  """Whether the process has a handler of its own for the signal."""
  status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
  return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
  "victim, number",
  [
    (1, signal.SIGTERM),
    pytest.param(0, signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(0, signal.SIGINT, marks=pytest.mark.slow),
  ],
)
def test_told_to_stop_before_the_first_step(start, tmp_path, victim, number):
  """From the first line of main(): both end with the signal's status and a line, and not after a timeout."""
  two = start(tmp_path / "run", 2, 1)
  ends = time.monotonic() + 60
  while not catches(two.processes[victim], signal.SIGTERM):
    assert time.monotonic() < ends
    time.sleep(0.01)
  two.processes[victim].send_signal(number)
  words = "stopped by SIGTERM" if number == signal.SIGTERM else "interrupted"
  results = two.results(90)
  assert [status for status, _, _ in results] == [128 + number] * 2, results
  [told], [heard] = errors_of(results[victim][2]), errors_of(results[1 - victim][2])
  assert told == f"glmjax: {words}" and heard.startswith(f"glmjax: process {victim} has ended: {words}")


def test_flags_half_given_and_nobody_there(start, tmp_path):
  """One line, a status and soon: nobody waits for a coordinator that never comes."""
  port = free_port()
  cases = {
    2: ["--coordinator=localhost:1", "--num_processes=2"],
    1: [f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=1", "--connect_seconds=2"],
  }
  messages = (
    "glmjax: --process_id missing: --coordinator, --num_processes and --process_id are given together",
    f"glmjax: localhost:{port}: the coordinator cannot be reached from process 1 (Connection refused)",
  )
  run = start(tmp_path / "run", 2, 1, join=list(cases.values()))
  for (status, out, err), wanted, message in zip(run.results(60), cases, messages):
    assert status == wanted and err.startswith(message) and err.count("\n") == 1 and not out, err
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "silent, hung, said, verdict",
  [
    (9, 0, {"1": {"step": 4, "waits": 99}}, None),
    (0, 0, {"1": {"step": 4, "waits": 0}}, "process 1 on h has not been heard of"),
    (9, 50, {"0": {"step": 5, "waits": 99}, "1": {"step": 4, "waits": 99}}, "begun by process 1 on h is step 4"),
    (9, 50, {"0": {"step": 5, "waits": 99}, "1": {"step": 5, "waits": 99}}, "begun by process all is step 5"),
    (9, 50, {"0": {"step": 5, "waits": 9}, "1": {"step": 4, "waits": 9}}, None),
  ],
)
def test_verdicts(silent, hung, said, verdict):
  watch = peers.Watch(hung_seconds=hung)
  object.__setattr__(watch, "silent_seconds", silent)
  judge = peers._Judge(watch)
  messages = {f"glmjax/process/{name}": json.dumps(state | {"host": "h"}) for name, state in said.items()}
  judge.verdict(messages)
  time.sleep(0.01)
  found = judge.verdict(messages)
  assert (found is None) if verdict is None else (verdict in found), found


@pytest.mark.slow
@pytest.mark.parametrize(
  "victim, blow", [(3, signal.SIGKILL), (0, signal.SIGKILL), (2, signal.SIGSTOP), (0, signal.SIGSTOP)]
)
def test_one_of_four_goes_and_two_go_on(start, tmp_path, victim, blow):
  """The others end within a minute, with one line; fewer processes continue with the same samples and losses.

  Where process 0 was killed, JAX may abort the others in its own words before they have said theirs: all of those stay.
  """
  one, run = tmp_path / "one", tmp_path / "run"
  four = start(run, 4, 1, *SLOW)
  four.wait_for_step(5)
  began = time.monotonic()
  four.processes[victim].send_signal(blow)
  others = [process for i, process in enumerate(four.processes) if i != victim]
  for process in others:
    process.wait(60)
  assert time.monotonic() - began < 60
  four.processes[victim].kill()
  for i, (status, _, err) in enumerate(four.results()):
    if i != victim:
      assert status not in (0, None), err
      if victim == 0 and blow == signal.SIGKILL:
        assert "glmjax: process 0 has died" in err or "Terminating process because the JAX distributed service" in err
        continue
      assert len(errors_of(err)) == 1 and errors_of(err)[0].startswith("glmjax: "), err
      assert "goes on from the last checkpoint" in err
      assert f"process {victim} on " in err or victim == 0
  saved = manager_lib.steps(run / "checkpoints")[-1]
  assert saved >= 3
  [(status, _, err)] = start(one, 1, 4).results()
  assert status == 0, err
  for status, _, err in start(run, 2, 2).results():
    assert status == 0, err
  np.testing.assert_allclose(losses(run), losses(one), rtol=1e-5)


@pytest.mark.slow
def test_a_process_that_fails_ends_all(start, tmp_path):
  """Its own words are repeated by the others."""
  first, second = start(tmp_path, 2, 1, "--gin.patterns.Source.fails_at=4", *SLOW).results()
  assert second[0] == 1 and "no such disk" in second[2]
  assert first[0] == 1 and errors_of(first[2])[0].startswith("glmjax: process 1 has ended: OSError: no such disk")


@pytest.mark.slow
def test_a_step_that_hangs(start, tmp_path):
  """Processes that live but do not move are noticed too."""
  hung = start(tmp_path, 2, 1, "--gin.patterns.Source.hangs_at=4", "--gin.peers.Watch.hung_seconds=8")
  for status, _, err in hung.results():
    assert status == 1 and "nothing has moved for 8 s" in errors_of(err)[0] and len(errors_of(err)) == 1, err


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh", ["data=1 tensor=4", "data=1 fsdp=2 tensor=2", "data=1 context=4", "data=1 stage=2 tensor=2"]
)
def test_axes_across_processes(start, tmp_path, mesh):
  """Where processes share rows each reads all of its devices' rows; of two stages each process holds one."""
  flags = [f"--gin.mesh.MeshConfig.{size}" for size in mesh.split()]
  for status, _, err in start(tmp_path / "two", 2, 2, *flags, "--stop_at_step=3").results():
    assert status == 0, err
  [(status, _, err)] = start(tmp_path / "one", 1, 4, *flags, "--stop_at_step=3").results()
  assert status == 0, err
  np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.parametrize("action", [pytest.param("skip", marks=pytest.mark.slow), "roll_back"])
def test_a_spike_is_one_for_all(start, tmp_path, action):
  """The embedding's gradient is ten thousand times as large from the seventh step on: two processes do the same about
  it, which is what one does.
  """
  guard = "glmjax.train.spikes.Guard"
  settings = {
    "loop.train.embedding_alpha": "@schedules.PiecewiseLinear()",
    "schedules.PiecewiseLinear.samples": "(96, 96)",
    "schedules.PiecewiseLinear.values": "(1e-4, 1.0)",
    "loop.train.spikes": f"@{guard}()",
    f"{guard}.window": "4",
    f"{guard}.least": "2",
    f"{guard}.action": f"'{action}'",
  }
  flags = [f"--gin.{name}={value}" for name, value in settings.items()]
  found = []
  for count in (1, 2):
    where = tmp_path / str(count)
    for status, _, err in start(where, count, 4 // count, *flags).results():
      assert status == 0, err
    lines = [json.loads(line) for line in (where / "interventions.jsonl").read_text().splitlines()]
    found.append([(line["step"], line["first_sample"], line["action"], line.get("back_to_step")) for line in lines])
  back = 6 if action == "roll_back" else None
  assert found[0] == found[1] and found[0][0] == (7, 96, action, back)
  np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=1e-5)


@pytest.mark.slow
def test_dropout_falls_on_the_same_rows_whoever_computes_them(start, tmp_path):
  """Two processes with micro-batches of half the batch as one process with all of it."""
  for status, _, err in start(tmp_path / "two", 2, 2, "--gin.loop.train.micro_batch=8", "--stop_at_step=3").results():
    assert status == 0, err
  [(status, _, err)] = start(tmp_path / "one", 1, 4, "--stop_at_step=3").results()
  assert status == 0, err
  np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
def test_the_issue_s_blown_up_rate(start, tmp_path):
  """One that float32 does not hold is a mistake; one that blows the state up is a result. Nothing is saved."""
  for rate, expected, words in (
    ("1e308", 2, "LearningRate.peak is 1e+308: give a number, 0 or more (float32"),
    ("1e30", 3, "left the state not finite, first seen in parameters of the emb"),
  ):
    where = tmp_path / rate
    rates = [f"--gin.schedules.LearningRate.{name}={rate}" for name in ("initial", "peak")]
    [(status, out, err)] = start(where, 1, 1, *rates, "--stop_at_step=1").results()
    assert status == expected and words in err and not out, err
    assert not manager_lib.steps(where / "checkpoints")


@pytest.mark.slow
def test_workdirs_that_are_not_shared(start, tmp_path):
  """A folder of its own on every host is found out before anything is trained."""
  where = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
  join = [[*where, f"--process_id={i}", f"--workdir={tmp_path / str(i)}"] for i in range(2)]
  for status, _, err in start(tmp_path / "run", 2, 1, join=join).results():
    assert status == 2 and len(errors_of(err)) == 1, err
    assert "process 1 does not see there what process 0 has written; use a folder that all hosts share" in err


@pytest.mark.parametrize(
  "own, what", [("--gin.loop.train.seed=1", "seed"), ("--gin.patterns.Source.name='others'", "data")]
)
def test_processes_that_are_told_otherwise(start, tmp_path, own, what):
  """They would train one model with two seeds, or on other rows than each other's: nothing is begun."""
  where = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
  join = [[*where, "--process_id=0"], [*where, "--process_id=1", own]]
  for status, out, err in start(tmp_path / "run", 2, 1, join=join).results(60):
    assert status == 2 and not out, err
    assert err == f"glmjax: loop.train, {what}: process 1 has another one than process 0: give all the same\n"
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_not_finite(start, tmp_path):
  """All stop at the same step, with the same words as one process."""
  results = start(tmp_path, 2, 2, "--gin.schedules.LearningRate.peak=1e38").results()
  [[said], [other]] = [errors_of(err) for _, _, err in results]
  assert said == other and said.startswith("glmjax: step 3 (samples 32 to 47) is not finite"), said
  assert [status for status, _, _ in results] == [3, 3]


@pytest.mark.slow
def test_batch_ramp_is_checked_against_the_hosts(start, tmp_path):
  """At the start, not when the ramp gets there."""
  ramp = [f"--gin.schedules.Batches.{name}" for name in ("ramp_start=4", "ramp_increment=3", "ramp_samples=64")]
  for status, _, err in start(tmp_path, 2, 1, *ramp).results():
    assert status == 2 and "batch size 7 does not divide over the 2 parts that 2 hosts read of it" in err, err


@pytest.mark.slow
def test_in_a_bucket_two_write_and_one_goes_on(server, start, tmp_path):
  """One of two is killed while they save; the other ends, and one process with as many devices goes on."""
  one, run = tmp_path / "one", paths.named("gs://bucket/runs/two")
  two = start(run, 2, 2, *SPLIT, *SLOW)
  ends = time.monotonic() + 180
  while not server.keys(prefix="runs/two/checkpoints/6/state/"):
    assert time.monotonic() < ends and all(process.poll() is None for process in two.processes), two.kill()
    time.sleep(0.01)
  two.processes[1].kill()
  (status, _, err), _ = two.results(90)
  assert status not in (0, None) and "goes on from the last checkpoint" in err, err
  assert manager_lib.steps(run / "checkpoints")[0] == 3
  [(status, _, err)] = start(one, 1, 4, *SPLIT).results()
  assert status == 0, err
  [(status, _, err)] = start(run, 1, 4, *SPLIT).results()
  assert status == 0 and "resumed at step" in err, err
  np.testing.assert_allclose(losses(run), losses(one), rtol=1e-5)
  [(status, _, err)] = start(run, 1, 4, *SPLIT).results()
  assert status == 0 and "nothing to do: the run is at step 10" in err, err


@pytest.mark.slow
def test_in_a_bucket_two_save_what_one_does(server, start, tmp_path):
  """Each puts its own shards; the step that process 0 publishes has all of them."""
  run = paths.named("s3://bucket/run")
  for status, _, err in start(run, 2, 2, *SPLIT, "--stop_at_step=3").results():
    assert status == 0, err
  [(status, _, err)] = start(tmp_path / "one", 1, 4, *SPLIT, "--stop_at_step=3").results()
  assert status == 0, err
  np.testing.assert_allclose(losses(run), losses(tmp_path / "one"), rtol=1e-5)
  for step in (run / "checkpoints" / "3", tmp_path / "one" / "checkpoints" / "3"):
    records = manager_lib.read_record(step)["arrays"]
    opened = arrays.check_files(step / "state", records)  # nothing lacks
    assert sum(np.prod(x.shape) for x in opened.values()) > 10_000
  [(status, _, err)] = start(run, 1, 2, "--stop_at_step=4").results()  # which verifies every array
  assert status == 0 and "resumed at step 3" in err, err


@pytest.mark.slow
def test_in_a_bucket_what_one_cannot_write_ends_all(server, start):
  """The second process's part is refused: both say so, and the step is none."""
  run = paths.named("gs://bucket/run")
  server.fault = lambda method, path: (
    bucket_server.Fault(status=403, code="AccessDenied")
    if method == "PUT" and re.search(r"checkpoints/3/state/params.*/[0.]*1[0.]*$", path)
    else None
  )
  for status, _, err in start(
    run, 2, 1, *[flag for flag in SPLIT if "tensor" not in flag], "--stop_at_step=4"
  ).results():
    assert status != 0 and "could not be written" in err and "permission denied" in err, err
  assert manager_lib.steps(run / "checkpoints") == []


def test_workdirs_in_two_buckets(server, start):
  where = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
  join = [[*where, f"--process_id={i}", f"--workdir=gs://bucket/{i}"] for i in range(2)]
  for status, _, err in start("unused", 2, 1, join=join).results():
    assert status == 2 and "workdir: process 1 has another one than process 0: give all the same" in err, err
