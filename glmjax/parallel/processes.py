"""What the processes of a run on several hosts must agree on."""

from collections.abc import Callable

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
