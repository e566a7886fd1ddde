"""A conversation as ChatGLM-6B held it: prompt of many rounds, clean-up of replies, history within a budget.

Sources: `chat` and `process_response` of the Hub's modeling_chatglm.py (docs/sources.md). What the original left to
its users is decided here: rounds that no longer fit are left out, the oldest first and whole.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from glmjax import display
from glmjax import errors
from glmjax import rounds as rounds_lib
from glmjax.infer import engine as engine_lib
from glmjax.infer import pieces
from glmjax.infer import sampling as sampling_lib

MAX_LENGTH = 2048  # tokens of prompt and answer together
# transformers draws among the 50 likeliest tokens unless told otherwise, and ChatGLM's code does not say.
SAMPLING = sampling_lib.Sampling(temperature=0.95, top_k=50, top_p=0.7)

_TRAINING_TIME = "[[训练时间]]"
_CHINESE = "[\u4e00-\u9fff]"
_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_BESIDE_CHINESE = re.compile(f"(?<={_CHINESE})[,!:;?]|[,!:;?](?={_CHINESE})")
# An end, blanks behind it apart, whose clean form depends on what follows: punctuation, a beginning of the placeholder.
_BEGINNINGS = "|".join(re.escape(_TRAINING_TIME[:n]) for n in range(len(_TRAINING_TIME) - 1, 0, -1))
_UNDECIDED = re.compile(rf"(?:(?<!{_CHINESE})[,!:;?]|{_BEGINNINGS})\Z")


@dataclasses.dataclass(frozen=True)
class Round:
  """A question and its reply, which is clean."""

  query: str
  reply: str


def prompt(rounds: Sequence[Round], query: str) -> str:
  """Returns the text that the model reads: the bare question, or numbered rounds with the last one open."""
  return rounds_lib.prompt([(each.query, each.reply) for each in rounds], query)


def clean(reply: str) -> str:
  """Returns a reply as the original shows it: stripped, dated 2023, with full-width punctuation beside Chinese."""
  return _in_full_width(reply.strip().replace(_TRAINING_TIME, "2023年"))


def _in_full_width(text: str) -> str:
  return _BESIDE_CHINESE.sub(lambda match: _FULL_WIDTH[match.group()], text)


class CleanStream:
  """A stream of bytes in, clean text out as soon as nothing that follows can change it.

  What `add` and `end` return adds up to `clean` of the whole text; no character is ever cut. Each is looked at a few
  times, however many there are.
  """

  def __init__(self) -> None:
    self._characters = pieces.Characters()
    self._shown: list[str] = []  # all that was returned
    self._before = ""  # the last character that was returned, as the model wrote it
    self._held = ""  # an undecided end
    self._blanks: list[str] = []  # behind it: at the end of the whole they are stripped

  @property
  def shown(self) -> str:
    """All that was returned so far."""
    return "".join(self._shown)

  def add(self, data: bytes) -> str:
    """Returns the new part of the clean text."""
    return self._take(self._characters.add(data))

  def end(self) -> str:
    """Returns what is left of the clean text: nothing follows that could change it."""
    new = self._take(self._characters.end())
    rest, self._held = self._held, ""
    return new + self._show(rest)

  def _take(self, text: str) -> str:
    solid = text.rstrip()
    blanks = text[len(solid) :]
    if not solid:
      decided, self._held = (self._held, "") if blanks else ("", self._held)  # a blank behind it decides an end
    else:
      decided = "".join([self._held, *self._blanks, solid])
      self._blanks = []
      undecided = None if blanks else _UNDECIDED.search(self._before + decided)
      start = max(undecided.start() - len(self._before), 0) if undecided else len(decided)
      decided, self._held = decided[:start], decided[start:]
    if blanks:
      self._blanks.append(blanks)
    return self._show(decided)

  def _show(self, decided: str) -> str:
    """Cleans what nothing that follows can change, and returns it."""
    if not self._before:
      decided = decided.lstrip()
    decided = decided.replace(_TRAINING_TIME, "2023年")
    new = _in_full_width(self._before + decided)[len(self._before) :]
    self._before = decided[-1:] or self._before
    self._shown.append(new)
    return new


class Session:
  """A conversation with a model. `rounds` is all of it; the prompt holds those from `first` on."""

  def __init__(
    self,
    model: engine_lib.Engine,
    sampling: sampling_lib.Sampling = SAMPLING,
    max_length: int = MAX_LENGTH,
    answer_tokens: int | None = None,
    seed: int = 0,
    adapter: str | None = None,
  ) -> None:
    """Begins a conversation; prompt and answer take `max_length` tokens, or what the model has if that is less.

    Old rounds leave `answer_tokens` of them free (a quarter). Each answer draws with a seed of its own. `adapter` is as
    in `use`.
    """
    if max_length < 4:
      raise errors.InputError(f"max_length is {max_length}: give 4 or more, as ChatGLM's {MAX_LENGTH}")
    self.max_length = min(max_length, model.config.max_length)
    self.answer_tokens = self.max_length // 4 if answer_tokens is None else answer_tokens
    if not 0 < self.answer_tokens < self.max_length:
      raise errors.InputError(
        f"answer_tokens is {answer_tokens}: give 1 or more, and less than the "
        f"{self.max_length} tokens of a whole conversation"
      )
    self.rounds: list[Round] = []
    self.first = 0
    self.finish_reason = "stop"  # of the last answer; length: it was cut off for want of room
    self._model = model
    self._sampling = sampling
    self._seed = seed
    self.use(adapter)

  def clear(self) -> None:
    """Forgets the conversation, so that the next query is its first."""
    self.rounds, self.first = [], 0

  def use(self, adapter: str | None) -> None:
    """Has questions from now on answered with the adapter of that name, None: by the model alone; what was said stays.

    Raises:
      errors.InputError: where there is no such adapter.
    """
    if adapter is not None:
      self._model.runner.adapter_number(adapter)
    self.adapter = adapter

  @property
  def adapters(self) -> tuple[str, ...]:
    """The names of those there are."""
    return self._model.adapters

  def __repr__(self) -> str:
    return f"Session({len(self.rounds)} rounds)"

  def _repr_html_(self) -> str:
    return display.table(("question", "reply"), [(each.query, each.reply) for each in self.rounds])

  def ask(self, query: str) -> Iterator[str]:
    """Yields the reply, a piece for each token, many of them empty; closing keeps what came of it, if anything.

    Raises:
      errors.InputError: for a question that does not fit, which leaves the conversation as it was.
    """
    row, first = self._row(query)
    room = min(self._model.room(row), self.max_length - len(row) - 1)
    if room < 1:
      raise errors.InputError(
        f"this takes {len(row) + 1} tokens, and there are {self.max_length} for question and answer: shorten it"
      )
    self.first = first
    self._seed += 1
    stream = CleanStream()
    tokens = self._model.stream(row, room, self._sampling, self._seed - 1, self.adapter)
    self.finish_reason = "interrupted"
    try:
      self.finish_reason = yield from self._text(tokens, stream)
    finally:
      if stream.shown or self.finish_reason != "interrupted":
        self.rounds.append(Round(query, stream.shown))

  def _text(self, tokens: Iterator[int], stream: CleanStream) -> Iterator[str]:
    """Yields the clean text of the tokens; returns why they ended."""
    read = pieces.TokenBytes(self._model.tokenizer.decode_bytes)
    while True:
      try:
        token = next(tokens)
      except StopIteration as end:
        yield stream.end()
        return end.value
      yield stream.add(read.add(token))

  def _row(self, query: str) -> tuple[list[int], int]:
    """Returns tokens of the prompt, and the first round in it: the earliest that leaves room for an answer."""
    for first in range(self.first, len(self.rounds) + 1):
      row = self._model.encode(prompt(self.rounds[first:], query), literal=True)
      if len(row) + 1 + self.answer_tokens <= self.max_length:
        break
    return row, first
