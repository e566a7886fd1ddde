"""The report of a run: what was trained, what it is worth, and what it says.

Gathers files, computes nothing anew. Writes report.json for machines, report.md and loss.png for people.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from glmjax.io import bucket_path
from glmjax.io import folders
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import user_json
from glmjax.io import user_text
from glmjax import display
from glmjax import errors
from glmjax import tokens as tokens_lib
from glmjax.evaluate import loss_plot
from glmjax.evaluate import markdown
from glmjax.evaluate import timings

_log = logging.getLogger("glmjax")
_SPEEDS = ("tokens_per_second", "model_flops_per_second")
MODEL = "model"  # beside the languages in an evaluation's file: whose figures they are
MEAN_STEPS = 20  # loss_first and loss_last are means over this many steps
EVALUATIONS = {"float": "heldout.json", "int8": "heldout_int8.json", "int4": "heldout_int4.json"}
EXPORTS = {"float": "float", "int8": "int8", "int4": "int4"}


def write(
  workdir: paths.Named,
  *,
  metrics: str = "train/metrics.jsonl",
  evaluations: Mapping[str, str] | None = None,
  exports: Mapping[str, str] | None = None,
  samples: str | None = "samples.jsonl",
  stages: str = "stages.jsonl",
) -> dict[str, Any]:
  """Writes the report and returns what report.json holds.

  Args:
    workdir: folder of all that belongs to the run: the other paths are relative to it, the report goes there.
    metrics: what glmjax train wrote; probe.json beside it is read where the run has one.
    evaluations: for each model what glmjax evaluate wrote of it; None: EVALUATIONS.
    exports: for each model its exported folder, {} for none; None: EXPORTS.
    samples: what glmjax generate wrote, one {"model", "prompt", "output"} a line; None for none.
    stages: seconds of the commands, one {"stage", "seconds"} a line; may be missing.
  """
  folder = paths.named(workdir, "the report's folder")
  lines = read_metrics(_inside(folder, metrics, "metrics"))
  heldout = {
    name: read_evaluation(_inside(folder, file, f"evaluations: {name}"))
    for name, file in (EVALUATIONS if evaluations is None else evaluations).items()
  }
  if "float" not in heldout:
    raise errors.InputError('report: no evaluation of the float model is named; add "float" to evaluations')
  probe = read_probe(_inside(folder, metrics, "metrics").parent / "probe.json")
  report = {
    "train": train_figures(lines),
    **({"probe": probe} if probe else {}),
    "heldout": heldout["float"],
    "quantized": quantized_figures(
      heldout,
      {
        name: _inside(folder, path, f"exports: {name}")
        for name, path in (EXPORTS if exports is None else exports).items()
      },
    ),
    "samples": [] if samples is None else read_samples(_inside(folder, samples, "samples")),
    "seconds": timings.read(_inside(folder, stages, "stages")),
  }
  picture, title = loss_picture(lines), folders.called(folder, "the report's folder")
  for name in ("loss.png", "report.md", "report.json"):
    folders.claim_file(folder / name, "the report")
  try:
    for name, contents in (("loss.png", picture.png), ("report.md", markdown.render(report, title).encode())):
      with publish.file(folder / name) as file:
        file.write(contents)
    publish.write_json(folder / "report.json", report)
  except OSError as error:
    raise errors.InputError(f"cannot write the report to {folder}: {errors.reason(error)}") from error
  return report


def _inside(folder: paths.Path, path: str, what: str) -> paths.Path:
  """Returns a path that may be relative to the folder."""
  found = paths.named(path, what)
  is_whole = isinstance(found, bucket_path.BucketPath) or found.is_absolute()
  return found if is_whole else folder / found


def read_metrics(path: paths.Path, tell: bool = True) -> list[dict[str, Any]]:
  """Reads the run's steps that have a loss, in order; lines that are no steps are told of, and left out."""
  _check_there(path, "glmjax train")
  user_text.check_regular(path)
  records, damaged = [], []
  with path.open("rb") as file:  # by bytes: a line that is no text must not hide the others
    for number, line in enumerate(file, 1):
      record = _step(line, f"{path}, line {number}")
      if record is None and line.endswith(b"\n"):  # else the run is writing it, or was killed then
        damaged.append(number)
      elif record is not None and record["loss"] is not None:
        records.append(record)
  if damaged and tell:
    shown = ", ".join(map(str, damaged[:5])) + (f" and {len(damaged) - 5:,} more" if len(damaged) > 5 else "")
    _log.warning("%s: no training step in line %s: damaged, left out of the report", path, shown)
  if not records:
    raise errors.InputError(f"{path}: no training step in it; train first")
  return records


def _step(line: bytes, where: str) -> dict[str, Any] | None:
  """Returns a step's record, if it has the figures that the report uses, all of them numbers; losses may be null."""
  try:
    record = user_json.parse(line, where)
  except errors.InputError:
    return None
  used = {name: record.get(name) for name in ("step", "samples_seen", "tokens_seen", *_SPEEDS)}
  losses = {name: value for name, value in record.items() if name == "loss" or name.startswith(("loss_", "eval_loss_"))}
  good = (
    "loss" in record
    and all(map(_is_number, used.values()))
    and all(value is None or _is_number(value) for value in losses.values())
  )
  return record if good else None


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_probe(path: paths.Path) -> dict[str, float]:
  """Reads what a run has measured of its forgetting: losses in nats per token before and after, and their difference
  with its 95 % interval; {} where it measured none, or not both yet.
  """
  if not path.exists() and not path.is_symlink():
    return {}
  advice = "restore a copy, or remove it"
  found = user_json.read(path, expected=advice)
  if "difference" not in found:
    return {}
  try:
    change = {name: found["difference"][name] for name in ("loss", "low", "high")}
    told = {"samples": found["samples"], **{name: found[name]["loss"] for name in ("before", "after")}}
    told |= {"difference": change["loss"], "low": change["low"], "high": change["high"]}
    if not all(map(_is_number, told.values())):
      raise ValueError
  except (KeyError, TypeError, ValueError) as error:
    raise errors.InputError(f"{path} has no figures of a probe; {advice}") from error
  return told


def resumed_at(lines: list[dict[str, Any]]) -> list[int]:
  """Returns steps from which the run went on after a stop."""
  return [line["step"] - 1 for line in lines if line.get("resumed")]


def train_figures(lines: list[dict[str, Any]]) -> dict[str, Any]:
  """Computes figures of the training run; losses are means over MEAN_STEPS steps, speeds the steps' median."""
  loss = [line["loss"] for line in lines]
  resumed = resumed_at(lines)
  return {
    "steps": lines[-1]["step"],
    "samples": lines[-1]["samples_seen"],
    "tokens": lines[-1]["tokens_seen"],
    "loss_first": float(np.mean(loss[:MEAN_STEPS])),
    "loss_last": float(np.mean(loss[-MEAN_STEPS:])),
    "loss_mean_steps": min(MEAN_STEPS, len(loss)),
    "resumed_at": resumed[-1] if resumed else None,
    **{name: float(np.median([line[name] for line in lines])) for name in _SPEEDS},
  }


def loss_picture(lines: list[dict[str, Any]]) -> display.Picture:
  """Draws the loss of each objective over a run's steps."""
  return loss_plot.draw(loss_curves(lines, "loss_"), loss_curves(lines, "eval_loss_"), resumed_at(lines))


def loss_curves(lines: list[dict[str, Any]], prefix: str) -> dict[str, loss_plot.Curve]:
  """Returns steps and losses of each objective that has any."""
  curves = {}
  for name in tokens_lib.OBJECTIVES:
    having = [line for line in lines if line.get(prefix + name) is not None]
    if having:
      curves[name] = (
        np.array([line["step"] for line in having]),
        np.array([line[prefix + name] for line in having], np.float64),
      )
  return curves


def quantized_figures(heldout: Mapping[str, dict], exports: Mapping[str, paths.Path]) -> dict[str, dict]:
  """Returns size on disk and bits per byte of every model; the float one is there to compare with."""
  figures = {}
  for model, languages in heldout.items():
    figures[model] = {"bytes": _size(exports[model])} if model in exports else {}
    if languages.keys() != heldout["float"].keys():
      raise errors.InputError(
        f"report: model {model} was evaluated on {', '.join(languages) or 'nothing'}, and "
        f"float on {', '.join(heldout['float']) or 'nothing'}; evaluate both again, on one cache"
      )
    for language, values in languages.items():
      figures[model][f"{language}_bits_per_byte"] = values["bits_per_byte"]
      reference = heldout["float"][language]
      if any(values[name] != reference[name] for name in ("tokens", "bytes")):
        raise errors.InputError(
          f"report: model {model} was evaluated on another text than float: "
          f"{values['tokens']} tokens of {language}, not {reference['tokens']}; "
          "evaluate both again"
        )
  return figures


def read_samples(path: paths.Path) -> list[dict[str, str]]:
  """Reads what the models said, one {"model", "prompt", "output"} a line; the last where a prompt was put twice."""
  samples = {}
  for number, line in _lines(path, "glmjax generate"):
    where = f"{path}, line {number}"
    advice = "not a sample with model, prompt and output; remove the line, or generate again"
    record = user_json.parse(line, where, expected=advice)
    if any(record.get(name) is None for name in ("model", "prompt", "output")):
      raise errors.InputError(f"{where}: {advice}")
    sample = {name: str(record[name]) for name in ("model", "prompt", "output")}
    samples[sample["model"], sample["prompt"]] = sample
  return list(samples.values())


def read_evaluation(path: paths.Path) -> dict[str, dict[str, float]]:
  """Reads what glmjax evaluate wrote of a model: its figures by language."""
  again = f"run glmjax evaluate --out={path} again"
  _check_there(path, f"glmjax evaluate --out={path}")
  languages = user_json.read(path, expected=again)
  languages.pop(MODEL, None)
  for language, figures in languages.items():
    if not (
      isinstance(figures, dict)
      and all(map(_is_number, figures.values()))
      and all(name in figures for name in ("tokens", "bytes", "bits_per_byte"))
    ):
      raise errors.InputError(f"{path}: {language[:40]!r} has no figures of an evaluation; {again}")
  return languages


def evaluated_weights(path: paths.Path) -> str | None:
  """Returns the fingerprint of the weights that an evaluation is of, of an adapter where there was one; None where an
  older glmjax wrote it.
  """
  model = user_json.read(path).get(MODEL)
  return (model.get("adapter") or model.get("weights")) if isinstance(model, dict) else None


def _size(folder: paths.Path) -> int:
  """Counts the bytes of an export's parameters on disk."""
  params = folder / "params"
  if isinstance(params, bucket_path.BucketPath):
    sizes = list(params.sizes().values())
  else:
    sizes = [path.stat().st_size for path in params.rglob("*") if path.is_file()]
  if not sizes:
    raise errors.InputError(
      f"{folder}: no exported model here; run glmjax export --out={folder}, or leave it out of report.write's exports"
    )
  return sum(sizes)


def _lines(path: paths.Path, command: str) -> Iterator[tuple[int, str]]:
  """Yields the lines of a file that hold something, and their numbers."""
  _check_there(path, command)
  return ((number, line) for number, line in user_text.lines(path) if line.strip())


def _check_there(path: paths.Path, command: str) -> None:
  if not path.exists() and not path.is_symlink():
    raise errors.InputError(f"{path}: missing; run {command} first, or leave it out of report.write's arguments")
