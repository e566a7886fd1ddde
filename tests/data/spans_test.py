"""Blank infilling of one sample: nothing is lost, nothing is shown that must be guessed."""

import numpy as np
import pytest

from glmjax import tokens as tokens_lib
from glmjax.data import spans

SPECIALS = tokens_lib.icetk()


def draw_spans(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
  lengths = rng.integers(1, max(n // (3 * k), 1) + 1, k)
  placed = spans.sample_spans(lengths, n, lambda high, size: rng.integers(high, size=size))
  return rng.permutation(placed)


def test_the_docstring_example() -> None:
  a, b, c, d, e = text = np.arange(20_100, 20_105)
  mask, sop, eop = SPECIALS.mask, SPECIALS.sop, SPECIALS.eop
  sample = spans.corrupt(text, np.array([[4, 5], [1, 3]]), mask, SPECIALS)
  assert sample.tokens.tolist() == [a, mask, d, mask, sop, e, sop, b, c]
  assert sample.targets.tolist() == [a, mask, d, mask, e, eop, b, c, eop]
  assert sample.positions.tolist() == [0, 1, 2, 3, 3, 3, 1, 1, 1]
  assert sample.block_positions.tolist() == [0, 0, 0, 0, 1, 2, 1, 2, 3]
  assert sample.context_length == 4
  assert all(array.dtype == np.int32 for array in sample[:4])


@pytest.mark.parametrize("seed", range(50))
def test_every_token_is_in_the_context_or_a_target_once(seed: int) -> None:
  rng = np.random.default_rng(seed)
  n, k = int(rng.integers(16, 200)), int(rng.integers(1, 6))
  text = rng.integers(20_004, 150_000, n).astype(np.int32)
  chosen = draw_spans(rng, n, k)
  sample = spans.corrupt(text, chosen, SPECIALS.mask, SPECIALS)
  context, predicted = np.split(sample.targets, [sample.context_length])
  blanks = np.split(predicted, np.flatnonzero(predicted == SPECIALS.eop) + 1)[:-1]
  assert len(blanks) == k
  restored, by_mask = (
    [],
    {
      sample.positions[np.flatnonzero(sample.positions == p)[-1]]: blank
      for p, blank in zip(sample.positions[sample.tokens == SPECIALS.sop], blanks)
    },
  )
  for i, token in enumerate(context):
    restored += by_mask[i][:-1].tolist() if token == SPECIALS.mask else [token]
  assert restored == text.tolist()
  assert len(sample.tokens) == n + 2 * k
  # Within the targets the input is the target one place before, sop at each start.
  inputs = sample.tokens[sample.context_length :]
  assert (inputs[1:] == np.where(predicted[:-1] == SPECIALS.eop, SPECIALS.sop, predicted[:-1])).all()


@pytest.mark.parametrize("seed", range(50))
def test_spans_are_apart(seed: int) -> None:
  rng = np.random.default_rng(seed)
  n, k = int(rng.integers(16, 200)), int(rng.integers(1, 6))
  chosen = draw_spans(rng, n, k)
  chosen = chosen[np.argsort(chosen[:, 0])]
  assert chosen.min() >= 0 and chosen.max() <= n
  assert (chosen[1:, 0] - chosen[:-1, 1] >= 1).all()


def test_adjacent_spans_keep_a_mask_each() -> None:
  sample = spans.corrupt(np.arange(10, 16), np.array([[3, 5], [1, 3]]), 7, SPECIALS)
  assert sample.tokens[: sample.context_length].tolist() == [10, 7, 7, 15]
  assert sample.positions[sample.context_length :].tolist() == [2, 2, 2, 1, 1, 1]


def test_whole_text_as_suffix() -> None:
  sample = spans.corrupt_suffix(np.arange(10, 13), 0, SPECIALS.gmask, SPECIALS)
  assert sample.tokens.tolist() == [SPECIALS.gmask, SPECIALS.sop, 10, 11]
  assert sample.targets.tolist() == [SPECIALS.gmask, 10, 11, 12]
  assert sample.context_length == 1


def test_span_lengths_add_up_to_one() -> None:
  pmf = spans.span_length_pmf()
  assert len(pmf) == 39 and np.isclose(pmf.sum(), 1)
  assert np.isclose(pmf @ np.arange(1, 40), 3 / (1 - np.exp(-3)))  # Poisson given that it is not 0


def test_generators_depend_on_seed_and_index_alone() -> None:
  draws = {
    (seed, index): spans.example_rng(seed, index).integers(2**63)
    for seed in (0, 1, -1, 2**63)
    for index in (0, 1, 10**12)
  }
  assert len(set(draws.values())) == len(draws)
  assert draws[1, 10**12] == spans.example_rng(1, 10**12).integers(2**63)
