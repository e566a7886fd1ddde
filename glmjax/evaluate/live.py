"""The curve of a run under way, drawn anew in a notebook's cell every few seconds."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from glmjax import display
from glmjax import errors
from glmjax.evaluate import report
from glmjax.io import paths
from glmjax.io import progress

_log = logging.getLogger("glmjax")
SECONDS = 3  # between two pictures, at least
_SHARE = 0.05  # of the time that drawing may take


@contextlib.contextmanager
def curve(metrics: paths.Path) -> Iterator[None]:
  """Shows report.loss_picture of what is written to a run's metrics.jsonl meanwhile; outside of notebooks nothing.

  A thread reads the file, and training knows nothing of it: where no picture can be drawn, that is told, and no more.

  Raises:
    errors.InputError: where matplotlib is not installed.
  """
  if not progress.is_notebook():
    yield
    return
  from IPython import display as ipython

  display.figure(1, 1)  # where matplotlib is missing, that is said before the training
  ended, shown = threading.Event(), ipython.display({"text/plain": "training ..."}, raw=True, display_id=True)
  before = _state(metrics)

  def draw(last: bool = False) -> bool:
    """Draws what there is, and tells whether to go on; damaged lines are told of with the last picture alone."""
    try:
      with contextlib.suppress(errors.InputError, OSError):  # no step yet; or the folder is being made anew
        if _state(metrics) != before:
          shown.update(report.loss_picture(report.read_metrics(metrics, tell=last)))
          return True
      if last:
        shown.update({"text/plain": ""}, raw=True)
    except Exception as error:  # whatever it is, the training's own result or error counts
      _log.warning("the curve cannot be drawn: %s: %s", type(error).__name__, error)
      return False
    return True

  def keep_drawing() -> None:
    took, going = 0.0, True
    while going and not ended.wait(max(SECONDS, took / _SHARE)):
      began = time.monotonic()
      going = draw()
      took = time.monotonic() - began

  thread = threading.Thread(target=keep_drawing, daemon=True, name="live curve")
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    draw(last=True)


def _state(path: paths.Path) -> tuple[int, int] | None:
  """Returns what changes when a file is written to; None without one."""
  try:
    found = path.stat()
  except OSError:
    return None
  return found.st_size, found.st_mtime_ns
