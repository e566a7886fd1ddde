"""Packing: every pair is in one row, rows hold what they hold, and best fit leaves little padding."""

import numpy as np
import pytest

from glmjax import tokens
from glmjax.data import packing
from glmjax.data import rows

SPECIALS = tokens.icetk(0, 1000)


def infilling(kind: str, length: int = 256, samples: int = 2) -> rows.BlankInfilling:
  return rows.BlankInfilling(length, SPECIALS, packing=kind, samples_per_sequence=samples)


def drawn(count: int, seed: int = 0) -> np.ndarray:
  """Lengths of questions and answers, of which a few are longer than a row."""
  rng = np.random.default_rng(seed)
  return np.exp(rng.normal([2.5, 3.5], [0.9, 1.0], [count, 2])).astype(np.int64)


@pytest.mark.parametrize("kind", rows.PACKINGS)
@pytest.mark.parametrize("count", [0, 1, 2, 17, 3000])
def test_every_pair_is_in_one_row_that_holds_it(kind: str, count: int) -> None:
  lengths, made = drawn(count), infilling(kind)
  found = packing.pack_pairs(lengths, made)
  places = [made.instruction_length(*map(int, pair)) for pair in lengths]
  pairs = [found.of_row(i) for i in range(len(found))]
  assert sorted(pair for row in pairs for pair in row) == list(range(count))
  for number, row in enumerate(pairs):
    assert row and row == sorted(row) and sum(places[pair] for pair in row) <= made.seq_length
    assert [pair for first, last in found.runs(number) for pair in range(first, last)] == row
    if kind != "best_fit":
      assert found.runs(number) == [(row[0], row[-1] + 1)]
      assert row[-1] + 1 == count or sum(places[row[0] : row[-1] + 2]) > made.seq_length, "the next would have fitted"


def test_no_two_rows_of_best_fit_would_fit_into_one() -> None:
  for seed in range(20):
    lengths, made = drawn(200, seed), infilling("best_fit")
    found = packing.pack_pairs(lengths, made)
    used = sorted(
      sum(made.instruction_length(*map(int, lengths[pair])) for pair in found.of_row(i)) for i in range(len(found))
    )
    assert len(used) < 2 or used[0] + used[1] > made.seq_length
    fewest = -(-sum(used) // made.seq_length)
    assert len(used) <= 11 / 9 * fewest + 4 and len(used) <= len(packing.pack_pairs(lengths, infilling("greedy")))


def test_best_fit_leaves_little_padding() -> None:
  lengths = drawn(20_000)
  padding = {}
  for kind in rows.PACKINGS:
    made = infilling(kind, samples=1)
    kept = sum(sum(made._cut_instruction(*map(int, pair))) + 1 for pair in lengths)
    padding[kind] = 1 - kept / (len(packing.pack_pairs(lengths, made)) * made.seq_length)
  assert padding["best_fit"] < 0.02 < 0.1 < padding["greedy"] < 0.3 < 0.6 < padding["fixed"]


def test_packing_is_the_same_every_time() -> None:
  one, two = (packing.pack_pairs(drawn(500), infilling("best_fit")) for _ in range(2))
  assert [one.of_row(i) for i in range(len(one))] == [two.of_row(i) for i in range(len(two))]
