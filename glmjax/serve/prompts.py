"""What requests ask, as text and tokens."""

from collections.abc import Sequence
from typing import NamedTuple

from glmjax import errors
from glmjax import rounds
from glmjax.infer import engine as engine_lib
from glmjax.serve import wire


def conversation(messages: Sequence[wire.Message]) -> str:
  """Returns the prompt of a conversation, as ChatGLM has it: what the system says stands before the first question."""
  if messages[-1].role != "user":
    raise errors.InputError("messages: the last one must be the user's")
  past, query = rounds.of_messages((message.role, message.text) for message in messages)
  return rounds.prompt(past, query)


class Prompt(NamedTuple):
  """A text to continue."""

  text: str
  tokens: list[int]  # of it
  content: list[int]  # the same without the sop that they may begin with
  row: list[int]  # that continues it


def read(engine: engine_lib.Engine, given: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
  """Reads texts or ids to continue, one or several; masks written in a text are text."""
  if isinstance(given, str):
    return [_of_text(engine, given)]
  if given and isinstance(given[0], int):
    return [_of_tokens(engine, given, None)]
  return [_of_text(engine, each) if isinstance(each, str) else _of_tokens(engine, each, None) for each in given]


def _of_text(engine: engine_lib.Engine, text: str) -> Prompt:
  return _of_tokens(engine, engine.tokenizer.encode(text), text)


def _of_tokens(engine: engine_lib.Engine, tokens: list[int], text: str | None) -> Prompt:
  """Returns the prompt of tokens; the model reads every text behind a sop, so that one which is given is no second."""
  specials = engine.tokenizer.specials
  content = tokens[1:] if tokens[:1] == [specials.sop] else tokens
  if (blanks := sum(token in specials.masks for token in content)) > 1:
    raise errors.InputError(f"prompt: there are {blanks} masks among its ids: /v1/fill fills several blanks")
  row = engine.config.position_kind.frame(content, specials)
  return Prompt(engine.tokenizer.decode(tokens) if text is None else text, tokens, content, row)
