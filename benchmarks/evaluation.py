"""Questions with choices: how many a second, against the way of GLM-130B's own evaluation, of one model in one process.

  python benchmarks/evaluation.py

Random questions of lengths as MMLU's have without and with examples before them, and four choices: letters (one token)
or texts (eight). The original's way is one forward for each question, its choices in one row, filled up to whole 32
places, and the log-probabilities of all tokens in all places; of INT4 it makes floats first, each time. Ours is what
`glmjax evaluate --tasks` does; of INT4 with `--activation_bits=8`. Both are timed once all their programs are compiled,
and take turns. Seconds are the process's on all processors, which other work on the machine changes least. Writes
benchmarks/results/evaluation.json.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import pathlib
import shlex
import statistics
import sys
import time
from typing import Any

import decode as decode_benchmark
import jax
import loader
import numpy as np

from glmjax import tokens as tokens_lib
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import rows as rows_lib
from glmjax.infer import runner as runner_lib
from glmjax.infer import score
from glmjax.infer import scoring
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import weights
from glmjax.quantize import qarray

CHOICES, TEXT = 4, 8  # of a question; tokens of a choice that is a text
LENGTHS = {"short": (40, 160), "with examples": (300, 480)}  # tokens of a context: least and most
_STEP = 32  # places that the original fills rows up to


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--questions", type=int, default=128)
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "results" / "evaluation.json"))
  options = parser.parse_args()
  config = dataclasses.replace(decode_benchmark.CONFIG, mlp_dim=1366)  # INT4 packs pairs of inputs
  result: dict[str, Any] = {
    "what": "questions of four choices a second of processor time",
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "machine": loader.machine(),
    "command": shlex.join(["python", "benchmarks/evaluation.py", *sys.argv[1:]]),
    "jax": jax.__version__,
  }
  params = glm.init_params(config, jax.random.key(0))
  models = {
    "float32": (params, runner_lib.Runner(config, params)),
    "int4": (
      weights.quantize(params, 4),
      runner_lib.Runner(dataclasses.replace(config, activation_bits=8), weights.quantize(params, 4)),
    ),
  }
  for name, lengths in LENGTHS.items():
    for kind, size in (("letters", 1), ("texts", TEXT)):
      asked = questions(config, options.questions, lengths, size)
      for precision, (plain, runner) in models.items():
        rates = compare(config, plain, runner, asked, options.turns)
        result[f"{precision}, {name}, {kind}"] = rates
        print(f"{precision}, {name}, {kind}: {rates}", flush=True)
  pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


def compare(
  config: config_lib.GLMConfig, params: Any, runner: runner_lib.Runner, asked: list[list[score.Row]], turns: int
) -> dict[str, float]:
  """Returns the questions a second of both ways, medians of `turns`, and their ratio."""
  ways = {"ours": lambda: together(runner, asked), "the original's": lambda: one_by_one(config, params, asked)}
  seconds: dict[str, list[float]] = {way: [] for way in ways}
  for turn in range(turns + 1):
    for way, ask in ways.items():
      began = time.process_time()
      ask()
      if turn:  # the first compiles
        seconds[way].append(time.process_time() - began)
  rates = {way: round(len(asked) / statistics.median(each), 2) for way, each in seconds.items()}
  return rates | {"ratio": round(rates["ours"] / rates["the original's"], 2)}


def questions(config: config_lib.GLMConfig, count: int, lengths: tuple[int, int], size: int) -> list[list[score.Row]]:
  """Returns the rows of each question, one for each choice."""
  draw, specials = np.random.default_rng(0), tokens_lib.icetk(0, config.vocab_size - 16)
  asked = []
  for length in draw.integers(*lengths, count):
    context = [*draw.integers(10, 1_000, length).tolist(), specials.mask]
    choices = draw.integers(10, 1_000, (CHOICES, size)).tolist()
    asked.append([score.target_row(context, choice, specials, config.position_kind) for choice in choices])
  return asked


def together(runner: runner_lib.Runner, asked: list[list[score.Row]]) -> None:
  """Scores all questions as the harness does."""
  scoring.score_rows(runner, [row for rows in asked for row in rows], pad=0)


def one_by_one(config: config_lib.GLMConfig, params: Any, asked: list[list[score.Row]]) -> None:
  """Computes what the original does, question by question: the log-probabilities of all that a row holds.

  A choice sees the others before it here, as the model's intervals have it: the work is the same.
  """
  for rows in asked:
    first = rows[0]
    context = len(first.prompt.tokens) - len(first.targets)
    more = [] if len(first.targets) == 1 else [token for row in rows[1:] for token in row.prompt.tokens[context:]]
    whole = prompt_lib.extend(first.prompt, more)
    length = -(-len(whole.tokens) // _STEP) * _STEP
    batch = rows_lib.pad([whole], 0, 1, length)
    jax.block_until_ready(log_probs(config, params, batch))


@functools.partial(jax.jit, static_argnames=("config",))
def log_probs(config: config_lib.GLMConfig, params: Any, batch: rows_lib.Batch) -> jax.Array:
  """Returns log-probabilities of all tokens in all places, as the original takes them."""

  def floats(x: Any) -> jax.Array:
    return qarray.dequantize(x) if isinstance(x, qarray.QuantizedArray) else x

  params = jax.tree.map(floats, params, is_leaf=lambda x: isinstance(x, qarray.QuantizedArray))
  positions = config.position_kind.of_model(batch.positions)
  logits_BLV = glm.GLM(config).apply({"params": params}, batch.tokens, positions, batch.start, batch.end)
  return jax.nn.log_softmax(logits_BLV)


if __name__ == "__main__":
  main()
