"""What requests hold, checked by pydantic: OpenAI's fields, and ours for filling blanks.

A field that OpenAI has and a GLM does not (tools, say) is refused by name, and so is one that nobody knows.
"""

from typing import Annotated, Any, Literal

import pydantic

from glmjax.infer import lanes
from glmjax.infer import pieces
from glmjax.infer import sampling as sampling_lib

MOST_ANSWERS = 16  # of one request
_MOST_FIELDS = 100  # of a body: every wrong one is told
_MOST_BIASES = 10_000  # which are looked at whenever a lane is taken
_IGNORED = ("user", "store", "metadata", "service_tier")  # change no answer
_SEED = {"ge": -(1 << 63), "lt": 1 << 63}

Stop = Annotated[list[str], pydantic.Field(max_length=pieces.MOST_STOPS)]
# Lists that are wrong at one place are not looked at further: all of a million mistakes would be told.
_ONE_MISTAKE = pydantic.Field(fail_fast=True)
Texts, Ids = Annotated[list[str], _ONE_MISTAKE], Annotated[list[int], _ONE_MISTAKE]


class Request(pydantic.BaseModel):
  """Holds what all requests for answers have."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True)

  model: str | None = None
  n: int = pydantic.Field(1, ge=1, le=MOST_ANSWERS)
  temperature: float = pydantic.Field(1.0, ge=0, le=100)
  top_p: float = pydantic.Field(1.0, gt=0, le=1)
  top_k: int = pydantic.Field(0, ge=0)
  seed: int | None = pydantic.Field(None, **_SEED)
  min_tokens: int = pydantic.Field(0, ge=0)
  no_repeat_ngram: int = pydantic.Field(0, ge=0, le=64)
  repetition_penalty: float = pydantic.Field(1.0, ge=sampling_lib.LEAST_PENALTY, le=sampling_lib.MOST_PENALTY)
  logit_bias: dict[str, float] | None = None

  @pydantic.model_validator(mode="before")
  @classmethod
  def _without_ignored(cls, given: Any) -> Any:
    if not isinstance(given, dict):
      return given
    for what, some, most in (("fields", given, _MOST_FIELDS), ("logit_bias", given.get("logit_bias"), _MOST_BIASES)):
      if isinstance(some, dict) and len(some) > most:
        raise ValueError(f"{what}: {len(some)} are given, and {most} are taken")
    return {name: value for name, value in given.items() if name not in _IGNORED and value is not None}

  def sampling(self) -> sampling_lib.Sampling:
    """Returns how tokens are drawn; raises InputError for what cannot be."""
    bias = tuple((_token(token), value) for token, value in (self.logit_bias or {}).items())
    return sampling_lib.Sampling(
      self.temperature, self.top_k, self.top_p, self.min_tokens, self.no_repeat_ngram, self.repetition_penalty, bias
    )


def _token(name: str) -> int:
  return int(name) if name.isdecimal() and len(name) < 12 else -1


class StreamOptions(pydantic.BaseModel):
  """Says what is told besides the answer."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True)

  include_usage: bool = False


class Streaming(Request):
  """Holds what those have that can be streamed."""

  stream: bool = False
  stream_options: StreamOptions | None = None
  stop: str | Stop | None = None

  def stops(self) -> list[str]:
    """Returns the strings that end an answer."""
    return [self.stop] if isinstance(self.stop, str) else self.stop or []


class TextPart(pydantic.BaseModel):
  """Holds a part of a message that is text; there are no others."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True)

  type: Literal["text"]
  text: str


class Message(pydantic.BaseModel):
  """Holds one message of a conversation."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True)

  role: Literal["system", "developer", "user", "assistant"]
  content: str | Annotated[list[TextPart], _ONE_MISTAKE]
  name: str | None = None

  @property
  def text(self) -> str:
    """The message's text."""
    return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(pydantic.BaseModel):
  """Asks for text; a GLM knows no other format."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True)

  type: Literal["text"]


class Chat(Streaming):
  """Holds the body of POST /v1/chat/completions."""

  messages: list[Message] = pydantic.Field(min_length=1, fail_fast=True)
  temperature: float = pydantic.Field(0.95, ge=0, le=100)
  top_p: float = pydantic.Field(0.7, gt=0, le=1)
  top_k: int = pydantic.Field(50, ge=0)
  max_tokens: int | None = pydantic.Field(None, ge=1)
  max_completion_tokens: int | None = pydantic.Field(None, ge=1)
  logprobs: bool = False
  top_logprobs: int = pydantic.Field(0, ge=0, le=lanes.MOST)
  response_format: ResponseFormat | None = None
  frequency_penalty: float = pydantic.Field(0.0, ge=0, le=0)
  presence_penalty: float = pydantic.Field(0.0, ge=0, le=0)


class Completion(Streaming):
  """Holds the body of POST /v1/completions."""

  prompt: str | Texts | Ids | Annotated[list[Ids], _ONE_MISTAKE]
  max_tokens: int = pydantic.Field(16, ge=0)
  echo: bool = False
  logprobs: int | None = pydantic.Field(None, ge=0, le=lanes.MOST)
  frequency_penalty: float = pydantic.Field(0.0, ge=0, le=0)
  presence_penalty: float = pydantic.Field(0.0, ge=0, le=0)
  suffix: None = None
  best_of: Literal[1] = 1

  @pydantic.field_validator("prompt")
  @classmethod
  def check_prompt(cls, prompt: Any) -> Any:
    """Refuses a list of no prompts."""
    if prompt == []:
      raise ValueError("the list of prompts is empty")
    return prompt

  @property
  def count(self) -> int:
    """How many prompts there are."""
    return 1 if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else len(self.prompt)


class Fill(Request):
  """Holds the body of POST /v1/fill."""

  text: str
  max_tokens: int = pydantic.Field(64, ge=1)


class Tokenize(pydantic.BaseModel):
  """Holds the body of POST /tokenize."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True)

  model: str | None = None
  prompt: str
  add_special_tokens: bool = False


class Detokenize(pydantic.BaseModel):
  """Holds the body of POST /detokenize."""

  model_config = pydantic.ConfigDict(extra="forbid", strict=True)

  model: str | None = None
  tokens: Ids


class Failure(pydantic.BaseModel):
  """Says what is wrong with a request, or with the server."""

  message: str
  type: Literal["invalid_request_error", "server_error"]
  param: str | None
  code: str | None


class Failed(pydantic.BaseModel):
  """Holds what is answered in place of an answer."""

  error: Failure
