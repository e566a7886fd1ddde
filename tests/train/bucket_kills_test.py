"""Runs in a bucket killed at random requests, also while they publish: the last whole step stays, and the same command
ends with the same losses and states as a run that was never broken.
"""

import json
import random
import signal
import threading

import forked
import patterns
import pytest

from glmjax.checkpoint import manager
from glmjax.io import paths

POINTS = 30  # runs that are killed, some of them twice
LIMIT = 120  # seconds of a command


def losses(server, name: str) -> list[tuple]:
  lines = server.data(f"{name}/metrics.jsonl").splitlines()
  return [tuple(json.loads(line).get(key) for key in ("step", "loss", "eval_loss", "grad_norm")) for line in lines]


def sums(name: str) -> dict[int, dict]:
  """The records of the whole steps."""
  there = paths.named(f"gs://bucket/{name}/checkpoints")
  return {step: manager.read_record(there / str(step))["arrays"] for step in manager.steps(there)}


class Runs:
  """Commands that train in the bucket."""

  def __init__(self, server, commands: forked.Server, folder):
    self._server, self._commands, self._folder = server, commands, folder
    (folder / "patterns.gin").write_text(patterns.GIN)

  def start(self, name: str, *more: str) -> forked.Running:
    argv = ["train", "--gin_file=patterns.gin", f"--workdir=gs://bucket/{name}", *more]
    return self._commands.start("forked:command", {"argv": argv}, self._folder)

  def finish(self, name: str, *more: str) -> int:
    """Runs to the end; returns how many requests that took."""
    before = len(self._server.log)
    ended = self.start(name, *more).end(LIMIT)
    assert ended.status == 0, ended
    return len(self._server.log) - before

  def kill(self, name: str, at: int) -> int:
    """Kills the run at that request, as the server gets it; returns its status."""
    count, come, hit = 0, threading.Event(), threading.Lock()
    running: list[forked.Running] = []

    def fault(method: str, path: str) -> None:
      nonlocal count
      with hit:
        count += 1
        strikes = count == at
      if strikes:
        come.wait(10)
        running[0].signal(signal.SIGKILL)

    self._server.fault = fault
    running.append(self.start(name))
    come.set()
    ended = running[0].end(LIMIT)
    self._server.fault = lambda method, path: None
    assert ended.status in (0, -signal.SIGKILL), ended
    return ended.status


@pytest.mark.slow
def test_kills(server, tmp_path):
  cache = forked.compiled_once(tmp_path / "compiled")
  modules, r = ("glmjax.cli.commands", "glmjax.train.loop"), random.Random(0)
  (tmp_path / "scratch").mkdir()
  with forked.Server(tmp_path, modules, **cache, TMPDIR=str(tmp_path / "scratch")) as commands:
    runs = Runs(server, commands, tmp_path)
    runs.finish("every", "--gin.loop.Intervals.save=1", "--gin.loop.Intervals.keep=100")
    total = runs.finish("whole")
    every, whole = sums("every"), losses(server, "whole")
    for number in range(POINTS):
      name, kills = f"killed-{number}", 1 + (r.random() < 0.4)
      for _ in range(kills):
        at = r.randrange(1, total)
        status = runs.kill(name, at)
        assert all(record == every[step] for step, record in sums(name).items()), (number, at)
      runs.finish(name)
      assert losses(server, name) == whole, (number, at, status)
      steps = sums(name)  # one that was to be deleted last may still be there
      assert all(steps.get(step) == record for step, record in sums("whole").items()), (number, at)
      left = {key.split("/")[2] for key in server.keys(prefix=f"{name}/checkpoints/")}
      assert left - {"metrics.json"} == set(map(str, steps)), (number, at, left)
