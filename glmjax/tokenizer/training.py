"""Training a tokenizer of our own: SentencePiece's trainer, set so that nothing of a text is lost."""

import collections
from collections.abc import Iterable, Iterator
import io
import itertools
import random
import re

import sentencepiece

from glmjax import errors
from glmjax import ranges
from glmjax.io import folders
from glmjax.io import paths
from glmjax.io import publish
from glmjax.tokenizer import encoding
from glmjax.tokenizer import layout

# Of a tokenizer that is trained: <unk> <s> </s> <pad> <n>, the bytes, and one character; SentencePiece's own bounds.
_FEWEST = layout.NUM_APPENDED + 5 + 256 + 1
_MOST = 1 << 22
_LEAST_COVERAGE = 0.98

_UNTRAINED = re.compile(r"[\n\t]| {2,}|" + layout.RESERVED.pattern.strip("()"))  # never inside a piece
_LONGEST = 1 << 16  # characters of a sentence
_OVERHEAD = 128  # bytes that Python takes for a sentence beside its text

# SentencePiece's settings with which decoding gives every text back as it was, and icetk's ids of control pieces.
_LOSSLESS = {
  "normalization_rule_name": "identity",
  "add_dummy_prefix": False,
  "remove_extra_whitespaces": False,
  "byte_fallback": True,
  "split_digits": True,
  "unk_id": 0,
  "bos_id": 1,
  "eos_id": 2,
  "pad_id": 3,
  "user_defined_symbols": ["<n>"],
  "input_sentence_size": 2_000_000,
  "shuffle_input_sentence": True,
  "max_sentence_length": 1 << 20,
  "minloglevel": 2,
}


def train(
  documents: Iterable[str],
  folder: paths.Named,
  vocab_size: int,
  model_type: str = "bpe",
  character_coverage: float = 0.998,
  num_threads: int = 4,
  sample_bytes: int = 100_000_000,
) -> encoding.Tokenizer:
  """Trains a lossless tokenizer on the documents and saves it.

  vocab_size counts every id, special tokens included: a multiple of 128 needs no padding in the model.
  Characters beyond the coverage are spelled in bytes; in a small bilingual vocabulary 0.998 leaves more
  room for words and gave 4 % fewer English and 2 % fewer Chinese tokens than 0.9995 (8192 ids).
  Of a text of more than sample_bytes (in UTF-8, and 128 a sentence) an even sample of its sentences is used, so that
  memory is bounded whatever the text's size; the longest document comes on top.
  The same documents give the same bytes (num_threads must stay the same for model_type="unigram"), so a
  folder that already holds the result is no mistake; one that holds anything else is left as it is.
  """
  if model_type not in ("bpe", "unigram"):
    raise errors.InputError(f'model_type is {model_type!r}; use "bpe" (fast) or "unigram" (as icetk)')
  ranges.whole("tokenizer.train.vocab_size", vocab_size, 1, _MOST)
  ranges.whole("tokenizer.train.num_threads", num_threads, 1, 1024)
  ranges.whole("tokenizer.train.sample_bytes", sample_bytes, 1 << 20)
  ranges.number("tokenizer.train.character_coverage", character_coverage, _LEAST_COVERAGE, 1.0)
  folder = folders.claim(folder, folders.Kind.TOKENIZER, "the tokenizer's folder")  # before the work
  if not publish.in_work(folder) and folder.is_dir() and any(folder.iterdir()):
    found = encoding.Tokenizer.load(folder).vocab_size
    if found != vocab_size:
      raise errors.InputError(
        f"{folder} holds a tokenizer of {found} ids, not {vocab_size}; remove it or choose another folder"
      )
  sentences, writer = _sample(documents, sample_bytes), io.BytesIO()
  are_empty = not sentences
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_taken_from(sentences),
      model_writer=writer,
      model_type=model_type,
      vocab_size=max(vocab_size, _FEWEST) - layout.NUM_APPENDED,
      character_coverage=character_coverage,
      num_threads=num_threads,
      **_LOSSLESS,
    )
  except (RuntimeError, OSError) as error:
    reason = str(error).rsplit("] ", 1)[-1].strip().replace("\n", " ")
    advice = "there is no text: give some" if are_empty else _advice(reason, character_coverage)
    raise errors.InputError(f"no tokenizer of {vocab_size} ids can be trained on this text: {advice}") from error
  if vocab_size < _FEWEST:
    raise errors.InputError(
      f"no tokenizer of {vocab_size} ids can be trained on this text: set vocab_size to "
      f"{_FEWEST} or more ({_FEWEST - 1} ids are specials, blanks and bytes)"
    )
  tokenizer = encoding.Tokenizer(writer.getvalue())
  tokenizer.save(folder)
  return tokenizer


def _sample(documents: Iterable[str], most_bytes: int) -> collections.deque[bytes]:
  """Returns what SentencePiece will see, in order: all sentences, or an even sample of them.

  Every sentence draws a number, and the share that is kept is halved as often as the kept ones become too many: about
  half of `most_bytes` or more is left.
  """
  rng, share, size = random.Random(0), 1.0, 0
  kept: collections.deque[tuple[float, bytes]] = collections.deque()
  for sentence in _sentences(documents):
    drawn = rng.random()
    if drawn < share:
      kept.append((drawn, sentence.encode()))
      size += len(kept[-1][1]) + _OVERHEAD
    while size > most_bytes:
      share /= 2
      kept = collections.deque(one for one in kept if one[0] < share)
      size = sum(len(encoded) + _OVERHEAD for _, encoded in kept)
  return collections.deque(encoded for _, encoded in kept)


def _sentences(documents: Iterable[str]) -> Iterator[str]:
  """Yields what stands between newlines, tabs and blank runs, in pieces of bounded length."""
  for document in documents:
    start = 0
    for end, after in itertools.chain(map(re.Match.span, _UNTRAINED.finditer(document)), [(len(document),) * 2]):
      for i in range(start, end, _LONGEST):
        yield document[i : min(i + _LONGEST, end)]
      start = after


def _taken_from(sentences: collections.deque[bytes]) -> Iterator[bytes]:
  """Gives each sentence away: SentencePiece keeps a copy."""
  while sentences:
    yield sentences.popleft()


def _advice(reason: str, character_coverage: float) -> str:
  """Says what to do where SentencePiece, which counts without the specials, has refused."""
  specials = layout.NUM_APPENDED
  if found := re.search(r"too high \(\d+\).* <= (\d+)", reason):
    most = int(found[1]) + specials
    return f"it gives {most} at most, {specials} of them specials: set vocab_size to {most}, or give more text"
  if found := re.search(r"required_chars\. \d+ vs (\d+)", reason):
    least = int(found[1]) + specials
    advice = f"its characters take {least}, {specials} specials among them: set vocab_size to {least} or more"
    if character_coverage <= _LEAST_COVERAGE:
      return advice
    lower = f"a tokenizer.train.character_coverage below {character_coverage:g}"
    return f"{advice}, or have rare characters spelled in bytes by {lower}"
  reason = reason or "SentencePiece gives no reason"
  return f"{reason} (its numbers leave {specials} specials out): give other text"
