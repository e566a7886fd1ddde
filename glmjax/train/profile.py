"""A trace of some steps, for TensorBoard's or Perfetto's profile view. Where it fails, training goes on without."""

from collections.abc import Sequence
import logging
import pathlib

import jax

_log = logging.getLogger("glmjax")


class Trace:
  """Traces steps `first` to `last` of a run into `folder`."""

  def __init__(self, steps: Sequence[int], folder: pathlib.Path):
    """Takes `steps`, (first, last), or empty for no trace."""
    self.steps, self.folder = tuple(steps), folder
    self._running = False

  def before(self, step: int) -> None:
    """Starts the trace when its first step is about to run."""
    if self.steps and step == self.steps[0]:
      try:
        jax.profiler.start_trace(str(self.folder))
        self._running = True
      except Exception as error:  # of the disk, or another profile is running
        self._failed(error)

  def ends_with(self, step: int) -> bool:
    """Tells whether the trace is to be stopped once this step is done."""
    return self._running and step >= self.steps[1]

  def stop(self) -> bool:
    """Ends and writes the trace, if one is running; tells whether it was written."""
    was_running, self._running = self._running, False
    if was_running:
      try:
        jax.profiler.stop_trace()
      except Exception as error:  # a full disk
        self._failed(error)
        return False
    return was_running

  def _failed(self, error: Exception) -> None:
    _log.warning(
      "%s: no profile of steps %d to %d: %s; training goes on",
      self.folder,
      *self.steps,
      " ".join(str(error).split())[:300] or type(error).__name__,
    )
