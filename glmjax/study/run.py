"""Runs a study: every point of its grid is a `glmjax train` of its own, in a process of its own.

  WORKDIR/  study.json   points/NAME/   results/NAME.json   logs/NAME.log   report.md   report.json   *.png

A point is done once its result is there, which is written last and names the settings that it is of. So a study that
was stopped goes on where it was, several at once, on hosts that share the folder, divide it between them, and points
that are added later, or whose settings change, are all that is done anew.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import glmjax
from glmjax import errors
from glmjax import ranges
from glmjax.data import shards
from glmjax.io import folders
from glmjax.io import lock
from glmjax.io import paths
from glmjax.io import printable
from glmjax.io import progress
from glmjax.io import publish
from glmjax.study import grid as grid_lib
from glmjax.study import report
from glmjax.study import results as results_lib

_TRAIN = "glmjax.train.loop.train"
_CACHE = "glmjax.data.loader.CachedMixture.directory"
_DIVERGED = 3  # the status of a run that has diverged, which is a result too
_MARK = "study.json"  # the axes as last asked for; the file by which a folder is a study's
_MOST_WORKERS = 1024
_LONGEST_LINE = 300  # characters of what a run said last

_COMMAND = (sys.executable, "-m", "glmjax", "train")

# Whatever cluster the study runs in: its runs are each for themselves.
_ALONE = ("--num_processes=1", "--process_id=0", "--coordinator=localhost:1")

_log = logging.getLogger("glmjax")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all points have in common, as the command line of the study had it."""

  files: Sequence[str]  # gin files
  bindings: Sequence[str] = ()  # "NAME=value" over them
  commands: Sequence[str] = ()  # full names of all functions that the files may be about


@dataclasses.dataclass(frozen=True)
class Task:
  """A point, and where what is known of it lies."""

  point: grid_lib.Point
  folder: pathlib.Path  # the study's
  digest: str  # hash of all that gin binds for its training, and of the token caches that it reads

  @property
  def workdir(self) -> pathlib.Path:
    """The folder of its training run."""
    return self.folder / "points" / self.point.name

  @property
  def checkpoints(self) -> pathlib.Path:
    """What its training run saves."""
    return self.workdir / "checkpoints"

  @property
  def result(self) -> pathlib.Path:
    """The file that says how it ended."""
    return self.folder / "results" / f"{self.point.name}.json"

  @property
  def log(self) -> pathlib.Path:
    """What its process printed."""
    return self.folder / "logs" / f"{self.point.name}.log"

  @property
  def is_done(self) -> bool:
    """Whether it has come to an end with these settings."""
    return self._ending.get("settings") == self.digest and self._ending.get("status") is not None

  @property
  def is_begun(self) -> bool:
    """Whether what is in its folder is of these settings, and to be gone on with."""
    return self._ending.get("settings") == self.digest and self._ending.get("status") is None

  @property
  def made_with(self) -> list[str]:
    """The versions of glmjax that have had a part in it."""
    return results_lib.versions(self._ending)

  @property
  def _ending(self) -> dict[str, Any]:
    return results_lib.ending(self.result) or {}


def run(
  workdir: paths.Named,
  grid: grid_lib.Grid,
  settings: Settings,
  workers: int = 1,  # runs at a time; each has its part of this machine's cores
  keep_checkpoints: bool = False,  # of runs that are done; False: their figures alone
) -> dict[str, Any]:
  """Trains a model for every point of a grid that is not done yet, and writes the report of all that are.

  Returns:
    How many points there are, are done, have diverged, have failed and are being done by others; the report's path.

  Raises:
    errors.InputError: for what the user can mend in any point, before the first is begun.
  """
  ranges.whole("run.workers", workers, 1, _MOST_WORKERS)
  folder = _claimed(workdir)
  tasks = _tasks(folder, grid, settings)
  folder.mkdir(parents=True, exist_ok=True)
  # First: by it the next call knows the folder, however early this one ends.
  publish.write_json(folder / _MARK, {"axes": {axis: [*map(str, values)] for axis, values in grid.axes.items()}})
  for name in ("points", "results", "logs"):
    (folder / name).mkdir(exist_ok=True)
  if not keep_checkpoints:
    _drop_checkpoints(tasks)
  waiting = [task for task in tasks if not task.is_done]
  if waiting:
    _log.info("%s of %s points to be done in %s", f"{len(waiting):,}", f"{len(tasks):,}", folder)
  failed = _Crew(settings, workers, keep_checkpoints).do(waiting, lambda: _report(folder, grid, tasks))
  done = _report(folder, grid, tasks)
  return {
    "points": len(tasks),
    "done": len(done),
    "diverged": sum(result.has_diverged for result in done),
    "failed": failed,
    "elsewhere": len(tasks) - len(done) - len(failed),
    "report": str(folder / "report.md"),
  }


def _report(folder: pathlib.Path, grid: grid_lib.Grid, tasks: Sequence[Task]) -> list[results_lib.Result]:
  """Writes the report of the tasks that are done, if any are; returns what they came to."""
  done = [results_lib.read(task.point, task.result, task.workdir) for task in tasks if task.is_done]
  if done:
    report.write(folder, grid, done)
  return done


def _drop_checkpoints(tasks: Sequence[Task]) -> None:
  """Deletes the checkpoints of tasks that are done, those as well that a study left that was killed before it could."""
  for task in tasks:
    if task.is_done and task.checkpoints.is_dir():
      with contextlib.ExitStack() as stack:
        if _takes(stack, lock.beside(task.result)) and task.is_done:
          shutil.rmtree(task.checkpoints)


def _claimed(workdir: paths.Named) -> pathlib.Path:
  """Returns the study's folder, which may be missing, empty or a study's."""
  folder = folders.real(workdir, "workdir")
  if not isinstance(folder, pathlib.Path):
    raise errors.InputError(f"workdir is {folder}: a study's folder is on a disk; its runs' data may be in a bucket")
  folders.claim(folder, folders.Kind.RUN, "workdir")  # its runs are in it
  there = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
  there = [name for name in there if not publish.is_unfinished(name)]
  if there and _MARK not in there:
    raise errors.InputError(f"{folder} holds other things ({', '.join(there[:3])}): choose another folder for a study")
  return folder


def _tasks(folder: pathlib.Path, grid: grid_lib.Grid, settings: Settings) -> list[Task]:
  """Returns every point, checked as `glmjax train` would."""
  swept = {binding.partition("=")[0] for point in grid.points() for binding in point.bindings}
  if both := sorted(swept & {binding.partition("=")[0].strip() for binding in settings.bindings}):
    raise errors.InputError(f"--gin.{both[0]} is given, and bound by the grid: give it in one place")
  tasks: dict[str, Task] = {}
  told, fingerprint = progress.Progress(len(grid), "points checked"), functools.cache(_fingerprint)
  for point in grid.points():
    if point.name in tasks:
      raise errors.InputError(f"Grid.axes: {tasks[point.name].point} and {point} have one name: label them apart")
    tasks[point.name] = Task(point, folder, _digest(settings, point, fingerprint))
    told.at(len(tasks))
  return list(tasks.values())


def _digest(settings: Settings, point: grid_lib.Point, fingerprint: Callable[[str], str]) -> str:
  """Returns the hash of what gin binds for a point's training, having checked all of it, and of the tokens in the
  caches that it names. The version of glmjax is no part of it: the report says where that differs.
  """
  from glmjax.config import gin_files  # loads gin

  overrides = [*settings.bindings, *point.bindings]
  commands = [_TRAIN, f"{__name__}.run", *settings.commands]
  program = gin_files.check(settings.files, overrides, _TRAIN, ["workdir"], commands)
  caches = [fingerprint(folder) for folder in program.values.get(_CACHE, ()) if isinstance(folder, str)]
  return hashlib.sha256("\n".join([*caches, *program.lines]).encode()).hexdigest()


def _fingerprint(cache: str) -> str:
  return shards.TokenCache.open(cache, local_gib=0).fingerprint


class _Crew:
  """Workers: threads that each wait for a process."""

  def __init__(self, settings: Settings, workers: int, keep_checkpoints: bool):
    self._settings, self._workers, self._keep = settings, workers, keep_checkpoints
    self._guard = threading.Lock()
    self._processes: set[subprocess.Popen] = set()
    self._stopped = False
    self._free = _shares(workers)  # cores of the workers that are idle

  def do(self, tasks: Sequence[Task], on_stop: Callable[[], Any]) -> dict[str, str]:
    """Does the tasks that nobody else does; returns the names of those that failed, with what their processes said.

    Where a signal stops it, `on_stop` is called while the runs save: that may take them longer than this process has.
    """
    failed, own, began = {}, 0, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
      futures = {pool.submit(self._one, task): task for task in tasks}
      try:
        for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
          task, (status, said) = futures[future], future.result()
          if status is None:
            continue
          own += 1
          if status not in (0, _DIVERGED):
            failed[task.point.name] = said
          seconds = (time.monotonic() - began) / own * (len(tasks) - count)
          left = f"; ETA {progress.duration(seconds)}" if count < len(tasks) else ""
          _log.info("%s of %s: %s: %s%s", f"{count:,}", f"{len(tasks):,}", task.point, said, left)
      except BaseException as error:
        self._stop()
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, KeyboardInterrupt):
          on_stop()
        raise
    return failed

  def _one(self, task: Task) -> tuple[int | None, str]:
    """Does one; returns its status, and what it came to in a line. None: another process does it, or has done it."""
    with contextlib.ExitStack() as stack:
      if not _takes(stack, lock.beside(task.result)) or task.is_done or self._stopped:
        return None, ""
      with contextlib.ExitStack() as run:  # which outlives a study that is killed
        if task.workdir.is_dir() and not _takes(run, task.workdir / ".lock"):
          return None, ""
      return self._train(task)

  def _train(self, task: Task) -> tuple[int, str]:
    arguments = [f"--gin_file={file}" for file in self._settings.files]
    arguments += [f"--gin.{each}" for each in (*self._settings.bindings, *task.point.bindings)]
    arguments += [f"--workdir={task.workdir}", *_ALONE]
    mode = "ab" if task.is_begun else "wb"
    if not task.is_begun and task.workdir.exists():
      shutil.rmtree(task.workdir)  # other settings' run, which must not be gone on with
    made_with = dict.fromkeys([*(task.made_with if task.is_begun else ()), glmjax.__version__])
    known = {"settings": task.digest, "labels": task.point.labels, "glmjax": [*made_with]}
    publish.write_json(task.result, known | {"status": None})
    with open(task.log, mode) as log:
      status = self._wait([*_COMMAND, *arguments], log)
    if status not in (0, _DIVERGED):
      return status, f"status {status}: {_last_line(task.log)} (all of it: {task.log})"
    publish.write_json(task.result, known | {"status": status})
    if not self._keep and task.checkpoints.is_dir():
      shutil.rmtree(task.checkpoints)
    return status, results_lib.read(task.point, task.result, task.workdir).line

  def _wait(self, command: Sequence[str], log: Any) -> int:
    """Runs a command on a share of the cores."""
    with self._guard:
      cores = self._free.pop()
    try:
      if cores:
        os.sched_setaffinity(0, cores)  # of this thread, and of what it starts
      with self._guard:
        # A session of its own: a terminal's Ctrl-C is for the study, which tells its runs once.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._processes.add(process)
        if self._stopped:
          process.send_signal(signal.SIGTERM)
      try:
        return process.wait()
      finally:
        with self._guard:
          self._processes.discard(process)
    finally:
      with self._guard:
        self._free.append(cores)

  def _stop(self) -> None:
    """Has all processes save and end."""
    with self._guard:
      self._stopped = True
      for process in self._processes:
        process.send_signal(signal.SIGTERM)


def _shares(workers: int) -> list[set[int]]:
  """Divides this process's cores among workers; empty sets where there are fewer cores, or the system cannot."""
  if not hasattr(os, "sched_setaffinity"):
    return [set() for _ in range(workers)]
  cores = sorted(os.sched_getaffinity(0))
  return [{*cores[i::workers]} for i in range(workers)]


def _takes(stack: contextlib.ExitStack, path: pathlib.Path) -> bool:
  """Tells whether a lock could be taken, which the stack then holds; False: another process has it."""
  try:
    stack.enter_context(lock.held(path, str(path)))
  except errors.InputError as error:
    if error.__cause__ is not None:  # it cannot be locked at all
      raise
    return False
  return True


def _last_line(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    size = file.seek(0, 2)
    file.seek(max(0, size - 4096))
    lines = file.read().decode(errors="replace").strip().splitlines()
  return printable.line(lines[-1], _LONGEST_LINE) if lines else "it said nothing"
