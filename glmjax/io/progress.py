"""How far a long loop has come: a bar, or a line now and then."""

import importlib.util
import logging
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

import tqdm

_log = logging.getLogger("glmjax")


def is_notebook() -> bool:
  """Tells whether this program is a notebook's, so that what it shows lies below a cell."""
  shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
  return hasattr(shell, "kernel")


def stream() -> TextIO | None:
  """Returns where news of progress go: standard error, but in a notebook the cell's output."""
  return sys.stdout if is_notebook() else sys.stderr


def bar(items: Iterable[Any] | None = None, **settings: Any) -> tqdm.tqdm:
  """Makes tqdm's bar; in a notebook a widget, or text where ipywidgets is not installed.

  It is shown on terminals and in notebooks alone, where `disable` says nothing else: a file is no place for it.
  """
  settings = {"disable": None} | settings
  if not is_notebook():
    return tqdm.tqdm(items, **settings)
  settings |= {"disable": bool(settings.get("disable"))}
  if importlib.util.find_spec("ipywidgets") is None:
    return tqdm.tqdm(items, **(settings | {"file": stream(), "mininterval": 1}))
  from tqdm import notebook

  return notebook.tqdm(items, **settings)


class Progress:
  """Says "3,000 of 10,000 texts scored, ETA 1:10" every `seconds`, through the logger "glmjax"; a short loop stays
  silent.
  """

  def __init__(self, total: int, what: str, seconds: float = 10):
    """Counts `what` up to `total`: "texts scored", "tokens scored"."""
    self._total, self._what, self._seconds = total, what, seconds
    self._began = self._told = time.monotonic()

  def at(self, done: int, share: float | None = None) -> None:
    """Says how many are done, if it is time; cheap enough to be called for each. `share`: of the work, where some take
    longer than others; None: done / total.
    """
    now = time.monotonic()
    if now - self._told >= self._seconds:
      self._told = now
      share = done / self._total if share is None else share
      left = f", ETA {duration((now - self._began) * (1 - share) / share)}" if share > 0 else ""
      _log.info("%s of %s %s%s", f"{done:,}", f"{self._total:,}", self._what, left)


def duration(seconds: float) -> str:
  """Writes seconds like 1:02:03, or 4:05."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
