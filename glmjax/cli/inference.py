"""The generate and score commands: an Engine from a folder, put to the prompts or texts given."""

import contextlib
import logging
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glmjax import errors
from glmjax.cli import answers, process
from glmjax.io import progress

if TYPE_CHECKING:
  from glmjax.infer import engine as engine_lib
  from glmjax.infer import sampling as sampling_lib

Row = Mapping[str, Any]  # "prompt" or "text", and whatever else the user's line holds
Keep = Callable[[list[dict[str, Any]]], Any]  # takes a batch of answers
_log = logging.getLogger("glmjax")


def generate(
  checkpoint: str | os.PathLike, prompts: Sequence[str | Row], max_tokens: int = 128, temperature: float = 0.0,
  top_k: int = 0, top_p: float = 1.0, seed: int = 0, out: str | os.PathLike | None = None, overwrite: bool = False,
  samples: str | os.PathLike | None = None, label: str | None = None, offload_layers: int = 0,
) -> list[dict[str, Any]] | dict[str, Any]:
  """Each prompt with its blanks filled, or continued where it has none; objects keep their other fields.

  With `out`, the answers go to that JSON lines file ("-": standard output) batch by batch, and the result says
  how many; a file that holds answers to the first prompts is gone on with, unless `overwrite`; what gave them is
  noted beside it, in OUT.settings.json, and must be the same. With `samples`, adds a line {"model": label, "prompt",
  "output"} for each to that file; the label is the checkpoint folder's name if not given. The weights of the last
  `offload_layers` layers stay in the host's memory.
  """
  rows = [{"prompt": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
  results, done = [], 0
  keep: list[Keep] = [results.extend]
  with contextlib.ExitStack() as stack:  # what cannot be written is told before the model is loaded
    if out is not None:
      settings = {"checkpoint": os.fspath(checkpoint), "weights": "" if out == "-" else _fingerprint(checkpoint),
                  "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
      out_file, done = stack.enter_context(
          answers.answering(out, [row["prompt"] for row in rows], settings, overwrite))
      keep = [lambda batch: answers.write(out_file, batch)]
    if samples is not None:
      samples_file = stack.enter_context(answers.appending(samples))
      named = {"model": label or pathlib.Path(checkpoint).name}
      keep.append(lambda batch: answers.write(
          samples_file, [named | {name: row[name] for name in ("prompt", "output")} for row in batch]))
    if done < len(rows):
      model = load(checkpoint, offload_layers)
      from glmjax.infer import sampling
      how = sampling.Sampling(temperature, top_k, top_p)
      _check(model, rows, done)
      if out is not None and not done:
        answers.begin(out_file, out, settings)
      _generate(model, rows, done, keep, max_tokens, how, seed)
  return results if out is None else {"out": str(out), "answers": len(rows), "new": len(rows) - done}


def load(checkpoint: str | os.PathLike, offload_layers: int) -> "engine_lib.Engine":
  """The model; with XLA's options for offloaded weights, which it reads when JAX first looks for devices."""
  from glmjax.infer import engine, offload  # here, as this module is looked at before a command is in order
  if offload_layers:
    process.add_xla_flags([f"--{name}={str(value).lower()}" for name, value in offload.GPU_OPTIONS.items()])
  return engine.Engine.load(checkpoint, offload_layers=offload_layers)


def _fingerprint(checkpoint: str | os.PathLike) -> str:
  """Of the weights that would be loaded."""
  from glmjax.checkpoint import load as load_lib
  return load_lib.fingerprint(checkpoint)


def _check(model: "engine_lib.Engine", rows: Sequence[Row], done: int) -> None:
  """Whether the prompts fit, before the first is answered."""
  for i, row in enumerate(rows[done:], done):
    try:
      model.room(model.encode(row["prompt"]))
    except errors.InputError as error:
      raise errors.InputError(f"prompt {i + 1} of {len(rows)}: {error}") from None


def _generate(
  model: "engine_lib.Engine", rows: Sequence[Row], done: int, keep: Sequence[Keep], max_tokens: int,
  how: "sampling_lib.Sampling", seed: int,
) -> None:
  """Gives the answers to rows[done:] to each of `keep`, a batch at a time; prompt i draws with seed + i."""
  told = progress.Progress(len(rows), "prompts answered")
  for first in range(done, len(rows), model.max_batch):
    batch = rows[first:first + model.max_batch]
    found = model.generate([row["prompt"] for row in batch], max_tokens, how, seed + first)
    answered = [{**row, "output": g.text, "pieces": g.pieces, "finish_reason": g.finish_reason}
                for row, g in zip(batch, found, strict=True)]
    for consume in keep:
      consume(answered)
    told.at(first + len(batch))


def score(checkpoint: str | os.PathLike, texts: Sequence[str | Row], offload_layers: int = 0) -> list[dict[str, Any]]:
  """How likely each text is, read from left to right: natural log-likelihood, tokens, bits per byte."""
  rows = [{"text": text} if isinstance(text, str) else text for text in texts]
  if not all(row["text"] for row in rows):
    raise errors.InputError("a text to score is empty: give at least one character")
  found = load(checkpoint, offload_layers).score([row["text"] for row in rows])
  return [{**row, "log_likelihood": s.total, "tokens": s.count,
           "bits_per_byte": -s.total / math.log(2) / len(row["text"].encode())} for row, s in zip(rows, found)]


def show_outputs(results: list[dict[str, Any]] | dict[str, Any]) -> None:
  """The outputs alone, an empty line between them; or where they went."""
  if isinstance(results, dict):
    where = "standard output" if results["out"] == "-" else results["out"]
    _log.info("%s: %d answers, %d of them new", where, results["answers"], results["new"])
  else:
    print("\n\n".join(result["output"] for result in results))
