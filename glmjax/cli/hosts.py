"""How the processes of one command find each other and share its work: one reads and writes, all compute."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

from glmjax import errors
from glmjax.cli import process, streams
from glmjax.cli.flags import Flag

FLAGS = (
  Flag("--coordinator", "HOST:PORT of process 0, where no cluster tells it", kind="prepared"),
  Flag("--num_processes", "processes of the run, on all hosts", int, least=1, kind="prepared"),
  Flag("--process_id", "number of this one, from 0", int, least=0, kind="prepared"),
  Flag(
    "--connect_seconds",
    "how long to wait for the other processes (300)",
    float,
    above=0,
    most=1_000_000,
    kind="prepared",
  ),
)
_TOGETHER = ("coordinator", "num_processes", "process_id")
_AGAIN = "give the same command again, on all hosts"


def check(options: argparse.Namespace) -> dict[str, Any]:
  """Raises InputError where the flags are half given or contradict each other; they are no arguments of the call."""
  given = {name: getattr(options, name) for name in _TOGETHER}
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if len(missing) == len(_TOGETHER):
    return {}
  if missing:
    raise errors.InputError(
      f"{' and '.join(missing)} missing: --coordinator, --num_processes and --process_id are "
      "given together, or none of them"
    )
  host, _, port = given["coordinator"].rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise errors.InputError(f"--coordinator is {given['coordinator']}: give HOST:PORT of process 0")
  if given["num_processes"] < 1 or not 0 <= given["process_id"] < given["num_processes"]:
    raise errors.InputError(
      f"--process_id is {given['process_id']} of --num_processes {given['num_processes']}: they are numbered from 0"
    )
  return {}


def check_mesh(options: argparse.Namespace) -> dict[str, Any]:
  """Does `check` for commands whose processes share a model: they need --mesh."""
  check(options)
  if options.coordinator is not None and options.mesh is None:
    raise errors.InputError(
      "--coordinator without --mesh: say how the processes' devices share the model, as --mesh=tensor=8"
    )
  return {}


@contextlib.contextmanager
def training(options: argparse.Namespace) -> Iterator[None]:
  """Makes the process ready for training and joins the others, which loop.train watches."""
  process.keep_programs()
  _join(options)
  yield


@contextlib.contextmanager
def sharing(options: argparse.Namespace) -> Iterator[None]:
  """Joins the processes that share a model over --mesh, and watches them until process 0 has written the answers.

  Without --mesh nothing happens: the processes of a cluster then answer each for itself.
  """
  if options.mesh is None:
    yield
    return
  _join(options)
  if not is_first():
    logging.getLogger("glmjax").setLevel(logging.WARNING)
  from glmjax.parallel import peers

  with peers.Watch().on(_AGAIN):
    yield
    from_first(lambda: None)  # the others' end would hurry process 0, which may still be writing


@contextlib.contextmanager
def evaluating(options: argparse.Namespace) -> Iterator[None]:
  """Does `sharing` for a command that compiles as soon as it begins."""
  process.keep_programs()
  with sharing(options):
    yield


def _join(options: argparse.Namespace) -> None:
  from glmjax.parallel import distributed  # loads JAX

  seconds = {} if options.connect_seconds is None else {"connect_seconds": options.connect_seconds}
  if distributed.join(options.coordinator, options.num_processes, options.process_id, **seconds) > 1:
    streams.keep_output()


def _several() -> bool:
  distributed = sys.modules.get("glmjax.parallel.distributed")  # loaded by what joins
  return distributed is not None and distributed.joined()


def is_first() -> bool:
  """Tells whether this process is the one that reads, writes and prints."""
  return not _several() or sys.modules["glmjax.parallel.distributed"].is_first()


def from_first(action: Callable[[], Any]) -> Any:
  """Returns in every process what `action`, called in process 0 alone, returns; JAX is not loaded in one that is
  alone.
  """
  if not _several():
    return action()
  from glmjax.parallel import processes

  return processes.from_first(action)


def check_same(value: Any, what: str) -> None:
  """Raises InputError, in all processes, where one of several was given another value than process 0."""
  if _several():
    from glmjax.parallel import processes

    processes.check_same({what: repr(value)})


def flag_of_first(flag: bool) -> bool:
  """Returns process 0's flag, in every process, which must all come here at once."""
  if not _several():
    return flag
  from glmjax.parallel import processes

  return processes.flag_of_first(flag)
