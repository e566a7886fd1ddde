"""What a command sets for its whole process: signals, messages, threads, memory, and standard streams (streams.py).

Called from main() alone, so that glmjax as a library changes nothing in the program that imports it.
"""

import contextlib
import gc
import logging
import os
import pathlib
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from glmjax.cli import streams
from glmjax.io import printable
from glmjax.parallel import host

SECONDS_TO_END = 5  # from a signal on, in which what is open is put in order; then the process ends as it is
SECONDS_TO_MEET = 15  # the same while a process of several has not met the others: they must be told

# After how many new objects Python looks for cycles among them. A command's start makes 300,000 that stay: to look
# after each 700, as Python does, takes a tenth of the time to the first answer.
_NEW_OBJECTS = 50_000

_TRAINS = ["train"]  # how a command line begins whose steps matter more than the compiling


class Stopped(KeyboardInterrupt):
  """SIGTERM or SIGINT, raised in the main thread wherever it is."""

  def __init__(self, number: int):
    super().__init__(number)
    self.number = number


def begin(arguments: Sequence[str] = ()) -> None:
  """Makes the settings that every command needs; `arguments` are the command line's. A second call changes nothing."""
  global _waiting, _noted, _raised
  _answered.extend(number for number in (_noted, _raised) if number is not None)
  _waiting, _noted, _raised = _is_of_several(arguments), None, None
  gc.set_threshold(_NEW_OBJECTS)
  if arguments[:1] == _TRAINS:
    host.keep_freed_memory()  # before the first thread, which watches for signals
  _take_signals()
  streams.open_all()
  _show_messages()
  _limit_threads()


def speak_utf8() -> None:
  """Starts the program anew in Python's UTF-8 mode where it was told to take the C locale at its word.

  Paths in gin files are UTF-8, and ASCII has no name for most of them.
  """
  if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# Signals -------------------------------------------------------------------------------------------------------------

_OURS = (signal.SIGTERM, signal.SIGINT)
_mask: set[int] = set()  # of signals that were blocked before a fork
_ending = threading.Lock()  # held by the thread that ends the process
_watcher: threading.Thread | None = None
_waiting = False  # whether signals wait for `met`
_noted: int | None = None  # the signal that waits
_answered: list[int] = []  # signals that came to commands of this process that are over: they do not end the next one
_raised: int | None = None  # the one that was raised: what is open is being put in order, and the next one ends that


def _take_signals() -> None:
  """Makes SIGTERM and SIGINT end the process with one line and status 128 + n from here on, also within native code.

  Python's handler runs when the main thread is back from native code, which may be minutes later (a compiler) or
  never (a dead peer's collective), and what it raises may be swallowed. A thread therefore hears of each signal at once
  and ends what has not ended by itself. train/stopping.py takes over while a run can save.
  """
  global _watcher
  if threading.current_thread() is not threading.main_thread():
    return  # not the program's main(): signals are someone else's
  for number in _OURS:
    signal.signal(number, _handle)
  if _watcher is None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_forget)
    _watcher = threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals")
    _watcher.start()


def _handle(number: int, frame: FrameType | None) -> None:
  global _noted, _raised
  if _ending.locked():
    return
  if _waiting:
    _noted = number
  elif _raised or _is_importing(frame):  # an exception within the making of a native module aborts the process
    end(number)
  else:
    _raised = number
    raise Stopped(number)


def stopped() -> int | None:
  """Returns the signal that ends the process, once one was raised; native code may have made another error of it."""
  return _raised


def _is_importing(frame: FrameType | None) -> bool:
  while frame is not None:
    if frame.f_code.co_filename.startswith("<frozen importlib"):
      return True
    frame = frame.f_back
  return False


def _watch(reader: int) -> None:
  while True:
    for number in os.read(reader, 1):
      ours = signal.getsignal(number) is _handle
      if ours:
        time.sleep(SECONDS_TO_MEET if _waiting else SECONDS_TO_END)
      if number in _answered:
        _answered.remove(number)
      elif ours and signal.getsignal(number) is _handle:
        end(number)


def _block() -> None:
  """Holds signals back before a fork: one to the child that came before `_forget` would be taken for the parent's."""
  global _mask
  _mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)


def _unblock() -> None:
  signal.pthread_sigmask(signal.SIG_SETMASK, _mask)


def _forget() -> None:
  """Makes signals end a forked child without a word; they are no business of its parent's."""
  if threading.current_thread() is threading.main_thread():  # as the thread that forked always is, in the child
    signal.set_wakeup_fd(-1)
    for number in _OURS:
      signal.signal(number, signal.SIG_DFL)
  _unblock()


def _is_of_several(arguments: Sequence[str]) -> bool:
  """Tells whether the command will join others. Told to stop before, it waits until it can tell them."""
  if arguments[:1] != _TRAINS and not any(argument.startswith("--mesh") for argument in arguments):
    return False
  from glmjax.parallel import clusters  # here, as few commands need it

  return bool(
    any(argument.startswith("--coordinator") for argument in arguments)
    or clusters.named()
    or clusters.is_kubernetes_job()
  )


def met() -> None:
  """Makes a signal act at once from here on, as one that came before does now: the others can be told."""
  global _waiting
  _waiting = False
  if _noted is not None:
    raise Stopped(_noted)


@contextlib.contextmanager
def keyboard() -> Iterator[None]:
  """Makes Ctrl-C within it a KeyboardInterrupt that may be answered, and ends nothing by itself. For the main
  thread.
  """
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def noting(number: int) -> Iterator[list[int]]:
  """Yields a list that stays empty until the signal comes; nothing is interrupted. For the main thread."""
  received: list[int] = []
  before = signal.signal(number, lambda number, frame: received.append(number))
  watched = signal.set_wakeup_fd(-1)  # nobody but this waits for it
  try:
    yield received
  finally:
    signal.set_wakeup_fd(watched)
    signal.signal(number, before)


def end(number: int) -> NoReturn:
  """Ends the process after a signal: without Python's own end, in which threads of native code may crash."""
  if not _ending.acquire(blocking=False):
    while True:  # the other thread is at it
      time.sleep(1)
  message = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
  with contextlib.suppress(OSError):
    os.write(2, f"glmjax: {message}\n".encode())
  with contextlib.suppress(Exception):
    multiprocessing = sys.modules.get("multiprocessing")
    for child in multiprocessing.active_children() if multiprocessing else ():
      child.kill()
  with contextlib.suppress(Exception):  # of modules that are half imported
    leave_others(128 + number, message)
  os._exit(128 + number)


def leave_others(status: int, message: str) -> None:
  """Ends a process of several, which tells the others why; returns in one that is alone."""
  distributed = sys.modules.get("glmjax.parallel.distributed")
  if distributed is not None and distributed.joined():  # JAX would wait at exit for processes that wait for this one
    distributed.leave(status, message)


# Messages ------------------------------------------------------------------------------------------------------------


class _Messages(logging.Handler):
  """Prints what the library says through the logger "glmjax": news as a bare line, warnings as "glmjax: ..."."""

  def emit(self, record: logging.LogRecord) -> None:
    line = printable.text(record.getMessage())
    if record.levelno >= logging.WARNING:
      line = f"glmjax: {line}"
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None:
      tqdm.tqdm.write(line, file=sys.stderr)  # above a progress bar
    else:
      print(line, file=sys.stderr)
    sys.stderr.flush()


def _show_messages() -> None:
  logger = logging.getLogger("glmjax")
  if not any(isinstance(handler, _Messages) for handler in logger.handlers):
    logger.addHandler(_Messages())
  logger.setLevel(logging.INFO)
  logger.propagate = False  # other libraries' handlers would print it once more
  if sys.unraisablehook is sys.__unraisablehook__:  # else another program's
    sys.unraisablehook = _report_unraisable


def _is_not_orbax(record: logging.LogRecord) -> bool:
  """Drops Orbax's records, which warn about what is as it should be, and log each error several times before it is
  raised.
  """
  return "orbax" not in pathlib.Path(record.pathname).parts


def _report_unraisable(unraisable: Any) -> None:
  """Reports what callbacks and finalizers raise, from which nothing can be raised: a signal ends the process there.

  All but this: when one write fails Orbax closes the event loop to which the others still report.
  """
  if isinstance(unraisable.exc_value, Stopped):
    end(unraisable.exc_value.number)
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def quieten() -> None:
  """Keeps from the user the rest of Orbax's noise about a failed save, which raises one error.

  Apart from `begin`, as absl takes a fifth of the time in which a command says what its flags are.
  """
  with contextlib.suppress(ImportError):
    import absl.logging  # noqa: F401  makes its own kind of logger, which must not be an ordinary one
  logging.getLogger("absl").addFilter(_is_not_orbax)
  warnings.filterwarnings("ignore", "coroutine .async_serialize.* was never awaited", RuntimeWarning)


# Threads, memory, accelerators ---------------------------------------------------------------------------------------


def _limit_threads() -> None:
  """Makes thread pools no larger than the processors we may use, and none that spins while it waits.

  Libraries count the machine's processors; a container's share (cgroup v2 cpu.max) is often far smaller.
  """
  count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  try:
    with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
      quota, period = file.read().split()
    if quota != "max":
      count = min(count, max(1, round(int(quota) / int(period))))
  except (OSError, ValueError):
    pass
  for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"):  # NPROC: XLA's thread pool on the CPU
    os.environ.setdefault(name, str(count))
  os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def keep_programs() -> None:
  """Has programs compiled by this process found again by the next; what XLA cannot load is compiled, without a word."""
  from glmjax import programs  # here, as it loads JAX

  warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry", UserWarning)
  programs.keep()


def compile_only() -> None:
  """Keeps JAX from computing anything on a device: the command compiles for others."""
  os.environ["JAX_PLATFORMS"] = "cpu"


def add_xla_flags(flags: list[str]) -> None:
  """Puts flags before the user's own, which win; once. XLA reads them when JAX first looks for devices."""
  there = os.environ.get("XLA_FLAGS", "").split()
  os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in flags if flag not in there), *there])
