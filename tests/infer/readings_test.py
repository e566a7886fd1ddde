"""What is read once for several rows, and how batches are made of it."""

import numpy as np
import pytest

import engine_models
from glmjax import positions as positions_lib
from glmjax import tokens
from glmjax.infer import readings
from glmjax.infer import runner as runner_lib
from glmjax.infer import score
from glmjax.infer import scoring

SPECIALS = tokens.icetk(0, 80)


def question(length: int, answers: list[list[int]], seed: int = 0) -> list[score.Row]:
  context = np.random.default_rng(seed).integers(4, 80, length).tolist()
  return [score.target_row([*context, SPECIALS.mask], each, SPECIALS, positions_lib.ROTARY_2D) for each in answers]


def test_answers_of_one_token_are_one_reading():
  alone, families = readings.of(question(12, [[5], [6], [7], [5]]))
  assert not families and [[i for i, _ in each.rows] for each in alone] == [[0, 1, 2, 3]]
  assert alone[0].scored == 4 and alone[0].answer == 1
  assert [of for _, of in alone[0].targets()] == [slice(i, i + 1) for i in range(4)]


def test_answers_of_several_tokens_share_their_context():
  """Those that differ in their last token alone are read once."""
  rows = question(12, [[5, 6], [5, 7], [8, 9, 10]]) + question(12, [[5, 6]], seed=1)
  alone, families = readings.of(rows)
  assert [[i for i, _ in each.rows] for each in alone] == [[3]]
  assert [[[i for i, _ in each.rows] for each in members] for members in families] == [[[0, 1], [2]]]
  [first, second] = families[0]
  assert first.head.tokens == second.head.tokens == rows[0].prompt.tokens[:13]


def test_contexts_that_are_read_from_one_side_are_not_shared():
  windows = score.window_rows(list(range(4, 44)), SPECIALS, positions_lib.ROTARY_2D, 16)
  alone, families = readings.of(windows)
  assert len(alone) == len(windows) and not families


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_batches_are_full_and_little_of_them_is_padding(platform: str, monkeypatch: pytest.MonkeyPatch):
  config, params = engine_models.model("rotary_2d", vocab_size=96)
  monkeypatch.setattr(scoring, "_on_cpu", lambda runner: platform == "cpu")
  lengths = np.random.default_rng(0).integers(300, 900, 200)
  rows = [row for i, length in enumerate(lengths) for row in question(length, [[5], [6]], seed=i)]
  batches = scoring._Batches(runner_lib.Runner(config, params), SPECIALS.pad, 4096)
  read, padded, shapes, sizes = 0, 0, set(), []
  for _, (batch, scored), members in batches.of(rows):
    shapes.add((batch.tokens.shape, scored.places.shape))
    read, padded = read + sum(each.length for each in members.values()), padded + batch.tokens.size
    sizes.append(len(members) / len(batch.tokens))
  assert read == sum(lengths) + 2 * len(lengths)  # with the blank and sop
  assert padded < 1.15 * read and len(shapes) <= 8 and set(sizes[:-1]) == {1.0}


def test_long_contexts_are_shared():
  """Longer ones than a batch has tokens, too."""
  config, params = engine_models.model("rotary_2d", vocab_size=96)
  rows = question(1_500, [[5, 6], [7, 8], [9, 10]])
  batches = [*scoring._Batches(runner_lib.Runner(config, params), SPECIALS.pad, 1024).of(rows)]
  assert [program for program, _, _ in batches] == [scoring.log_probs_behind]
