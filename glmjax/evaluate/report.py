"""The report of a run: what was trained, what it is worth, and what it says.

Gathers files, computes nothing anew. Writes report.json for machines, report.md and loss.png for people.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from glmjax.io import publish
from glmjax import errors
from glmjax import tokens as tokens_lib
from glmjax.evaluate import loss_plot
from glmjax.evaluate import markdown
from glmjax.evaluate import stages as stages_lib

MEAN_STEPS = 20  # loss_first and loss_last are means over this many steps
EVALUATIONS = {"float": "heldout.json", "int8": "heldout_int8.json", "int4": "heldout_int4.json"}
EXPORTS = {"float": "float", "int8": "int8", "int4": "int4"}


def write(workdir: str | os.PathLike, *, metrics: str = "train/metrics.jsonl",
          evaluations: Mapping[str, str] | None = None, exports: Mapping[str, str] | None = None,
          samples: str | None = "samples.jsonl", stages: str = "stages.jsonl") -> dict[str, Any]:
  """Writes the report and returns what report.json holds.

  Args:
    workdir: folder of all that belongs to the run: the other paths are relative to it, the report goes there.
    metrics: what glmjax train wrote.
    evaluations: for each model what glmjax evaluate wrote of it; None: EVALUATIONS.
    exports: for each model its exported folder, {} for none; None: EXPORTS.
    samples: what glmjax generate wrote, one {"model", "prompt", "output"} a line; None for none.
    stages: seconds of the commands, one {"stage", "seconds"} a line; may be missing.
  """
  folder = pathlib.Path(workdir)
  lines = read_metrics(folder / metrics)
  heldout = {name: _read_json(folder / file, "glmjax evaluate --out=" + str(folder / file))
             for name, file in (EVALUATIONS if evaluations is None else evaluations).items()}
  if "float" not in heldout:
    raise errors.InputError("report: no evaluation of the float model is named; add \"float\" to evaluations")
  report = {
      "train": train_figures(lines),
      "heldout": heldout["float"],
      "quantized": quantized_figures(heldout, {name: folder / path for name, path in
                                               (EXPORTS if exports is None else exports).items()}),
      "samples": [] if samples is None else read_samples(folder / samples),
      "seconds": stages_lib.read(folder / stages),
  }
  picture = loss_plot.draw(loss_curves(lines, "loss_"), loss_curves(lines, "eval_loss_"), resumed_at(lines))
  for name, contents in (("loss.png", picture), ("report.md", markdown.render(report, folder.name).encode())):
    with publish.file(folder / name) as file:
      file.write(contents)
  publish.write_json(folder / "report.json", report)
  return report


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """The run's steps that have a loss, in order."""
  text = _read(path, "glmjax train")
  records = []
  complete = text[:text.rfind("\n") + 1]  # the last line may be half-written
  for number, line in enumerate(complete.splitlines(), 1):
    try:
      record = json.loads(line)
      records += [record] if record["loss"] is not None else []
    except (ValueError, KeyError, TypeError) as error:
      raise errors.InputError(f"{path}, line {number}: not a training step; remove the line") from error
  if not records:
    raise errors.InputError(f"{path}: no training step in it; train first")
  return records


def resumed_at(lines: list[dict[str, Any]]) -> list[int]:
  """Steps from which the run went on after a stop."""
  return [line["step"] - 1 for line in lines if line.get("resumed")]


def train_figures(lines: list[dict[str, Any]]) -> dict[str, Any]:
  """Figures of the training run; losses are means over MEAN_STEPS steps, speeds the steps' median."""
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
      "tokens_per_second": float(np.median([line["tokens_per_second"] for line in lines])),
      "model_flops_per_second": float(np.median([line["model_flops_per_second"] for line in lines])),
  }


def loss_curves(lines: list[dict[str, Any]], prefix: str) -> dict[str, loss_plot.Curve]:
  """Steps and losses of each objective that has any."""
  curves = {}
  for name in tokens_lib.OBJECTIVES:
    having = [line for line in lines if line.get(prefix + name) is not None]
    if having:
      curves[name] = (np.array([line["step"] for line in having]),
                      np.array([line[prefix + name] for line in having], np.float64))
  return curves


def quantized_figures(heldout: Mapping[str, dict], exports: Mapping[str, pathlib.Path]) -> dict[str, dict]:
  """Size on disk and bits per byte of every model; the float one is there to compare with."""
  figures = {}
  for model, languages in heldout.items():
    figures[model] = {"bytes": _size(exports[model])} if model in exports else {}
    for language, values in languages.items():
      figures[model][f"{language}_bits_per_byte"] = values["bits_per_byte"]
      reference = heldout["float"].get(language, {})
      if any(values[name] != reference.get(name) for name in ("tokens", "bytes")):
        raise errors.InputError(f"report: model {model} was evaluated on another text than float: "
                                f"{values['tokens']} tokens of {language}, not {reference.get('tokens')}; "
                                "evaluate both again")
  return figures


def read_samples(path: pathlib.Path) -> list[dict[str, str]]:
  """What the models said, one {"model", "prompt", "output"} a line; the last where a prompt was put twice."""
  samples = {}
  for number, line in enumerate(_read(path, "glmjax generate").split("\n"), 1):
    if not line.strip():  # split at "\n" alone: JSON leaves U+2028 and the like as they are
      continue
    try:
      record = json.loads(line)
      sample = {name: str(record[name]) for name in ("model", "prompt", "output")}
      samples[sample["model"], sample["prompt"]] = sample
    except (ValueError, KeyError, TypeError) as error:
      raise errors.InputError(f"{path}, line {number}: not a sample with model, prompt and output; remove "
                              "the line, or generate again") from error
  return list(samples.values())


def _size(folder: pathlib.Path) -> int:
  """Bytes of an export's parameters on disk."""
  files = [path for path in (folder / "params").rglob("*") if path.is_file()]
  if not files:
    raise errors.InputError(f"{folder}: no exported model here; run glmjax export --out={folder}, or leave "
                            "it out of report.write's exports")
  return sum(path.stat().st_size for path in files)


def _read(path: pathlib.Path, command: str) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise errors.InputError(f"{path}: not UTF-8 at byte {error.start}; run {command} again") from None
  except FileNotFoundError:
    raise errors.InputError(f"{path}: missing; run {command} first, or leave it out of report.write's "
                            "arguments") from None


def _read_json(path: pathlib.Path, command: str) -> Any:
  try:
    return json.loads(_read(path, command))
  except ValueError as error:
    raise errors.InputError(f"{path}: not JSON ({error}); run {command} again") from error
