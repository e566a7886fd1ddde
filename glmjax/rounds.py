"""How rounds of a conversation are written as one prompt: ChatGLM-6B's way, in chats and in its training data."""

from collections.abc import Iterable


def prompt(rounds: Iterable[tuple[str, str]], query: str) -> str:
  """Returns the text that the model reads: the bare question, or numbered rounds with the last one open.

  Args:
    rounds: (question, answer) of each round before, the oldest first.
    query: the question that is to be answered.
  """
  past = [f"[Round {i}]\n问：{asked}\n答：{answered}\n" for i, (asked, answered) in enumerate(rounds)]
  return "".join([*past, f"[Round {len(past)}]\n问：{query}\n答："]) if past else query
