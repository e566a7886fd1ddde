"""Tasks of text files: corpora and instruction sets; which examples they hold, of which split, and of which shard."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import collections
import functools
import hashlib
import itertools
import random

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.data import filtering
from glmjax.data import filters as filters_lib
from glmjax.data import shards
from glmjax.data import splits as splits_lib
from glmjax.data import text
from glmjax.data import tokenizing
from glmjax.io import paths
from glmjax.io import progress
from glmjax.io import user_text

Reader = Callable[[paths.Path, int], Iterator[tuple[str, str | tokenizing.Strings]]]  # yields (split, an example)

# What stands before and behind the cache in seqio's task of each kind (tasks/registration.py); the names alone are
# used here, for fingerprints.
_STEPS = {
  "text": ["tokenize", "append_eos", "CacheDatasetPlaceholder", "cut_windows", "fill_features"],
  "instruction": ["tokenize", "CacheDatasetPlaceholder", "fill_features"],
}


class FileTask:
  """A task over text files: documents, or pairs of inputs and targets, as `read` tells them apart.

  A file is read whole by one reader, so that processes share the work; more shards than files share examples.
  """

  def __init__(
    self,
    name: str,
    kind: str,
    patterns: text.Patterns,
    read: Reader,
    max_examples: int | None = None,
    suffixes: Collection[str] = text.SUFFIXES,
    filters: Sequence[filters_lib.Filter] = (),
    stated: Mapping[str, str] | None = None,
  ) -> None:
    """Finds the files.

    Args:
      name: the task's name.
      kind: a key of tokenizing.FEATURES: text, instruction or preference.
      patterns: files, folders and globs.
      read: called with (path, file number), yields (split, a string or, of pairs, a tuple of several).
      max_examples: of a split with more lines, so many are taken at even distances; of lines that hold several
        examples (conversations), the same part of the examples. None: all.
      suffixes: of the files.
      filters: what is done with documents, in their order; of a text's task alone.
      stated: what the manifest is to say of the text: its "license" and "source".
    """
    assert not filters or kind == "text" and max_examples is None
    self.name, self.kind, self.read = name, kind, read
    self.filters, self.stated = tuple(filters), dict(stated or {})
    self.paths = text.find_files(patterns, suffixes)
    counts = None if max_examples is None else [_count_lines(path) for path in self.paths]
    self._shares = counts and _shares(counts, max_examples)  # by split: each file's (examples taken, examples there)

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the splits."""
    return splits_lib.SPLITS

  @property
  def features(self) -> tuple[str, ...]:
    """Names of an example's strings."""
    return tokenizing.FEATURES[self.kind]

  @property
  def sizes(self) -> dict[str, int] | None:
    """How many lines with examples each split has; None where only reading tells."""
    if self._shares is None:
      return None
    return {split: sum(taken for taken, _ in of_files) for split, of_files in self._shares.items()}

  @property
  def windows(self) -> splits_lib.Windows | None:
    """How documents are cut, where whole ones would leave nothing held out."""
    return getattr(self.read, "keywords", {}).get("windows")

  @functools.cached_property
  def outcome(self) -> filtering.Outcome | None:
    """What the filters leave, found out by reading all files; None without filters."""
    if not self.filters:
      return None
    files = [self.read(path, number) for number, path in enumerate(self.paths)]
    found = filtering.outcome(self.filters, progress.bar(files, unit="file", desc=f"filter {self.name}", leave=False))
    if not found.records[-1]["documents_out"]:
      each = ", ".join(f"{own['name']} {own['documents_out']:,}" for own in found.records)
      raise errors.InputError(
        f"the filters of {self.name} leave nothing of its {sum(found.counts):,} documents: {each}"
      )
    return found

  def notes(self) -> dict[str, object]:
    """Returns what the manifest has of the task beside its splits: what is stated of the text, and its filters."""
    return self.stated | ({"filters": list(self.outcome.records)} if self.outcome is not None else {})

  def files(self) -> list[str]:
    """Returns the paths of the files."""
    return [str(path) for path in self.paths]

  def file_hash(self, name: str) -> str:
    """Returns the sha256 of one of the files."""
    try:
      return shards.file_sha256(paths.named(name))
    except OSError as error:
      raise errors.InputError(f"cannot read {name}: {errors.reason(error)}") from error

  def fingerprint(self, split: str, hashes: Mapping[str, str]) -> str:
    """Hashes what the tokens of a split are made from: files, by `hashes` of their contents, and settings."""
    del split  # every file may have some of each
    return fingerprint_of(
      [(path.name, hashes.get(str(path))) for path in self.paths], self.settings(), _STEPS[self.kind]
    )

  def settings(self) -> dict[str, object]:
    """Returns the settings under the names that seqio's data source had for them.

    Caches were first made from that one; those that are there are known as the same by it.
    """
    return {
      "_splits": self.splits,
      "_num_input_examples": self.sizes,
      "_caching_permitted": True,
      "_performs_internal_shuffling": False,
      "files": ["PosixPath"] * len(self.paths),  # where they lie is no matter
      "_features": self.features,
      "_read": self.read,
      "_max_per_file": self._shares,
      **({"_filters": filters_lib.described(self.filters)} if self.filters else {}),
    }

  def deals_out(self, num_shards: int) -> bool:
    """Tells whether example i of a split is in shard i modulo num_shards, since there are fewer files than shards."""
    return num_shards > len(self.paths)

  def documents(
    self, tokenizer: tokenizer_lib.Tokenizer, split: str, index: int, num_shards: int
  ) -> Iterator[shards.Document]:
    """Yields the documents of shard `index` of a split."""
    return tokenizing.documents(tokenizer, self.kind, self.examples(split, index, num_shards))

  def examples(
    self, split: str, index: int = 0, num_shards: int = 1, rng: random.Random | None = None
  ) -> Iterator[tokenizing.Strings]:
    """Yields the examples of one of the shards of a split, in the files' order; `rng` shuffles the files."""
    files = list(enumerate(self.paths))
    first, step = index, num_shards
    if not self.deals_out(num_shards):
      files, first, step = files[index::num_shards], 0, 1
    if rng is not None:
      rng.shuffle(files)
    every = (example for found, example in self._taken(files) if found == split)
    yield from itertools.islice(every, first, None, step)

  def all_examples(self) -> Iterator[tuple[str, tokenizing.Strings]]:
    """Yields (split, example) of all splits by one reading, each split's in the order of `examples`."""
    return self._taken(list(enumerate(self.paths)))

  def _taken(self, files: Sequence[tuple[int, paths.Path]]) -> Iterator[tuple[str, tokenizing.Strings]]:
    """Yields (split, example) of numbered files, without those that are too many."""
    for number, path in files:
      seen = collections.Counter[str]()
      found = self.read(path, number)
      if self.outcome is not None:
        found = self.outcome.passed(number, str(path), found, self.filters)
      for split, example in found:
        if self._shares is None or _is_taken(seen[split], *self._shares[split][number]):
          yield split, (example,) if isinstance(example, str) else example
        seen[split] += 1


def fingerprint_of(files: Sequence[tuple[str, str | None]], source: Mapping[str, object], steps: Sequence) -> str:
  """Hashes (name, hash) of files, and the settings of what reads them and of the steps behind it."""
  made_from = [list(files), _plain(source), _plain(list(steps))]
  return hashlib.sha256(repr(made_from).encode()).hexdigest()


def _plain(value: object) -> object:
  """Returns what of a value prints the same in every process: numbers, strings, names of functions, containers."""
  if isinstance(value, dict):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, functools.partial):
    return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
  if isinstance(value, (str, bytes, int, float, type(None))):
    return value
  return getattr(value, "__qualname__", type(value).__qualname__)


def _count_lines(path: paths.Path) -> int:
  """Counts the lines of a file that are not blank."""
  return sum(bool(line.strip()) for _, line in user_text.lines(path))


def _shares(counts: Sequence[int], max_examples: int) -> dict[str, list[tuple[int, int]]]:
  """Returns for each split each file's (examples taken, examples there), of files with so many records each."""
  held_out = [
    (number + count) // splits_lib.HELD_OUT_EVERY - number // splits_lib.HELD_OUT_EVERY
    for number, count in enumerate(counts)
  ]  # splits_lib.split_of, counted
  shares = {}
  for split, there in zip(splits_lib.SPLITS, ([n - k for n, k in zip(counts, held_out)], held_out)):
    ends = [0, *itertools.accumulate(there)]
    most = min(max_examples, ends[-1])
    taken = [most * end // max(ends[-1], 1) for end in ends]
    shares[split] = [(last - first, n) for first, last, n in zip(taken, taken[1:], there)]
  return shares


def _is_taken(i: int, taken: int, there: int) -> bool:
  """Tells whether the i-th is among the `taken` of `there`, at even distances: a file in the order of its labels keeps
  all of them.
  """
  return (i + 1) * taken // there > i * taken // there
