"""A conversation as ChatGLM-6B held it: prompt of many rounds, clean-up of replies, history within a budget.

Sources: `chat` and `process_response` of the Hub's modeling_chatglm.py (FACTS 7.3). What the original left to
its users is decided here: rounds that no longer fit are left out, the oldest first and whole.
"""

import codecs
import dataclasses
import re
from collections.abc import Iterator, Sequence

from glmjax import errors
from glmjax import rounds as rounds_lib
from glmjax.infer import engine as engine_lib
from glmjax.infer import sampling as sampling_lib

MAX_LENGTH = 2048  # tokens of prompt and answer together
# transformers draws among the 50 likeliest tokens unless told otherwise, and ChatGLM's code does not say.
SAMPLING = sampling_lib.Sampling(temperature=0.95, top_k=50, top_p=0.7)

_TRAINING_TIME = "[[训练时间]]"
_CHINESE = "[\u4e00-\u9fff]"
_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_BESIDE_CHINESE = re.compile(f"(?<={_CHINESE})[,!:;?]|[,!:;?](?={_CHINESE})")
# An end whose clean form depends on what follows: blanks, punctuation, the beginning of the placeholder.
_BEGINNINGS = "|".join(re.escape(_TRAINING_TIME[:n]) for n in range(len(_TRAINING_TIME) - 1, 0, -1))
_UNDECIDED = re.compile(rf"(?:\s+|(?<!{_CHINESE})[,!:;?]|{_BEGINNINGS})\Z")


@dataclasses.dataclass(frozen=True)
class Round:
  """A question and its reply, which is clean."""

  query: str
  reply: str


def prompt(rounds: Sequence[Round], query: str) -> str:
  """The text that the model reads: the bare question, or numbered rounds with the last one open."""
  return rounds_lib.prompt([(each.query, each.reply) for each in rounds], query)


def clean(reply: str) -> str:
  """A reply as the original shows it: stripped, dated 2023, with full-width punctuation beside Chinese."""
  reply = reply.strip().replace(_TRAINING_TIME, "2023年")
  return _BESIDE_CHINESE.sub(lambda match: _FULL_WIDTH[match.group()], reply)


class CleanStream:
  """Bytes in, clean text out as soon as nothing that follows can change it.

  What `add` and `end` return adds up to `clean` of the whole text; no character is ever cut.
  """

  def __init__(self) -> None:
    self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    self._raw = ""
    self.shown = ""  # all that was returned

  def add(self, data: bytes) -> str:
    """The new part of the clean text."""
    self._raw += self._decoder.decode(data)
    return self._show(_UNDECIDED.sub("", self._raw))

  def end(self) -> str:
    """The rest."""
    self._raw += self._decoder.decode(b"", final=True)
    return self._show(self._raw)

  def _show(self, raw: str) -> str:
    text = clean(raw)
    assert text.startswith(self.shown), (self.shown, text)
    new = text[len(self.shown):]
    self.shown = text
    return new


class Session:
  """A conversation with a model. `rounds` is all of it; the prompt holds those from `first` on."""

  def __init__(self, model: engine_lib.Engine, sampling: sampling_lib.Sampling = SAMPLING,
               max_length: int = MAX_LENGTH, answer_tokens: int | None = None, seed: int = 0) -> None:
    """Prompt and answer take `max_length` tokens, or what the model has if that is less.

    Old rounds leave `answer_tokens` of them free (a quarter). Each answer draws with a seed of its own.
    """
    if max_length < 4:
      raise errors.InputError(f"max_length is {max_length}: give 4 or more, as ChatGLM's {MAX_LENGTH}")
    self.max_length = min(max_length, model.config.max_length)
    self.answer_tokens = self.max_length // 4 if answer_tokens is None else answer_tokens
    if not 0 < self.answer_tokens < self.max_length:
      raise errors.InputError(f"answer_tokens is {answer_tokens}: give 1 or more, and less than the "
                              f"{self.max_length} tokens of a whole conversation")
    self.rounds: list[Round] = []
    self.first = 0
    self.finish_reason = "stop"  # of the last answer; length: it was cut off for want of room
    self._model = model
    self._sampling = sampling
    self._seed = seed

  def clear(self) -> None:
    """Starts anew."""
    self.rounds, self.first = [], 0

  def ask(self, query: str) -> Iterator[str]:
    """The reply, a piece for each token, many of them empty; closing keeps what came of it, if anything.

    Raises:
      errors.InputError: for a question that does not fit, which leaves the conversation as it was.
    """
    row, first = self._row(query)
    room = min(self._model.room(row), self.max_length - len(row) - 1)
    if room < 1:
      raise errors.InputError(f"this takes {len(row) + 1} tokens, and there are {self.max_length} for question "
                              "and answer: shorten it")
    self.first = first
    self._seed += 1
    stream = CleanStream()
    tokens = self._model.stream(row, room, self._sampling, self._seed - 1)
    self.finish_reason = "interrupted"
    try:
      self.finish_reason = yield from self._text(tokens, stream)
    finally:
      if stream.shown or self.finish_reason != "interrupted":
        self.rounds.append(Round(query, stream.shown))

  def _text(self, tokens: Iterator[int], stream: CleanStream) -> Iterator[str]:
    """Clean text of the tokens; returns why they ended."""
    ids: list[int] = []
    seen = 0
    while True:
      try:
        ids.append(next(tokens))
      except StopIteration as end:
        yield stream.end()
        return end.value
      data = self._model.tokenizer.decode_bytes(ids)
      yield stream.add(data[seen:])
      seen = len(data)

  def _row(self, query: str) -> tuple[list[int], int]:
    """Tokens of the prompt, and the first round in it: the earliest that leaves room for an answer."""
    for first in range(self.first, len(self.rounds) + 1):
      row = self._model.encode(prompt(self.rounds[first:], query), literal=True)
      if len(row) + 1 + self.answer_tokens <= self.max_length:
        break
    return row, first
