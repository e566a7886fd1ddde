"""The server over a real socket: OpenAI's client, blanks, errors, clients that vanish."""

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator

import openai
import pydantic
import pytest
from serve import running as running_lib

from glmjax.infer import filling
from glmjax.infer import lanes
from glmjax.infer import sampling
from glmjax.infer import scheduler
from glmjax.serve import app
from glmjax.serve import run
from glmjax.serve import service
from glmjax.serve import wire

MASK = running_lib.Letters.specials.mask
BIASES = {str(token): "much" for token in range(100_000)}


@pytest.fixture(scope="module")
def running() -> Iterator[running_lib.Running]:
  with running_lib.Running() as running:
    yield running


@pytest.fixture(scope="module")
def client(running) -> openai.OpenAI:
  return openai.OpenAI(base_url=f"{running.address}/v1", api_key="none", max_retries=0)


def test_lists_its_model(client):
  assert [model.id for model in client.models.list()] == ["letters"]


def test_a_completion_is_what_the_engine_generates(running, client):
  answer = client.completions.create(model="letters", prompt="hello", max_tokens=7, seed=5, temperature=1.5)
  [expected] = running.server.engine.generate(["hello"], 7, sampling.Sampling(temperature=1.5), 5)
  [choice] = answer.choices
  assert choice.text == expected.pieces[0] and choice.finish_reason == expected.finish_reason
  assert answer.usage.completion_tokens == len(expected.tokens[0])
  assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_adds_up_to_the_whole(client):
  given = {"model": "letters", "prompt": "hello", "max_tokens": 9, "seed": 3, "n": 3}
  whole = client.completions.create(**given)
  texts, reasons = {}, {}
  for chunk in client.completions.create(**given, stream=True, stream_options={"include_usage": True}):
    for choice in chunk.choices:
      texts[choice.index] = texts.get(choice.index, "") + choice.text
      reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
  assert [(texts[i], reasons[i]) for i in range(3)] == [(each.text, each.finish_reason) for each in whole.choices]
  assert len(set(texts.values())) > 1 and chunk.usage == whole.usage


def test_a_conversation(running, client):
  messages = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": [{"type": "text", "text": "and"}]},
  ]
  given = {"model": "letters", "messages": messages, "max_tokens": 8, "seed": 1}
  whole = client.chat.completions.create(**given, logprobs=True, top_logprobs=2)
  [choice] = whole.choices
  assert choice.message.role == "assistant" and len(choice.logprobs.content) >= len(choice.message.content)
  assert all(len(each.top_logprobs) == 2 for each in choice.logprobs.content)
  chunks = list(client.chat.completions.create(**given, stream=True))
  assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
  assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_stop_strings_and_biases(client):
  given = {"model": "letters", "prompt": "hello", "max_tokens": 12, "temperature": 0.0}
  given["extra_body"] = {"min_tokens": 12}
  whole = client.completions.create(**given).choices[0].text
  assert len(whole) > 4
  cut = client.completions.create(**given, stop=[whole[3:5]]).choices[0]
  assert cut.text == whole[: whole.find(whole[3:5])] and cut.finish_reason == "stop"
  answer = client.completions.create(**given | {"max_tokens": 60}, stop=[whole[7:9]])  # comes several tokens at a time
  assert answer.usage.completion_tokens == whole.find(whole[7:9]) + 2, "tokens behind it are none of the answer"
  assert client.completions.create(**given, logit_bias={"12": 100}).choices[0].text == "c" * 12


def test_log_probabilities(client):
  [choice] = client.completions.create(model="letters", prompt="abc", max_tokens=4, temperature=0, logprobs=3).choices
  logprobs = choice.logprobs
  assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
  assert all(3 <= len(top) <= 4 for top in logprobs.top_logprobs) and max(logprobs.token_logprobs) <= 0
  assert all(
    top[token] == one for token, one, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs)
  )


def test_blanks(running):
  text = "ab[MASK]cd[MASK]ef"
  status, answer = running.post("/v1/fill", {"text": text, "n": 3, "max_tokens": 5, "seed": 7})
  assert status == 200 and answer["object"] == "fill" and len(answer["choices"]) == 3
  expected = running.server.engine.generate([text] * 3, 5, sampling.Sampling(temperature=1.0), 7)
  for choice, filled in zip(answer["choices"], expected):
    assert (choice["text"], choice["pieces"]) == (filled.text, filled.pieces)
    assert [choice["text"][first:end] for first, end in choice["places"]] == choice["pieces"]
  assert running.post("/v1/fill", {"text": "no blank"})[0] == 400


def test_tokens(running):
  status, answer = running.post("/tokenize", {"prompt": "abc"})
  assert status == 200 and answer["tokens"] == [10, 11, 12] and answer["count"] == 3
  assert running.post("/v1/detokenize", {"tokens": [10, 11]}) == (200, {"prompt": "ab"})


def test_what_a_remote_tokenizer_asks(running):
  specials = running.server.engine.tokenizer.specials
  for prefix in ("", "/v1"):
    status, text = running.get(f"{prefix}/tokenizer_info")
    info = json.loads(text)
    assert status == 200
    for name, token in (("bos_token", specials.sop), ("eos_token", specials.eop)):
      assert running.post(f"{prefix}/tokenize", {"prompt": info[name]})[1]["tokens"] == [token]


@pytest.mark.parametrize(
  "path, body, status, words",
  [
    ("/v1/completions", {"prompt": "a", "max_tokens": "7"}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "n": 17}, 400, "n: "),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "max_token": 1}, 400, "max_token: Extra inputs"),
    ("/v1/completions", {"prompt": "a", "echo": 1}, 400, "echo"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0"),
    ("/v1/completions", {"prompt": [70], "max_tokens": 0, "echo": True, "logprobs": 1}, 400, "70 is no id"),
    ("/v1/completions", {"prompt": "a" * 63, "max_tokens": 0, "echo": True, "logprobs": 1}, 400, "must leave 0 to"),
    ("/v1/completions", {"prompt": "a", "stop": ["x"] * 17}, 400, "stop"),
    ("/v1/completions", {"prompt": ["a"] * 257}, 400, "257 answers are asked for at once, and 256 may wait"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"64": 1}}, 400, "64 is no id"),
    ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "no model 'other'"),
    ("/v1/completions", {"prompt": "a" * 70}, 400, "must leave 1 to the answer"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 50}]}, 400, "must leave 16 to"),
    ("/v1/completions", {"prompt": [70]}, 400, "70 is no id"),
    ("/v1/completions", {"prompt": "a", "min_tokens": 20}, 400, "min_tokens"),
    ("/v1/completions", b"{", 400, "JSON"),
    ("/v1/completions", b'{"prompt": "\xff"}', 400, ""),
    ("/v1/completions", b'{"prompt": ' + b"[" * 5000, 400, ""),
    ("/v1/completions", b"x" * 30_000, 413, "more than 20000 bytes"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, 400, "role"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, 400, "the last one must be"),
    (
      "/v1/chat/completions",
      {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}},
      400,
      "response_format",
    ),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": []}, 400, "tools"),
    ("/v1/nothing", {}, 404, "Not Found"),
    ("/v1/completions", {"prompt": [{}] * 4_000}, 400, "prompt"),
    ("/v1/completions", {"prompt": [[]] * 4_000, "n": 16}, 400, "64000 answers are asked for at once"),
    ("/v1/completions", {"prompt": "a", "repetition_penalty": 1e-3}, 400, "repetition_penalty"),
    ("/v1/completions", {"prompt": [MASK, 20, MASK], "max_tokens": 3}, 400, "2 masks among its ids: /v1/fill"),
    ("/v1/completions", dict.fromkeys(map(str, range(200)), 1), 400, "fields: 200 are given"),
    ("/tokenize", {"prompt": "a", "model": "other"}, 404, "no model 'other'"),
  ],
)
def test_mistakes_are_told(running, path, body, status, words):
  got, answer = running.post(path, body)
  assert got == status and words in answer["error"]["message"], answer
  assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_clients_that_vanish_leave_their_lanes(running, client):
  body = json.dumps({"prompt": "a", "max_tokens": 40, "min_tokens": 40, "stream": True}).encode()
  head = (
    f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
  )
  for i in range(12):
    with socket.create_connection(running.socket.getsockname()) as connection:
      connection.sendall(head.encode() + (body if i % 3 else body.replace(b"true", b"0   ")))
      if i % 2:
        connection.recv(200)
  running.idle()
  assert client.completions.create(model="letters", prompt="hello", max_tokens=3).choices


def test_half_sent_requests_end():
  half = b"POST /v1/completions HTTP/1.1\r\nHost:"
  with running_lib.Running(seconds=1.0) as running:
    with socket.create_connection(running.socket.getsockname()) as connection:
      connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
      connection.settimeout(60)
      assert b"408" in connection.recv(4096)
    for begun in (b"", half):
      with socket.create_connection(running.socket.getsockname()) as connection:
        connection.sendall(begun)
        connection.settimeout(60)
        assert connection.recv(4096) == b""
    with socket.create_connection(running.socket.getsockname()) as connection:  # behind a whole one
      connection.settimeout(60)
      connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
      assert b"200 OK" in connection.recv(4096)
      connection.sendall(half)
      while connection.recv(4096):
        pass


def test_a_model_that_fails_before_its_first_answer(monkeypatch):
  """What is asked is answered all the same, or fails in words; nobody waits for ever."""

  def fail(self) -> None:
    raise RuntimeError("no memory")

  with monkeypatch.context() as patch:
    patch.setattr(scheduler.Scheduler, "warm", fail)
    with running_lib.Running() as running:
      status, answer = running.post("/v1/completions", {"prompt": "hello", "max_tokens": 3, "min_tokens": 3})
      assert status == 200 and answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("prompt", [[], [[]], [""]])
def test_no_prompt_at_all(running, prompt):
  status, answer = running.post("/v1/completions", {"prompt": prompt, "max_tokens": 3})
  if prompt == []:
    assert status == 400 and "prompt" in answer["error"]["message"]
  else:
    assert status == 200 and len(answer["choices"]) == 1


def test_many_at_once_get_what_each_gets_alone(running, client):
  given = [{"model": "letters", "prompt": "abcdefgh"[i % 8] * (1 + i), "max_tokens": 6, "seed": i} for i in range(24)]
  alone = [client.completions.create(**each).choices[0].text for each in given]
  texts: dict[int, str] = {}

  def ask(i: int) -> None:
    texts[i] = client.completions.create(**given[i]).choices[0].text

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [texts[i] for i in range(24)] == alone
  running.idle()


def test_a_prompt_that_is_too_long_has_its_code(running):
  _, answer = running.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 50}]})
  assert answer["error"]["code"] == "context_length_exceeded"


def test_the_page(running):
  with urllib.request.urlopen(running.address, timeout=30) as answer:
    policy = answer.headers["Content-Security-Policy"]
    assert b"<script" in answer.read() and "default-src 'none'" in policy and "unsafe" not in policy


def test_keys(tmp_path):
  """What is asked without one is not even read."""
  (tmp_path / "keys").write_text("\ufeffone\n\n  two \nключ\n", encoding="utf-8")
  keys = run.read_keys(tmp_path / "keys")
  assert keys == ["one", "two", "ключ"]
  with running_lib.Running(keys=keys) as running:
    body = {"prompt": "a", "max_tokens": 1}
    for header in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}):
      for each in (body, {"max_tokens": -1}, b"x" * 30_000):
        status, answer = running.post("/v1/completions", each, **header)
        assert status == 401 and "Bearer KEY" in answer["error"]["message"]
      assert running.post("/tokenize", {"prompt": "a"}, **header)[0] == 401
    assert running.get("/v1/models")[0] == 401
    for key in keys:
      assert running.post("/v1/completions", body, Authorization=f"Bearer {key}".encode().decode("latin-1"))[0] == 200
    assert [running.get(path)[0] for path in ("/health", "/metrics", "/", "/openapi.json")] == [200] * 4


def test_mistakes_are_counted_once():
  """Not each of a hundred thousand."""
  for body in ({"prompt": [{}] * 100_000}, {"prompt": [[{}] * 100_000]}, {"prompt": "a", "logit_bias": BIASES}):
    with pytest.raises(pydantic.ValidationError) as found:
      wire.Completion.model_validate(body)
    assert len(found.value.errors()) < 6
  with pytest.raises(pydantic.ValidationError) as found:
    wire.Chat.model_validate({"messages": [{}] * 100_000})
  assert len(found.value.errors()) < 6


def test_more_log_probabilities_of_prompts_than_are_told(running, monkeypatch):
  body = {"prompt": ["abcd", "ab"], "max_tokens": 0, "echo": True, "logprobs": 4, "n": 2}
  assert running.post("/v1/completions", body)[0] == 200
  monkeypatch.setattr(app, "_MOST_TOLD", 59)
  status, answer = running.post("/v1/completions", body)
  assert status == 400 and "60 log-probabilities of prompts are asked for" in answer["error"]["message"]


def test_logits_that_are_not_finite_fail_one_answer_alone(running, monkeypatch):
  """A request of several fails with it; others go on."""
  sick, plain = filling.turn_seed(13, 0), lanes.Lanes._news
  body = {"prompt": "abc", "max_tokens": 12, "min_tokens": 12}
  alone = running.post("/v1/completions", {**body, "seed": 100})
  asked = {12: 3, 100: 1}
  got: dict[int, tuple[int, dict]] = {}

  def news(self, told):
    return [each._replace(finite=self.requests[each.lane].seed != sick) for each in plain(self, told)]

  def ask(seed: int) -> None:
    got[seed] = running.post("/v1/completions", {**body, "seed": seed, "n": asked[seed]})

  with monkeypatch.context() as patch:
    patch.setattr(lanes.Lanes, "_news", news)
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in asked]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert got[12][0] == 500 and "not finite" in got[12][1]["error"]["message"]
  assert got[100][0] == 200 and got[100][1]["choices"] == alone[1]["choices"]
  running.idle()


def test_nobody_s_jobs_keep_out_another_s(running):
  """Of a queue that is full a key has its share; and what needs no lane waits for none."""
  made = service.Service(running.server.engine, scheduler.Capacity(4), 4, lambda events: None)
  row = made.engine.encode("ab")

  def submit(key: str, **more) -> bool:
    try:
      made.submit(service.Job(row, **{"max_tokens": 2, "key": key, **more}))
    except service.Refused:
      return False
    return True

  assert [submit("a") for _ in range(6)] == [True] * 4 + [False] * 2
  assert [submit("b") for _ in range(3)] == [True, True, False]
  assert [submit("c") for _ in range(3)] == [True, False, False] and not submit("a")
  assert [job.key for job in made._next_jobs()] == ["a", "b", "c", "a"]
  made = service.Service(running.server.engine, scheduler.Capacity(1), 9, lambda events: None)
  assert submit("a") and submit("a") and submit("a", max_tokens=0, scored=row) and submit("b", max_tokens=0)
  assert [job.max_tokens for job in made._next_jobs()] == [2, 0]


def test_the_queue_has_an_end_and_an_ending_server_takes_nothing():
  with running_lib.Running(most_waiting=0) as running:
    assert running.post("/v1/completions", {"prompt": "a"})[0] == 503
  with running_lib.Running() as running:
    answers = []
    body = {"prompt": "a", "max_tokens": 30, "min_tokens": 30, "seed": 1}
    thread = threading.Thread(target=lambda: answers.append(running.post("/v1/completions", body)))
    thread.start()
    while not running.server.service.running:
      time.sleep(0.005)
    ends = threading.Thread(target=running.server.service.end, args=(30,))
    ends.start()
    while not running.server.service._ending:
      time.sleep(0.005)
    assert running.post("/v1/completions", body)[0] == 503
    thread.join()
    ends.join()
    assert answers[0][0] == 200 and answers[0][1]["usage"]["completion_tokens"] == 30
