"""Text to ids and back, and the folder of a tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import functools
import hashlib
import os
import re

import numpy as np
import sentencepiece

from glmjax import errors
from glmjax import tokens
from glmjax.io import bucket_path
from glmjax.io import downloads
from glmjax.io import folders
from glmjax.io import lock
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import tokenizer_folder
from glmjax.io import user_json
from glmjax.tokenizer import layout

MODEL_FILE, LAYOUT_FILE = tokenizer_folder.MODEL, tokenizer_folder.LAYOUT
LAYOUT_FORMAT = 1

_SENTENCE_ENDS = ".?!;:。？！；…\n"
# Characters: longer texts are encoded in chunks, no chunk is longer than the second, and so many go to SentencePiece
# at once.
_CHUNK, _LONGEST_CHUNK, _TOGETHER = 1 << 16, 1 << 18, 1 << 18

_SPECIAL_TEXT = re.compile("(" + "|".join(re.escape(text) for text in layout.SPECIAL_TEXT) + ")")


class Tokenizer:
  """An immutable tokenizer; two are equal when their fingerprints are."""

  def __init__(self, model: bytes, num_image_tokens: int = 0, source: str = "SentencePiece model") -> None:
    """Takes `model`, a serialized SentencePiece model in the icetk layout; `source` names it in messages."""
    self.model = model
    self.num_image_tokens = num_image_tokens
    proto, self.num_text_tokens = layout.extended_model(model, source)
    self._processor = sentencepiece.SentencePieceProcessor()
    self._processor.LoadFromSerializedProto(proto.SerializeToString())
    normalizer = proto.normalizer_spec
    self._is_verbatim = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    self._adds_dummy_prefix = proto.normalizer_spec.add_dummy_prefix
    self.specials = tokens.icetk(num_image_tokens, self.num_text_tokens)
    self.vocab_size = num_image_tokens + len(proto.pieces)
    self._bytes, self._names = layout.decoding_tables(proto, self.num_text_tokens, num_image_tokens)
    first = num_image_tokens + self.num_text_tokens
    self._special_ids = {text: first + i for i, text in enumerate(layout.SPECIAL_TEXT)}
    self._byte_ids = {
      piece.piece: i for i, piece in enumerate(proto.pieces, num_image_tokens) if piece.type == layout.Piece.BYTE
    }
    self.fingerprint = tokenizer_folder.fingerprint(self._layout())

  @classmethod
  def load(cls, path: paths.Named, num_image_tokens: int | None = None) -> "Tokenizer":
    """Loads a tokenizer folder, that of a model's folder, or a bare SentencePiece model such as the user's own
    ice_text.model.

    A folder knows its number of image ids; a bare model has none unless the caller says so
    (20000 for GLM-130B and the first ChatGLM-6B, 0 for ChatGLM-6B since April 2023).
    """
    path = paths.named(path, "the tokenizer")
    if not path.is_dir():
      return cls(_read_bytes(path), num_image_tokens or 0, str(path))
    if not (path / LAYOUT_FILE).exists() and (inside := path / tokenizer_folder.FOLDER).is_dir():
      path = inside
    model = _read_bytes(path / MODEL_FILE)
    layout_path = path / LAYOUT_FILE
    saved = user_json.parse(
      _read_bytes(layout_path), str(layout_path), expected="make the tokenizer folder again with `glmjax tokenizer`"
    )
    try:
      saved_hash, saved_images, saved_format = (
        saved["model_sha256"],
        int(saved["num_image_tokens"]),
        int(saved["format"]),
      )
    except (ValueError, KeyError, TypeError) as error:
      raise errors.InputError(
        f"{layout_path} is not a tokenizer layout ({error!r}); make the tokenizer folder again with `glmjax tokenizer`"
      ) from error
    if saved_format != LAYOUT_FORMAT:
      raise errors.InputError(
        f"{layout_path} has layout format {saved_format}, and this glmjax reads "
        f"{LAYOUT_FORMAT}; use the glmjax version that wrote it"
      )
    if hashlib.sha256(model).hexdigest() != saved_hash:
      raise errors.InputError(
        f"{path / MODEL_FILE} does not match the hash in {LAYOUT_FILE}: one of the two "
        "was changed or damaged; copy the folder again from where it was made"
      )
    if num_image_tokens not in (None, saved_images):
      raise errors.InputError(
        f"{path} has {saved_images} image ids, not {num_image_tokens}; leave the number out to use the folder as it is"
      )
    return cls(model, saved_images, str(path / MODEL_FILE))

  def save(self, folder: paths.Named) -> None:
    """Writes the tokenizer folder whole or not at all; one that is there already must be the same.

    Raises:
      errors.InputError: when another tokenizer is there, or the folder cannot be written.
    """
    folder = folders.real(folder, "folder")
    in_bucket = isinstance(folder, bucket_path.BucketPath)
    taken = f"{folder}: another process is writing this tokenizer"
    with lock.held(lock.beside(folder), taken) if in_bucket else contextlib.nullcontext():
      self._save(folder)

  def _save(self, folder: paths.Path) -> None:
    if publish.in_work(folder):
      publish.sweep(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
      try:
        with publish.folder(folder, LAYOUT_FILE) as temporary:
          (temporary / MODEL_FILE).write_bytes(self.model)
          publish.finish(temporary / LAYOUT_FILE, self._layout())
        return
      except OSError as error:
        raise errors.InputError(f"cannot write the tokenizer {folder}: {errors.reason(error)}") from error
      except errors.InputError:  # another process was first
        if not folder.is_dir():
          raise
    if Tokenizer.load(folder) != self:
      raise errors.InputError(f"{folder} holds another tokenizer; remove it or choose another folder")

  def check_fits(self, vocab_size: int) -> None:
    """Refuses a model whose embedding rows are those of the vocabulary's other date, with or without image ids."""
    other = 0 if self.num_image_tokens else layout.IMAGE_TOKENS
    padding, others_padding = (
      vocab_size - (self.vocab_size - self.num_image_tokens + n) for n in (self.num_image_tokens, other)
    )
    if not 0 <= padding < layout.IMAGE_TOKENS and 0 <= others_padding < layout.IMAGE_TOKENS:
      raise errors.InputError(
        f"the tokenizer has {self.vocab_size} ids, {self.num_image_tokens} of them image ids, and the model's "
        f"{vocab_size} go with {other} image ids: it is of another date (ChatGLM-6B dropped them on 6 April 2023); "
        "use the one that came with the model"
      )

  def encode(self, text: str, allow_special: bool = False, dummy_prefix: bool = True) -> list[int]:
    """Returns ids of the text; written specials such as "[MASK]" become special tokens only if allowed.

    dummy_prefix=False is for text that goes on where other text ended: models that put a space before
    every text (ice_text.model; those of `training` do not) then put none.
    """
    return self.encode_arrays([text], allow_special, dummy_prefix)[0].tolist()

  def encode_arrays(
    self, texts: Sequence[str], allow_special: bool = False, dummy_prefix: bool = True
  ) -> list[np.ndarray]:
    """Applies `encode` to every text, int32, in memory that is bounded but for texts and ids."""
    rows: list[list[np.ndarray]] = [[] for _ in texts]
    segments = (
      (row, *segment) for row, text in zip(rows, texts) for segment in self._segments(text, allow_special, dummy_prefix)
    )
    for together in _bounded(segments):
      encoded = iter(self._encode_marked([segment for _, segment, _ in together if isinstance(segment, str)]))
      for row, segment, drop in together:
        if isinstance(segment, str):
          row.append(np.array(next(encoded), np.int32)[drop:] + np.int32(self.num_image_tokens))
        else:
          row.append(np.array(segment, np.int32))
    return [row[0] if len(row) == 1 else np.concatenate(row or [np.zeros(0, np.int32)]) for row in rows]

  def _encode_marked(self, marked: list[str]) -> list[list[int]]:
    """Returns SentencePiece's ids of texts whose whitespace is marked."""
    try:
      return self._processor.encode(marked, num_threads=1)
    except (TypeError, UnicodeEncodeError) as error:
      if not any(re.search("[\ud800-\udfff]", text) for text in marked):
        raise
      raise errors.InputError(
        "the text holds half a surrogate pair, which is not valid Unicode: read it as UTF-8"
      ) from error

  def decode(self, ids: Iterable[int], show_special: bool = False, dummy_prefix: bool = True) -> str:
    """Returns the text of the ids, special tokens left out or written as in layout.SPECIAL_TEXT; broken UTF-8
    becomes U+FFFD.
    """
    return self.decode_bytes(ids, show_special, dummy_prefix).decode("utf-8", errors="replace")

  def decode_bytes(self, ids: Iterable[int], show_special: bool = False, dummy_prefix: bool = True) -> bytes:
    """Returns the UTF-8 bytes of the ids: where a character is split over ids, any cut of them still adds up."""
    out = []
    strip = dummy_prefix and self._adds_dummy_prefix
    starts = strip  # at the start, and after a special token, a leading space is the dummy prefix
    for i in ids:
      i = int(i)
      name = self._names.get(i)
      if name is not None:
        out.append(name if show_special else b"")
        starts = strip
      elif self.num_image_tokens <= i < self.vocab_size:
        piece = self._bytes[i - self.num_image_tokens]
        out.append(piece[1:] if starts and piece.startswith(b" ") else piece)
        starts = False
    return b"".join(out)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Tokenizer) and self.fingerprint == other.fingerprint

  def __hash__(self) -> int:
    return hash(self.fingerprint)

  def __reduce__(self) -> tuple:
    return Tokenizer, (self.model, self.num_image_tokens)

  def _layout(self) -> dict:
    return {
      "format": LAYOUT_FORMAT,
      "layout": "icetk",
      "model_sha256": hashlib.sha256(self.model).hexdigest(),
      "num_image_tokens": self.num_image_tokens,
      "vocab_size": self.vocab_size,
    }

  def _segments(self, text: str, allow_special: bool, dummy_prefix: bool) -> Iterator[tuple[str | list[int], int]]:
    """Yields (marked text, ids to drop from its front) and (ids of its own, 0) in order."""
    for part in _SPECIAL_TEXT.split(text) if allow_special else (text,):
      if allow_special and part in self._special_ids:
        yield [self._special_ids[part]], 0
        dummy_prefix = True  # GLM-130B encodes the text behind a mask as a text of its own
        continue
      for number, run in enumerate((part,) if part.isascii() else layout.RESERVED.split(part)):
        if number % 2:  # what the pattern has found
          yield [self._byte_ids[f"<0x{byte:02X}>"] for byte in run.encode()], 0
          dummy_prefix = False
          continue
        for chunk in self._chunks(run):
          marked = layout.mark_whitespace(chunk)
          if dummy_prefix or not self._adds_dummy_prefix:
            yield marked, 0
          else:  # the model's space goes before a newline, and both are dropped
            yield layout.NEWLINE + marked, 2
          dummy_prefix = False

  def _chunks(self, text: str) -> Iterator[str]:
    """Cuts a long text where no piece crosses, so that the memory that SentencePiece takes is bounded.

    It is cut after newlines; where there is none, between characters that no piece has side by side; where all have,
    at the limit. (A model that folds characters is cut after newlines alone: what it folds may lie across.)
    """
    start = 0
    while len(text) - start > _CHUNK:
      end = text.find("\n", start + _CHUNK, start + _LONGEST_CHUNK if self._is_verbatim else None) + 1
      if not end and not self._is_verbatim:
        break
      end = end or self._cut(text, start)
      yield text[start:end]
      start = end
    if start < len(text):
      yield text[start:]

  def _cut(self, text: str, start: int) -> int:
    """Returns where a chunk without a newline ends."""
    stop = min(start + _LONGEST_CHUNK, len(text))
    for end in range(start + _CHUNK, stop):
      pair = text[end - 1 : end + 1]
      if pair not in self._pairs and pair != "  ":
        return end
    return stop

  @functools.cached_property
  def _pairs(self) -> frozenset[str]:
    """All pairs of characters that stand side by side in a piece."""
    pieces = (self._processor.IdToPiece(i).replace(layout.SPACE, " ") for i in range(len(self._bytes)))
    return frozenset(piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1))


def sentence_ends(folder: str | os.PathLike) -> tuple[int, ...]:
  """Returns ids of the tokenizer's pieces that end a sentence, as THUDM/GLM's blocklm_utils.py tells them."""
  tokenizer = Tokenizer.load(folder)
  return tuple(
    i
    for i in range(tokenizer.num_image_tokens, tokenizer.vocab_size)
    if not set(tokenizer.decode([i])).isdisjoint(_SENTENCE_ENDS)
  )


_Segment = tuple[list[np.ndarray], str | list[int], int]


def _bounded(segments: Iterator[_Segment]) -> Iterator[list[_Segment]]:
  """Yields segments in lists of about _TOGETHER characters."""
  together, size = [], 0
  for segment in segments:
    together.append(segment)
    size += len(segment[1])
    if size >= _TOGETHER:
      yield together
      together, size = [], 0
  if together:
    yield together


def _read_bytes(path: paths.Path) -> bytes:
  try:
    if path.exists() and not path.is_file():  # a FIFO would wait for ever
      raise errors.InputError(
        f"the tokenizer file {path} is no regular file; give a folder that `glmjax tokenizer` "
        "made, or a SentencePiece model"
      )
    if path.exists() and path.stat().st_size > tokenizer_folder.LARGEST:
      raise errors.InputError(
        f"the tokenizer file {path} has {path.stat().st_size:,} bytes, where {tokenizer_folder.LARGEST:,} at "
        "most are expected: no SentencePiece model"
      )
    content = path.read_bytes()
    downloads.check(content[: downloads.HEAD], str(path))
    return content
  except OSError as error:
    raise errors.InputError(
      f"cannot read the tokenizer file {path}: {errors.reason(error)}; give a folder that "
      f"`glmjax tokenizer` made, or a SentencePiece model"
    ) from error
