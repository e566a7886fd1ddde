"""How rounds of a conversation are written as one prompt: ChatGLM-6B's way, in chats and in its training data."""

from collections.abc import Iterable

from glmjax import errors

ASSISTANT = "assistant"


def prompt(rounds: Iterable[tuple[str, str]], query: str) -> str:
  """Returns the text that the model reads: the bare question, or numbered rounds with the last one open.

  Args:
    rounds: (question, answer) of each round before, the oldest first.
    query: the question that is to be answered.
  """
  past = [f"[Round {i}]\n问：{asked}\n答：{answered}\n" for i, (asked, answered) in enumerate(rounds)]
  return "".join([*past, f"[Round {len(past)}]\n问：{query}\n答："]) if past else query


def of_messages(messages: Iterable[tuple[str, str]]) -> tuple[list[tuple[str, str]], str]:
  """Returns the rounds of a conversation, and the question behind them that is still open; "" where there is none.

  What stands between two answers is one question, a message a line: so a system message, for which ChatGLM-6B has no
  place of its own, begins the first question.

  Args:
    messages: (role, text) of each message.

  Raises:
    errors.InputError: when an answer follows no question.
  """
  past: list[tuple[str, str]] = []
  asked: list[str] = []
  for role, text in messages:
    if role != ASSISTANT:
      asked.append(text)
    elif not asked:
      raise errors.InputError("messages: the assistant's answer follows no question")
    else:
      past.append(("\n".join(asked), text))
      asked = []
  return past, "\n".join(asked)
