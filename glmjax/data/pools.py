"""Pools of the workers that make a token cache, each given the same object: threads, forked processes, or fresh
interpreters.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from glmjax import errors
from glmjax.data import workers

_KILLED = (
  "a caching process was killed (out of memory?); run the same command again, with fewer num_workers: what is "
  "complete is kept"
)
_here = threading.local()  # .given: what this worker was given; .helper: the process of a thread


def given() -> Any:
  """Returns what the pool of this worker was made with."""
  return _here.given


@contextlib.contextmanager
def forked(
  num_workers: int, shared: Any, on_start: Callable[[], object] = lambda: None
) -> Iterator[concurrent.futures.Executor]:
  """Yields an executor of forked processes, or with 0 workers of a thread of this one; at an error it drops what is
  unfinished.

  Args:
    num_workers: processes.
    shared: what they are given: the fork copies it, so that nothing of it is sent with each job.
    on_start: called in each new process.

  Raises:
    errors.InputError: a process was killed.
  """
  if num_workers == 0:
    executor = concurrent.futures.ThreadPoolExecutor(1, initializer=_take, initargs=(shared,))
  else:
    executor = concurrent.futures.ProcessPoolExecutor(
      num_workers, multiprocessing.get_context("fork"), _start_process, (os.getpid(), shared, on_start)
    )
  others = set(multiprocessing.active_children())
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Python 3.12 warns of threads; here they are OpenBLAS's idle ones
      executor.submit(os.getpid).result()  # all processes are forked here
    yield executor
  except BaseException as error:
    executor.shutdown(wait=False, cancel_futures=True)
    for process in set(multiprocessing.active_children()) - others:
      process.kill()
    if isinstance(error, concurrent.futures.process.BrokenProcessPool):
      raise errors.InputError(_KILLED) from error
    raise
  finally:
    executor.shutdown()


class _FreshPool(concurrent.futures.ThreadPoolExecutor):
  """An executor whose threads hand each job to a process of their own, a fresh interpreter."""

  def __init__(self, num_workers: int, shared: Any) -> None:
    super().__init__(num_workers, initializer=self._begin, initargs=(shared,))
    self.helpers: list[workers.Worker] = []
    self.ended = False

  def _begin(self, shared: Any) -> None:
    _here.helper = workers.Worker("caching", _taker, shared)
    self.helpers.append(_here.helper)

  def submit(self, function: Callable, /, *args: object) -> concurrent.futures.Future:
    """Hands over one job; function and arguments are sent."""
    return super().submit(self._ask, function, *args)

  def _ask(self, function: Callable, *args: object) -> object:
    if self.ended:
      raise workers.WorkerDied("this job comes too late")
    _here.helper.request((function, args))
    return _here.helper.result()


@contextlib.contextmanager
def fresh(num_workers: int, shared: Any) -> Iterator[concurrent.futures.Executor]:
  """Yields an executor of fresh interpreters, which may use buckets; at an error it drops what is unfinished.

  Raises:
    errors.InputError: what they are given cannot be sent, or a process was killed.
  """
  try:
    pickle.dumps(shared)
  except (pickle.PicklingError, AttributeError, TypeError) as error:
    raise errors.InputError(
      f"the mixture cannot be sent to other processes ({errors.one_line(error)}): use num_workers=0"
    ) from error
  executor = _FreshPool(num_workers, shared)
  try:
    yield executor
  except BaseException as error:
    executor.ended = True
    for helper in executor.helpers:
      helper.kill()
    if isinstance(error, workers.WorkerDied):
      raise errors.InputError(_KILLED) from error
    raise
  finally:
    executor.shutdown(cancel_futures=True)
    for helper in executor.helpers:
      helper.close()


def _taker(shared: Any) -> Callable[[tuple[Callable, tuple]], object]:
  """Makes what a fresh interpreter does with a job."""
  _take(shared)
  return _do


def _do(job: tuple[Callable, tuple]) -> object:
  function, args = job
  return function(*args)


def _take(shared: Any) -> None:
  _here.given = shared


def _start_process(parent: int, shared: Any, on_start: Callable[[], object]) -> None:
  """Makes a new process end with its parent, and at Ctrl-C without a word."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  threading.Thread(target=workers.follow, args=(parent,), daemon=True).start()
  _take(shared)
  on_start()
