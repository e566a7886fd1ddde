"""Log-probabilities of prompts: OpenAI's legacy completions with echo, as the engine scores a text."""

import itertools
import threading

import numpy as np
import openai
import pytest
from serve import running as running_lib

from glmjax.infer import sampling
from glmjax.infer import scheduler
from glmjax.serve import service as service_lib

TEXTS = ["On day 7 the quick brown fox", "小河边的柳树🌿发芽了", "fox", "x" * 31, "x" * 32, "On day 12 " * 9]


@pytest.fixture(scope="module")
def running(untrained):
  with running_lib.Running(untrained) as running:
    yield running


@pytest.fixture(scope="module")
def client(running) -> openai.OpenAI:
  return openai.OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0)


def ask(client, prompt, **settings):
  given = {"model": "letters", "echo": True, "logprobs": 3, "max_tokens": 1, "seed": 1, **settings}
  return client.completions.create(prompt=prompt, **given)


@pytest.mark.parametrize("text", TEXTS)
def test_echo_is_never_silently_without_the_prompt_s_log_probabilities(running, client, text):
  """What llama.cpp's issue 27174 is about: evaluations then compare sums of nothing."""
  engine = running.server.engine
  [score], ids = engine.score([text]), engine.tokenizer.encode(text)
  answer = ask(client, text)
  [choice] = answer.choices
  told = choice.logprobs
  assert choice.text.startswith(text) and len(told.tokens) == len(ids) + 1 == answer.usage.prompt_tokens + 1
  assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
  np.testing.assert_allclose(told.token_logprobs[1:-1], score.log_probs[1:], atol=1e-4)
  best = [one == max(top.values()) for one, top in zip(told.token_logprobs[1:-1], told.top_logprobs[1:-1])]
  assert best == score.correct[1:].tolist()
  assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
  for token, one, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs))[1:]:
    assert 3 <= len(top) <= 4 and top[token] == one and sum(map(np.exp, top.values())) < 1.001


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_are_where_tokens_begin(client, text):
  told = ask(client, text, max_tokens=0).choices[0].logprobs
  for token, (first, end) in zip(told.tokens, itertools.pairwise([*told.text_offset, len(text)])):
    assert token.startswith("bytes:") or text[first:end] == token
  assert told.text_offset == sorted(told.text_offset)
  assert "".join(each for each in told.tokens if not each.startswith("bytes:")) == text.replace("🌿", "")


def test_a_text_that_begins_with_sop_has_all_of_its_tokens_told(running, client):
  engine = running.server.engine
  ids = engine.tokenizer.encode(TEXTS[0])
  [choice] = ask(client, [engine.tokenizer.specials.sop, *ids]).choices
  [score] = engine.score([TEXTS[0]])
  np.testing.assert_allclose(choice.logprobs.token_logprobs[1:-1], score.log_probs, atol=1e-4)
  assert choice.logprobs.tokens[0] == "<sop>" and choice.text.startswith(TEXTS[0])
  alone = ask(client, TEXTS[0], max_tokens=9)
  assert ask(client, [engine.tokenizer.specials.sop, *ids], max_tokens=9).choices[0].text == alone.choices[0].text
  assert ask(client, [engine.tokenizer.specials.sop], max_tokens=0).choices[0].logprobs.token_logprobs == [None]


def test_without_tokens_to_generate_the_prompt_is_all(client):
  for logprobs in (None, 0, 2):
    answer = ask(client, TEXTS[0], max_tokens=0, logprobs=logprobs)
    assert answer.choices[0].text == TEXTS[0] and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 0


def test_several_prompts_and_answers(running, client):
  ids = [running.server.engine.tokenizer.encode(text) for text in TEXTS]
  alone = [ask(client, text).choices[0] for text in TEXTS]
  for prompts in (TEXTS, ids):
    answer = ask(client, prompts, n=2)
    assert [choice.index for choice in answer.choices] == list(range(2 * len(TEXTS)))
    for choice, one in zip(answer.choices, [each for each in alone for _ in range(2)]):
      assert choice.logprobs.token_logprobs[:-1] == one.logprobs.token_logprobs[:-1]


def test_a_stream_adds_up(client):
  given = {"prompt": TEXTS[:2], "max_tokens": 6, "n": 2, "temperature": 0.5}
  whole = ask(client, **given)
  text, lists = [""] * 4, [{} for _ in range(4)]
  for chunk in ask(client, **given, stream=True):
    for choice in chunk.choices:
      text[choice.index] += choice.text
      for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
        lists[choice.index].setdefault(name, []).extend(values)
  assert text == [choice.text for choice in whole.choices]
  assert lists == [choice.logprobs.model_dump() for choice in whole.choices]


def test_offsets_count_from_the_prompt_without_echo_too(client):
  given = {"max_tokens": 5, "extra_body": {"min_tokens": 5}}
  echoed, plain = (ask(client, TEXTS[0], echo=echo, **given).choices[0] for echo in (True, False))
  assert plain.logprobs.text_offset == echoed.logprobs.text_offset[-5:] and plain.text == echoed.text[len(TEXTS[0]) :]


def test_scores_are_the_same_among_others_and_disturb_nobody(client):
  alone = [ask(client, text, max_tokens=0).choices[0].logprobs for text in TEXTS]
  given = {"model": "letters", "prompt": "On day", "max_tokens": 60, "seed": 4, "extra_body": {"min_tokens": 60}}
  text = client.completions.create(**given).choices[0].text
  streams, scored = [], []
  threads = [
    threading.Thread(target=lambda: streams.append(client.completions.create(**given).choices[0].text))
    for _ in range(3)
  ]
  threads += [
    threading.Thread(target=lambda i=i: scored.append((i, ask(client, TEXTS[i], max_tokens=0).choices[0].logprobs)))
    for i in (*range(6), *range(6))
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert streams == [text] * 3 and len(scored) == 12
  assert all(told == alone[i] for i, told in scored)


def test_a_stream_waits_for_one_score_at_most(untrained):
  rounds = []
  service = service_lib.Service(untrained, scheduler.Capacity(4), most_waiting=64, deliver=rounds.append)
  stream = service_lib.Job(untrained.encode("On day"), max_tokens=200, sampling=sampling.Sampling(min_tokens=200))
  service.submit(stream)
  texts = [untrained.tokenizer.encode(f"On day {i} the quick brown fox") for i in range(12)]
  for text in texts:
    service.submit(service_lib.Job([], max_tokens=0, scored=text, logprobs=0))
  service.start()
  assert service.end(300)
  told = [
    [type(event) for event in events if event.job is stream or isinstance(event, service_lib.Scored)]
    for events in rounds
  ]
  assert sum(each.count(service_lib.Scored) for each in told) == 12
  streaming = told[: next(i for i, each in enumerate(told) if service_lib.End in each)]
  assert sum(service_lib.Scored in each for each in streaming) > 1, "the stream was over too soon"
  for each in streaming:
    assert each.count(service_lib.Scored) <= 1 and service_lib.Part in each
