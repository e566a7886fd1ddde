"""The flags by which the processes of one training find each other, where no cluster tells them."""

import argparse
import sys
from typing import Any

from glmjax import errors
from glmjax.cli import process

_TOGETHER = ("coordinator", "num_processes", "process_id")


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


def begin(options: argparse.Namespace) -> None:
  """Makes the process ready for training and joins the others, when flags and gin files are in order."""
  process.prepare_training()
  from glmjax.parallel import distributed  # loads JAX

  seconds = {} if options.connect_seconds is None else {"connect_seconds": options.connect_seconds}
  distributed.join(options.coordinator, options.num_processes, options.process_id, **seconds)


def is_first() -> bool:
  """Whether this process is the one that writes and prints."""
  distributed = sys.modules.get("glmjax.parallel.distributed")  # loaded by what joins
  return distributed is None or not distributed.joined() or distributed.process_id() == 0
