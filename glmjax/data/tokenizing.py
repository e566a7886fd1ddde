"""Text to ids, a group of documents at a time."""

from collections.abc import Iterable, Iterator

import numpy as np

from glmjax import tokenizer as tokenizer_lib
from glmjax.data import shards

FEATURES = {"text": ("text",), "instruction": ("inputs", "targets")}  # of a task's examples, by its kind
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
  """Yields examples as the cache has them: a text's ids and the token that ends it, or a pair's ids."""
  end = np.int32([tokenizer.specials.eos] if kind == "text" else [])
  for group in groups(examples):
    encoded = [tokenizer.encode_arrays(column) for column in zip(*group)]
    for strings, ids in zip(group, zip(*encoded)):
      tokens = np.concatenate([*ids, end])
      yield shards.Document(tokens, sum(map(_utf8_bytes, strings)), len(ids[0]) if kind == "instruction" else 0)


def _utf8_bytes(text: str) -> int:
  if text.isascii():
    return len(text)
  return sum(len(text[i : i + _UTF8_CHUNK].encode()) for i in range(0, len(text), _UTF8_CHUNK))
