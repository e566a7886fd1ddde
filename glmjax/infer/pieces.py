"""An answer's text as its tokens come: whole characters, and nothing that may yet turn out to be a stop string."""

import codecs
from collections.abc import Callable, Sequence

from glmjax import errors

MOST_STOPS, LONGEST_STOP = 16, 256


class TokenBytes:
  """Tokens in, their bytes out: what a token reads as depends on the one before it."""

  def __init__(self, decode: Callable[[Sequence[int]], bytes]) -> None:
    """Takes the tokenizer's `decode_bytes`."""
    self._decode = decode
    self._recent: list[int] = []  # the last token that has bytes, and what came after it
    self._seen = 0  # bytes of it

  def add(self, token: int) -> bytes:
    """Returns what a token adds to the text."""
    self._recent.append(token)
    data = self._decode(self._recent)[self._seen :]
    if data:
      del self._recent[:-1]
      self._seen = len(self._decode(self._recent))
    return data


class Characters:
  """Bytes in, characters out, each once it is whole; broken ones are U+FFFD."""

  def __init__(self) -> None:
    """Begins with none."""
    self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def add(self, data: bytes) -> str:
    """Returns the characters that are whole now."""
    return self._decoder.decode(data)

  def end(self) -> str:
    """Returns what is left."""
    return self._decoder.decode(b"", final=True)


class Stops:
  """Ends a text before that of some strings which is whole first; holds back an end that may be the beginning of one.

  Raises:
    errors.InputError: for more or longer strings than there can be, or an empty one.
  """

  def __init__(self, stops: Sequence[str]) -> None:
    """Takes the strings."""
    if len(stops) > MOST_STOPS or any(not 0 < len(stop) <= LONGEST_STOP for stop in stops):
      raise errors.InputError(f"stop: give up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters each")
    self._stops, self._held = stops, ""
    self.stopped = False

  def add(self, text: str) -> str:
    """Returns what is surely part of the text; nothing more once it has `stopped`."""
    if self.stopped:
      return ""
    text = self._held + text
    found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
    if found:
      self.stopped, self._held = True, ""
      return text[: min(found)[1]]
    held = max((self._begun(text, stop) for stop in self._stops), default=0)
    self._held = text[len(text) - held :]
    return text[: len(text) - held]

  def end(self) -> str:
    """Returns what was held back: nothing follows."""
    held, self._held = self._held, ""
    return held

  @staticmethod
  def _begun(text: str, stop: str) -> int:
    """Returns how many of the text's last characters begin a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
