"""The engine: blanks filled and texts continued in batches, streaming, scores, what does not fit."""

import dataclasses
from collections.abc import Iterator

import jax
import engine_models
import numpy as np
import pytest

from glmjax import errors
from glmjax import tokenizer
from glmjax.checkpoint import load
from glmjax.infer import beam
from glmjax.infer import decode
from glmjax.infer import engine
from glmjax.infer import lanes
from glmjax.infer import prefill
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import runner
from glmjax.infer import sampling
from glmjax.infer import scheduler
from glmjax.infer import score
from glmjax.models import glm
from glmjax.models import weights


def test_generates_only_text_and_fills_every_blank():
  specials = engine_models.Letters.specials
  answers = engine_models.make().generate(
    ["ab[MASK]cd[MASK]ef.", "hello", "[MASK] x [gMASK]", ""], max_tokens=6, sampling=sampling.Sampling(temperature=3.0)
  )
  assert [len(a.pieces) for a in answers] == [2, 1, 2, 1]
  first, second = answers[0].pieces
  assert answers[0].text == f"ab{first}cd{second}ef."
  assert answers[1].text == "hello" + answers[1].pieces[0]
  assert answers[2].text == f"{answers[2].pieces[0]} x {answers[2].pieces[1]}"
  for answer in answers:
    for piece, ids in zip(answer.pieces, answer.tokens):
      assert len(ids) <= 6 and engine_models.Letters().decode(ids) == piece and len(piece) == len(ids)
      assert not set(ids) & set(dataclasses.astuple(specials))
    assert answer.finish_reason == ("length" if max(map(len, answer.tokens)) == 6 else "stop")


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d", "learned_2d"])
def test_batch_is_one_by_one(positions: str):
  """Prompts of unlike lengths and kinds, more of them than run together."""
  prompts = ["ab[MASK]cd[MASK]e.", "xyz", "[MASK]", "the quick brown fox [gMASK]", "a long tail [MASK] of text here."]
  requests = [sampling.Sampling(temperature=1.5, top_k=20)] * 5
  ask = engine_models.make(positions, max_batch=2)
  together = ask.generate(prompts, 5, requests, seed=7)
  for i, prompt in enumerate(prompts):
    assert ask.generate([prompt], 5, requests[i], seed=7 + i) == [together[i]]


def test_same_shapes_compile_once():
  ask = engine_models.make()
  ask.generate(["abc"], 5)
  before = prefill.through._cache_size(), decode.decode._cache_size()
  ask.generate(["something else"], 17)
  ask.generate(["to be [MASK] or not."], 9)
  assert (prefill.through._cache_size(), decode.decode._cache_size()) == before


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d"])
def test_streaming_is_decoding(positions: str, monkeypatch: pytest.MonkeyPatch):
  """Token by token, through caches that grow, to a stop token or to the end of the room."""
  monkeypatch.setattr(scheduler, "_AHEAD", 8)
  how = sampling.Sampling(temperature=1.5, top_k=20)
  for ask, text in (
    (engine_models.make(positions), "abc"),
    (engine_models.make(positions, stop_tokens=()), "the quick [MASK] over"),
  ):
    row = ask.encode(text)
    new, reason = drain(ask.stream(row, 100, how, seed=5))
    request = lanes.Request(
      prompt_lib.fill(row, engine_models.Letters.specials, ask.config.position_kind), ask.room(row), how, 5
    )
    at_once = ask.scheduler(1)
    whole = at_once.submit(request)
    while at_once.busy:
      at_once.advance(16)
    assert new == (whole.tokens[:-1] if reason == "stop" else whole.tokens)
    assert text == "abc" or (reason == "length" and len(new) == ask.room(row))
  assert len(drain(ask.stream(row, 3))[0]) == 3


def drain(stream: Iterator[int]) -> tuple[list[int], str]:
  """A generator's values and its result."""
  values = []
  while True:
    try:
      values.append(next(stream))
    except StopIteration as end:
      return values, end.value


def test_streaming_compiles_once_for_a_size():
  """Decoding for the cache's sizes alone, whatever the prompts' lengths."""
  ask = engine_models.make()
  prefill.through.clear_cache()
  decode.decode.clear_cache()
  for length in range(1, 60):
    drain(ask.stream(ask.encode("a" * length), 2))
  assert prefill.through._cache_size() == 2  # prompts of up to 32 and up to 64 tokens
  assert decode.decode._cache_size() == 1  # a cache of 64 slots, all that the model has


def test_greedy_from_the_model_alone():
  """Greedy tokens are the arg max of the whole row's logits, step by step."""
  ask = engine_models.make()
  answer = ask.generate(["abc"], 8)[0]
  prompt = prompt_lib.fill(ask.encode("abc"), engine_models.Letters.specials, ask.config.position_kind)
  row = score.Row(prompt_lib.extend(prompt, answer.tokens[0][:-1]), answer.tokens[0])
  suppressed = np.asarray(ask._vocabulary.suppressed_V)
  # One pass over the whole row: what stands behind a token does not change its logits.
  config, params = engine_models.model()
  length = len(row.prompt.tokens)
  end = np.maximum(np.arange(1, length + 1), prompt.context_length)
  logits = glm.GLM(config).apply(
    {"params": params}, np.array([row.prompt.tokens]), row.prompt.positions[:1], np.zeros((1, length), int), end[None]
  )
  best = np.where(suppressed, -np.inf, logits[0, -len(row.targets) :]).argmax(-1).tolist()
  assert best == answer.tokens[0]
  assert ask.score_rows([row])[0].count == len(best)


def test_masks_as_text():
  ask = engine_models.make()
  specials = engine_models.Letters.specials
  assert ask.encode("a[MASK]") == [10, specials.mask]
  assert ask.encode("a[MASK]", literal=True) == [*engine_models.Letters().encode("a[MASK]"), specials.gmask]
  answer = ask.generate(["a[MASK]"], 3, literal=True)[0]
  assert answer.text.startswith("a[MASK]") and len(answer.pieces) == 1


def test_frames_of_the_families():
  specials = engine_models.Letters.specials
  assert engine_models.make().encode("[MASK]b") == [specials.mask, 11, specials.eos]
  assert engine_models.make("rotary_2d").encode("[MASK]b") == [specials.mask, 11]
  assert engine_models.make("learned_2d").encode("b") == [specials.enc, 11, specials.gmask]


def test_prompts_that_do_not_fit():
  ask = engine_models.make()
  with pytest.raises(errors.InputError, match="takes 66 tokens, and the model has 64"):
    ask.generate(["ok", "a" * 64], 4)
  answer = ask.generate(["a" * 58 + "[MASK][MASK]"], 10, sampling.Sampling(temperature=2.0))[0]
  assert answer.finish_reason == "length" and len(answer.text) <= 63
  with pytest.raises(errors.InputError, match="max_tokens is 0"):
    ask.generate(["a"], 0)


def test_a_tokenizer_that_does_not_fit():
  config = dataclasses.replace(engine_models.model()[0], vocab_size=48)
  small = runner.Runner(config, glm.init_params(config, jax.random.key(0)))
  with pytest.raises(errors.InputError, match="53 ids.*vocabulary 48"):
    engine.Engine(small, engine_models.Letters())


def test_folders_whose_tokenizer_does_not_fit(tmp_path, monkeypatch):
  config, params = engine_models.model()
  loaded = load.LoadedModel(dataclasses.replace(config, vocab_size=20_600), params, tmp_path / "tokenizer", None, {})
  monkeypatch.setattr(runner, "read", lambda folder, placement, precision, offload_layers, adapter: loaded)
  with pytest.raises(errors.InputError, match="runs/m has no tokenizer"):
    engine.Engine.load("runs/m")
  tokenizer.train(["the quick brown fox", "敏捷的狐狸"] * 9, tmp_path / "tokenizer", 400)
  with pytest.raises(errors.InputError, match="400 ids.* 20600 go with 20000 image ids: it is of another date"):
    engine.Engine.load("runs/m")


def test_quantized_parameters():
  config, params = engine_models.model()
  quantized = engine.Engine(runner.Runner(config, weights.quantize(params, 8)), engine_models.Letters())
  texts = ["the quick brown fox", "jumps"]
  for a, b in zip(engine_models.make().score(texts), quantized.score(texts)):
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=0.2)
  assert quantized.generate(["abc"], 5)[0].text.startswith("abc")


def test_no_prompts():
  assert engine_models.make().generate([], 4) == [] and engine_models.make().score([]) == []


def test_beam_search_fills_every_blank_with_its_best_beam():
  answering, specials = engine_models.make(), engine_models.Letters.specials
  settings = beam.BeamSearch(3, length_penalty=0.5, no_repeat_ngram=2, min_tokens=2)
  found = answering.generate(["ab[MASK]cd[MASK]", "hello"], max_tokens=5, sampling=settings)
  assert found == answering.generate(["ab[MASK]cd[MASK]", "hello"], max_tokens=5, sampling=settings, seed=7)
  assert [len(answer.pieces) for answer in found] == [2, 1]
  assert found[0].text == f"ab{found[0].pieces[0]}cd{found[0].pieces[1]}"
  prompt = prompt_lib.fill(answering.encode("hello"), specials, answering.config.position_kind)
  ids = beam.Ids(sorted(answering.stops), specials.pad, np.asarray(answering._vocabulary.suppressed_V))
  best = beam.search(answering.runner, [prompt], 5, settings, ids)[0][0]
  new = best.tokens[len(prompt.tokens) :]
  assert found[1].tokens[0] == (new[:-1] if new[-1] in answering.stops else new)


def test_constraints_of_one_prompt_leave_the_others_alone():
  answering = engine_models.make()
  plain = sampling.Sampling(temperature=2.0)
  hows = [
    plain,
    dataclasses.replace(plain, no_repeat_ngram=2),
    dataclasses.replace(plain, min_tokens=12),
    dataclasses.replace(plain, repetition_penalty=5.0),
    plain,
  ]
  found = answering.generate(["abc abc"] * 5, max_tokens=12, sampling=hows, seed=3)
  for i in (0, 1):
    assert found[i] == answering.generate(["abc abc"], max_tokens=12, sampling=hows[i], seed=3 + i)[0]
  pairs = list(zip(found[1].tokens[0], found[1].tokens[0][1:]))
  assert len(pairs) == len(set(pairs))
  assert len(found[2].tokens[0]) == 12


def test_streams_keep_to_constraints():
  answering = engine_models.make()
  how = sampling.Sampling(no_repeat_ngram=2, min_tokens=30, repetition_penalty=1.5)
  new = list(answering.stream(answering.encode("ab"), 40, how))
  assert len(new) >= 30 and len(set(zip(new, new[1:]))) == len(new) - 1
  assert new == answering.generate(["ab"], max_tokens=40, sampling=how)[0].tokens[0]


@pytest.mark.parametrize("how", [sampling.Sampling(min_tokens=9), beam.BeamSearch(2, min_tokens=9)])
def test_more_tokens_wanted_than_allowed(how):
  with pytest.raises(errors.InputError, match="min_tokens is 9 and max_tokens 8"):
    engine_models.make().generate(["a"], max_tokens=8, sampling=how)


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d", "learned_2d"])
def test_scores_behind_a_context(positions):
  """A continuation is scored as what the context's blank takes: the sum over its tokens, each behind the earlier."""
  answering, specials = engine_models.make(positions), engine_models.Letters.specials
  kind = answering.config.position_kind
  ids = engine_models.Letters().encode
  found = answering.score(["cde", "cde", "cde", "cde"], ["ab", "ab[gMASK]", "a[MASK]b", ""])
  front = [specials.enc] if positions == "learned_2d" else []
  rows = [score.target_row([*front, *ids("ab"), specials.gmask], ids("cde"), specials, kind)] * 2
  framed = kind.frame([*ids("a"), specials.mask, *ids("b")], specials)
  rows.append(
    score.target_row(
      [*ids("a"), specials.mask, *ids("b")] if positions == "rotary" else framed, ids("cde"), specials, kind
    )
  )
  rows += score.window_rows(ids("cde"), specials, kind, 64)
  for one, other in zip(found, answering.score_rows(rows), strict=True):
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
  assert answering.score(["cde"])[0].total == pytest.approx(found[3].total, abs=1e-4)


def test_texts_longer_than_the_model_behind_a_context():
  """In windows: each token once, the first behind the context."""
  answering = engine_models.make()
  found = answering.score(["abc " * 60], ["hello"])[0]
  assert found.count == 240
  short = answering.score(["abc " * 5], ["hello"])[0]
  np.testing.assert_allclose(found.log_probs[:20], short.log_probs, atol=1e-4)
  for text, context, expected in (
    ("a", "b" * 63, "a context takes 63 tokens"),
    ("a" * 60, "b[MASK]cdef", "a text takes 60"),
    ("a", "b[MASK]c[MASK]", "a context has 2 blanks"),
  ):
    with pytest.raises(errors.InputError, match=expected):
      answering.score([text], [context])


def test_choices():
  """Whole choices, by their sums; the context's end is kept where it does not fit, as in the original."""
  answering, specials = engine_models.make(), engine_models.Letters.specials
  long = "abcdefgh" * 8
  found = answering.score_choices(["ab[MASK]c", "ab", long], [["x", "yz"], ["x", "y"], ["xyz", "zy"]])
  ids = engine_models.Letters().encode
  for context, choices, one in (
    ([*ids("ab"), specials.mask, *ids("c")], ["x", "yz"], found[0]),
    ([*ids("ab"), specials.mask], ["x", "y"], found[1]),
    ([*ids(long)[-(64 - 5 - 2) :], specials.mask], ["xyz", "zy"], found[2]),
  ):
    rows = [score.target_row(context, ids(choice), specials, answering.config.position_kind) for choice in choices]
    totals = [one.total for one in answering.score_rows(rows)]
    np.testing.assert_allclose([one.total for one in one.scores], totals, atol=1e-4)
    assert one.best == int(np.argmax(totals))
  assert [one.left_out for one in found] == [0, 0, 64 - 57]
  gmask = answering.score_choices(["ab"], [["xy"]], "[gMASK]")[0]
  assert gmask.scores[0].total == pytest.approx(answering.score(["xy"], ["ab"])[0].total, abs=1e-4)
  with pytest.raises(errors.InputError, match="2 choices take 70 tokens together, and the model has 64 places"):
    answering.score_choices(["a"], [["x" * 35, "y" * 35]])
  with pytest.raises(errors.InputError, match="a text to score is empty"):
    answering.score_choices(["a"], [["x", ""]])
