"""The features of a training batch: the only place that lists them.

Data makes FEATURES by rows of `length` places, train/feed adds ROWS, and the loss takes TARGETS, in this order; the
model takes the others, by their names.
"""

import dataclasses

import numpy as np

from glmjax import positions as positions_lib


@dataclasses.dataclass(frozen=True)
class Feature:
  """One array of a batch: its shape follows the kind of positions, and so does that of its part in a row."""

  name: str
  dtype: np.dtype
  each: str = "token"  # there is a number for each token; or for each of its "position"s; or for each "row"
  own_place: int | None = None  # what pads place i: i + own_place; None: 0

  def row_shape(self, length: int, kind: positions_lib.Positions) -> tuple[int, ...]:
    """Returns the shape of what one row holds."""
    return {"token": (length,), "position": kind.shape(length), "row": ()}[self.each]

  def padding(self, rows: int, length: int, kind: positions_lib.Positions) -> np.ndarray:
    """Returns rows, [rows, *row_shape], in which each place sees itself alone (no softmax is empty) and has no loss."""
    array = np.zeros((rows, *self.row_shape(length, kind)), self.dtype)
    if self.own_place is not None:
      array[:] = np.arange(self.own_place, length + self.own_place)
    return array


_INT, _FLOAT = np.dtype(np.int32), np.dtype(np.float32)

FEATURES = (
  Feature("tokens", _INT),
  Feature("targets", _INT),
  Feature("loss_weights", _FLOAT),
  Feature("positions", _INT, each="position"),
  Feature("attend_start", _INT, own_place=0),
  Feature("attend_end", _INT, own_place=1),
  Feature("objective", _INT),
)
NAMES = tuple(feature.name for feature in FEATURES)
ROWS = Feature("rows", _INT, each="row")  # a row's number in the step's batch, by which dropout draws

TARGETS = ("targets", "loss_weights", "objective")
