"""Helper processes that answer requests over a pipe.

Fresh interpreters that import only what their handler needs: unlike multiprocessing's they never import the
user's script (and JAX with it), and they end by themselves when the process that started them does.
"""

import multiprocessing.connection as connection_lib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable

from glmjax import errors

_START = "import sys; from glmjax.data import workers; workers.serve(int(sys.argv[1]), int(sys.argv[2]))"

_IGNORED = (signal.SIGINT, signal.SIGTERM)  # these reach a whole job: the parent decides what they mean


class WorkerError(RuntimeError):
  """A helper process failed or died."""


class WorkerDied(WorkerError):
  """A helper process is gone, or does not answer."""


class Worker:
  """A process that calls `make(*args)` once and then the result for every request, in order."""

  def __init__(self, name: str, make: Callable[..., Callable], *args: object) -> None:
    self.name = name
    ours, theirs = socket.socketpair()
    with theirs:
      environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
      # A signal to the whole job must not end it before `serve` ignores it: it inherits them blocked.
      before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
      try:
        self._process = subprocess.Popen(
          [sys.executable, "-c", _START, str(theirs.fileno()), str(os.getpid())],
          pass_fds=[theirs.fileno()],
          env=environment,
          stdin=subprocess.DEVNULL,
        )
      finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    self.connection = connection_lib.Connection(ours.detach())
    self._send((make, args))

  @property
  def pid(self) -> int:
    return self._process.pid

  def request(self, value: object) -> None:
    """Hands over one request; `result` gives the answers in the same order."""
    self._send(value)

  def result(self) -> object:
    """Returns the next answer; raises what the handler raised, or WorkerDied if the process is gone."""
    try:
      good, value, trace = self.connection.recv()
    except (EOFError, ConnectionError):
      raise self._died() from None
    if good:
      return value
    if not isinstance(value, errors.InputError):
      value.add_note(f"In the {self.name} process:\n{trace}")
    raise value

  def kill(self) -> None:
    """Ends the process at once: a thread that waits for its answer gets WorkerDied."""
    self._process.kill()

  def close(self) -> None:
    """Ends the process; what it was asked and has not answered is lost."""
    self.connection.close()
    self.kill()
    self._process.wait()

  def _send(self, value: object) -> None:
    try:
      self.connection.send(value)
    except (BrokenPipeError, ConnectionError):
      raise self._died() from None

  def _died(self) -> WorkerDied:
    try:
      status = self._process.wait(5)
    except subprocess.TimeoutExpired:
      return WorkerDied(f"the {self.name} process {self._process.pid} stopped answering")
    why = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    hint = " (out of memory?)" if status == -signal.SIGKILL else ""
    return WorkerDied(f"the {self.name} process {self._process.pid} {why}{hint}")


def serve(descriptor: int, parent: int) -> None:
  """Lives the helper's whole life: makes the handler, answers requests until the pipe ends."""
  for name in _IGNORED:
    signal.signal(name, signal.SIG_IGN)
  threading.Thread(target=follow, args=(parent,), daemon=True).start()
  connection = connection_lib.Connection(descriptor)
  handler = None
  try:
    while True:
      request = connection.recv()
      try:
        if handler is None:
          make, args = request
          handler = make(*args)
          continue
        answer = (True, handler(request), "")
      except Exception as error:  # handed to the parent, which raises it there
        answer = (False, _picklable(error), traceback.format_exc())
        if handler is None:
          handler = _Broken(answer[1])
          continue
      connection.send(answer)
  except (EOFError, ConnectionError):
    pass


class _Broken:
  """Answers every request with what went wrong when the handler was made."""

  def __init__(self, error: Exception) -> None:
    self._error = error

  def __call__(self, request: object) -> None:
    raise self._error


def _picklable(error: Exception) -> Exception:
  """Returns the error if the other side will be able to rebuild it, else its text."""
  rebuilt = (errors.InputError, ValueError, TypeError, OSError, RuntimeError, AssertionError)
  if isinstance(error, errors.InputError):
    error.passes = errors.may_pass(error)  # its causes stay here
  if isinstance(error, rebuilt) and type(error).__module__ in ("builtins", "glmjax.errors"):
    return error
  if isinstance(error, OSError) and error.errno is not None:  # one of a kind of our own
    return OSError(error.errno, error.strerror, error.filename)
  return WorkerError(f"{type(error).__name__}: {error}")


def follow(parent: int) -> None:
  """Ends this process soon after its parent has ended, even in the middle of a request."""
  while os.getppid() == parent:
    time.sleep(0.5)
  os._exit(1)
