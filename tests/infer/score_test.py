"""Log-likelihoods: rows, windows of long texts, batches."""

import dataclasses
import functools

import jax
import numpy as np
import engine_models
import pytest

from glmjax import errors
from glmjax import positions as positions_lib
from glmjax import tokens
from glmjax.infer import prompt
from glmjax.infer import rows as rows_lib
from glmjax.infer import runner
from glmjax.infer import score
from glmjax.infer import scoring
from glmjax.models import config as config_lib
from glmjax.models import glm

SPECIALS = tokens.icetk(0, 80)


def model(positions: str) -> tuple[config_lib.GLMConfig, dict]:
  return engine_models.model(positions, vocab_size=96)


def text(n: int, seed: int = 0) -> list[int]:
  return np.random.default_rng(seed).integers(4, 80, n).tolist()


@functools.cache
def forward(positions: str):
  config, params = model(positions)
  return jax.jit(lambda *inputs: glm.GLM(config).apply({"params": params}, *inputs))


def alone(positions: str, row: score.Row) -> tuple[np.ndarray, np.ndarray]:
  """A row's log-probabilities from one unpadded pass."""
  n = len(row.prompt.tokens)
  batch = rows_lib.pad([row.prompt], SPECIALS.pad, 1, n)
  positions_1 = model(positions)[0].position_kind.of_model(batch.positions)
  logits = np.asarray(forward(positions)(batch.tokens, positions_1, batch.start, batch.end), np.float64)
  logits = logits[0, -len(row.targets) :]
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return log_probs[np.arange(len(row.targets)), row.targets], logits.argmax(-1) == row.targets


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d", "learned_2d"])
def test_batched_is_alone(positions: str, monkeypatch: pytest.MonkeyPatch):
  kind = positions_lib.KINDS[positions]
  rows = [
    score.target_row([*text(9), SPECIALS.mask, *text(5)], text(4), SPECIALS, kind),
    score.target_row([*text(30), SPECIALS.gmask], text(1), SPECIALS, kind),
    score.target_row([*text(30), SPECIALS.gmask], text(1, 1), SPECIALS, kind),  # of the same prompt
    *score.window_rows(text(90), SPECIALS, kind, 48, 20),
    *score.window_rows(text(50), SPECIALS, kind, 48, 20),
  ]
  config, params = model(positions)
  monkeypatch.setattr(scoring, "_CHUNK_LOGITS", 96 * 40)  # several chunks of logits
  told = []
  scores = scoring.score_rows(runner.Runner(config, params), rows, SPECIALS.pad, batch_tokens=100, progress=told.append)
  for row, s in zip(rows, scores, strict=True):
    log_probs, correct = alone(positions, row)
    np.testing.assert_allclose(s.log_probs, log_probs, atol=2e-4)
    np.testing.assert_array_equal(s.correct, correct)
    assert s.count == len(row.targets) and abs(s.total - log_probs.sum()) < 1e-2
  assert sum(told) == sum(len(row.prompt.tokens) for row in rows)


@pytest.mark.parametrize("kept", [None, "int8"])
@pytest.mark.parametrize("free", [0, None])
def test_choices_behind_one_context_are_alone(kept: str | None, free: int | None, monkeypatch: pytest.MonkeyPatch):
  """However a cache is kept, and however little memory is left for contexts."""
  kind = positions_lib.KINDS["rotary_2d"]
  contexts = [[*text(n, n), SPECIALS.mask, *text(3)] for n in (20, 22, 30)]
  rows = [
    score.target_row(context, text(1 + i % 4, i), SPECIALS, kind)
    for context, count in zip(contexts, (3, 9, 2), strict=True)
    for i in range(count)
  ]
  config, params = model("rotary_2d")
  one = runner.Runner(dataclasses.replace(config, kv_cache_dtype=kept), params)
  ran, run = [], runner.Runner.run
  monkeypatch.setattr(runner.Runner, "free_bytes", lambda self: free)
  monkeypatch.setattr(
    runner.Runner,
    "run",
    lambda self, program, *more, **options: ran.append(program) or run(self, program, *more, **options),
  )
  scores = scoring.score_rows(one, rows, SPECIALS.pad)
  assert {*ran} == {scoring.log_probs_behind if free is None else scoring.log_probs}
  for row, s in zip(rows, scores, strict=True):
    log_probs, correct = alone("rotary_2d", row)
    np.testing.assert_allclose(s.log_probs, log_probs, atol=2e-4)
    np.testing.assert_array_equal(s.correct, correct)


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 40, 100])
@pytest.mark.parametrize("stride, skip", [(None, 0), (1, 0), (15, 0), (6, 2)])
def test_windows_score_each_token_once(num_tokens: int, stride: int | None, skip: int):
  ids = text(num_tokens)
  rows = score.window_rows(ids, SPECIALS, positions_lib.ROTARY, 16, stride, skip)
  assert [target for row in rows for target in row.targets] == ids[skip:]
  assert all(len(row.prompt.tokens) <= 16 for row in rows)
  for row in rows[1:]:  # full windows, but for the last
    assert len(row.prompt.tokens) == 16 or row is rows[-1]
    assert row.prompt.context_length == len(row.prompt.tokens) - len(row.targets)


def test_window_of_a_text():
  row = score.window_rows([5, 6, 7], SPECIALS, positions_lib.ROTARY, 16)[0]
  assert row.prompt.tokens == [SPECIALS.gmask, SPECIALS.sop, 5, 6] and list(row.targets) == [5, 6, 7]


def test_mistakes():
  with pytest.raises(errors.InputError, match="cannot advance by 16"):
    score.window_rows(text(40), SPECIALS, positions_lib.ROTARY, 16, 16)
  long = prompt.fill([*text(70), SPECIALS.gmask], SPECIALS, positions_lib.ROTARY)
  with pytest.raises(errors.InputError, match="takes 72 places, and the model has 64"):
    scoring.score_rows(runner.Runner(*model("rotary")), [score.Row(long, [5])], SPECIALS.pad)
