"""LAMBADA's own rules: which words may not begin an answer, and where its first word ends.

Paperno et al. (2016) ask for a text's last word. GLM-130B's evaluation searches with beams that begin with no
punctuation, and takes the first that goes on with some behind its first word.
"""

from collections.abc import Mapping, Sequence
import string

from glmjax.infer import vocabulary

# Pieces of GLM-130B's vocabulary, by their ids in tasks/lambada/task.py: an apostrophe, two quotation marks of a word's
# beginning, and two grave accents. Other vocabularies are asked for theirs.
_APOSTROPHE, _OPENING_DOUBLE, _OPENING_SINGLE, _GRAVE = 20_068, 146_010, 146_337, 46_010
_WRITTEN = {_APOSTROPHE: "'", _OPENING_DOUBLE: ' "', _OPENING_SINGLE: " '", _GRAVE: "``"}
_ICETK_IMAGES, _ICETK_IDS = 20_000, 150_000  # of GLM-130B's vocabulary: image ids, and ids at least


def marks(tokenizer: vocabulary.Tokenizer, known: Mapping[int, int] | None = None) -> tuple[set[int], list[list[int]]]:
  """Returns ids that never come out, and what no answer begins with.

  Args:
    tokenizer: of the model.
    known: the ids that stand for GLM-130B's, by these; None: those of the vocabulary.
  """
  found = _own(tokenizer) if known is None else known
  never = {found[each] for each in (_APOSTROPHE, _OPENING_DOUBLE, _OPENING_SINGLE) if each in found}
  beginnings = [[found[each]] for each in (_GRAVE, _OPENING_SINGLE) if each in found]
  for mark in string.punctuation:
    ids = tokenizer.encode(mark)
    beginnings.append(ids)
    if len(ids) == 1:
      never.add(ids[0])
  return never, [ids for ids in beginnings if ids]


def _own(tokenizer: vocabulary.Tokenizer) -> dict[int, int]:
  if tokenizer.num_image_tokens == _ICETK_IMAGES and tokenizer.vocab_size >= _ICETK_IDS:
    return {each: each for each in _WRITTEN}
  ids = {each: tokenizer.encode(text) for each, text in _WRITTEN.items()}
  return {each: found[0] for each, found in ids.items() if len(found) == 1}


def choose(texts: Sequence[str]) -> int:
  """Returns the number of the answer that counts: the first with punctuation behind its first word, else the first."""
  for i, text in enumerate(texts):
    words = text.strip().split(" ")
    if len(words) > 1 and words[1] in string.punctuation:  # as there: the empty text is in it as well
      return i
  return 0


def first_word(text: str) -> str:
  """Returns an answer's first word."""
  return text.strip().split(" ")[0]
