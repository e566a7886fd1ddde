"""Every field of the answers, as the official client's types have them; golden blanks, filled through the server."""

import openai
import pydantic
import pytest
import golden_models
from serve import running as running_lib

from glmjax.infer import engine
from glmjax.infer import sampling

OURS = {"max_model_len"}  # that OpenAI's models do not have


@pytest.fixture(scope="module")
def running():
  with running_lib.Running() as running:
    yield running


@pytest.fixture(scope="module")
def client(running) -> openai.OpenAI:
  return openai.OpenAI(
    base_url=f"{running.address}/v1", api_key="none", max_retries=0, _strict_response_validation=True
  )


def unknown(value) -> set[str]:
  """Returns the names of fields that the client's types do not have, at any depth."""
  if isinstance(value, list):
    return set().union(*map(unknown, value))
  if not isinstance(value, pydantic.BaseModel):
    return set()
  return {*(value.model_extra or ())}.union(*(unknown(getattr(value, name)) for name in type(value).model_fields))


GIVEN = {"model": "letters", "seed": 1, "n": 2, "max_tokens": 6, "temperature": 0.7, "top_p": 0.9, "stop": ["zz"]}
GIVEN |= {"logit_bias": {"12": 1.5}, "frequency_penalty": 0, "presence_penalty": 0, "user": "somebody"}
EOP = running_lib.Letters.specials.eop
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("logprobs", [None, 2])
def test_completions(client, logprobs):
  answer = client.completions.create(**GIVEN, prompt=["hello", "ho"], logprobs=logprobs)
  assert not unknown(answer) and answer.object == "text_completion" and answer.id.startswith("cmpl-")
  assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and answer.created > 1.7e9
  for choice in answer.choices:
    assert choice.finish_reason in ("stop", "length") and (choice.logprobs is None) == (logprobs is None)


@pytest.mark.parametrize("logprobs", [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}])
def test_chat_completions(client, logprobs):
  answer = client.chat.completions.create(**GIVEN, messages=MESSAGES, response_format={"type": "text"}, **logprobs)
  assert not unknown(answer) and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
  for choice in answer.choices:
    assert choice.message.role == "assistant" and (choice.logprobs is None) == (not logprobs)
    for each in choice.logprobs.content if choice.logprobs else ():
      assert bytes(each.bytes).decode() == each.token and len(each.top_logprobs) == logprobs.get("top_logprobs", 0)


@pytest.mark.parametrize("more", [{"logprobs": True}, {}, {"logit_bias": {str(EOP): 100}}])
def test_chat_streams(client, more):
  """The first chunk tells whose the message is, and no other does, though it has no text, as where nothing is said."""
  chunks = list(
    client.chat.completions.create(
      **{**GIVEN, **more}, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
  )
  assert not unknown(chunks) and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
  assert len({chunk.id for chunk in chunks}) == 1
  assert (chunks[-1].usage.completion_tokens > 0) == ("logit_bias" not in more)
  for i in range(2):
    mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == i]
    assert [choice.delta.role for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
    assert [choice.finish_reason is not None for choice in mine] == [False] * (len(mine) - 1) + [True]


def test_models(client):
  [model] = client.models.list()
  assert model.object == "model" and unknown(model) == OURS
  assert client.models.retrieve("letters") == model
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve("a/b")


@pytest.mark.parametrize(
  "kind, wrong", [("BadRequestError", {"n": 0}), ("NotFoundError", {"model": "other"}), ("BadRequestError", {"x": 1})]
)
def test_errors(client, kind, wrong):
  with pytest.raises(getattr(openai, kind)) as caught:
    client.completions.create(**{**GIVEN, "extra_body": wrong}, prompt="a")
  assert caught.value.type == "invalid_request_error" and caught.value.body["message"]


class Numbers:
  """The golden model's ids, written as numbers."""

  num_image_tokens = 0

  def __init__(self, specials, vocab_size: int) -> None:
    self.specials, self.vocab_size = specials, vocab_size

  def encode(self, text, allow_special=False):
    return [int(each) for each in text.split()]

  def decode(self, ids):
    return " ".join(map(str, ids))

  def decode_bytes(self, ids, show_special=False, dummy_prefix=True):
    return self.decode(ids).encode()


CASES = golden_models.load("glm130b_tiny")[0]["fill_blanks"]


@pytest.mark.parametrize("name", CASES)
def test_golden_blanks(name):
  case, specials = CASES[name], golden_models.specials("glm130b_tiny")
  config = golden_models.config("glm130b_tiny", max_length=case["out_seq_length"])
  answering = engine.Engine(
    golden_models.runner("glm130b_tiny", None, max_length=case["out_seq_length"]),
    Numbers(specials, config.vocab_size),
    stop_tokens=(specials.eop, specials.eos),
    suppressed_tokens=(),
  )
  with running_lib.Running(answering) as running:
    text = case["raw_text"] if "MASK]" in case["raw_text"] else case["raw_text"] + " [gMASK]"
    given = {"text": text, "max_tokens": config.max_length, "temperature": 0}
    status, answer = running.post("/v1/fill", given)
  [expected] = answering.generate([text], config.max_length, sampling.Sampling(temperature=0.0))
  [choice] = answer["choices"]
  assert status == 200 and (choice["text"], choice["pieces"]) == (expected.text, expected.pieces)
  assert [[choice["text"]], [choice["pieces"]]] == [case["answers"], case["blanks"]]
