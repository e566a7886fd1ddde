"""seqio data sources over text files."""

from collections.abc import Callable, Iterator, Sequence
import itertools
import math
import pathlib
import random

import seqio
import tensorflow as tf

from glmjax.data import text


class FileSource(seqio.DataSource):
  """Examples of text files; every 50th is in the split "validation", all others in "train".

  A shard is a file, so that Beam and other readers share the work; more readers than files share examples.
  """

  def __init__(
      self, patterns: str | Sequence[str], features: Sequence[str],
      read: Callable[[pathlib.Path, int, str], Iterator], max_examples: int | None = None,
  ) -> None:
    """`read(path, file number, split)` yields a string for one feature, or a tuple in their order.

    Of `max_examples` every file may give an equal part.
    """
    super().__init__(splits=text.SPLITS)
    self.files = text.find_files(patterns)
    self._features = tuple(features)
    self._read = read
    self._max_per_file = None if max_examples is None else math.ceil(max_examples / len(self.files))

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    return [str(path) for path in self.files]

  def get_dataset(
      self, split: str = "train", shuffle: bool = True, seed: int | None = None,
      shard_info: seqio.ShardInfo | None = None, *, sequence_length: object = None, use_cached: bool = False,
      num_epochs: int | None = 1,
  ) -> tf.data.Dataset:
    """Examples as string scalars; shuffle=True shuffles the files."""
    del sequence_length, use_cached, num_epochs  # seqio passes them to every source
    order = list(enumerate(self.files))
    shard, num_shards = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
    step = 1
    if num_shards <= len(order):
      order = order[shard::num_shards]
      shard = 0
    else:
      step = num_shards
    if shuffle:
      random.Random(seed).shuffle(order)

    def examples() -> Iterator[dict[str, str]]:
      every = itertools.chain.from_iterable(
          itertools.islice(self._read(path, number, split), self._max_per_file) for number, path in order)
      for example in itertools.islice(every, shard, None, step):
        values = (example,) if isinstance(example, str) else example
        yield dict(zip(self._features, values, strict=True))

    signature = {name: tf.TensorSpec([], tf.string) for name in self._features}
    return tf.data.Dataset.from_generator(examples, output_signature=signature)
