"""The glmjax command. Each subcommand is one function of the library, bound by gin files and a few flags.

Flags and gin files are checked before the function's module, and so JAX, is imported.
"""

import errno
import os
import sys
import traceback
from collections.abc import Sequence

from glmjax import errors

_GIN = "  In call to configurable"
_LONGEST = 1000  # characters of an error that is printed


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; its exit status: 0 done, 2 a mistake to mend, 130 interrupted, 1 anything else."""
  arguments = list(sys.argv[1:] if argv is None else argv)
  debug = "--debug" in arguments
  try:
    from glmjax import gin_files  # here, so that Ctrl-C during the imports is caught as well
    from glmjax.cli import commands

    _limit_threads()
    return commands.run(arguments)
  except KeyboardInterrupt:
    return _fail("interrupted", 130)
  except BrokenPipeError:  # the reader of our output has left, as in `glmjax ... | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except Exception as error:
    if debug:
      traceback.print_exc()
    if "glmjax.gin_files" in sys.modules:  # else the import itself failed
      error = gin_files.original(error)
    return (
      _fail(_one_line(error), 2) if isinstance(error, errors.InputError) else _fail(_describe(error), 1)
    )


def _describe(error: Exception) -> str:
  """One line for an error that no part of glmjax foresaw."""
  again = "run again with --debug for the traceback"
  if isinstance(error, ModuleNotFoundError) and error.name:
    from glmjax import signatures

    extra = signatures.EXTRAS.get(error.name.split(".")[0])
    if extra:
      return f"this needs {error.name}: pip install 'glmjax[{extra}]'"
  if isinstance(error, OSError) and error.errno == errno.ENOSPC:
    place = error.filename or "while writing"
    return f"the disk is full ({place}): free some space and run the same command again"
  return f"{type(error).__name__}: {_one_line(error)} ({again})"


def _one_line(error: Exception) -> str:
  """The message, its lines joined, without those that gin appends; a library's essay is cut."""
  lines = [line.strip() for line in str(error).splitlines() if not line.startswith(_GIN)]
  text = " ".join(filter(None, lines)) or "no message"
  return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _fail(message: str, status: int) -> int:
  print(f"glmjax: {message}", file=sys.stderr, flush=True)
  distributed = sys.modules.get("glmjax.parallel.distributed")
  if distributed is not None and distributed.joined():  # JAX would wait at exit for processes that wait for this one
    distributed.leave(status, message)
  return status


def _limit_threads() -> None:
  """Thread pools no larger than the processors we may use, and none that spins while it waits.

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
