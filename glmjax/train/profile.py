"""A trace of some steps, for TensorBoard's or Perfetto's profile view."""

from collections.abc import Sequence
import pathlib

import jax


class Trace:
  """Traces steps `first` to `last` of a run into `folder`."""

  def __init__(self, steps: Sequence[int], folder: pathlib.Path):
    """`steps` is (first, last), or empty for no trace."""
    self.steps, self.folder = tuple(steps), folder
    self._running = False

  def before(self, step: int) -> None:
    """Starts the trace when its first step is about to run."""
    if self.steps and step == self.steps[0]:
      jax.profiler.start_trace(str(self.folder))
      self._running = True

  def ends_with(self, step: int) -> bool:
    """Whether the trace is to be stopped once this step is done."""
    return self._running and step >= self.steps[1]

  def stop(self) -> bool:
    """Ends and writes the trace, if one is running; whether it was."""
    was_running, self._running = self._running, False
    if was_running:
      jax.profiler.stop_trace()
    return was_running
