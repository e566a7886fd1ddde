"""What a model was measured to do: files of held-out figures, and folders of answered tasks."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from glmjax import errors
from glmjax.evaluate import report
from glmjax.io import paths
from glmjax.io import user_json

_RUN_JSON, _REPORT_JSON = "run.json", "report.json"  # of `glmjax evaluate --tasks`
_OWN = {"bits_per_byte": "bits per byte", "infill_accuracy": "blanks' tokens right (share)"}
_BASELINES = {"unigram_bits_per_byte": "bits per byte of a unigram model", "xz_bits_per_byte": "bits per byte of xz"}
BASELINES = tuple(_BASELINES.values())  # figures that are not the model's own
_SETTINGS = ("kv_cache_dtype", "activation_bits", "head_bits")  # of answering, that change figures


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Figures of a model, and how they came about."""

  name: str  # of the file or the folder
  weights: str | None  # fingerprint of the model that was measured, of its adapter if it had one; None: not said
  figures: Mapping[str, Mapping[str, Mapping[str, float]]]  # task, then metric: value, and low, high, items if known
  parts: tuple[str, ...] = ()  # why these are not all items
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  version: str | None = None  # of glmjax


def read(path: paths.Path, weights: str) -> Evaluation:
  """Reads an evaluation of a model.

  Args:
    path: a file that `glmjax evaluate` wrote, or a folder of `glmjax evaluate --tasks`.
    weights: the model's fingerprint.

  Raises:
    errors.InputError: for one of another model, and one that is damaged.
  """
  found = _tasks(path) if path.is_dir() else _held_out(path)
  if found.weights not in (None, weights):
    raise errors.InputError(
      f"--evaluation: {path} is of weights {found.weights[:8]}, and these are {weights[:8]}: evaluate these"
    )
  return found


def _tasks(folder: paths.Path) -> Evaluation:
  again = "give a folder of glmjax evaluate --tasks"
  run = user_json.read(folder / _RUN_JSON, expected=again)
  tasks = user_json.read(folder / _REPORT_JSON, expected=again)
  of = run.get("adapter") or run.get("weights")
  parts = []
  if run.get("limit") is not None:
    parts.append(f"the first {run['limit']} items of each file alone")
  if run.get("skip"):
    parts.append("what had no file, or no room, was left out")
  try:
    figures = {
      str(task): {str(metric): _figure(own) for metric, own in each["figures"].items()} for task, each in tasks.items()
    }
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise errors.InputError(f"{folder / _REPORT_JSON} is damaged ({errors.one_line(error)}); {again}") from None
  if of is not None and not isinstance(of, str):
    raise errors.InputError(f"{folder / _RUN_JSON} is damaged (weights); {again}")
  if not figures:
    raise errors.InputError(f"--evaluation: {folder / _REPORT_JSON} has no figures: {again}")
  settings = {name: run[name] for name in _SETTINGS if run.get(name) is not None}
  return Evaluation(folder.name, of, figures, tuple(parts), settings, run.get("glmjax"))


def _figure(own: Mapping[str, Any]) -> dict[str, float]:
  """Returns a figure whose numbers are numbers."""
  found = {name: float(own[name]) for name in ("value", "low", "high", "items") if own.get(name) is not None}
  if "value" not in found or not all(map(math.isfinite, found.values())):
    raise ValueError("a figure without a value")
  return found


def _held_out(path: paths.Path) -> Evaluation:
  shown, read = _OWN | _BASELINES, report.read_evaluation(path)
  figures = {
    f"held-out text, {language}": {
      text: {"value": own[name], **_interval(own, name)} for name, text in shown.items() if name in own
    }
    for language, own in read.items()
  }
  if not figures:
    raise errors.InputError(f"--evaluation: {path} has no figures: give what glmjax evaluate wrote")
  parts = tuple(part for language, own in read.items() if (part := _part(language, own)))
  return Evaluation(path.name, report.evaluated_weights(path), figures, parts)


def _part(language: str, own: Mapping[str, float]) -> str | None:
  """Says how much of the held-out text was read; None where it was all."""
  if "split_tokens" not in own:
    return f"{language}: how much of the held-out text was read is not recorded"
  read, whole = own["tokens"], own["split_tokens"]
  return None if read >= whole else f"{language}: {read:,} of the {whole:,} tokens that are held out"


def _interval(own: Mapping[str, float], name: str) -> dict[str, float]:
  """Returns the 95 % interval of a figure that has a standard error: 1.96 of them either side."""
  error = own.get(f"{name}_se")
  return {} if error is None else {"low": own[name] - 1.96 * error, "high": own[name] + 1.96 * error}
