"""Instruction rows against what the original's fine-tuning was given: inputs, labels (tests/golden/README.md)."""

import os
import pathlib

import numpy as np
import pytest

from glmjax import tokens as tokens_lib
from glmjax.data import rows

GOLDEN = pathlib.Path(os.environ.get("GLMJAX_GOLDEN_DIR") or pathlib.Path(__file__).parents[1] / "golden")
IGNORED = -100  # a label that is not counted
SPECIALS = tokens_lib.icetk(0, 180)  # the tiny ChatGLM-6B's


def batches(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
  """(input_ids, labels) [rows, L] of every batch of a golden file."""
  with np.load(GOLDEN / f"{name}.npz") as arrays:
    prefixes = [key.removesuffix("input_ids") for key in arrays if key.endswith("input_ids")]
    pairs = [(arrays[f"{prefix}input_ids"], arrays[f"{prefix}labels"]) for prefix in prefixes]
  return [batch for ids, labels in pairs for batch in zip(ids, labels)]


@pytest.mark.parametrize("name", ["p_tuning", "lora"])
def test_rows_have_the_originals_inputs_and_labels(name: str) -> None:
  found = batches(name)
  assert found
  for ids_BL, labels_BL in found:
    made = rows.BlankInfilling(
      ids_BL.shape[1],
      SPECIALS,
      "rotary_2d",
      samples_per_sequence=1,
      instruction_mask="gmask",
      instruction_sop_loss=True,
    )
    for ids_L, labels_L in zip(ids_BL, labels_BL):
      sop, eop = (int(np.flatnonzero(ids_L == token)[0]) for token in (SPECIALS.sop, SPECIALS.eop))
      row = made.instruction_row([(ids_L[: sop - 1], ids_L[sop + 1 : eop])])
      np.testing.assert_array_equal(row["tokens"][:eop], ids_L[:eop])  # eop is predicted, not read
      counted_L = row["loss_weights"] > 0
      shifted_L = np.append(labels_L[1:], IGNORED)  # place i predicts label i + 1
      np.testing.assert_array_equal(np.where(counted_L, row["targets"], IGNORED), shifted_L)
      np.testing.assert_array_equal(row["positions"][0, :eop], np.minimum(np.arange(eop), sop - 1))
      np.testing.assert_array_equal(row["positions"][1, :eop], np.maximum(np.arange(eop) - sop + 1, 0))
