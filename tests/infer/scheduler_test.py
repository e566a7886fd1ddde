"""Requests that join and leave: each gets the same text, bit for bit, alone or among others."""

import dataclasses
import functools

import engine_models
import jax
import numpy as np
import pytest

from glmjax import errors
from glmjax.infer import decode
from glmjax.infer import engine
from glmjax.infer import lanes
from glmjax.infer import placement
from glmjax.infer import prefill
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import runner
from glmjax.infer import sampling
from glmjax.infer import scheduler
from glmjax.infer import score

LANES = 4
SETTINGS = (
  sampling.Sampling(),
  sampling.Sampling(temperature=1.5),
  sampling.Sampling(temperature=1.0, top_k=5),
  sampling.Sampling(temperature=2.0, top_p=0.8),
  sampling.Sampling(temperature=1.5, no_repeat_ngram=2, min_tokens=4),
  sampling.Sampling(repetition_penalty=1.3),
  sampling.Sampling(temperature=1.0, logit_bias=((15, 5.0), (16, -100.0))),
)


@functools.cache
def model(drafts: int = 0, kv_cache_dtype: str | None = None) -> engine.Engine:
  return engine_models.make("rotary_2d", kv_cache_dtype, drafts=drafts)


def make_requests(count: int, seed: int) -> list[lanes.Request]:
  """Prompts of all lengths, with blanks at their ends and within, and limits that often end them."""
  r, ask = np.random.default_rng(seed), model()
  requests = []
  for i in range(count):
    letters = "".join(r.choice(list("abcdefgh "), size=r.integers(0, 40)))
    row = ask.encode(letters + r.choice(["", "[MASK]", "[MASK] xyz", "[gMASK]"]))
    prompt = prompt_lib.fill(row, ask.tokenizer.specials, ask.config.position_kind)
    limit = int(min(ask.room(row), r.integers(1, 24)))
    tops = None if r.random() < 0.7 else int(r.integers(0, 5))
    requests.append(lanes.Request(prompt, limit, SETTINGS[i % len(SETTINGS)], int(r.integers(1 << 32)), tops))
  return requests


def alone(request: lanes.Request, kv_cache_dtype: str | None = None) -> list[int]:
  return finish(model(0, kv_cache_dtype).scheduler(LANES), [request])[0]


def finish(rows: scheduler.Scheduler, requests: list[lanes.Request]) -> list[list[int]]:
  answers = [rows.submit(request) for request in requests]
  while rows.busy:
    rows.advance(16)
  return [answer.tokens for answer in answers]


@functools.cache
def expected(kv_cache_dtype: str | None = None) -> tuple[list[lanes.Request], list[list[int]]]:
  requests = make_requests(40, 0)
  return requests, [alone(request, kv_cache_dtype) for request in requests]


def run_schedule(seed: int, drafts: int = 0, kv_cache_dtype: str | None = None) -> None:
  """Submits a random choice of requests at random rounds, cancels some, and compares all that the others say."""
  r = np.random.default_rng(seed)
  requests, texts = expected(kv_cache_dtype)
  rows = model(drafts, kv_cache_dtype).scheduler(LANES, most=LANES * int(r.integers(1, 4)), few_programs=True)
  waiting = list(r.integers(0, len(requests), size=r.integers(1, 30)))
  answers: list[tuple[int, scheduler.Answer]] = []
  cancelled: set[int] = set()
  said: dict[int, list[int]] = {}
  while waiting or rows.busy:
    while waiting and r.random() < 0.5:
      answers.append((int(waiting[-1]), rows.submit(requests[waiting.pop()])))
    if answers and r.random() < 0.1:
      rows.cancel(answers[i := int(r.integers(len(answers)))][1])
      cancelled.add(i)
    for answer, new in rows.advance(int(r.choice([1, 1, 1, 2, 5])), fill=r.random() < 0.3):
      said.setdefault(id(answer), []).extend(new)
  for i, (which, answer) in enumerate(answers):
    assert answer.ended and answer.tokens == said.get(id(answer), [])
    whole = texts[which]
    assert answer.tokens == (whole[: len(answer.tokens)] if i in cancelled else whole), (seed, i)


@pytest.mark.parametrize("drafts, kv_cache_dtype", [(0, None), (LANES - 1, None), (LANES - 1, "int8")])
def test_joining_and_leaving_changes_no_text(drafts: int, kv_cache_dtype: str | None):
  for seed in range(20):
    run_schedule(seed, drafts, kv_cache_dtype)


@pytest.mark.slow
def test_500_schedules():
  for seed in range(1000, 1500):
    run_schedule(seed)


def test_programs_are_compiled_for_lanes_not_for_requests():
  for seed in range(3):
    run_schedule(seed)
  before = decode.decode._cache_size()
  for seed in range(3):
    run_schedule(seed)
  assert decode.decode._cache_size() == before


def test_no_more_decode_together_than_asked():
  requests, texts = expected()
  rows = model().scheduler(LANES, most=LANES)
  answers = [rows.submit(request) for request in requests[:9]]
  assert len(rows.advance(fill=True)) == LANES
  while rows.busy:
    assert len(rows.advance()) <= LANES
  assert [answer.tokens for answer in answers] == texts[:9]


def test_a_cancelled_request_leaves_its_lane():
  requests, texts = expected()
  rows = model().scheduler(LANES)
  first = [rows.submit(request) for request in requests[:LANES]]
  rows.advance(fill=True)
  waits = rows.submit(requests[LANES])
  gone = rows.submit(requests[LANES + 1])
  for answer in (gone, *first):
    rows.cancel(answer)
  assert rows.busy and all(answer.ended for answer in (gone, *first))
  while rows.busy:
    rows.advance()
  assert waits.tokens == texts[LANES] and gone.tokens == []
  rows.cancel(waits)  # which has ended already


def test_what_is_not_finite_ends_alone():
  """Whoever else is there, and whoever has the lane next, gets the same text as ever."""
  requests, texts = expected()
  rows = model().scheduler(LANES)
  answers = [rows.submit(request) for request in requests[: LANES + 2]]
  rows.advance(fill=True)
  sick, lane = next((answer, lane) for (_, lane), answer in rows._held.items() if not answer.ended)
  [lanes_there] = rows._sets
  cache = jax.tree.map(lambda x: x.at[lane].set(np.nan), lanes_there._state.cache)
  lanes_there._state = dataclasses.replace(lanes_there._state, cache=cache)
  while rows.busy:
    rows.advance(3)
  assert [answer.finite for answer in answers] == [answer is not sick for answer in answers]
  assert [answer.tokens for answer in answers if answer is not sick] == [
    text for answer, text in zip(answers, texts) if answer is not sick
  ]
  with pytest.raises(errors.NotFiniteError, match="not finite"):
    sick.check()


@pytest.mark.parametrize("drafts", [0, 3])
def test_who_has_the_lane_next_finds_nothing_of_it(drafts: int):
  """On a mesh, where attention multiplies with all slots; also lanes that have read for it."""
  config, params = engine_models.model("rotary_2d")
  mesh = placement.on_mesh("tensor=2")
  ask = engine.Engine(runner.Runner(config, params, mesh), engine_models.Letters(), drafts=drafts)
  size = 1 + drafts
  first, *others = [each._replace(limit=9, logprobs=None) for each in make_requests(1 + size, 5)]
  how = sampling.Sampling(min_tokens=20, logit_bias=((15, 100.0),))  # repeats itself, so that others read for it
  alone = [finish(ask.scheduler(size), [each])[0] for each in others]
  rows = ask.scheduler(size, few_programs=True)  # so that lanes which are free stay
  sick = rows.submit(first._replace(limit=20, sampling=how))
  rows.advance(fill=True)
  rows.advance()
  [lanes_there] = rows._sets
  spoilt = jax.tree.map(lambda x: x.at[:].set(np.nan), lanes_there._state.cache)
  lanes_there._state = dataclasses.replace(lanes_there._state, cache=spoilt)
  rows.advance()
  assert sick.ended and not sick.finite and rows._sets == [lanes_there]
  assert finish(rows, others) == alone


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[prompt_lib.Prompt]:
  """Returns a list that grows by each prompt that is read from now on."""
  reads, read = [], scheduler.Scheduler._prefill
  monkeypatch.setattr(scheduler.Scheduler, "_prefill", lambda self, prompt: reads.append(prompt) or read(self, prompt))
  return reads


def test_one_context_is_read_once(monkeypatch: pytest.MonkeyPatch):
  """By its samples, whatever their settings and seeds, and by who asks again; their texts are those of each alone."""
  requests, _ = expected()
  some = [requests[3]._replace(seed=seed, sampling=how) for seed in range(3) for how in SETTINGS]
  texts = [alone(request) for request in some]
  reads = count_reads(monkeypatch)
  rows = model().scheduler(LANES, most=2 * LANES)
  assert finish(rows, some) == texts and len(reads) == 1
  assert finish(rows, some[:1]) == texts[:1] and len(reads) == 1
  finish(rows, [requests[4]])
  assert len(reads) == 2


def test_contexts_keep_within_their_bytes(monkeypatch: pytest.MonkeyPatch):
  requests, texts = expected()
  reads = count_reads(monkeypatch)
  rows = model().scheduler(LANES)
  finish(rows, requests[:1])
  one = rows.contexts.bytes
  rows = model().scheduler(LANES, context_bytes=3 * one)
  for request, text in zip(requests, texts):
    assert finish(rows, [request]) == [text] and rows.contexts.bytes <= 3 * one
  reads.clear()
  finish(rows, requests[-1:])
  assert not reads  # asked for last
  finish(rows, requests[:1])
  assert len(reads) == 1
  rows = model().scheduler(LANES, context_bytes=0)
  assert finish(rows, requests[:2] * 2) == texts[:2] * 2 and rows.contexts.bytes == 0


def read(prompt: prompt_lib.Prompt) -> decode.State:
  reading = prefill.Prefill(model().runner, prompt, model().tokenizer.specials.pad, 8)
  while not reading.done:
    reading.advance()
  return reading.state()


@pytest.mark.parametrize("tokens", [1, 64, 10**6])
def test_groups_of_layers_read_as_all_at_once(monkeypatch: pytest.MonkeyPatch, tokens: int):
  """To rounding: what is read is near what one program of all layers leaves."""
  monkeypatch.setattr(prefill, "TOKENS", tokens)
  ask = model()
  for request in expected()[0][:4]:
    batch, rows = decode.make_rows([request.prompt], [1], ask.tokenizer.specials.pad)
    whole = ask.runner.run(decode.prefill, batch, rows, new_tokens=8, all_slots=batch.tokens.shape[1])
    used = len(request.prompt.tokens) - 1
    for ours, theirs in zip(jax.tree.leaves(read(request.prompt)), jax.tree.leaves(whole), strict=True):
      if ours.ndim == 4:
        ours, theirs = ours[:, :, :used], theirs[:, :, :used]
      np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_long_prompt_does_not_stall_who_decodes():
  """Between two of its tokens a request waits for one group of layers, not for a prompt."""
  requests, texts = expected()
  ask, rows = model(), model().scheduler(LANES)
  first = rows.submit(requests[0]._replace(limit=24, sampling=sampling.Sampling(temperature=1.5, min_tokens=24)))
  rows.advance()
  long = prompt_lib.fill(ask.encode("a" * 34 + "[MASK]"), ask.tokenizer.specials, ask.config.position_kind)
  second = rows.submit(lanes.Request(long, 3))
  per_round = []
  while not second.tokens:
    per_round.append(len(first.tokens))
    rows.advance()
  assert per_round == list(range(1, 1 + ask.config.num_layers // prefill.layers_at_once(ask.config.num_layers, 64)))


def test_layers_at_once():
  assert [prefill.layers_at_once(28, n) for n in (32, 64, 128, 256, 512, 2048)] == [28, 28, 14, 7, 2, 1]
  assert prefill.layers_at_once(7, 128) == 1


def test_why_a_beginning_is_not_shared():
  """What the first tokens leave in the cache depends, above the first layer, on those that follow."""
  ask = model()
  kind, specials = ask.config.position_kind, ask.tokenizer.specials
  first, second = (read(prompt_lib.fill(ask.encode(text), specials, kind)) for text in ("abcdefgh x", "abcdefgh y"))
  below, above = (
    [np.asarray(state.cache[layer].key.kept)[0, :, :8] for state in (first, second)]
    for layer in ("layers_0", "layers_1")
  )
  np.testing.assert_array_equal(*below)
  assert np.abs(above[0] - above[1]).max() > 1e-3


def test_tells_how_likely_tokens_were():
  """By the model alone, as scoring says, whatever was drawn; for those who ask, and as many alternatives as asked."""
  ask, rows = model(), model().scheduler(LANES)
  how = sampling.Sampling(temperature=2.0, logit_bias=((15, 2.0),))
  prompts = [request.prompt for request in expected()[0][:3]]
  answers = [
    rows.submit(lanes.Request(prompt, 6, how, i, tops)) for i, (prompt, tops) in enumerate(zip(prompts, (3, None, 0)))
  ]
  while rows.busy:
    rows.advance(16)
  assert [len(each.told) for each in answers] == [len(answers[0].tokens), 0, len(answers[2].tokens)]
  for answer, tops in ((answers[0], 3), (answers[2], 0)):
    extended = prompt_lib.extend(answer.request.prompt, answer.tokens[:-1])
    [scored] = ask.score_rows([score.Row(extended, answer.tokens)])
    np.testing.assert_allclose([each.logprob for each in answer.told], scored.log_probs, atol=1e-4)
    for told, token in zip(answer.told, answer.tokens):
      values = [value for _, value in told.likeliest]
      assert len(values) == tops and values == sorted(values, reverse=True)
      assert token not in dict(told.likeliest) or dict(told.likeliest)[token] == told.logprob


def test_a_bias_is_added():
  ask = model()
  answers = ask.generate(["abc"] * 2, 5, [sampling.Sampling(logit_bias=((12, 100.0),)), sampling.Sampling()])
  assert answers[0].tokens == [[12] * 5] and answers[1] == ask.generate(["abc"], 5)[0]
  for bias, words in (((64, 1.0), "token 64 is no id"), ((1, 101.0), "logit_bias of token 1"), ((-1, 1.0), "token")):
    with pytest.raises(errors.InputError, match=words):
      ask.generate(["abc"], 5, sampling.Sampling(logit_bias=(bias,)))
