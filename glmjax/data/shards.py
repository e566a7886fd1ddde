"""The token cache on disk: shards of token ids, their documents, and the manifest over them.

```
CACHE/manifest.json                              what is here: mixture, tasks, rates, counts, checksums
      tokenizer/                                 a copy of the tokenizer that made the ids
      <task>/<split>-00000-of-00008.tokens       ids, uint16 or uint32, little endian
      <task>/<split>-00000-of-00008.documents    int64 [documents, 3]: DOCUMENT_COLUMNS
```
A split is the concatenation of its shards. Reading is by position (`pread`): it takes neither TensorFlow nor
memory that grows with the text, and a file that shrinks under a running job is an error instead of a SIGBUS.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import pathlib
import typing
from collections.abc import Iterable, Iterator

import numpy as np

from glmjax.io import publish
from glmjax import errors
from glmjax import tokens as tokens_lib

FORMAT = 1
MANIFEST = "manifest.json"
# One row a document: where its tokens end in the shard, UTF-8 bytes of its text (-1: unknown), and how many
# of its tokens are an instruction's input (0: plain text).
DOCUMENT_COLUMNS = ("end", "utf8_bytes", "input_length")
_MAX_OPEN_FILES = 256
_BUFFER_TOKENS = 1 << 20


class Document(typing.NamedTuple):
  """What is stored of one document, or of one pair: the input's tokens, then the target's."""

  tokens: np.ndarray | list[int]
  utf8_bytes: int = -1
  input_length: int = 0


def token_dtype(vocab_size: int) -> str:
  """The narrowest of the two stored types that holds ids 0..vocab_size - 1."""
  return "<u2" if vocab_size <= 1 << 16 else "<u4"


class Hashed:
  """A binary file that counts and hashes what is written."""

  def __init__(self, name: str, file: typing.BinaryIO) -> None:
    self.name, self.bytes = name, 0
    self._file, self._hash = file, hashlib.sha256()

  def write(self, data: bytes) -> None:
    """Appends."""
    self._file.write(data)
    self._hash.update(data)
    self.bytes += len(data)

  @property
  def record(self) -> dict:
    """Name, size and checksum."""
    return {"file": self.name, "bytes": self.bytes, "sha256": self._hash.hexdigest()}


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[Hashed]:
  """A file that takes its name only when all of it is on the disk."""
  try:
    with publish.file(path) as file:
      yield Hashed(path.name, file)
  except OSError as error:
    raise _readable(error, path) from error


def _readable(error: OSError, path: pathlib.Path) -> OSError | errors.InputError:
  """An InputError for what the user can mend; the error itself otherwise."""
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    return errors.InputError(f"{path}: the disk is full; free some space or choose another folder, then run "
                             "again (what is complete is kept)")
  if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
    return errors.InputError(f"{path}: cannot be written ({error.strerror}); choose another folder")
  return error


def write_shard(folder: pathlib.Path, stem: str, documents: Iterable[Document], vocab_size: int) -> dict:
  """Writes one shard's two files, each complete or absent, and returns its entry for the manifest."""
  dtype = np.dtype(token_dtype(vocab_size))
  path = folder / stem
  path.parent.mkdir(parents=True, exist_ok=True)
  rows, buffer, buffered, end = [], [], 0, 0
  with replacing(path.with_name(path.name + ".tokens")) as file:
    for document in documents:
      ids = np.asarray(document.tokens, np.int64)
      if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        worst = ids.max() if ids.min() >= 0 else ids.min()
        raise errors.InputError(f"{stem}: token id {worst} is outside the vocabulary of {vocab_size}; "
                                "cache with the tokenizer that the task uses")
      end += ids.size
      rows.append((end, document.utf8_bytes, document.input_length))
      buffer.append(ids.astype(dtype))
      buffered += ids.size
      if buffered >= _BUFFER_TOKENS:
        file.write(np.concatenate(buffer).tobytes())
        buffer, buffered = [], 0
    if buffer:
      file.write(np.concatenate(buffer).tobytes())
  table = np.asarray(rows, "<i8").reshape(-1, len(DOCUMENT_COLUMNS))
  with replacing(path.with_name(path.name + ".documents")) as index:
    index.write(table.tobytes())
  known = bool((table[:, 1] >= 0).all())
  return {
      "documents": len(table),
      "tokens": int(end),
      "utf8_bytes": int(table[:, 1].sum()) if known else None,
      "files": [file.record, index.record]
  }


def file_sha256(path: pathlib.Path) -> str:
  """Checksum of a file's contents."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(folder: pathlib.Path, record: dict, contents: bool) -> str | None:
  """What is wrong with a file of the manifest; None if nothing. `contents` reads it whole."""
  path = folder / record["file"]
  try:
    size = path.stat().st_size
    if size != record["bytes"]:
      return f"{path}: {size} bytes, {record['bytes']} expected"
    if contents and file_sha256(path) != record["sha256"]:
      return f"{path}: contents differ from the checksum in the manifest"
  except FileNotFoundError:
    return f"{path}: missing"
  except OSError as error:
    return f"{path}: cannot be read ({error.strerror})"
  return None


class SplitReader:
  """Random access to the tokens and documents of one task's split."""

  def __init__(self, folder: pathlib.Path, dtype: str, split: dict) -> None:
    self._folder = folder
    self._dtype = np.dtype(dtype)
    self._shards = split["shards"]
    self.num_tokens: int = split["tokens"]
    self.num_documents: int = split["documents"]
    self.utf8_bytes: int | None = split["utf8_bytes"]
    self._token_ends = np.cumsum([shard["tokens"] for shard in self._shards])
    self._document_ends = np.cumsum([shard["documents"] for shard in self._shards])
    self._descriptors: dict[str, int] = {}

  def read(self, start: int, stop: int) -> np.ndarray:
    """Token ids [start, stop) of the split's stream, int32."""
    assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
    parts = []
    shard = int(np.searchsorted(self._token_ends, start, side="right"))
    while start < stop:
      end = int(self._token_ends[shard])
      first = end - self._shards[shard]["tokens"]
      take = min(stop, end) - start
      if take:
        parts.append(self._pread(self._shards[shard]["files"][0], start - first, take, self._dtype))
      start, shard = start + take, shard + 1
    return np.concatenate(parts or [np.zeros(0, self._dtype)]).astype(np.int32)

  def documents(self) -> Iterator[Document]:
    """Every document of the split, in order."""
    for i in range(self.num_documents):
      yield self.document(i)

  def document(self, index: int) -> Document:
    """Document `index` of the split."""
    shard = int(np.searchsorted(self._document_ends, index, side="right"))
    row = index - (int(self._document_ends[shard]) - self._shards[shard]["documents"])
    before = min(row, 1)  # the row before says where this document starts
    rows = self._pread(self._shards[shard]["files"][1], 3 * (row - before), 3 * (1 + before), np.dtype("<i8"))
    start = int(rows[0]) if before else 0
    end, utf8_bytes, input_length = (int(x) for x in rows[-3:])
    ids = self._pread(self._shards[shard]["files"][0], start, end - start, self._dtype)
    return Document(ids.astype(np.int32), utf8_bytes, input_length)

  def document_lengths(self) -> np.ndarray:
    """int64 [documents, 2]: input tokens and the rest (for text: 0 and all tokens) of every document."""
    parts = []
    for shard in self._shards:
      table = self._pread(shard["files"][1], 0, 3 * shard["documents"], np.dtype("<i8")).reshape(-1, 3)
      lengths = np.diff(table[:, 0], prepend=0)
      parts.append(np.stack([table[:, 2], lengths - table[:, 2]], axis=1))
    return np.concatenate(parts)

  def _pread(self, record: dict, first: int, count: int, dtype: np.dtype) -> np.ndarray:
    """Items [first, first + count) of a shard's file."""
    name, size = record["file"], count * dtype.itemsize
    try:
      if name not in self._descriptors:
        if len(self._descriptors) >= _MAX_OPEN_FILES:
          self.close()
        self._descriptors[name] = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
      data = os.pread(self._descriptors[name], size, first * dtype.itemsize)
      while len(data) < size and (more := os.pread(self._descriptors[name], size - len(data),
                                                   first * dtype.itemsize + len(data))):
        data += more
    except OSError as error:
      raise errors.InputError(
          f"{self._folder / name}: cannot be read ({error.strerror}); make the cache again "
          "(glmjax cache --overwrite)") from error
    if len(data) < size:
      raise errors.InputError(f"{self._folder / name}: ends too early; make the cache again "
                              "(glmjax cache --overwrite)")
    return np.frombuffer(data, dtype)

  def close(self) -> None:
    """Closes the files; the next read opens what it needs again."""
    for descriptor in self._descriptors.values():
      os.close(descriptor)
    self._descriptors.clear()

  def __del__(self) -> None:
    if hasattr(self, "_descriptors"):
      self.close()


@dataclasses.dataclass(frozen=True)
class TokenCache:
  """An opened cache: its folder and manifest."""

  directory: pathlib.Path
  manifest: dict

  @classmethod
  def open(cls, directory: str | os.PathLike) -> "TokenCache":
    """Reads the manifest and checks that every file is there with its right size."""
    cache = cls(pathlib.Path(directory), read_manifest(pathlib.Path(directory)))
    cache._check(contents=False)
    return cache

  def verify(self) -> None:
    """Reads every file and compares its checksum."""
    self._check(contents=True)

  def _check(self, contents: bool) -> None:
    for folder, record in _files(self.directory, self.manifest):
      if problem := check_file(folder, record, contents):
        raise errors.InputError(
            f"token cache is damaged: {problem}; make it again (glmjax cache --overwrite)")

  @property
  def tasks(self) -> dict[str, dict]:
    return self.manifest["tasks"]

  @property
  def vocab_size(self) -> int:
    return self.manifest["tokenizer"]["vocab_size"]

  @property
  def specials(self) -> tokens_lib.SpecialTokens:
    return tokens_lib.SpecialTokens(**self.manifest["tokenizer"]["specials"])

  @property
  def tokenizer_folder(self) -> pathlib.Path:
    return self.directory / "tokenizer"

  @functools.cached_property
  def fingerprint(self) -> str:
    """One hash over all checksums: two caches with the same one hold the same tokens."""
    listing = sorted((str(folder.relative_to(self.directory)), record["file"], record["sha256"])
                     for folder, record in _files(self.directory, self.manifest))
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

  def split(self, task: str, split: str) -> SplitReader:
    """A reader of one task's split."""
    if task not in self.tasks:
      raise errors.InputError(f"{self.directory}: no task {task!r} in this cache; "
                              f"it has {', '.join(sorted(self.tasks))}")
    splits = self.tasks[task]["splits"]
    if split not in splits:
      raise errors.InputError(f"{self.directory}: task {task} has no split {split!r}; "
                              f"it has {', '.join(sorted(splits))}")
    return SplitReader(self.directory / task, self.manifest["dtype"], splits[split])


def read_manifest(directory: pathlib.Path) -> dict:
  """The manifest of a finished cache."""
  path = directory / MANIFEST
  try:
    manifest = json.loads(path.read_bytes())
    version = manifest["format"]
  except (FileNotFoundError, NotADirectoryError):
    raise errors.InputError(f"{directory}: no finished token cache here (no {MANIFEST}); "
                            "make one with glmjax cache") from None
  except (ValueError, TypeError, KeyError) as error:
    raise errors.InputError(f"{path}: damaged ({error}); make the cache again "
                            "(glmjax cache --overwrite)") from error
  if version != FORMAT:
    raise errors.InputError(f"{path}: cache format {version}, this glmjax reads {FORMAT}; "
                            "make the cache again")
  return manifest


def _files(directory: pathlib.Path, manifest: dict) -> Iterator[tuple[pathlib.Path, dict]]:
  """Every file that the manifest has a checksum of, with its folder."""
  for record in manifest["tokenizer"]["files"]:
    yield directory / "tokenizer", record
  for name, task in manifest["tasks"].items():
    for split in task["splits"].values():
      for shard in split["shards"]:
        for record in shard["files"]:
          yield directory / name, record
