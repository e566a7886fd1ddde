"""What the processes of a run on several hosts must agree on."""

from collections.abc import Callable
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

from glmjax import errors


def on_first(action: Callable[[], None]) -> None:
  """Runs `action` in process 0 alone; the others wait for it, and stop where it failed.

  Raises:
    errors.InputError: in the other processes, when process 0 raised anything.
  """
  failure = None
  if jax.process_index() == 0:
    try:
      action()
    except Exception as error:  # the others must hear of it before it goes on
      failure = error
  if jax.process_count() > 1:
    failed = multihost_utils.broadcast_one_to_all(np.int32(failure is not None))
    if failed and failure is None:
      raise errors.InputError("process 0 could not begin: its own message says why")
  if failure is not None:
    raise failure


def check_same_filesystem(look: Callable[[], int], what: str, seconds: float = 20) -> None:
  """Returns when `look`, at a folder, gives every process the 32 bits that it gives process 0.

  A network file system may take a while to show one host what another wrote.

  Raises:
    errors.InputError: in all processes, when one of them does not see it within that time.
  """
  if jax.process_count() == 1:
    return
  wanted = int(multihost_utils.broadcast_one_to_all(np.uint32(look())))
  ends = time.monotonic() + seconds
  while look() != wanted and time.monotonic() < ends:
    time.sleep(0.5)
  others = np.flatnonzero(multihost_utils.process_allgather(np.int32(look() != wanted)))
  if others.size:
    raise errors.InputError(
      f"{what}: process {others[0]} does not see there what process 0 has written; use a folder that all hosts share"
    )
