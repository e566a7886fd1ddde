"""What was done about spikes, beside the metrics: a JSON line each, and a gin file by which another run does the same.

  WORKDIR/interventions.jsonl   WORKDIR/interventions.gin

Ways back are kept through all of a run: a process that goes on with it leaves the same samples out. The other lines of
steps behind a checkpoint go when the run goes on from there, as those of metrics.jsonl do: the steps come again.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

import jax

from glmjax import errors
from glmjax.io import lease
from glmjax.io import paths
from glmjax.io import publish
from glmjax.parallel import processes
from glmjax.train import schedules
from glmjax.train import spikes
from glmjax.train import workdir as workdir_lib

Line = dict[str, Any]
Ranges = list[tuple[int, int]]

_FRAGMENT = f"""\
{workdir_lib.REPLAY_MARK} another run of the same settings, with this file behind them, does about the same samples
# what this one came to do, whatever its limits ("clip" computes them again, from the same figures):
#   glmjax train --gin_file=... --gin_file=WORKDIR/interventions.gin --workdir=ANOTHER
from __gin__ import dynamic_registration
from glmjax.train import schedules
from glmjax.train import spikes

"""

_log = logging.getLogger("glmjax")


class Journal:
  """The interventions of one run; the first process reads and writes, all know the same."""

  def __init__(self, folder: workdir_lib.Workdir, guard: spikes.Guard | None, batches: schedules.Batches):
    """Reads what there is.

    Args:
      folder: the run's.
      guard: what is watched; None: nothing, and what was done before still holds.
      batches: as the user gave them, before anything was left out.

    Raises:
      errors.InputError: when it is damaged, or cannot be read.
    """
    self._folder, self._guard, self._batches = folder, guard, batches
    self._lines: list[Line] = processes.from_first(lambda: _read(folder.interventions))
    self._failed, self._told = False, False

  def begin(self, step: int) -> None:
    """Forgets what comes again in a run that goes on from `step`."""
    kept = [line for line in self._lines if line["action"] == "roll_back" or line["step"] <= step]
    if len(kept) != len(self._lines):
      self._lines = kept
      self._write()

  def add(self, spike: spikes.Spike, back_to: int | None = None) -> None:
    """Records a spike; `back_to`: the step that the run has gone back to."""
    line: Line = {"step": spike.step, "first_sample": spike.first, "last_sample": spike.last}
    line |= {"above": spike.figures, "action": spike.action}
    if back_to is not None:
      line["back_to_step"] = back_to
    self._lines.append(line)
    self._write()

  def count(self, step: int, window: int) -> int:
    """Returns how many updates were skipped, and ways gone back, within a window before a step, or behind it."""
    return sum(line["action"] in ("skip", "roll_back") and line["step"] > step - window for line in self._lines)

  @property
  def left_out(self) -> Ranges:
    """The samples, (first, last), before which the run went back."""
    return self._samples("roll_back")

  def _samples(self, action: str) -> Ranges:
    return [(line["first_sample"], line["last_sample"]) for line in self._lines if line["action"] == action]

  def _write(self) -> None:
    """Writes both files; what cannot be written is said once, and training goes on. A gin file of that name that no run
    wrote stays as it is.
    """
    if jax.process_index() != 0:
      return
    try:
      lease.check()
      publish.write_text(self._folder.interventions, "".join(json.dumps(line) + "\n" for line in self._lines))
      self._write_replay()
      self._failed = False
    except (OSError, errors.InputError) as error:
      if not self._failed:
        reason = errors.reason(error) if isinstance(error, OSError) else errors.one_line(error)
        _log.warning("%s: cannot be written: %s; training goes on", self._folder.interventions, reason)
      self._failed = True

  def _write_replay(self) -> None:
    if self._folder.owns_replay():
      publish.write_text(self._folder.replay, self._fragment())
    elif not self._told:
      _log.warning(
        "%s: no run has written it, and it stays as it is: what is done about spikes is in %s alone; move it away, and "
        "the next intervention writes it",
        *(self._folder.replay, self._folder.interventions.name),
      )
      self._told = True

  def _fragment(self) -> str:
    clips = any(line["action"] == "clip" for line in self._lines)
    text = f'{_FRAGMENT}spikes.Guard.action = "{"clip" if clips else "log"}"\n'
    own = () if self._guard is None else self._guard.skip
    text += _bound("spikes.Guard.skip", [*own, *self._samples("skip")])
    return text + _bound("schedules.Batches.skip", [*self._batches.skip, *self.left_out])


def _bound(name: str, found: Sequence[tuple[int, int]]) -> str:
  """Returns the gin line of some ranges; nothing of none."""
  found = sorted({(first, last) for first, last in found})
  return f"{name} = {found}\n" if found else ""


def _read(path: paths.Path) -> list[Line]:
  """Reads what was written; of files that nobody wrote, nothing."""
  try:
    text = path.read_bytes().decode()
  except FileNotFoundError:
    return []
  except (OSError, ValueError) as error:
    reason = errors.reason(error) if isinstance(error, OSError) else "it is no text"
    raise errors.InputError(f"cannot read {path}: {reason}; restore a copy") from error
  lines = []
  for number, line in enumerate(text.splitlines(), 1):
    try:
      found = json.loads(line)
      whole = [found["step"], found["first_sample"], found["last_sample"]]
      if not all(type(each) is int and each >= 0 for each in whole) or found["action"] not in spikes.ACTIONS:
        raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise errors.InputError(
        f"{path}, line {number}: damaged; restore a copy: the run leaves out the samples that it names"
      ) from error
    lines.append(found)
  return lines
