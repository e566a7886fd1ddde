"""What a run makes its model forget: the loss on text of another kind, of the model that it begins with and at its end.

  WORKDIR/probe.json  {"text", "samples", "tokens", "before", "after", "difference"}

Both are the base's own objective, blanks to be filled, whatever the run is trained by: "before" is the model without
the adapter that the run trains, "after" the model with it. Each is there once it has been measured, whole, and is not
measured again by a run that goes on. N rows, of which none is there twice: "samples".
"""

import dataclasses
import json
import logging
import math
from typing import Any

import jax
import numpy as np

from glmjax import errors
from glmjax.io import lease
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import user_json
from glmjax.models import config as config_lib
from glmjax.parallel import processes
from glmjax.train import feed as feed_lib
from glmjax.train import runtime as runtime_lib
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib

_Z = 1.959964  # of 95 %, of normal values
_log = logging.getLogger("glmjax")


@dataclasses.dataclass(frozen=True)
class Text:
  """What the losses are of."""

  described: dict[str, Any]  # what its source says of itself
  samples: int  # N
  parts: list[feed_lib.Evaluated]  # this host's

  @classmethod
  def read(cls, source: feed_lib.DataSource | None, layout: feed_lib.Layout, samples: int) -> "Text | None":
    """Reads the first samples of a source, as far as none of them comes again; None: none is given.

    Raises:
      errors.InputError: when it has none, or one alone, or they are pairs of answers.
    """
    if source is None:
      return None
    if samples < 2:
      raise errors.InputError(f"Intervals.eval_samples is {samples}: loop.train.probe compares rows: give 2 or more")
    parts = feed_lib.read_held_out(source, layout, samples, "probe")
    described = json.loads(json.dumps(source.describe()))  # as a file will give it back
    if described.get("preference"):
      raise errors.InputError("loop.train.probe is of pairs of answers: give it text, or questions with one answer")
    # The error of the difference is that of rows which do not depend on each other; the same one twice tells no more.
    once = source.samples_once() if hasattr(source, "samples_once") else samples
    if once < 2:
      raise errors.InputError("loop.train.probe has one row, and no others to compare: give it more text")
    if once < samples:
      _log.warning(
        "loop.train.probe has %s rows before one comes again: these are compared, and not Intervals.eval_samples, %s",
        *(f"{once:,}", f"{samples:,}"),
      )
      samples, parts = once, [part for part in parts if part.first < once]
    return cls(described, samples, parts)


class Probe:
  """Measures and records what one run makes its model forget; the first process writes, all know the same."""

  def __init__(
    self, runtime: runtime_lib.Runtime, base: config_lib.GLMConfig, text: Text, path: paths.Path, adapts: bool
  ):
    """Reads what there is.

    Args:
      runtime: the run's.
      base: the model that it begins with, without an adapter.
      text: what both losses are of.
      path: of probe.json.
      adapts: whether an adapter is trained beside the base, which is then there at any time.

    Raises:
      errors.InputError: when a file of that name is no record of a probe.
    """
    self._runtime, self._base, self._text, self._path, self._adapts = runtime, base, text, path, adapts
    self._found: dict[str, Any] = processes.from_first(lambda: read(path))

  def begin(self, state: state_lib.TrainState, resumed: bool) -> None:
    """Measures the model that the run begins with, unless the run goes on and that was done.

    Raises:
      errors.InputError: when it was measured on another text, with which the end could not be compared.
    """
    own = {"text": self._text.described, "samples": self._text.samples}
    if resumed and self._found:
      if any(self._found[name] != own[name] for name in own):
        raise errors.InputError(
          f"{self._path} is of another text, or of other samples of it: give loop.train.probe and "
          "Intervals.eval_samples as the run began with, or move that file away"
        )
      return
    self._found = own
    if resumed and not self._adapts:
      _log.warning("the run began without loop.train.probe: what it has forgotten until now cannot be told")
    else:
      self._measure("before", 0, self._base, state)

  def end(self, state: state_lib.TrainState) -> str:
    """Measures the model that the run ends with, unless that was done; returns what comes of both in a line."""
    step = int(state.step)
    if self._found.get("after", {}).get("step") != step:
      if "after" in self._found:  # of an end that the run has gone on from
        self._found = {name: each for name, each in self._found.items() if name not in ("after", "difference")}
        self._write()
      self._measure("after", step, self._runtime.objective.config, state)
    found, rows = self._found, f"{self._text.samples:,} rows"
    if "difference" in found:
      change, losses = found["difference"], [found[name]["loss"] for name in ("before", "after")]
      return (
        f"loss on the text of the probe, {rows}: {losses[0]:.4f} before, {losses[1]:.4f} now, {change['loss']:+.4f} "
        f"(95 %: {change['low']:+.4f} to {change['high']:+.4f}); {self._path}"
      )
    if "after" in found:
      return f"loss on the text of the probe, {rows}: {found['after']['loss']:.4f} now; {self._path}"
    return "the text of the probe has no finite loss"

  def _measure(self, name: str, step: int, config: config_lib.GLMConfig, state: state_lib.TrainState) -> None:
    """Computes and records one of the two losses; one that is not finite is told, and nothing is recorded."""
    losses_N, tokens_N = self._rows(config, state)
    if not np.isfinite(losses_N).all():
      _log.warning("the text of the probe, %s: the loss is not finite, and is not recorded", name)
      return
    loss = float(losses_N.sum() / tokens_N.sum())
    found = self._found | {"tokens": tokens_N.tolist()}
    found[name] = {"step": step, "loss": loss, "rows": losses_N.tolist()}
    if {"before", "after"} <= found.keys():
      found["difference"] = difference(*(np.array(found[each]["rows"]) for each in ("before", "after")), tokens_N)
    self._found = found
    self._write()

  def _rows(self, config: config_lib.GLMConfig, state: state_lib.TrainState) -> tuple[np.ndarray, np.ndarray]:
    """Returns each row's summed cross entropies and their weights, float64 [N] each, in the source's order."""
    objective = dataclasses.replace(self._runtime.objective, config=config, preference=None, reference=None)
    program, layout = step_lib.compile_row_step(objective), dataclasses.replace(self._runtime.layout, num_micro=1)
    found_N = np.zeros((2, self._text.samples))
    with self._runtime.peers.patient():
      for part in self._text.parts:
        rows, *sums = jax.device_get(program(state.params, state.frozen, layout.put(part.rows)))
        there = rows < min(part.size, self._text.samples - part.first)
        found_N[:, part.first + rows[there]] = [each[there] for each in sums]
    return found_N[0], found_N[1]

  def _write(self) -> None:
    """Writes probe.json; what cannot be written is said, and training goes on."""
    if jax.process_index() != 0:
      return
    try:
      lease.check()
      publish.write_text(self._path, json.dumps(self._found, ensure_ascii=False) + "\n")
    except (OSError, errors.InputError) as error:
      reason = errors.reason(error) if isinstance(error, OSError) else errors.one_line(error)
      _log.warning("%s: cannot be written: %s; training goes on", self._path, reason)


def difference(before_N: np.ndarray, after_N: np.ndarray, tokens_N: np.ndarray) -> dict[str, float]:
  """Returns by how much the loss per token has changed, in nats, with its standard error and 95 % interval.

  Rows are what varies, each with itself before (paired), and have different numbers of tokens: the error is that of a
  ratio of two sums (Cochran, Sampling Techniques, 1977, chapter 6).

  Args:
    before_N: each row's summed cross entropies before.
    after_N: the same, after.
    tokens_N: each row's summed weights.
  """
  changes_N, count = after_N - before_N, max(int((tokens_N > 0).sum()), 2)
  change = float(changes_N.sum() / tokens_N.sum())
  rest_N = changes_N - change * tokens_N
  error = math.sqrt(count / (count - 1) * float(np.square(rest_N).sum())) / float(tokens_N.sum())
  return {"loss": change, "standard_error": error, "low": change - _Z * error, "high": change + _Z * error}


def read(path: paths.Path) -> dict[str, Any]:
  """Reads what was recorded; {} where nothing was.

  Raises:
    errors.InputError: when the file is no such record.
  """
  if not path.exists() and not path.is_symlink():
    return {}
  advice = "move it away, and the probe begins anew"
  found = user_json.read(path, expected=advice)
  try:
    samples = found["samples"]
    rows = [found["tokens"], *(found[name]["rows"] for name in ("before", "after") if name in found)]
    steps = [found[name]["step"] for name in ("before", "after") if name in found]
    good = isinstance(found["text"], dict) and all(isinstance(each, int) for each in (samples, *steps))
    if not good or any(np.array(each, np.float64).shape != (samples,) for each in rows):
      raise ValueError
  except (KeyError, TypeError, ValueError) as error:
    raise errors.InputError(f"{path} is damaged, or nothing that a run has written: {advice}") from error
  return found
