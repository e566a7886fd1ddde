"""seqio data sources over text files."""

import collections
from collections.abc import Callable, Iterator, Sequence
import itertools
import pathlib
import random
from typing import Any

import seqio
import tensorflow as tf

from glmjax.io import user_text
from glmjax.data import splits
from glmjax.data import text
from glmjax.data import tokenizing


class FileSource(seqio.DataSource):
  """A source of examples of text files, in the splits "train" and "validation" as `read` tells them apart.

  A shard is a file, so that Beam and other readers share the work; more readers than files share examples.
  """

  def __init__(
    self,
    patterns: text.Patterns,
    features: Sequence[str],
    read: Callable[[pathlib.Path, int], Iterator[tuple[str, Any]]],
    max_examples: int | None = None,
  ) -> None:
    """Takes `read(path, file number)`, which yields (split, a string for one feature or a tuple in their order).

    Of a split with more than `max_examples` so many are taken, at even distances; then a line is an example.
    """
    files = text.find_files(patterns)
    shares = None if max_examples is None else _shares([_count_lines(path) for path in files], max_examples)
    sizes = shares and {split: sum(taken for taken, _ in of_files) for split, of_files in shares.items()}
    super().__init__(splits=splits.SPLITS, num_input_examples=sizes)
    self.files = files
    self._features = tuple(features)
    self._read = read
    self._max_per_file = shares  # for each split, each file's (examples taken, examples there); None: all

  @property
  def features(self) -> tuple[str, ...]:
    """Names of the strings that an example has."""
    return self._features

  @property
  def windows(self) -> splits.Windows | None:
    """How documents are cut, where whole ones would leave nothing held out."""
    return getattr(self._read, "keywords", {}).get("windows")

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    return [str(path) for path in self.files]

  def get_dataset(
    self,
    split: str = "train",
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    *,
    sequence_length: object = None,
    use_cached: bool = False,
    num_epochs: int | None = 1,
  ) -> tf.data.Dataset:
    """Returns examples as string scalars; shuffle=True shuffles the files."""
    del sequence_length, use_cached, num_epochs  # seqio passes them to every source

    def groups() -> Iterator[dict[str, list[str]]]:
      for group in tokenizing.groups(self._examples(split, shard_info, random.Random(seed) if shuffle else None)):
        yield dict(zip(self.features, map(list, zip(*group)), strict=True))

    signature = {name: tf.TensorSpec([None], tf.string) for name in self.features}
    return tf.data.Dataset.from_generator(groups, output_signature=signature).unbatch()

  def examples(self, split: str, shard_info: seqio.ShardInfo | None = None) -> Iterator[tokenizing.Strings]:
    """Yields the examples of get_dataset in the files' order, without TensorFlow."""
    return self._examples(split, shard_info, None)

  def all_examples(self) -> Iterator[tuple[str, tokenizing.Strings]]:
    """Yields (split, example) of all splits by one reading, each split's in the order of `examples`."""
    return self._taken(list(enumerate(self.files)))

  def deals_out(self, num_shards: int) -> bool:
    """Tells whether example i of a split is in shard i modulo num_shards, since there are fewer files than shards."""
    return num_shards > len(self.files)

  def _examples(
    self, split: str, shard_info: seqio.ShardInfo | None, rng: random.Random | None
  ) -> Iterator[tokenizing.Strings]:
    order = list(enumerate(self.files))
    shard, num_shards = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
    step = 1
    if self.deals_out(num_shards):
      step = num_shards
    else:
      order = order[shard::num_shards]
      shard = 0
    if rng is not None:
      rng.shuffle(order)
    every = (example for found, example in self._taken(order) if found == split)
    yield from itertools.islice(every, shard, None, step)

  def _taken(self, files: Sequence[tuple[int, pathlib.Path]]) -> Iterator[tuple[str, tokenizing.Strings]]:
    """Yields (split, example) of numbered files, without those that are too many."""
    for number, path in files:
      seen = collections.Counter[str]()
      for split, example in self._read(path, number):
        if self._max_per_file is None or _is_taken(seen[split], *self._max_per_file[split][number]):
          yield split, (example,) if isinstance(example, str) else example
        seen[split] += 1


def _count_lines(path: pathlib.Path) -> int:
  """Counts the lines of a file that are not blank."""
  return sum(bool(line.strip()) for _, line in user_text.lines(path))


def _shares(counts: Sequence[int], max_examples: int) -> dict[str, list[tuple[int, int]]]:
  """Returns for each split each file's (examples taken, examples there), of files with so many records each."""
  held_out = [
    (number + count) // splits.HELD_OUT_EVERY - number // splits.HELD_OUT_EVERY for number, count in enumerate(counts)
  ]  # splits.split_of, counted
  shares = {}
  for split, there in zip(splits.SPLITS, ([n - k for n, k in zip(counts, held_out)], held_out)):
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
