"""The features of a batch, and the documentation's table of them."""

import pathlib
import re

import numpy as np
import pytest

from glmjax import batch
from glmjax import positions

ARCHITECTURE = pathlib.Path(__file__).parents[1] / "docs" / "architecture.md"


def documented():
  """(name, dtype, shape, padding) of each row of the table."""
  table = ARCHITECTURE.read_text("utf-8").split("**Batch.**")[1].split("\n\n")[1]
  return [[cell.strip() for cell in line.split("|")[1:5]] for line in table.splitlines()[2:]]


def shape_in_words(feature):
  shapes = {}
  for kind in positions.KINDS.values():
    found = ", ".join(["B", *("L" if size == 7 else str(size) for size in feature.row_shape(7, kind))])
    shapes.setdefault(f"[{found}]", []).append(kind.name)
  if len(shapes) == 1:
    return next(iter(shapes))
  return ", ".join(f"{shape} ({', '.join(kinds)})" for shape, kinds in shapes.items())


def padding_in_words(feature):
  row = feature.padding(2, 7, positions.ROTARY)[1].tolist()
  words = {"0": [0] * 7, "i": list(range(7)), "i + 1": list(range(1, 8))}
  return next(name for name, values in words.items() if values == row)


def test_the_documentation_lists_the_features():
  assert documented() == [[f.name, f.dtype.name, shape_in_words(f), padding_in_words(f)] for f in batch.FEATURES]


@pytest.mark.parametrize("kind", positions.KINDS.values())
def test_padding_sees_itself_alone_and_does_not_count(kind):
  row = {feature.name: feature.padding(1, 9, kind)[0] for feature in batch.FEATURES}
  assert not row["loss_weights"].any()
  np.testing.assert_array_equal(row["attend_start"], np.arange(9))
  np.testing.assert_array_equal(row["attend_end"] - row["attend_start"], 1)
  for feature in batch.FEATURES:
    assert row[feature.name].shape == feature.row_shape(9, kind) and row[feature.name].dtype == feature.dtype


def test_the_loss_takes_features_of_a_batch():
  assert {*batch.TARGETS} <= {*batch.NAMES}


def test_names_of_positions_are_compared_in_one_module():
  """Elsewhere their objects are asked; settings and their checks may write a name."""
  compared = re.compile(rf"[!=]= *[\"']({'|'.join(positions.KINDS)})[\"']")
  for path in (ARCHITECTURE.parents[1] / "glmjax").rglob("*.py"):
    assert path.name == "positions.py" or not compared.search(path.read_text("utf-8")), path
