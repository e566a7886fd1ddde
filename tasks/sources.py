"""A seqio data source over a task of text files."""

from collections.abc import Iterator
import random

import seqio
import tensorflow as tf

from glmjax.data import file_tasks
from glmjax.data import tokenizing


class FileSource(seqio.DataSource):
  """A source of the strings of a task's examples.

  A shard is a file, so that Beam and other readers share the work; more readers than files share examples.
  """

  def __init__(self, file_task: file_tasks.FileTask) -> None:
    super().__init__(splits=file_task.splits, num_input_examples=file_task.sizes)
    self.file_task = file_task

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    return self.file_task.files()

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
    index, num_shards = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
    names = self.file_task.features

    def groups() -> Iterator[dict[str, list[str]]]:
      examples = self.file_task.examples(split, index, num_shards, random.Random(seed) if shuffle else None)
      for group in tokenizing.groups(examples):
        yield dict(zip(names, map(list, zip(*group)), strict=True))

    signature = {name: tf.TensorSpec([None], tf.string) for name in names}
    return tf.data.Dataset.from_generator(groups, output_signature=signature).unbatch()
