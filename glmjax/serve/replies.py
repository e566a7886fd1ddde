"""What requests are answered with: OpenAI's objects, and ours for filled blanks."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from glmjax.infer import engine as engine_lib
from glmjax.infer import lanes
from glmjax.infer import pieces
from glmjax.serve import service as service_lib

Json = dict[str, Any]


class Reply:
  """One request's answers, as they come and when they are whole; `texts` has each one's text so far."""

  object = chunk = prefix = ""

  def __init__(self, engine: engine_lib.Engine, model: str, count: int, prompt_tokens: int) -> None:
    """Begins with `count` answers that are empty."""
    self._engine, self._prompt_tokens = engine, prompt_tokens
    self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
    self.texts = [""] * count
    self._begun = [False] * count
    self._told: list[list[Json]] = [[] for _ in range(count)]
    self._finish: list[str | None] = [None] * count
    self._tokens = 0  # of all answers, without what ends them

  def add(self, i: int, event: service_lib.Event) -> Json:
    """Takes an event of answer i; returns it as a chunk of a stream."""
    if isinstance(event, service_lib.End):
      self._finish[i] = event.finish_reason
      return self._add(i, "", [])
    assert isinstance(event, service_lib.Part), "only completions show their prompts"
    self._tokens += sum(token not in self._engine.stops for token in event.tokens)
    return self._add(i, event.text, [self._logprob(i, *each) for each in zip(event.tokens, event.told)])

  def whole(self) -> Json:
    """Returns all of it."""
    choices = [self._choice(i) for i in range(len(self.texts))]
    return {**self._head, "object": self.object, "choices": choices, "usage": self.usage()}

  def last(self) -> Json:
    """Returns a stream's chunk that tells the usage."""
    return {**self._head, "object": self.chunk, "choices": [], "usage": self.usage()}

  def usage(self) -> Json:
    """Returns counts of tokens."""
    total = self._prompt_tokens + self._tokens
    return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._tokens, "total_tokens": total}

  def _add(self, i: int, text: str, told: Sequence[Json]) -> Json:
    first, self._begun[i] = not self._begun[i], True
    self.texts[i] += text
    self._told[i] += told
    choice = {"index": i, **self._piece(text, first), "logprobs": self._logprobs(told) if told else None}
    return {**self._head, "object": self.chunk, "choices": [choice | {"finish_reason": self._finish[i]}]}

  def _choice(self, i: int) -> Json:
    told = self._told[i]
    choice = {"index": i, **self._text(self.texts[i]), "logprobs": self._logprobs(told) if told else None}
    return choice | {"finish_reason": self._finish[i]}

  def _text(self, text: str) -> Json:
    return {"text": text}

  def _piece(self, text: str, first: bool) -> Json:
    del first
    return {"text": text}

  def _logprob(self, i: int, token: int, told: lanes.Told) -> Json:
    del i
    top = [self._named(other, logprob) for other, logprob in told.likeliest]
    return {**self._named(token, told.logprob), "top_logprobs": top}

  def _named(self, token: int, logprob: float) -> Json:
    data = self._bytes(token)
    return {"token": data.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(data)}

  def _bytes(self, token: int) -> bytes:
    """Returns what a token reads as amid others; a special one its name."""
    return self._engine.tokenizer.decode_bytes([token], show_special=True, dummy_prefix=False)

  def _logprobs(self, told: Sequence[Json]) -> Json:
    return {"content": list(told)}


class CompletionReply(Reply):
  """Of /v1/completions: lists of tokens, and the prompt before the answer where it is to be echoed."""

  object = chunk = "text_completion"
  prefix = "cmpl"

  def __init__(
    self,
    engine: engine_lib.Engine,
    model: str,
    prompts: Sequence[tuple[str, list[int]]],
    prompt_tokens: int,
    echo: bool,
  ) -> None:
    """Begins with an answer to each of `prompts`, texts and their tokens, that is empty."""
    super().__init__(engine, model, len(prompts), prompt_tokens)
    self._prompts = prompts
    self._openings = [prompt if echo else "" for prompt, _ in prompts]
    self._entries: dict[int, list[Json]] = {}  # of each prompt that was scored, which several answers may have
    self._places = [_Places(engine, len(prompt)) for prompt, _ in prompts]

  def add(self, i: int, event: service_lib.Event) -> Json:
    """Takes an event of answer i, or how likely its prompt is; returns it as a chunk of a stream."""
    if isinstance(event, service_lib.Scored):
      tokens = id(self._prompts[i][1])
      if tokens not in self._entries:
        self._entries[tokens] = self._scored(i, event.told)
      return self._add(i, "", self._entries[tokens])
    return super().add(i, event)

  def _add(self, i: int, text: str, told: Sequence[Json]) -> Json:
    opening, self._openings[i] = self._openings[i], ""
    return super()._add(i, opening + text, told)

  def _scored(self, i: int, told: Sequence[lanes.Told]) -> list[Json]:
    """Returns the prompt's tokens; of the first nobody says how likely it is."""
    tokens, places = self._prompts[i][1], _Places(self._engine, 0)
    known = [None] * (len(tokens) - len(told)) + list(told)
    return [self._entry(token, each if n else None, places) for n, (token, each) in enumerate(zip(tokens, known))]

  def _logprob(self, i: int, token: int, told: lanes.Told) -> Json:
    return self._entry(token, told, self._places[i])

  def _entry(self, token: int, told: lanes.Told | None, places: "_Places") -> Json:
    entry = {"token": self._name(token), "text_offset": places.of(token), "logprob": None, "top": None}
    if told is None:
      return entry
    top: dict[str, float] = {}
    for other, logprob in [*told.likeliest, (token, told.logprob)]:  # the token itself is always among them
      top.setdefault(self._name(other), logprob)
    return entry | {"logprob": told.logprob, "top": top}

  def _name(self, token: int) -> str:
    """Returns a token's text, which is a key: where it is a part of a character, its bytes in hexadecimal."""
    data = self._bytes(token)
    try:
      return data.decode()
    except UnicodeDecodeError:
      return "bytes:" + "".join(f"\\x{each:02x}" for each in data)

  def _logprobs(self, told: Sequence[Json]) -> Json:
    return {
      "tokens": [each["token"] for each in told],
      "token_logprobs": [each["logprob"] for each in told],
      "top_logprobs": [each["top"] for each in told],
      "text_offset": [each["text_offset"] for each in told],
    }


class _Places:
  """Where tokens begin in a text, in characters; one within a character begins where that does."""

  def __init__(self, engine: engine_lib.Engine, first: int) -> None:
    self._bytes, self._characters = pieces.TokenBytes(engine.tokenizer.decode_bytes), pieces.Characters()
    self._next = first

  def of(self, token: int) -> int:
    """Returns the place of the next token."""
    place = self._next
    self._next += len(self._characters.add(self._bytes.add(token)))
    return place


class ChatReply(Reply):
  """Of /v1/chat/completions."""

  object, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

  def _text(self, text: str) -> Json:
    return {"message": {"role": "assistant", "content": text}}

  def _piece(self, text: str, first: bool) -> Json:
    return {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text else {})}


class FillReply(Reply):
  """Of /v1/fill: whole texts, and what was put into each blank."""

  object = prefix = "fill"

  def __init__(self, engine: engine_lib.Engine, model: str, count: int, prompt_tokens: int) -> None:
    """Begins with `count` answers that are empty."""
    super().__init__(engine, model, count, prompt_tokens)
    self._filled: list[engine_lib.Generation | None] = [None] * count

  def add(self, i: int, event: service_lib.Event) -> Json:
    """Takes an event of answer i; there is no stream of these."""
    if isinstance(event, service_lib.End):
      self._filled[i] = self._engine.generation(event.filled)
    return super().add(i, event)

  def _choice(self, i: int) -> Json:
    filled = self._filled[i]
    assert filled is not None, "all jobs have ended"
    places = [list(place) for place in filled.places]
    return {
      "index": i,
      "text": filled.text,
      "pieces": filled.pieces,
      "places": places,
      "finish_reason": filled.finish_reason,
    }
