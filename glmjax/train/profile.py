"""A trace of some steps, for TensorBoard's or Perfetto's profile view. Where it fails, training goes on without."""

from collections.abc import Sequence
import logging
import pathlib
import shutil
import tempfile
import threading

import jax

from glmjax.io import lease
from glmjax.io import paths

_PIECE = 1 << 22  # bytes

_log = logging.getLogger("glmjax")


class Trace:
  """Traces steps `first` to `last` of a run into `folder`; for a bucket JAX writes to the disk first."""

  def __init__(self, steps: Sequence[int], folder: paths.Path):
    """Takes `steps`, (first, last), or empty for no trace."""
    self.steps, self.folder = tuple(steps), folder
    self._running = False
    self._local = folder if isinstance(folder, pathlib.Path) else None  # None: made when it is needed
    self._putting: threading.Thread | None = None

  def before(self, step: int) -> None:
    """Starts the trace when its first step is about to run."""
    if self.steps and step == self.steps[0]:
      try:
        if not isinstance(self.folder, pathlib.Path):
          self._local = pathlib.Path(tempfile.mkdtemp(prefix="glmjax-"))
        jax.profiler.start_trace(str(self._local))
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
      if self._local != self.folder:
        self._putting = threading.Thread(target=self._put, name=f"puts {self.folder}", daemon=True)
        self._putting.start()
    return was_running

  def close(self) -> None:
    """Waits until what was traced is in its bucket."""
    if self._putting is not None:
      self._putting.join()

  def _put(self) -> None:
    assert self._local is not None
    try:
      for path in self._local.rglob("*"):
        if path.is_file():
          lease.check()
          with path.open("rb") as source, (self.folder / str(path.relative_to(self._local))).open("wb") as target:
            shutil.copyfileobj(source, target, _PIECE)
    except Exception as error:  # of the network, or of the disk
      self._failed(error)
    finally:
      shutil.rmtree(self._local, ignore_errors=True)

  def _failed(self, error: Exception) -> None:
    _log.warning(
      "%s: no profile of steps %d to %d: %s; training goes on",
      self.folder,
      *self.steps,
      " ".join(str(error).split())[:300] or type(error).__name__,
    )
