"""Writing the shards of a token cache: files that are hashed as they are written, and complete or absent."""

import contextlib
import hashlib
import typing
from collections.abc import Iterator

import numpy as np

from glmjax import errors
from glmjax.data import shards
from glmjax.data import verified
from glmjax.io import paths
from glmjax.io import publish

_BUFFER_TOKENS = 1 << 20


class Hashed:
  """A binary file that counts and hashes what is written."""

  def __init__(self, name: str, file: typing.BinaryIO) -> None:
    self.name, self.bytes = name, 0
    self.sums = verified.Sums()
    self._file, self._hash = file, hashlib.sha256()

  def write(self, data: bytes) -> None:
    """Appends data, counted and hashed."""
    self._file.write(data)
    self._hash.update(data)
    self.sums.add(data)
    self.bytes += len(data)

  @property
  def record(self) -> dict:
    """The name, size and checksum of the file."""
    return {"file": self.name, "bytes": self.bytes, "sha256": self._hash.hexdigest()}


@contextlib.contextmanager
def replacing(path: paths.Path) -> Iterator[Hashed]:
  """Yields a file that takes its name only when all of it is there."""
  try:
    with publish.file(path) as file:
      yield Hashed(path.name, file)
  except OSError as error:
    raise errors.InputError(
      f"cannot write {path}: {errors.reason(error)}; then run the same command again, or choose "
      "another folder (what is complete is kept)"
    ) from error


class ShardWriter:
  """A writer of a shard's tokens and documents, on their way to its files."""

  def __init__(self, stem: str, file: Hashed, vocab_size: int) -> None:
    self.record: dict = {}  # its entry for the manifest, once all is written
    self._stem, self._file, self._vocab_size = stem, file, vocab_size
    self._dtype = np.dtype(shards.token_dtype(vocab_size))
    self._rows: list[tuple[int, int, int]] = []
    self._buffer: list[np.ndarray] = []
    self._buffered = self._end = 0

  def add(self, document: shards.Document) -> None:
    """Appends a document."""
    ids = np.asarray(document.tokens)
    ids = ids if ids.dtype.kind == "i" else ids.astype(np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
      worst = ids.max() if ids.min() >= 0 else ids.min()
      raise errors.InputError(
        f"{self._stem}: token id {worst} is outside the vocabulary of {self._vocab_size}; "
        "cache with the tokenizer that the task uses"
      )
    self._end += ids.size
    self._rows.append((self._end, document.utf8_bytes, document.input_length))
    self._buffer.append(ids.astype(self._dtype))
    self._buffered += ids.size
    if self._buffered >= _BUFFER_TOKENS:
      self.flush()

  def flush(self) -> None:
    """Writes what is buffered."""
    if self._buffer:
      self._file.write(np.concatenate(self._buffer).tobytes())
    self._buffer, self._buffered = [], 0

  def table(self) -> np.ndarray:
    """Returns the documents so far, [documents, shards.DOCUMENT_COLUMNS]."""
    return np.asarray(self._rows, "<i8").reshape(-1, len(shards.DOCUMENT_COLUMNS))


@contextlib.contextmanager
def writing_shard(folder: paths.Path, stem: str, vocab_size: int) -> Iterator[ShardWriter]:
  """Yields a writer of one shard, whose three files are there at the end, each complete or absent."""
  path = folder / stem
  path.parent.mkdir(parents=True, exist_ok=True)
  with replacing(path.with_name(path.name + ".tokens")) as file:
    writer = ShardWriter(stem, file, vocab_size)
    yield writer
    writer.flush()
  table = writer.table()
  with replacing(path.with_name(path.name + ".documents")) as index:
    index.write(table.tobytes())
  with replacing(path.with_name(path.name + ".sums")) as sums:
    sums.write(file.sums.array().tobytes() + index.sums.array().tobytes())
  known = bool((table[:, 1] >= 0).all())
  writer.record = {
    "documents": len(table),
    "tokens": int(table[-1, 0]) if len(table) else 0,
    "utf8_bytes": int(table[:, 1].sum()) if known else None,
    "files": [file.record, index.record],
    "sums": sums.record,  # apart from them: a cache's fingerprint is that of its tokens
  }
