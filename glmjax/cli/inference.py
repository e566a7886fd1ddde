"""The generate and score commands: an Engine from a folder, put to the prompts or texts given."""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from glmjax import errors


def generate(
  checkpoint: str | os.PathLike, prompts: Sequence[str], max_tokens: int = 128, temperature: float = 0.0,
  top_k: int = 0, top_p: float = 1.0, seed: int = 0, samples: str | os.PathLike | None = None,
  label: str | None = None,
) -> list[dict[str, Any]]:
  """Each prompt with its blanks filled, or continued where it has none.

  With `samples`, adds a line {"model": label, "prompt", "output"} for each to that file; the label is the
  checkpoint folder's name if not given.
  """
  if samples is not None and not pathlib.Path(samples).absolute().parent.is_dir():
    raise errors.InputError(f"cannot write {samples}: no such folder")
  from glmjax.infer import engine, sampling  # here, as this module is looked at before a command is in order
  how = sampling.Sampling(temperature, top_k, top_p)
  found = engine.Engine.load(checkpoint).generate(prompts, max_tokens, how, seed)
  results = [{"prompt": prompt, "output": generation.text, "pieces": generation.pieces,
              "finish_reason": generation.finish_reason} for prompt, generation in zip(prompts, found)]
  if samples is not None:
    model = label or pathlib.Path(checkpoint).name
    lines = [json.dumps({"model": model, "prompt": r["prompt"], "output": r["output"]}, ensure_ascii=False)
             for r in results]
    with open(samples, "ab", buffering=0) as file:  # one write, so that what other processes add stays whole
      file.write("".join(f"{line}\n" for line in lines).encode())
  return results


def score(checkpoint: str | os.PathLike, texts: Sequence[str]) -> list[dict[str, Any]]:
  """How likely each text is, read from left to right: natural log-likelihood, tokens, bits per byte."""
  if not all(texts):
    raise errors.InputError("a text to score is empty: give at least one character")
  from glmjax.infer import engine
  found = engine.Engine.load(checkpoint).score(texts)
  return [{"text": text, "log_likelihood": s.total, "tokens": s.count,
           "bits_per_byte": -s.total / math.log(2) / len(text.encode())} for text, s in zip(texts, found)]


def show_outputs(results: list[dict[str, Any]]) -> None:
  """The outputs alone, an empty line between them."""
  print("\n\n".join(result["output"] for result in results))

