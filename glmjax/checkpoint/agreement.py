"""What the processes of a run find in a checkpoint, agreed on: all read the same step, or all say why they cannot."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

from glmjax import errors
from glmjax.checkpoint import files

_LONGEST = 1000  # bytes of a text that is exchanged

T = TypeVar("T")


def together(action: Callable[[], T]) -> T:
  """Returns what `action` gives this process, once it has succeeded in all.

  Every process must call it, and the action itself must not wait for other processes.

  Raises:
    files.DamagedError: in all processes, when what one of them read is damaged.
    Exception: in all processes, when it failed in one of them for another reason; that goes before damage, so that
      no step is passed over for a fault of one machine. Where the action succeeded this is an InputError.
  """
  failure, result = None, None
  try:
    result = action()
  except Exception as error:  # of any kind: the others must hear of it
    failure = error
  is_damage = isinstance(failure, files.DamagedError)
  kind = "" if failure is None else "damaged" if is_damage else "outage" if errors.may_pass(failure) else "failed"
  said = gather(f"{kind} {errors.one_line(failure)}" if failure else "")
  for word in ("failed", "outage", "damaged"):
    if failure is not None and word == kind:
      raise failure
    for process, text in enumerate(said):
      if text.startswith(word):
        message = f"process {process}: {text.removeprefix(word + ' ')}"
        raise files.DamagedError(message) if word == "damaged" else errors.InputError(message, passes=word == "outage")
  return result


def of_first(action: Callable[[], str]) -> str:
  """Returns what `action`, in process 0 alone, finds; at most 1,000 bytes. It raises as `together` does."""
  return gather(together(lambda: action() if jax.process_index() == 0 else ""))[0]


def gather(text: str) -> list[str]:
  """Gathers the texts of all processes, in their order, each cut at 1,000 bytes."""
  if jax.process_count() == 1:
    return [text]
  mine = np.zeros(_LONGEST, np.uint8)
  encoded = text.encode()[:_LONGEST]
  mine[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(mine)]
