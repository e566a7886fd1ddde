"""Programs are traced, and so compiled, once for each shape, whatever is asked."""

import chex
import jax
import numpy as np
import pytest

from glmjax import tokens
from glmjax.infer import beam
from glmjax.infer import decode
from glmjax.infer import engine
from glmjax.infer import runner
from glmjax.infer import sampling
from glmjax.infer import scoring
from glmjax.models import config as config_lib
from glmjax.models import glm
from infer.mesh_test import Numbers

CONFIG = config_lib.GLMConfig(vocab_size=96, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, max_length=64)
STATIC = {
  "prefill": ("new_tokens", "all_slots"),
  "grow": ("slots",),
  "log_probs": ("top",),
  "log_probs_behind": ("top",),
}


@pytest.fixture
def limit(monkeypatch):
  """Allows a program so many traces: limit(decode, "prefill", 1)."""
  chex.clear_trace_counter()

  def allow(module, name: str, traces: int) -> None:
    counted = chex.assert_max_traces(getattr(module, name).__wrapped__, traces)
    monkeypatch.setattr(module, name, jax.jit(counted, static_argnames=("config", *STATIC.get(name, ()))))

  yield allow
  chex.clear_trace_counter()


@pytest.fixture(scope="module")
def model() -> engine.Engine:
  return engine.Engine(runner.Runner(CONFIG, glm.init_params(CONFIG, jax.random.key(0))), Numbers())


def test_batches_of_one_shape(limit, model):
  """Other prompts, lengths, limits, seeds and numbers of sampling; three blanks one after another."""
  limit(decode, "prefill", 1)
  limit(decode, "decode", 2)  # greedy, and drawing among the likeliest
  model.generate(["5 6 7", "8 [MASK] 9"], 20)
  model.generate(["10 11 12 13 [MASK] 14 [MASK] 15 [MASK]", "[MASK] 8 [MASK] [MASK]"], 4)
  for top_k, seed in ((5, 1), (9, 2)):
    model.generate(["5 6 7 8 9 10 11", "12"], 18 + seed, sampling.Sampling(1.0, top_k, 0.9), seed)


def test_streams(limit, model):
  """One for each size of the cache; the prompt's program and the tokens' are shared by all questions."""
  limit(decode, "prefill", 1)
  limit(decode, "decode", 1)
  for question in ("5 6 7", "8 9 10 11"):
    assert len(list(model.stream(model.encode(question), 12))) <= 12


def test_scores_and_beams(limit, model):
  limit(scoring, "log_probs", 1)
  limit(beam, "step", 1)
  limit(decode, "prefill", 1)
  for text in ("5 6 7 8", "9 10 11 12 13 14"):
    model.score([text])
    model.generate([text], 6, beam.BeamSearch(2))


def test_shapes_that_do_not_fit_are_refused(model):
  """Where a program is traced, by the name of what is wrong."""
  specials = tokens.icetk(0, 80)
  prompts, rows = decode.make_rows([], [], specials.pad, batch=2, slots=32)
  with pytest.raises(AssertionError, match="shape"):
    model.runner.run(decode.prefill, prompts._replace(end=prompts.end[:, :-1]), rows, new_tokens=4)
  with pytest.raises(AssertionError, match="type float32 but expected int32"):
    model.runner.run(decode.prefill, prompts._replace(tokens=np.float32(prompts.tokens)), rows, new_tokens=4)
