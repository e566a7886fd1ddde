"""How far a long loop has come, said now and then."""

import logging
import time

_log = logging.getLogger("glmjax")


class Progress:
  """Says "3,000 of 10,000 texts scored" every `seconds`, through the logger "glmjax"; a short loop stays silent."""

  def __init__(self, total: int, what: str, seconds: float = 10):
    """Counts `what` up to `total`: "texts scored", "tokens scored"."""
    self._total, self._what, self._seconds = total, what, seconds
    self._told = time.monotonic()

  def at(self, done: int) -> None:
    """Says how many are done, if it is time; cheap enough to be called for each."""
    now = time.monotonic()
    if now - self._told >= self._seconds:
      self._told = now
      _log.info("%s of %s %s", f"{done:,}", f"{self._total:,}", self._what)
