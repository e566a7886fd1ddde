"""A run's steps as its metrics.jsonl has them: loss, tokens and learning rate of each, the last time it was done."""

import array
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.cards import records
from glmjax.io import paths

_HIGHEST = 1e9  # loss or learning rate: what is above is none
_MOST = 1 << 53  # steps and tokens that a float64 still counts one by one


@dataclasses.dataclass(frozen=True)
class Steps:
  """N steps in order, each once."""

  tokens_N: np.ndarray  # float64: seen when the step was done
  loss_N: np.ndarray  # float64, nats a token; NaN where a step has none
  rate_N: np.ndarray  # float64, the learning rate


def read(source: paths.Named | Iterable[Mapping[str, Any]]) -> Steps:
  """Reads a metrics.jsonl, or takes its records.

  Where a run went back to an earlier step, what it had done behind that step is dropped. Lines that are no steps are
  left out. 32 bytes of each step are kept in memory, and one line at a time.

  Raises:
    errors.InputError: when the file cannot be read, or has no step.
  """
  is_file = isinstance(source, paths.Named)
  path = paths.named(source, "the metrics") if is_file else None
  number, columns = array.array("q"), [array.array("d") for _ in range(3)]
  for record in records.read(path) if is_file else source:
    figures = None if record is None else _figures(record)
    if figures is None:
      continue
    while number and number[-1] >= figures[0]:
      number.pop()
      for column in columns:
        column.pop()
    number.append(figures[0])
    for column, value in zip(columns, figures[1:], strict=True):
      column.append(value)
  if not number:
    raise errors.InputError(
      f"{path or 'the records'}: no step with a loss, its tokens and its learning rate; name the metrics.jsonl of a run"
    )
  tokens_N, loss_N, rate_N = (np.array(column) for column in columns)
  return Steps(np.maximum.accumulate(tokens_N), loss_N, rate_N)


def _figures(record: Mapping[str, Any]) -> tuple[int, float, float, float] | None:
  """Returns step, tokens, loss and rate of a record; None where one of them is no such number."""
  step, tokens, loss, rate = (record.get(name) for name in ("step", "tokens_seen", "loss", "learning_rate"))
  if not (type(step) is int and type(tokens) in (int, float) and type(rate) in (int, float)):
    return None
  if not (0 <= step < _MOST and 0 < tokens < _MOST and 0 <= rate < _HIGHEST):
    return None
  is_loss = type(loss) in (int, float) and 0 < loss < _HIGHEST
  return step, float(tokens), float(loss) if is_loss else math.nan, float(rate)
