"""The token cache on disk: shards of token ids, their documents, and the manifest over them.

```
CACHE/manifest.json                              what is here: mixture, tasks, rates, counts, checksums
      tokenizer/                                 a copy of the tokenizer that made the ids
      <task>/<split>-00000-of-00008.tokens       ids, uint16 or uint32, little endian
      <task>/<split>-00000-of-00008.documents    int64 [documents, 3]: DOCUMENT_COLUMNS
      <task>/<split>-00000-of-00008.sums         uint32: CRC-32 of each 32 KiB of the two
```
A split is the concatenation of its shards. Reading is by position (`pread`): it takes neither TensorFlow nor
memory that grows with the text, and every block is compared with its checksum (`verified`), so that a file that is
damaged, shrinks or is replaced under a running job is an error instead of other data or a SIGBUS.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import stat
import typing
from collections.abc import Callable, Iterator

import numpy as np

from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import seal
from glmjax.io import user_json
from glmjax import errors
from glmjax import tokens as tokens_lib
from glmjax.data import verified

FORMAT = 1
MANIFEST = "manifest.json"
# One row a document: where its tokens end in the shard, UTF-8 bytes of its text (-1: unknown), and how many
# of its tokens are an instruction's input (0: plain text).
DOCUMENT_COLUMNS = ("end", "utf8_bytes", "input_length")
_AGAIN = "make the cache again (glmjax cache --overwrite)"
_KEEP = 2  # blocks of the last read that are kept: documents are often read in order


class Document(typing.NamedTuple):
  """What is stored of one document, or of one pair: the input's tokens, then the target's."""

  tokens: np.ndarray | list[int]
  utf8_bytes: int = -1
  input_length: int = 0


def token_dtype(vocab_size: int) -> str:
  """Returns the narrowest of the two stored types that holds ids 0..vocab_size - 1."""
  return "<u2" if vocab_size <= 1 << 16 else "<u4"


def shard_files(shard: dict) -> list[dict]:
  """Returns the records of a shard's files; older caches have no sums of blocks."""
  return [*shard["files"], *([shard["sums"]] if "sums" in shard else [])]


def file_sha256(path: pathlib.Path) -> str:
  """Returns the checksum of a file's contents."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(folder: pathlib.Path, record: dict, contents: bool) -> str | None:
  """Says what is wrong with a file of the manifest; None if nothing. `contents` reads it whole."""
  path = folder / record["file"]
  try:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
      return f"{path}: no regular file"
    if found.st_size != record["bytes"]:
      return f"{path}: {found.st_size} bytes, {record['bytes']} expected"
    if contents and file_sha256(path) != record["sha256"]:
      return f"{path}: contents differ from the checksum in the manifest"
  except (FileNotFoundError, NotADirectoryError):
    return f"{path}: missing"
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {errors.reason(error)}") from error
  return None


class _Shard:
  """The two files of a shard, opened when they are first read."""

  def __init__(self, folder: pathlib.Path, entry: dict) -> None:
    self.tokens, self.documents = entry["tokens"], entry["documents"]
    self.path = folder / entry["files"][0]["file"]
    self._folder, self._entry = folder, entry

  @functools.cached_property
  def files(self) -> tuple[verified.File, verified.File]:
    """The files of tokens and documents, with the sums of their blocks."""
    records = self._entry["files"]
    if "sums" not in self._entry:
      return tuple(verified.File(self._folder, record) for record in records)
    sums_file = verified.File(self._folder, self._entry["sums"])
    sums = np.frombuffer(sums_file.whole(), "<u4")
    sums_file.close()
    blocks = [-(-record["bytes"] // verified.BLOCK) for record in records]
    if len(sums) != sum(blocks):
      raise verified.Damaged(f"{sums_file.path}: sums of {len(sums)} blocks, where the shard has {sum(blocks)}")
    return (
      verified.File(self._folder, records[0], sums[: blocks[0]]),
      verified.File(self._folder, records[1], sums[blocks[0] :]),
    )

  def close(self) -> None:
    for file in self.__dict__.get("files", ()):
      file.close()


class SplitReader:
  """A reader with random access to the tokens and documents of one task's split."""

  def __init__(
    self, folder: pathlib.Path, dtype: str, split: dict, explain: Callable[[str], errors.InputError]
  ) -> None:
    """Takes `explain`, which makes the error of files that are not what they were."""
    self._dtype = np.dtype(dtype)
    self._shards = [_Shard(folder, entry) for entry in split["shards"]]
    self._explain = explain
    self.num_tokens: int = split["tokens"]
    self.num_documents: int = split["documents"]
    self.utf8_bytes: int | None = split["utf8_bytes"]
    self._token_ends = np.cumsum([shard.tokens for shard in self._shards])
    self._document_ends = np.cumsum([shard.documents for shard in self._shards])
    self._kept: dict[int, tuple[_Shard, int, bytes]] = {}  # of tokens and documents: shard, first block, blocks

  def read(self, start: int, stop: int) -> np.ndarray:
    """Reads token ids [start, stop) of the split's stream, int32."""
    assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
    parts = []
    shard = int(np.searchsorted(self._token_ends, start, side="right"))
    while start < stop:
      end = int(self._token_ends[shard])
      first = end - self._shards[shard].tokens
      take = min(stop, end) - start
      if take:
        parts.append(self._items(self._shards[shard], 0, start - first, take, self._dtype))
      start, shard = start + take, shard + 1
    if len(parts) == 1:
      return parts[0].astype(np.int32)
    return np.concatenate(parts or [np.zeros(0, self._dtype)]).astype(np.int32)

  def documents(self) -> Iterator[Document]:
    """Yields every document of the split, in order."""
    for i in range(self.num_documents):
      yield self.document(i)

  def document(self, index: int) -> Document:
    """Reads document `index` of the split."""
    number = int(np.searchsorted(self._document_ends, index, side="right"))
    shard = self._shards[number]
    row = index - (int(self._document_ends[number]) - shard.documents)
    before = min(row, 1)  # the row before says where this document starts
    rows = self._items(shard, 1, 3 * (row - before), 3 * (1 + before), np.dtype("<i8"))
    start = int(rows[0]) if before else 0
    end, utf8_bytes, input_length = (int(x) for x in rows[-3:])
    ids = self._items(shard, 0, start, end - start, self._dtype)
    return Document(ids.astype(np.int32), utf8_bytes, input_length)

  def document_lengths(self) -> np.ndarray:
    """Returns int64 [documents, 2]: input tokens and the rest (for text: 0 and all tokens) of every document."""
    parts = []
    for shard in self._shards:
      table = self._items(shard, 1, 0, 3 * shard.documents, np.dtype("<i8")).reshape(-1, 3)
      lengths = np.diff(table[:, 0], prepend=0)
      parts.append(np.stack([table[:, 2], lengths - table[:, 2]], axis=1))
    return np.concatenate(parts)

  def _items(self, shard: _Shard, kind: int, first: int, count: int, dtype: np.dtype) -> np.ndarray:
    """Reads items [first, first + count) of a shard's file, 0: tokens, 1: documents."""
    if not count:
      return np.zeros(0, dtype)
    start = first * dtype.itemsize
    begin, end = start // verified.BLOCK, -(-(start + count * dtype.itemsize) // verified.BLOCK)
    kept, kept_begin, data = self._kept.get(kind, (None, 0, b""))
    if kept is not shard or not kept_begin <= begin or end > kept_begin + -(-len(data) // verified.BLOCK):
      data, kept_begin = self._blocks(shard, kind, begin, end), begin
      if end - begin <= _KEEP:
        self._kept[kind] = shard, begin, data
    return np.frombuffer(data, dtype, count, start - kept_begin * verified.BLOCK)

  def _blocks(self, shard: _Shard, kind: int, begin: int, end: int) -> bytes:
    try:
      return shard.files[kind].blocks(begin, end)
    except verified.Damaged as problem:
      raise self._explain(str(problem)) from None
    except OSError as error:
      raise errors.InputError(f"cannot read {error.filename or shard.path}: {errors.reason(error)}") from error

  def close(self) -> None:
    """Closes the files; the next read opens what it needs again."""
    for shard in self._shards:
      shard.close()

  def __del__(self) -> None:
    if hasattr(self, "_shards"):
      self.close()


@dataclasses.dataclass(frozen=True)
class TokenCache:
  """An opened cache: its folder and manifest."""

  directory: pathlib.Path
  manifest: dict

  @classmethod
  def open(cls, directory: str | os.PathLike) -> "TokenCache":
    """Reads the manifest and checks that every file is there with its right size."""
    directory = paths.local(directory, "the folder of the token cache")
    cache = cls(directory, read_manifest(directory))
    cache._check(contents=False)
    return cache

  def verify(self) -> None:
    """Reads every file and compares its checksum."""
    self._check(contents=True)

  def _check(self, contents: bool) -> None:
    for folder, record in _files(self.directory, self.manifest, sums=True):
      if problem := check_file(folder, record, contents):
        raise self.explain(problem)

  def explain(self, problem: str) -> errors.InputError:
    """Returns the error of a file that is not what the manifest says: damaged, or of another cache that took its
    place.
    """
    with contextlib.suppress(errors.InputError):
      if read_manifest(self.directory) != self.manifest:
        return errors.InputError(
          f"{self.directory}: the token cache was replaced while it was being read ({problem}); "
          "start again, with the new one"
        )
    return errors.InputError(f"token cache is damaged: {problem}; {_AGAIN}")

  def copy_tokenizer(self, folder: str | os.PathLike) -> None:
    """Copies the tokenizer's files into the folder, compared with their checksums."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for record in self.manifest["tokenizer"]["files"]:
      if problem := check_file(self.tokenizer_folder, record, contents=True):
        raise self.explain(problem)
      shutil.copyfile(self.tokenizer_folder / record["file"], folder / record["file"])

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
    listing = sorted(
      (str(folder.relative_to(self.directory)), record["file"], record["sha256"])
      for folder, record in _files(self.directory, self.manifest, sums=False)
    )
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

  def split(self, task: str, split: str) -> SplitReader:
    """Returns a reader of one task's split."""
    if task not in self.tasks:
      raise errors.InputError(
        f"{self.directory}: no task {task!r} in this cache; it has {', '.join(sorted(self.tasks))}"
      )
    splits = self.tasks[task]["splits"]
    if split not in splits:
      raise errors.InputError(
        f"{self.directory}: task {task} has no split {split!r}; it has {', '.join(sorted(splits))}"
      )
    return SplitReader(self.directory / task, self.manifest["dtype"], splits[split], self.explain)


def read_manifest(directory: pathlib.Path) -> dict:
  """Reads the manifest of a finished cache."""
  path = directory / MANIFEST
  if not os.path.lexists(path):
    if old := publish.interrupted(directory):
      raise errors.InputError(
        f"{directory} was being replaced when that was killed: rename {old.name} beside it back "
        f"to {directory.name}, or run glmjax cache again"
      )
    raise errors.InputError(f"{directory}: no finished token cache here (no {MANIFEST}); make one with glmjax cache")
  content = user_json.read(path, expected=_AGAIN)
  version = content.get("format")
  if version != FORMAT:
    raise errors.InputError(
      f"{path}: cache format {str(version)[:20]}, this glmjax reads {FORMAT}; make the cache again"
    )
  try:
    manifest = seal.unseal(content, required=False)  # caches of before have none
    _check_manifest(manifest)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise errors.InputError(f"{path}: damaged, or changed by hand ({error}); {_AGAIN}") from error
  return manifest


def write_manifest(directory: pathlib.Path, manifest: dict) -> None:
  """Writes the manifest with its own checksum."""
  publish.write_json(directory / MANIFEST, seal.seal(manifest))


def _check_manifest(manifest: dict) -> None:
  """Raises ValueError, TypeError, KeyError or AttributeError where an unsealed manifest is none."""
  np.dtype(manifest["dtype"])
  tokens_lib.SpecialTokens(**manifest["tokenizer"]["specials"])
  int(manifest["tokenizer"]["vocab_size"]), str(manifest["tokenizer"]["fingerprint"])
  for task in manifest["tasks"].values():
    str(task["kind"]), float(task["rate"])
    for split in task["splits"].values():
      for shard in split["shards"]:
        int(shard["tokens"]), int(shard["documents"])
      if any(split[name] != sum(shard[name] for shard in split["shards"]) for name in ("tokens", "documents")):
        raise ValueError("its counts do not add up")
  for folder, record in _files(pathlib.Path(), manifest, sums=True):
    int(record["bytes"]), folder / record["file"], str(record["sha256"])


def _files(directory: pathlib.Path, manifest: dict, sums: bool) -> Iterator[tuple[pathlib.Path, dict]]:
  """Yields every file that the manifest has a checksum of, with its folder; `sums`: those of blocks as well."""
  for record in manifest["tokenizer"]["files"]:
    yield directory / "tokenizer", record
  for name, task in manifest["tasks"].items():
    for split in task["splits"].values():
      for shard in split["shards"]:
        for record in shard_files(shard) if sums else shard["files"]:
          yield directory / name, record
