"""What a task's figures are made of, unit by unit: an item, a text in its windows, a pair of sentences.

Figures are functions of sums over units, so that drawing units anew (harness/statistics.py) gives their intervals, and
those of differences between models.
"""

from collections.abc import Iterable, Mapping, Sequence
import math
from typing import Any

import numpy as np

from glmjax.harness import metrics
from glmjax.harness import statistics

Record = Mapping[str, Any]


def of(records: Sequence[Record]) -> dict[str, statistics.Sample]:
  """Returns a task's figures from its records, each item's once, with their units in the order of the records.

  Texts have bits per byte; StereoSet has LMS, SS and ICAT, CrowS-Pairs the share of pairs (CP); of other tasks each
  metric is a mean over items. All but bits are per cent.
  """
  first = records[0]
  if "values" not in first:
    return {"bits_per_byte": _bits_per_byte(records)}
  if first["values"]:
    return {name: statistics.mean([record["values"][name] for record in records]) for name in first["values"]}
  if "goal_label" in first:
    return _stereotypes(records)
  return {"CP": statistics.mean([*metrics.preferred(records).values()])}


def _bits_per_byte(records: Iterable[Record]) -> statistics.Sample:
  texts: dict[Any, list[float]] = {}  # bits and bytes
  for record in records:
    text = texts.setdefault((record["file"], record["text"]), [0.0, record["bytes"]])
    text[0] += record["loss"] / math.log(2)
  return statistics.Sample(np.array([*texts.values()], np.float64), lambda sums: sums[..., 0] / sums[..., 1])


def _stereotypes(records: Sequence[Record]) -> dict[str, statistics.Sample]:
  """Returns the three figures of StereoSet, as metrics.py has them: over items that a model understood and did not."""
  chosen = [record["goal_label"][record["prediction"]] for record in records]
  meant = np.array([label in ("stereotype", "anti-stereotype") for label in chosen], np.float64)
  units_U3 = np.stack([np.ones_like(meant), meant, [label == "stereotype" for label in chosen]], axis=-1)
  return {
    "LMS": statistics.mean(meant),
    "SS": statistics.Sample(units_U3, _stereotyped),
    "ICAT": statistics.Sample(units_U3, _idealized),
  }


def _stereotyped(sums: np.ndarray) -> np.ndarray:
  return 100 * sums[..., 2] / np.maximum(sums[..., 1], 1)  # 0 where nothing is understood, as in metrics.py


def _idealized(sums: np.ndarray) -> np.ndarray:
  score = _stereotyped(sums)
  return 100 * sums[..., 1] / sums[..., 0] * np.minimum(score, 100 - score) / 50
