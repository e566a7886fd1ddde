"""The icetk layout of ids: what stands before and behind the text pieces of a SentencePiece model.

From id 0 up (docs/sources.md, "Tokens"):

  image ids (20000 in GLM-130B, else none) | text pieces: <unk> <s> </s> <pad> <n> ... |
  [MASK] [gMASK] [sMASK] eod sop eop ENC dBLOCK | tab | runs of 2..80 spaces | 256 bytes

The last block is there only when the SentencePiece model has no byte pieces of its own. What text holds can
never become a special token: newline, tab and blank runs are marked by private characters that the
extended model knows as symbols, and those characters themselves, like U+2581, go through as bytes.
With an identity-normalised model (all that `training` makes) encode and decode are exact inverses; the
original ice_text.model folds some characters (full-width "!" to "!"), as it did for GLM-130B.
"""

import re

from sentencepiece import sentencepiece_model_pb2

from glmjax import errors
from glmjax import tokens

MAX_BLANKS = 80
# [MASK] .. dBLOCK, tab, blanks of 2..80: what the layout adds behind the text pieces.
NUM_APPENDED = len(tokens.ICETK_SPECIALS) + MAX_BLANKS
IMAGE_TOKENS = 20_000  # before the text in GLM-130B, and in ChatGLM-6B until 6 April 2023

# Private characters: + 0 is newline, + 1 tab, + k a run of k spaces, + 128 .. the specials.
_MARK = 0x10FF00
NEWLINE = chr(_MARK)
_SPECIAL_MARK = _MARK + 128
SPACE = "\u2581"  # SentencePiece's own stand-in for a space
RESERVED = re.compile(f"([{SPACE}{chr(_MARK)}-{chr(_SPECIAL_MARK + len(tokens.ICETK_SPECIALS))}])")
_BLANKS = re.compile(f" {{2,{MAX_BLANKS}}}")

# How special tokens are written in text, for callers that ask for it.
SPECIAL_TEXT = tuple(name if name.startswith("[") else f"<{name}>" for name in tokens.ICETK_SPECIALS)

Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def mark_whitespace(text: str) -> str:
  """Puts the private characters in place of newlines, tabs and runs of blanks."""
  text = text.replace("\n", NEWLINE).replace("\t", chr(_MARK + 1))
  return _BLANKS.sub(lambda match: chr(_MARK + len(match.group())), text) if "  " in text else text


def extended_model(model: bytes, source: str) -> tuple[sentencepiece_model_pb2.ModelProto, int]:
  """Returns the model with everything behind the text pieces in place, and the number of text pieces."""
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
  proto.pieces[4].piece = NEWLINE
  proto.pieces[4].type = Piece.USER_DEFINED
  num_bytes = sum(piece.type == Piece.BYTE for piece in proto.pieces)
  if num_bytes not in (0, 256):
    raise errors.InputError(f"{source} has {num_bytes} byte pieces and should have 256 or none")
  if not num_bytes:
    proto.trainer_spec.byte_fallback = True
    proto.pieces.extend(Piece(piece=f"<0x{i:02X}>", score=0.0, type=Piece.BYTE) for i in range(256))
  return proto, num_text


def _num_text_pieces(names: list[str], source: str) -> int:
  """Returns where the text pieces end: at [MASK] if the model already holds the specials, else at its end."""
  masks = ["[MASK]", "[gMASK]", "[sMASK]"]
  for i in range(len(names) - 2):
    if names[i : i + 3] == masks:
      tail = names[i + len(tokens.ICETK_SPECIALS) : i + NUM_APPENDED]
      if tail != ["<|tab|>"] + [f"<|blank_{k}|>" for k in range(2, MAX_BLANKS + 1)]:
        raise errors.InputError(f"{source} holds [MASK] at {i}, but not the tokens that icetk has behind it")
      return i
  return len(names)


def _appended_piece(index: int) -> Piece:
  num_specials = len(tokens.ICETK_SPECIALS)
  if index < num_specials:  # a control piece is never produced from text
    return Piece(piece=chr(_SPECIAL_MARK + index), score=0.0, type=Piece.CONTROL)
  return Piece(piece=chr(_MARK + 1 + index - num_specials), score=0.0, type=Piece.USER_DEFINED)


def decoding_tables(
  proto: sentencepiece_model_pb2.ModelProto, num_text: int, num_image_tokens: int
) -> tuple[list[bytes], dict[int, bytes]]:
  """Returns the bytes of every piece, and the written names of special ids."""
  table = []
  names = {}
  for i, piece in enumerate(proto.pieces):
    text = piece.piece
    mark = ord(text) - _MARK if len(text) == 1 and _MARK <= ord(text) <= _MARK + MAX_BLANKS else None
    if piece.type == Piece.BYTE:
      table.append(bytes([int(text[3:5], 16)]))
    elif mark is not None:
      table.append({0: b"\n", 1: b"\t"}.get(mark, b" " * mark))
    elif piece.type == Piece.UNKNOWN:
      table.append("\ufffd".encode())
    elif piece.type == Piece.CONTROL:
      table.append(b"")
      special = i - num_text
      names[i + num_image_tokens] = (SPECIAL_TEXT[special] if special >= 0 else text).encode()
    else:
      table.append(text.replace(SPACE, " ").encode())
  return table, names
