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
damaged, shrinks or is replaced under a running job is an error instead of other data or a SIGBUS. In a bucket the
folder is the same; blocks that were fetched are kept nearby (`nearby`).
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import stat
import typing
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from glmjax.io import bucket_path
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import seal
from glmjax.io import user_json
from glmjax import errors
from glmjax import tokens as tokens_lib
from glmjax.data import nearby
from glmjax.io import together
from glmjax.data import verified

FORMAT = 1
MANIFEST = "manifest.json"
# One row a document: where its tokens end in the shard, UTF-8 bytes of its text (-1: unknown), and how many
# of its tokens are an instruction's input (0: plain text).
DOCUMENT_COLUMNS = ("end", "utf8_bytes", "input_length")
_AGAIN = "make the cache again (glmjax cache --overwrite)"
_KEEP = 2  # blocks of the last read that are kept: documents are often read in order
_TOGETHER = 1 << 16  # tokens of documents that are read at once where all are read in order
LOCAL_GIB = 8.0  # of a cache in a bucket, kept on the local disk


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


def file_sha256(path: paths.Path) -> str:
  """Returns the checksum of a file's contents."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


Sizes = Mapping[bucket_path.BucketPath, int]
Folder = typing.TypeVar("Folder", pathlib.PurePosixPath, paths.Path)


def sizes_below(folder: paths.Path) -> Sizes | None:
  """Returns the bytes of all files of a folder in a bucket, which one listing tells; None of one on a disk."""
  return folder.sizes() if isinstance(folder, bucket_path.BucketPath) else None


def check_file(folder: paths.Path, record: dict, contents: bool, sizes: Sizes | None = None) -> str | None:
  """Says what is wrong with a file of the manifest; None if nothing.

  Args:
    folder: where it is.
    record: of it.
    contents: read it whole, and compare its checksum.
    sizes: of what is there, by `sizes_below`; None: ask.
  """
  path = folder / record["file"]
  try:
    size = _size(path) if sizes is None else sizes.get(path)
    if size is None:
      return f"{path}: {'no regular file' if sizes is None else 'missing'}"
    if size != record["bytes"]:
      return f"{path}: {size} bytes, {record['bytes']} expected"
    if contents and file_sha256(path) != record["sha256"]:
      return f"{path}: contents differ from the checksum in the manifest"
  except (FileNotFoundError, NotADirectoryError):
    return f"{path}: missing"
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {errors.reason(error)}") from error
  return None


def _size(path: paths.Path) -> int | None:
  """Returns a file's bytes; None: it is something else."""
  found = path.stat()
  return found.st_size if stat.S_ISREG(found.st_mode) else None


class _Shard:
  """The two files of a shard, opened when they are first read."""

  def __init__(self, folder: paths.Path, entry: dict, near: nearby.Folder | None) -> None:
    self.tokens, self.documents = entry["tokens"], entry["documents"]
    self.path = folder / entry["files"][0]["file"]
    self._folder, self._entry, self._near = folder, entry, near
    self._opened: tuple[verified.File, verified.File] | None = None

  @property
  def files(self) -> tuple[verified.File, verified.File]:
    """The files of tokens and documents, with the sums of their blocks."""
    if self._opened is None:  # threads that come at once read the sums of one shard twice, and wait for no other's
      self._opened = self._open()
    return self._opened

  def _open(self) -> tuple[verified.File, verified.File]:
    records = self._entry["files"]
    if "sums" not in self._entry:
      tokens, documents = (verified.File(self._folder, record, near=self._near) for record in records)
      return tokens, documents
    sums_file = verified.File(self._folder, self._entry["sums"], near=self._near)
    sums = np.frombuffer(sums_file.whole(), "<u4")
    sums_file.close()
    blocks = [-(-record["bytes"] // verified.BLOCK) for record in records]
    if len(sums) != sum(blocks):
      raise verified.Damaged(f"{sums_file.path}: sums of {len(sums)} blocks, where the shard has {sum(blocks)}")
    return (
      verified.File(self._folder, records[0], sums[: blocks[0]], self._near),
      verified.File(self._folder, records[1], sums[blocks[0] :], self._near),
    )

  def close(self) -> None:
    for file in self._opened or ():
      file.close()


class SplitReader:
  """A reader with random access to the tokens and documents of one task's split; by several threads, too."""

  def __init__(
    self,
    folder: paths.Path,
    dtype: str,
    split: dict,
    explain: Callable[[str], errors.InputError],
    near: nearby.Folder | None = None,
  ) -> None:
    """Takes `explain`, which makes the error of files that are not what they were; `near` as verified.File."""
    self._dtype = np.dtype(dtype)
    self._shards = [_Shard(folder, entry, near) for entry in split["shards"]]
    self._explain = explain
    self._waits = isinstance(folder, bucket_path.BucketPath)
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
    first = 0
    for shard in self._shards:
      few = max(1, _TOGETHER * shard.documents // max(shard.tokens, 1))
      for start in range(first, first + shard.documents, few):
        yield from self.documents_between(start, min(start + few, first + shard.documents))
      first += shard.documents

  def document(self, index: int) -> Document:
    """Reads document `index` of the split."""
    return self.documents_between(index, index + 1)[0]

  def documents_between(self, first: int, last: int) -> list[Document]:
    """Reads documents [first, last) of the split: of each shard its lengths, and its tokens, at once."""
    found = []
    while first < last:
      number = int(np.searchsorted(self._document_ends, first, side="right"))
      shard, end = self._shards[number], int(self._document_ends[number])
      row = first - (end - shard.documents)
      count = min(last, end) - first
      found += self._documents_of(shard, row, count)
      first += count
    return found

  def _documents_of(self, shard: _Shard, row: int, count: int) -> list[Document]:
    before = min(row, 1)  # the row before says where this document starts
    table = self._items(shard, 1, 3 * (row - before), 3 * (count + before), np.dtype("<i8")).reshape(-1, 3).tolist()
    start = table.pop(0)[0] if before else 0
    ids = self._items(shard, 0, start, table[-1][0] - start, self._dtype).astype(np.int32)
    starts = [start, *(end for end, _, _ in table)]
    return [
      Document(ids[begin - start : end - start], utf8_bytes, input_length)
      for begin, (end, utf8_bytes, input_length) in zip(starts, table)
    ]

  def document_lengths(self) -> np.ndarray:
    """Returns int64 [documents, 2]: input tokens and the rest (for text: 0 and all tokens) of every document."""
    of_shards = together.each(self._lengths, self._shards) if self._waits else map(self._lengths, self._shards)
    return np.concatenate(list(of_shards))

  def _lengths(self, shard: _Shard) -> np.ndarray:
    table = self._items(shard, 1, 0, 3 * shard.documents, np.dtype("<i8")).reshape(-1, 3)
    return np.stack([table[:, 2], np.diff(table[:, 0], prepend=0) - table[:, 2]], axis=1)

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

  directory: paths.Path
  manifest: dict
  near: nearby.Folder | None = dataclasses.field(default=None, compare=False)  # keeps what is read; None: nothing does

  @classmethod
  def open(cls, directory: paths.Named, local_gib: float = LOCAL_GIB) -> "TokenCache":
    """Reads the manifest and checks that every file is there with its right size.

    Args:
      directory: of the cache.
      local_gib: GiB of the local disk that the blocks read of caches in buckets may take; 0: none are kept.
    """
    directory = paths.named(directory, "the folder of the token cache")
    limit = int(local_gib * (1 << 30)) if isinstance(directory, bucket_path.BucketPath) else 0
    try:
      cache = cls(directory, read_manifest(directory), nearby.Folder.usual(limit) if limit else None)
      cache._check(contents=False)
    except OSError as error:
      raise errors.InputError(f"cannot open the token cache {directory}: {errors.reason(error)}") from error
    return cache

  def verify(self) -> None:
    """Reads every file and compares its checksum."""
    self._check(contents=True)

  def _check(self, contents: bool) -> None:
    sizes = sizes_below(self.directory)
    for folder, record in _files(self.directory, self.manifest, sums=True):
      if problem := check_file(folder, record, contents, sizes):
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

  def copy_tokenizer(self, folder: paths.Named) -> None:
    """Copies the tokenizer's files into the folder, compared with their checksums."""
    folder = paths.named(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for record in self.manifest["tokenizer"]["files"]:
      try:
        content = verified.File(self.tokenizer_folder, record).whole()
      except verified.Damaged as problem:
        raise self.explain(str(problem)) from None
      except OSError as error:
        raise errors.InputError(f"cannot read the tokenizer of {self.directory}: {errors.reason(error)}") from error
      (folder / record["file"]).write_bytes(content)

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
  def tokenizer_folder(self) -> paths.Path:
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
    return SplitReader(self.directory / task, self.manifest["dtype"], splits[split], self.explain, self.near)


def read_manifest(directory: paths.Path) -> dict:
  """Reads the manifest of a finished cache."""
  path = directory / MANIFEST
  if not path.is_symlink() and not path.exists():
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


def write_manifest(directory: paths.Path, manifest: dict) -> None:
  """Writes the manifest with its own checksum: the last file of a cache."""
  publish.finish(directory / MANIFEST, seal.seal(manifest))


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
  for folder, record in _files(pathlib.PurePosixPath(), manifest, sums=True):
    int(record["bytes"]), folder / record["file"], str(record["sha256"])


def _files(directory: Folder, manifest: dict, sums: bool) -> Iterator[tuple[Folder, dict]]:
  """Yields every file that the manifest has a checksum of, with its folder; `sums`: those of blocks as well."""
  for record in manifest["tokenizer"]["files"]:
    yield directory / "tokenizer", record
  for name, task in manifest["tasks"].items():
    for split in task["splits"].values():
      for shard in split["shards"]:
        for record in shard_files(shard) if sums else shard["files"]:
          yield directory / name, record
