"""Text to ids, a group of documents at a time."""

from collections.abc import Iterable, Iterator

import numpy as np

from glmjax import tokenizer as tokenizer_lib
from glmjax.data import shards
from glmjax.data import tokenized

FEATURES = {  # of a task's examples, by its kind
  "text": ("text",),
  "instruction": ("inputs", "targets"),
  tokenized.PREFERENCE: ("inputs", "chosen", "rejected"),
}
Strings = tuple[str, ...]  # of an example: one of each feature

_GROUP_CHARACTERS = 1 << 17  # a group has less, or a single example
_UTF8_CHUNK = 1 << 20


def groups(examples: Iterable[Strings]) -> Iterator[list[Strings]]:
  """Puts consecutive examples in groups of bounded size, so that memory is that of the longest example."""
  group: list[Strings] = []
  size = 0
  for example in examples:
    length = sum(map(len, example))
    if group and size + length > _GROUP_CHARACTERS:
      yield group
      group, size = [], 0
    group.append(example)
    size += length
  if group:
    yield group


def documents(tokenizer: tokenizer_lib.Tokenizer, kind: str, examples: Iterable[Strings]) -> Iterator[shards.Document]:
  """Yields examples as the cache has them: a text's ids and the token that ends it, a pair's ids, or of two answers
  two pairs, the chosen one's first.
  """
  end = np.int32([tokenizer.specials.eos] if kind == "text" else [])
  for group in groups(examples):
    encoded = [tokenizer.encode_arrays(column) for column in zip(*group)]
    for strings, ids in zip(group, zip(*encoded)):
      if kind == tokenized.PREFERENCE:
        asked, *answers = zip(strings, ids)
        yield from (_pair(asked, answer) for answer in answers)
      else:
        tokens = np.concatenate([*ids, end])
        yield shards.Document(tokens, sum(map(utf8_bytes, strings)), len(ids[0]) if kind == "instruction" else 0)


def _pair(asked: tuple[str, np.ndarray], answer: tuple[str, np.ndarray]) -> shards.Document:
  """Returns a pair of two texts and their ids."""
  size = sum(utf8_bytes(text) for text, _ in (asked, answer))
  return shards.Document(np.concatenate([asked[1], answer[1]]), size, len(asked[1]))


def utf8_bytes(text: str) -> int:
  """Counts the bytes of a text in UTF-8, without another copy of a long one."""
  if text.isascii():
    return len(text)
  return sum(len(text[i : i + _UTF8_CHUNK].encode()) for i in range(0, len(text), _UTF8_CHUNK))
