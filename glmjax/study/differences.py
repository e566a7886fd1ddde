"""What each axis makes of the last loss: the mean difference between runs that are alike but for it."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import special

from glmjax.study import grid as grid_lib
from glmjax.study import results as results_lib

_LEVEL = 0.95


def between(grid: grid_lib.Grid, results: Sequence[results_lib.Result]) -> list[dict[str, Any]]:
  """Returns, for each value of each axis but `over` and `repeats`, how its last losses differ from those of the axis's
  first value, nats a token: over all pairs of runs that are alike otherwise and have both learned, and over those of
  each value of `over`.
  """
  found = []
  for axis in grid.others:
    first, *others = grid.axes[axis]
    for value in others:
      pairs = _pairs(grid, results, axis, value, first)
      if not pairs:
        continue
      at = [
        {"value": each, **_estimate([difference for label, difference in pairs if label == each])}
        for each in grid.axes[grid.over]
        if any(label == each for label, _ in pairs)
      ]
      every = _estimate([difference for _, difference in pairs])
      found.append({"axis": axis, "value": value, "against": first, **every, "at": at})
  return found


def _pairs(
  grid: grid_lib.Grid, results: Sequence[results_lib.Result], axis: str, value: Any, first: Any
) -> list[tuple[Any, float]]:
  """Returns what each pair has of `over`, and the difference of its last losses."""
  rest = [other for other in grid.axes if other != axis]
  learned = [run for run in results if not run.has_failed]
  against = {grid_lib.key(run.point, rest): run.last_loss for run in learned if run.point.labels[axis] == first}
  return [
    (run.point.labels[grid.over], run.last_loss - against[key])
    for run in learned
    if run.point.labels[axis] == value and (key := grid_lib.key(run.point, rest)) in against
  ]


def _estimate(values: Sequence[float]) -> dict[str, Any]:
  """Returns the mean, and half of its 95 % interval by Student's t; None of one value."""
  half = None
  if len(values) > 1:
    quantile = float(special.stdtrit(len(values) - 1, (1 + _LEVEL) / 2))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
  return {"pairs": len(values), "mean": statistics.fmean(values), "half": half}
