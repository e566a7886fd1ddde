"""SIGTERM and Ctrl-C: the step under way is finished and saved, the same one by all processes of the run.

Before the first step there is nothing to save, and the program's own handlers act (cli/process.py).
"""

import contextlib
import signal
from typing import Any

import jax
import numpy as np


class Stopping:
  """A scope within which SIGTERM and Ctrl-C are noted, for the loop to finish its step; a second one acts at once.

  A run of several processes stops when all know that one of them was told to. What each has noted goes along
  with every step as one number a device; the largest is read where the step's figures are, a step later, so
  that no process waits for it.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self.agreed: int | None = None  # the signal that the run stops for
    self._received: int | None = None
    self._before: dict[int, Any] = {}
    self._wakeup: int | None = None
    self._alone = jax.process_count() == 1
    self._split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # `step` makes it wait for the step: two collectives of one process in any order would meet the others' crosswise
    self._largest = jax.jit(lambda numbers, step: numbers.max(), out_shardings=everywhere, keep_unused=True)

  def __enter__(self) -> "Stopping":
    with contextlib.suppress(ValueError):  # not in the main thread: signals are someone else's
      self._wakeup = signal.set_wakeup_fd(-1)  # whoever is woken by signals need not know of this one
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *exc: Any) -> None:
    self._restore()

  def ask(self, step: jax.Array) -> jax.Array | None:
    """Begins to ask all processes, once the device has computed `step`."""
    if self._alone:
      return None
    number = np.full(1, self._received or 0, np.int32)
    numbers = jax.make_array_from_callback((self._split.mesh.size,), self._split, lambda index: number)
    return self._largest(numbers, step)

  def hear(self, answer: jax.Array | None) -> None:
    """Takes what `ask` gave for an earlier step; None: there was none."""
    if self._alone:
      self.agreed = self._received
    elif answer is not None:
      self.agreed = int(answer) or None

  def _note(self, number: int, frame: Any) -> None:
    del frame
    self._received = number
    self._restore()

  def _restore(self) -> None:
    if self._wakeup is not None:
      signal.set_wakeup_fd(self._wakeup)
      self._wakeup = None
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before.clear()
