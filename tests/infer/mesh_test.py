"""Inference on a mesh: the same tokens, beams and scores as on one device; the program that a plan compiles."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from glmjax import errors
from glmjax import tokens
from glmjax.infer import beam
from glmjax.infer import decode
from glmjax.infer import engine
from glmjax.infer import placement
from glmjax.infer import prompt
from glmjax.infer import runner
from glmjax.infer import sampling
from glmjax.infer import score
from glmjax.infer import scoring
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.parallel import collectives
from glmjax.parallel import hlo
from glmjax.parallel import partitioning
from glmjax.plan import programs
from glmjax.models import weights

SPECIALS = tokens.icetk(0, 80)
CONFIG = config_lib.GLMConfig(vocab_size=96, num_layers=2, embed_dim=64, num_heads=8, mlp_dim=48, max_length=64)
FAMILIES = {
  "rotary": {},
  "rotary_2d": dict(positions="rotary_2d", mlp="gelu_tanh", tie_embeddings=False),
  "learned_2d": dict(positions="learned_2d", mlp="gelu_tanh", norm="pre", init_std=0.3),
  "prefix": dict(positions="rotary_2d", mlp="gelu_tanh", tie_embeddings=False, prefix_length=5),
  "int8_cache": dict(positions="rotary_2d", mlp="gelu_tanh", tie_embeddings=False, kv_cache_dtype="int8"),
}
MESHES = ["tensor=2", "tensor=4", "tensor=8", "data=2,tensor=4", "fsdp=2,tensor=2"]


class Numbers:
  """A tokenizer whose texts are token ids."""

  specials, vocab_size, num_image_tokens = SPECIALS, SPECIALS.dblock + 1, 0

  def encode(self, text: str) -> list[int]:
    return [int(x) for x in text.split()]

  def decode(self, ids: list[int]) -> str:
    return " ".join(map(str, ids))


def config_of(family: str) -> config_lib.GLMConfig:
  return dataclasses.replace(CONFIG, **FAMILIES[family])


@functools.cache
def params(family: str, bits: int | None) -> dict:
  found = glm.init_params(config_of(family), jax.random.key(1))
  return found if bits is None else weights.quantize(found, bits)


@functools.cache
def answers(family: str, bits: int | None, mesh: str | None, offload_layers: int = 0) -> dict:
  """What a model says by every way of asking: filling, continuing, sampling, streaming, beams, scores."""
  model = runner.Runner(config_of(family), params(family, bits), placement.on_mesh(mesh), offload_layers)
  asked = engine.Engine(model, Numbers())
  texts = ["5 6 7 [MASK] 8 9 [MASK] 10", "11 12 13", "20 21 [MASK]"]
  greedy = asked.generate(texts, 6)
  sampled = asked.generate(texts, 6, sampling.Sampling(1.0, top_k=20, top_p=0.9), seed=3)
  streamed = list(asked.stream(asked.encode(texts[1]), 8))
  prompts = [prompt.fill(asked.encode(text), SPECIALS, model.config.position_kind) for text in texts]
  beams = beam.search(model, prompts, 6, beam.BeamSearch(3, no_repeat_ngram=2), beam.Ids((SPECIALS.eop,), SPECIALS.pad))
  rows = score.window_rows(list(range(4, 60)), SPECIALS, model.config.position_kind, CONFIG.max_length, 20)
  scores = np.concatenate([s.log_probs for s in scoring.score_rows(model, rows, SPECIALS.pad)])
  return {
    "tokens": [[g.tokens for g in some] for some in (greedy, sampled)],
    "streamed": streamed,
    "beams": [[b.tokens for b in some] for some in beams],
    "scores": scores,
    "beam_scores": [[b.score for b in some] for some in beams],
  }


@pytest.mark.parametrize(
  "family, bits, mesh, offload_layers",  # each kind of kernels on each axis; offloaded and with prefixes on some
  [
    *(("rotary", None, mesh, 0) for mesh in MESHES),
    ("rotary", 4, "tensor=4", 0),
    ("rotary", 8, "data=2,tensor=2", 0),
    ("rotary_2d", 4, "tensor=2", 0),
    ("learned_2d", None, "data=2,tensor=2", 0),
    ("int8_cache", None, "data=2,tensor=4", 0),
    pytest.param("rotary", 8, "fsdp=2", 1, marks=pytest.mark.slow),
    pytest.param("rotary_2d", 4, "fsdp=2,tensor=2", 1, marks=pytest.mark.slow),
    pytest.param("prefix", None, "data=2,tensor=2", 2, marks=pytest.mark.slow),
    pytest.param("prefix", 4, "tensor=4", 0, marks=pytest.mark.slow),
  ],
)
def test_answers_are_those_of_one_device(family, bits, mesh, offload_layers):
  one, many = answers(family, bits, None), answers(family, bits, mesh, offload_layers)
  for name in ("tokens", "streamed", "beams"):
    assert many[name] == one[name], name
  for name in ("scores", "beam_scores"):
    np.testing.assert_allclose(many[name], one[name], atol=2e-5)


@functools.cache
def brief(family: str, bits: int | None, mesh: str | None, offload_layers: int) -> tuple[list, np.ndarray]:
  """Greedy answers, and the scores of a text."""
  model = runner.Runner(config_of(family), params(family, bits), placement.on_mesh(mesh), offload_layers)
  found = engine.Engine(model, Numbers()).generate(["5 6 7 [MASK] 8 9 [MASK] 10", "11 12 13"], 4)
  rows = score.window_rows(list(range(4, 40)), SPECIALS, model.config.position_kind, CONFIG.max_length, 20)
  scores = np.concatenate([s.log_probs for s in scoring.score_rows(model, rows, SPECIALS.pad)])
  return [g.tokens for g in found], scores


@pytest.mark.slow
@pytest.mark.parametrize("offload_layers", [0, 1])
@pytest.mark.parametrize("mesh", ["tensor=2", "fsdp=2", "data=2", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("family", ["rotary", "prefix"])
def test_every_combination(family, bits, mesh, offload_layers):
  """Of kernels, axes, offloaded layers and P-Tuning prefixes."""
  (tokens, scores), (same, close) = brief(family, bits, None, 0), brief(family, bits, mesh, offload_layers)
  assert same == tokens
  np.testing.assert_allclose(close, scores, atol=2e-5)


@pytest.mark.parametrize("mesh", ["tensor=2", "data=2,tensor=4"])
def test_filters_of_a_vocabulary_that_is_split(mesh):
  """One of more tokens than are looked at first, on which XLA's top-k of a split axis has failed."""
  logits = jax.random.normal(jax.random.key(0), (4, 448))
  top_k, top_p = np.full(4, 50, np.int32), np.full(4, 0.7, np.float32)
  place = placement.on_mesh(mesh)
  with place.scope():
    split = jax.device_put(logits, partitioning.named(place.mesh, place.rules, None, "act_vocab"))
    found = jax.jit(sampling.filter_logits)(split, top_k, top_p)
  np.testing.assert_array_equal(found, sampling.filter_logits(logits, top_k, top_p))


@pytest.mark.parametrize("bits, mesh", [(None, "tensor=4"), (4, "data=2,tensor=2")])
def test_the_program_that_runs_is_the_one_planned(bits, mesh):
  """Text for text: what a plan says of memory and exchanges is true of the engine's own program."""
  model = runner.Runner(CONFIG, params("rotary", bits), placement.on_mesh(mesh))
  batch, slots = 2, 64
  one = prompt.fill([5, 6, SPECIALS.gmask], SPECIALS, model.config.position_kind)
  prompts, rows = decode.make_rows([one] * batch, [slots - 32] * batch, SPECIALS.pad, batch, slots=32)
  draws = sampling.draws([sampling.Sampling()] * batch, [0] * batch)
  none = np.zeros(CONFIG.vocab_size, bool)
  state = model.run(decode.prefill, prompts, rows, new_tokens=slots, all_slots=slots)
  run = model.run(decode.decode.lower, rows, state, draws, none, none, np.int32(1)).as_text()
  planned = programs.Decode(batch=batch, context=slots, bits=bits).program(CONFIG, model.placement.mesh)
  assert planned.traced.lower().as_text() == run


def test_memory_and_exchanges_of_each_device():
  """Weights and cache are split, and a token moves sums of activations only."""
  text, bytes_of = {}, {}
  for mesh in ("tensor=1", "tensor=4"):
    place = placement.on_mesh(mesh)
    program = programs.Decode(batch=1, context=64).program(CONFIG, place.mesh).traced.lower().compile()
    text[mesh], bytes_of[mesh] = program.as_text(), program.memory_analysis().argument_size_in_bytes
  small = 40_000  # norms, biases, rows and draws are on every device
  assert bytes_of["tensor=4"] < bytes_of["tensor=1"] / 4 + small
  largest = max(
    np.prod(shape)
    for c in collectives.of(hlo.read(text["tensor=4"]), placement.on_mesh("tensor=4").mesh)
    for _, shape in c.arrays
  )
  assert largest <= CONFIG.vocab_size  # one row's logits


@pytest.mark.parametrize(
  "mesh, words",
  [
    ("tensor=3", "num_heads 8 does not divide over tensor=3: this model takes tensor=1, 2, 4, 8"),
    ("stage=2", "stage=2 is for training"),
    ("tensor=16", "needs 16 devices, here are 8"),
    ("tensor", "as tensor=4"),
    ("heads=2", "as tensor=4"),
    ("tensor=2,tensor=2", "as tensor=4"),
    ("fsdp=5", "embed_dim 64 does not divide"),
  ],
)
def test_meshes_that_do_not_fit_are_refused(mesh, words):
  with pytest.raises(errors.InputError, match=words):
    runner.Runner(CONFIG, params("rotary", None), placement.on_mesh(mesh))
