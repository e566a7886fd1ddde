"""Instruction pairs from conversations, as OpenAI's chat format has them: each answer behind what precedes it."""

from collections.abc import Iterator, Mapping
import json
from typing import Any

from glmjax import errors
from glmjax import rounds
from glmjax.io import user_json

MESSAGES = "messages"  # the field of a record
ROLES = ("system", "developer", "user", rounds.ASSISTANT)
# Characters of the rounds before an answer: about 2,048 tokens of English, more than twice that of Chinese; models read
# 2,048. So the pairs of a long conversation are together no more than a multiple of it.
HISTORY_CHARACTERS = 1 << 13
_READ = ("role", "content", "weight", "name")  # keys of a message; a name is passed over, as the server does


def pairs(record: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
  """Yields (inputs, targets) of a conversation: for each answer, and the rounds before it as the model reads them.

  An answer of "weight" 0 is a part of what follows, and not learned itself. Of rounds before that are longer than
  HISTORY_CHARACTERS the oldest are left out, whole.

  Raises:
    errors.InputError: for what is no conversation that ends with an answer; it names the place, and the message.
  """
  said = read(record[MESSAGES], where)
  if said[-1][0] != rounds.ASSISTANT:
    raise errors.InputError(
      f"{where}: the last message is the {said[-1][0]}'s, with no answer to learn: end with the assistant's, or "
      "leave it out"
    )
  try:
    spoken, _ = rounds.of_messages((role, text) for role, text, _ in said)
  except errors.InputError as error:
    raise errors.InputError(f"{where}: {error}: give each answer a question, or join the two answers") from None
  learned = [weight for role, _, weight in said if role == rounds.ASSISTANT]
  if not any(learned):
    raise errors.InputError(f"{where}: no answer is learned, as all have weight 0: leave the record out")
  for number, (question, answer) in enumerate(spoken):
    if learned[number]:
      yield rounds.prompt(spoken[_first(spoken, number) : number], question), answer


def read(messages: Any, where: str) -> list[tuple[str, str, bool]]:
  """Returns role and text of each message, and whether it is learned where it is an answer.

  Raises:
    errors.InputError: for what is no list of messages; it names the place, and the message.
  """
  if not isinstance(messages, list) or not messages:
    raise errors.InputError(
      f'{where}: the field "messages" is {json.dumps(messages)[:40]}, not a list of messages: write them as '
      '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    )
  return [_message(message, f"{where}: message {number}") for number, message in enumerate(messages, 1)]


def _first(spoken: list[tuple[str, str]], number: int) -> int:
  """Returns the first round that is still read before round `number`."""
  room, first = HISTORY_CHARACTERS, number
  while first and (room := room - sum(map(len, spoken[first - 1]))) >= 0:
    first -= 1
  return first


def _message(message: Any, where: str) -> tuple[str, str, bool]:
  """Returns role, text, and whether it is learned where it is an answer."""
  if not isinstance(message, dict):
    raise errors.InputError(f'{where} is {json.dumps(message)[:40]}, not {{"role": "...", "content": "..."}}')
  role, weight = message.get("role"), message.get("weight", 1)
  if role not in ROLES:
    raise errors.InputError(
      f"{where} has the role {json.dumps(role)[:40]}, none of {', '.join(ROLES)}: write what it says into one of "
      "theirs, or leave the record out"
    )
  for name, value in message.items():
    if name not in _READ and value not in (None, "", [], {}):
      raise errors.InputError(f"{where}: {name[:40]!r} is not read: write it into the content, or remove it")
  if weight not in (0, 1):
    raise errors.InputError(f"{where} has the weight {json.dumps(weight)[:40]}: give 1, or 0 for what is not learned")
  text = _text(message, where)
  if not text.strip():
    raise errors.InputError(f"{where}, the {role}'s, is empty: give its text, or leave it out")
  return role, text, bool(weight)


def _text(message: Mapping[str, Any], where: str) -> str:
  """Returns a message's content: a string, or the texts of a list of parts."""
  parts = message.get("content")
  if not isinstance(parts, list):
    return user_json.string({"content": "", **message}, "content", where)
  for part in parts:
    if not isinstance(part, dict) or part.get("type") != "text":
      raise errors.InputError(f"{where} has a part that is no text: {json.dumps(part)[:40]}; a GLM reads text alone")
  return "".join(user_json.string(part, "text", where) for part in parts)
