"""Text to ids and back in the icetk layout, over SentencePiece and without TensorFlow.

Layout (docs/sources.md, "Tokens"), from id 0 up:

  image ids (20000 in GLM-130B, else none) | text pieces: <unk> <s> </s> <pad> <n> ... |
  [MASK] [gMASK] [sMASK] eod sop eop ENC dBLOCK | tab | runs of 2..80 spaces | 256 bytes

The last block is there only when the SentencePiece model has no byte pieces of its own. What text holds can
never become a special token: newline, tab and blank runs are marked by private characters that the
extended model knows as symbols, and those characters themselves, like U+2581, go through as bytes.
With an identity-normalised model (all that `train` makes) encode and decode are exact inverses; the
original ice_text.model folds some characters (full-width "!" to "!"), as it did for GLM-130B.
"""

from collections.abc import Iterable, Iterator, Sequence
import hashlib
import io
import json
import os
import pathlib
import re

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from glmjax import errors
from glmjax import ranges
from glmjax import tokens
from glmjax.io import downloads
from glmjax.io import folders
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import user_json

MODEL_FILE = "tokenizer.model"
LAYOUT_FILE = "tokenizer.json"
LAYOUT_FORMAT = 1
MAX_BLANKS = 80
# [MASK] .. dBLOCK, tab, blanks of 2..80: what the layout adds behind the text pieces.
NUM_APPENDED = len(tokens.ICETK_SPECIALS) + MAX_BLANKS

# Of a tokenizer that is trained: <unk> <s> </s> <pad> <n>, the bytes, and one character; SentencePiece's own bounds.
_FEWEST = NUM_APPENDED + 5 + 256 + 1
_MOST = 1 << 22
_LEAST_COVERAGE = 0.98

IMAGE_TOKENS = 20_000  # before the text in GLM-130B, and in ChatGLM-6B until 6 April 2023

# Private characters: + 0 is newline, + 1 tab, + k a run of k spaces, + 128 .. the specials.
_MARK = 0x10FF00
_NEWLINE = chr(_MARK)
_SPECIAL_MARK = _MARK + 128
_SPACE = "\u2581"  # SentencePiece's own stand-in for a space
_RESERVED = re.compile(f"([{_SPACE}{chr(_MARK)}-{chr(_SPECIAL_MARK + len(tokens.ICETK_SPECIALS))}])")
_BLANKS = re.compile(f" {{2,{MAX_BLANKS}}}")
_UNTRAINED = re.compile(r"[\n\t]| {2,}|" + _RESERVED.pattern.strip("()"))  # never inside a piece
_SENTENCE_ENDS = ".?!;:。？！；…\n"
_LARGEST = 1 << 28  # bytes of a SentencePiece model; ice_text.model has 2.7 MB
_CHUNK = 1 << 16  # characters; longer texts are encoded in pieces cut at newlines

# How special tokens are written in text, for callers that ask for it.
SPECIAL_TEXT = tuple(name if name.startswith("[") else f"<{name}>" for name in tokens.ICETK_SPECIALS)
_SPECIAL_TEXT = re.compile("(" + "|".join(re.escape(text) for text in SPECIAL_TEXT) + ")")

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


class Tokenizer:
  """An immutable tokenizer; two are equal when their fingerprints are."""

  def __init__(self, model: bytes, num_image_tokens: int = 0, source: str = "SentencePiece model") -> None:
    """`model` is a serialized SentencePiece model in the icetk layout; `source` names it in messages."""
    self.model = model
    self.num_image_tokens = num_image_tokens
    proto, self.num_text_tokens = _extended_model(model, source)
    self._processor = sentencepiece.SentencePieceProcessor()
    self._processor.LoadFromSerializedProto(proto.SerializeToString())
    self._adds_dummy_prefix = proto.normalizer_spec.add_dummy_prefix
    self.specials = tokens.icetk(num_image_tokens, self.num_text_tokens)
    self.vocab_size = num_image_tokens + len(proto.pieces)
    self._bytes, self._names = _decoding_tables(proto, self.num_text_tokens, num_image_tokens)
    first = num_image_tokens + self.num_text_tokens
    self._special_ids = {text: first + i for i, text in enumerate(SPECIAL_TEXT)}
    self._byte_ids = {
      piece.piece: i for i, piece in enumerate(proto.pieces, num_image_tokens) if piece.type == _Piece.BYTE
    }
    self.fingerprint = hashlib.sha256(json.dumps(self._layout(), sort_keys=True).encode()).hexdigest()

  @classmethod
  def load(cls, path: str | os.PathLike, num_image_tokens: int | None = None) -> "Tokenizer":
    """Loads a tokenizer folder, or a bare SentencePiece model such as the user's own ice_text.model.

    A folder knows its number of image ids; a bare model has none unless the caller says so
    (20000 for GLM-130B and the first ChatGLM-6B, 0 for ChatGLM-6B since April 2023).
    """
    path = paths.local(path, "the tokenizer")
    if not path.is_dir():
      return cls(_read_bytes(path), num_image_tokens or 0, str(path))
    model = _read_bytes(path / MODEL_FILE)
    layout_path = path / LAYOUT_FILE
    layout = user_json.parse(
      _read_bytes(layout_path), str(layout_path), expected="make the tokenizer folder again with `glmjax tokenizer`"
    )
    try:
      saved_hash, saved_images, saved_format = (
        layout["model_sha256"],
        int(layout["num_image_tokens"]),
        int(layout["format"]),
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

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the tokenizer folder whole or not at all; one that is there already must be the same.

    Raises:
      errors.InputError: when another tokenizer is there, or the folder cannot be written.
    """
    folder = folders.real(folder, "folder")
    if not folder.is_dir() or not any(folder.iterdir()):
      try:
        with publish.folder(folder) as temporary:
          (temporary / MODEL_FILE).write_bytes(self.model)
          (temporary / LAYOUT_FILE).write_text(json.dumps(self._layout(), indent=2, sort_keys=True) + "\n")
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
    other = 0 if self.num_image_tokens else IMAGE_TOKENS
    padding, others_padding = (
      vocab_size - (self.vocab_size - self.num_image_tokens + n) for n in (self.num_image_tokens, other)
    )
    if not 0 <= padding < IMAGE_TOKENS and 0 <= others_padding < IMAGE_TOKENS:
      raise errors.InputError(
        f"the tokenizer has {self.vocab_size} ids, {self.num_image_tokens} of them image ids, and the model's "
        f"{vocab_size} go with {other} image ids: it is of another date (ChatGLM-6B dropped them on 6 April 2023); "
        "use the one that came with the model"
      )

  def encode(self, text: str, allow_special: bool = False, dummy_prefix: bool = True) -> list[int]:
    """Ids of the text; written specials such as "[MASK]" become special tokens only if allowed.

    dummy_prefix=False is for text that goes on where other text ended: models that put a space before
    every text (ice_text.model; those of `train` do not) then put none.
    """
    return self.encode_batch([text], allow_special, dummy_prefix, num_threads=1)[0]

  def encode_batch(
    self, texts: Sequence[str], allow_special: bool = False, dummy_prefix: bool = True, num_threads: int = 2
  ) -> list[list[int]]:
    """`encode` of every text, on SentencePiece's own threads."""
    segments = [list(self._segments(text, allow_special, dummy_prefix)) for text in texts]
    marked = [segment for parts in segments for segment, _ in parts if isinstance(segment, str)]
    try:
      encoded = iter(self._processor.encode(marked, num_threads=num_threads))
    except (TypeError, UnicodeEncodeError) as error:
      if not any(re.search("[\ud800-\udfff]", text) for text in marked):
        raise
      raise errors.InputError(
        "the text holds half a surrogate pair, which is not valid Unicode: read it as UTF-8"
      ) from error
    rows = []
    for parts in segments:
      row: list[int] = []
      for segment, drop in parts:
        if isinstance(segment, str):
          row.extend(i + self.num_image_tokens for i in next(encoded)[drop:])
        else:
          row.extend(segment)
      rows.append(row)
    return rows

  def decode(self, ids: Iterable[int], show_special: bool = False, dummy_prefix: bool = True) -> str:
    """Text of the ids, special tokens left out or written as in SPECIAL_TEXT; broken UTF-8 becomes U+FFFD."""
    return self.decode_bytes(ids, show_special, dummy_prefix).decode("utf-8", errors="replace")

  def decode_bytes(self, ids: Iterable[int], show_special: bool = False, dummy_prefix: bool = True) -> bytes:
    """UTF-8 bytes of the ids: where a character is split over ids, any cut of them still adds up."""
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
      for run in _RESERVED.split(part):
        if _RESERVED.fullmatch(run):
          yield [self._byte_ids[f"<0x{byte:02X}>"] for byte in run.encode()], 0
        else:
          for chunk in _chunks(run):
            marked = _mark_whitespace(chunk)
            if dummy_prefix or not self._adds_dummy_prefix:
              yield marked, 0
            else:  # the model's space goes before a newline, and both are dropped
              yield _NEWLINE + marked, 2
            dummy_prefix = False
        dummy_prefix = dummy_prefix and not run


def train(
  documents: Iterable[str],
  folder: str | os.PathLike,
  vocab_size: int,
  model_type: str = "bpe",
  character_coverage: float = 0.998,
  num_threads: int = 4,
) -> Tokenizer:
  """Trains a lossless tokenizer on the documents and saves it.

  vocab_size counts every id, special tokens included: a multiple of 128 needs no padding in the model.
  Characters beyond the coverage are spelled in bytes; in a small bilingual vocabulary 0.998 leaves more
  room for words and gave 4 % fewer English and 2 % fewer Chinese tokens than 0.9995 (8192 ids).
  The same documents give the same bytes (num_threads must stay the same for model_type="unigram"), so a
  folder that already holds the result is no mistake; one that holds anything else is left as it is.
  """
  if model_type not in ("bpe", "unigram"):
    raise errors.InputError(f'model_type is {model_type!r}; use "bpe" (fast) or "unigram" (as icetk)')
  ranges.whole("tokenizer.train.vocab_size", vocab_size, 1, _MOST)
  ranges.whole("tokenizer.train.num_threads", num_threads, 1, 1024)
  ranges.number("tokenizer.train.character_coverage", character_coverage, _LEAST_COVERAGE, 1.0)
  folder = folders.claim(folder, folders.Kind.TOKENIZER, "the tokenizer's folder")  # before the work
  if folder.is_dir() and any(folder.iterdir()):
    found = Tokenizer.load(folder).vocab_size
    if found != vocab_size:
      raise errors.InputError(
        f"{folder} holds a tokenizer of {found} ids, not {vocab_size}; remove it or choose another folder"
      )
  writer, lines = io.BytesIO(), _TrainingLines(documents)
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=writer,
      model_type=model_type,
      vocab_size=max(vocab_size, _FEWEST) - NUM_APPENDED,
      character_coverage=character_coverage,
      num_threads=num_threads,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      byte_fallback=True,
      split_digits=True,
      unk_id=0,
      bos_id=1,
      eos_id=2,
      pad_id=3,
      user_defined_symbols=["<n>"],
      input_sentence_size=2_000_000,
      shuffle_input_sentence=True,
      max_sentence_length=1 << 20,
      minloglevel=2,
    )
  except (RuntimeError, OSError) as error:
    if lines.mistake is not None:  # in the text; SentencePiece would say it in words of its own
      raise lines.mistake from None
    reason = str(error).rsplit("] ", 1)[-1].strip().replace("\n", " ")
    advice = "there is no text: give some" if lines.are_empty else _advice(reason, character_coverage)
    raise errors.InputError(f"no tokenizer of {vocab_size} ids can be trained on this text: {advice}") from error
  if vocab_size < _FEWEST:
    raise errors.InputError(
      f"no tokenizer of {vocab_size} ids can be trained on this text: set vocab_size to "
      f"{_FEWEST} or more ({_FEWEST - 1} ids are specials, blanks and bytes)"
    )
  tokenizer = Tokenizer(writer.getvalue())
  tokenizer.save(folder)
  return tokenizer


def sentence_ends(folder: str | os.PathLike) -> tuple[int, ...]:
  """Ids of the tokenizer's pieces that end a sentence, as THUDM/GLM's blocklm_utils.py tells them."""
  tokenizer = Tokenizer.load(folder)
  return tuple(
    i
    for i in range(tokenizer.num_image_tokens, tokenizer.vocab_size)
    if not set(tokenizer.decode([i])).isdisjoint(_SENTENCE_ENDS)
  )


def _advice(reason: str, character_coverage: float) -> str:
  """What to do where SentencePiece, which counts without the specials, has refused."""
  if found := re.search(r"too high \(\d+\).* <= (\d+)", reason):
    most = int(found[1]) + NUM_APPENDED
    return f"it gives {most} at most, {NUM_APPENDED} of them specials: set vocab_size to {most}, or give more text"
  if found := re.search(r"required_chars\. \d+ vs (\d+)", reason):
    least = int(found[1]) + NUM_APPENDED
    return f"its characters take {least}, {NUM_APPENDED} specials among them: set vocab_size to {least} or more" + (
      f", or have rare characters spelled in bytes by a tokenizer.train.character_coverage below {character_coverage:g}"
      if character_coverage > _LEAST_COVERAGE
      else ""
    )
  return f"{reason or 'SentencePiece gives no reason'} (its numbers leave {NUM_APPENDED} specials out): give other text"


class _TrainingLines:
  """What SentencePiece will see between newlines, tabs and blank runs, in bounded pieces."""

  def __init__(self, documents: Iterable[str]) -> None:
    self._documents = documents
    self.are_empty = True
    self.mistake: errors.InputError | None = None  # that reading them came to

  def __iter__(self) -> Iterator[str]:
    try:
      for document in self._documents:
        for line in _UNTRAINED.split(document):
          for start in range(0, len(line), _CHUNK):
            self.are_empty = False
            yield line[start : start + _CHUNK]
    except errors.InputError as error:
      self.mistake = error
      raise


def _chunks(text: str) -> Iterator[str]:
  """Cuts after newlines, where no piece crosses; keeps the memory of one long text bounded."""
  start = 0
  while len(text) - start > _CHUNK:
    end = text.find("\n", start + _CHUNK) + 1
    if not end:
      break
    yield text[start:end]
    start = end
  if start < len(text):
    yield text[start:]


def _mark_whitespace(text: str) -> str:
  text = text.replace("\n", _NEWLINE).replace("\t", chr(_MARK + 1))
  return _BLANKS.sub(lambda match: chr(_MARK + len(match.group())), text) if "  " in text else text


def _extended_model(model: bytes, source: str) -> tuple[sentencepiece_model_pb2.ModelProto, int]:
  """The model with everything behind the text pieces in place, and the number of text pieces."""
  try:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  except Exception as error:  # protobuf's DecodeError; its class differs between versions
    raise errors.InputError(f"{source} is not a SentencePiece model") from error
  names = [piece.piece for piece in proto.pieces]
  wanted = {0: "<unk>", 2: "</s>", 3: "<pad>", 4: "<n>"}
  for i, name in wanted.items():
    if len(names) <= i or names[i] != name:
      found = names[i] if len(names) > i else "nothing"
      raise errors.InputError(
        f"{source} is not in the icetk layout: piece {i} is {found!r} and should be "
        f"{name!r}; train one with `glmjax tokenizer`, or use THUDM's ice_text.model"
      )
  num_text = _num_text_pieces(names, source)
  for i in range(num_text, len(names)):  # ChatGLM-6B's model since April 2023 already holds them
    if i < num_text + NUM_APPENDED:
      proto.pieces[i].Clear()
      proto.pieces[i].MergeFrom(_appended_piece(i - num_text))
  if num_text == len(names):
    proto.pieces.extend(_appended_piece(i) for i in range(NUM_APPENDED))
  proto.pieces[4].piece = _NEWLINE
  proto.pieces[4].type = _Piece.USER_DEFINED
  num_bytes = sum(piece.type == _Piece.BYTE for piece in proto.pieces)
  if num_bytes not in (0, 256):
    raise errors.InputError(f"{source} has {num_bytes} byte pieces and should have 256 or none")
  if not num_bytes:
    proto.trainer_spec.byte_fallback = True
    proto.pieces.extend(_Piece(piece=f"<0x{i:02X}>", score=0.0, type=_Piece.BYTE) for i in range(256))
  return proto, num_text


def _num_text_pieces(names: list[str], source: str) -> int:
  """Where the text pieces end: at [MASK] if the model already holds the specials, else at its end."""
  masks = ["[MASK]", "[gMASK]", "[sMASK]"]
  for i in range(len(names) - 2):
    if names[i : i + 3] == masks:
      tail = names[i + len(tokens.ICETK_SPECIALS) : i + NUM_APPENDED]
      if tail != ["<|tab|>"] + [f"<|blank_{k}|>" for k in range(2, MAX_BLANKS + 1)]:
        raise errors.InputError(f"{source} holds [MASK] at {i}, but not the tokens that icetk has behind it")
      return i
  return len(names)


def _appended_piece(index: int) -> _Piece:
  num_specials = len(tokens.ICETK_SPECIALS)
  if index < num_specials:  # a control piece is never produced from text
    return _Piece(piece=chr(_SPECIAL_MARK + index), score=0.0, type=_Piece.CONTROL)
  return _Piece(piece=chr(_MARK + 1 + index - num_specials), score=0.0, type=_Piece.USER_DEFINED)


def _decoding_tables(
  proto: sentencepiece_model_pb2.ModelProto, num_text: int, num_image_tokens: int
) -> tuple[list[bytes], dict[int, bytes]]:
  """Bytes of every piece, and the written names of special ids."""
  table = []
  names = {}
  for i, piece in enumerate(proto.pieces):
    text = piece.piece
    mark = ord(text) - _MARK if len(text) == 1 and _MARK <= ord(text) <= _MARK + MAX_BLANKS else None
    if piece.type == _Piece.BYTE:
      table.append(bytes([int(text[3:5], 16)]))
    elif mark is not None:
      table.append({0: b"\n", 1: b"\t"}.get(mark, b" " * mark))
    elif piece.type == _Piece.UNKNOWN:
      table.append("\ufffd".encode())
    elif piece.type == _Piece.CONTROL:
      table.append(b"")
      special = i - num_text
      names[i + num_image_tokens] = (SPECIAL_TEXT[special] if special >= 0 else text).encode()
    else:
      table.append(text.replace(_SPACE, " ").encode())
  return table, names


def _read_bytes(path: pathlib.Path) -> bytes:
  try:
    if path.exists() and not path.is_file():  # a FIFO would wait for ever
      raise errors.InputError(
        f"the tokenizer file {path} is no regular file; give a folder that `glmjax tokenizer` "
        "made, or a SentencePiece model"
      )
    if path.exists() and path.stat().st_size > _LARGEST:
      raise errors.InputError(
        f"the tokenizer file {path} has {path.stat().st_size:,} bytes, where {_LARGEST:,} at "
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
