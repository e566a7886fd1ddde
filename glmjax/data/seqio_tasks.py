"""Tasks and mixtures that are registered with seqio, as the token cache takes them; their tokenizing in groups.

A task gives examples of one of two kinds: `text`, the ids of one document with its end-of-document token, or
`inputs` and `targets`, the ids of a pair. Where it keeps the text itself as well (`<feature>_pretokenized`,
which seqio.preprocessors.tokenize adds), the UTF-8 bytes are counted for evaluation.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import functools
import hashlib
import os

import numpy as np
import seqio
import tensorflow as tf

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.data import file_tasks
from glmjax.data import mixtures
from glmjax.data import shards
from glmjax.data import tokenizing
from glmjax.io import paths as paths_lib

_GROUP_EXAMPLES = 16  # that are together in TensorFlow, whatever their lengths


def mixture(name: str) -> mixtures.Mixture:
  """Returns a registered mixture or task. What seqio's registration of a task of files does is left to that task.

  Raises:
    errors.InputError: when it is not registered, or its tasks have other vocabularies than one GLMVocabulary.
  """
  try:
    found = seqio.get_mixture_or_task(name)
    tasks = list(seqio.get_subtasks(found))
  except ValueError as error:  # seqio's own message lists near names
    raise errors.InputError(str(error).splitlines()[0]) from error
  rates = {task.name: float(found.get_rate(task)) if isinstance(found, seqio.Mixture) else 1.0 for task in tasks}
  return mixtures.Mixture(
    name, _tokenizer(name, tasks), tuple(_file_task(task) or SeqioTask(task) for task in tasks), rates
  )


def _tokenizer(name: str, tasks: Sequence[seqio.Task]) -> tokenizer_lib.Tokenizer:
  """Returns the one tokenizer of a mixture's tasks."""
  found = {}
  for task in tasks:
    for feature_name, feature in task.output_features.items():
      tokenizer = getattr(feature.vocabulary, "text_tokenizer", None)
      if not isinstance(tokenizer, tokenizer_lib.Tokenizer):
        kind = type(feature.vocabulary).__name__
        raise errors.InputError(
          f"task {task.name}: feature {feature_name} has a {kind}; use glmjax.tasks.vocabulary.GLMVocabulary"
        )
      found[tokenizer.fingerprint] = tokenizer
  if len(found) != 1:
    raise errors.InputError(f"mixture {name}: its tasks use {len(found)} tokenizers; use one")
  return found.popitem()[1]


def _file_task(task: seqio.Task) -> file_tasks.FileTask | None:
  """Returns the task of files that glmjax.tasks has registered as this one; None for any other task."""
  found = _source_task(task)
  if found is None or found.name != task.name:
    return None
  steps = list(task.preprocessors)
  end = next((i for i, step in enumerate(steps) if isinstance(step, seqio.CacheDatasetPlaceholder)), 0)
  if found.kind == "text":
    same = steps[:end] == [tokenize, seqio.preprocessors.append_eos] and task.output_features["text"].add_eos
  else:
    same = steps[:end] == [tokenize]
  return found if same else None


def _source_task(task: seqio.Task) -> file_tasks.FileTask | None:
  """Returns the task of files that a seqio task's source reads (glmjax.tasks.sources.FileSource)."""
  found = getattr(task.source, "file_task", None)
  return found if isinstance(found, file_tasks.FileTask) else None


class SeqioTask:
  """A seqio task, whose examples come through TensorFlow.

  What starts TensorFlow's threads (`kind`, `documents`) must not be asked for in a process that will be forked.
  """

  windows = None

  def __init__(self, task: seqio.Task) -> None:
    self._task = task

  @property
  def name(self) -> str:
    return self._task.name

  @property
  def splits(self) -> Sequence[str]:
    return self._task.splits

  @functools.cached_property
  def kind(self) -> str:
    """Text or instruction, by the features that its examples have."""
    kinds = {self._kind(split) for split in self.splits}
    assert len(kinds) == 1, f"{self.name}: {kinds}"
    return kinds.pop()

  def _kind(self, split: str) -> str:
    features = self._examples(split, 0, 1).element_spec
    for kind, names in tokenizing.FEATURES.items():
      if all(name in features for name in names):
        return kind
    raise errors.InputError(f"task {self.name} gives {', '.join(features)}; a cache needs text, or inputs and targets")

  @property
  def paths(self) -> Sequence[paths_lib.Path]:
    """The files that are not read by TensorFlow."""
    file_task = _source_task(self._task)
    return [] if file_task is None else file_task.paths

  def notes(self) -> dict[str, object]:
    """Returns what the manifest has of the task beside its splits: nothing."""
    return {}

  def files(self) -> list[str]:
    """Returns its source's files; sources without files have other names for their shards."""
    if (file_task := _source_task(self._task)) is not None:
      return file_task.files()
    names = {name for split in self.splits for name in self._task.source.list_shards(split)}
    return sorted(filter(tf.io.gfile.exists, names))

  def file_hash(self, name: str) -> str:
    if (file_task := _source_task(self._task)) is not None:
      return file_task.file_hash(name)
    digest = hashlib.sha256()
    with tf.io.gfile.GFile(name, "rb") as file:
      while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()

  def fingerprint(self, split: str, hashes: Mapping[str, str]) -> str:
    files = [(os.path.basename(name), hashes.get(name)) for name in self._task.source.list_shards(split)]
    file_task = _source_task(self._task)
    source = vars(self._task.source) if file_task is None else file_task.settings()
    return file_tasks.fingerprint_of(files, source, self._task.preprocessors)

  def deals_out(self, num_shards: int) -> bool:
    return False

  def documents(
    self, tokenizer: tokenizer_lib.Tokenizer, split: str, index: int, num_shards: int
  ) -> Iterator[shards.Document]:
    del tokenizer  # its features have it
    try:
      yield from _documents(self._examples(split, index, num_shards).as_numpy_iterator())
    except tf.errors.OpError as error:
      raise _plain_error(error) from None

  def _examples(self, split: str, index: int, num_shards: int) -> tf.data.Dataset:
    """Returns shard `index` of the examples, in order: as they are at its CacheDatasetPlaceholder, if it has one.

    Random preprocessors are seeded by the shard.
    """
    source = self._task.source
    if source.supports_arbitrary_sharding or len(source.list_shards(split)) >= num_shards:
      dataset = source.get_dataset(split=split, shuffle=False, shard_info=seqio.ShardInfo(index, num_shards))
    else:
      dataset = source.get_dataset(split=split, shuffle=False).shard(num_shards, index)
    if self._task.supports_caching:
      return self._task.preprocess_precache(dataset, seed=index)
    return self._task.preprocess_postcache(dataset, sequence_length=None, seed=index)


def _documents(examples: Iterable[dict]) -> Iterator[shards.Document]:
  for example in examples:
    names = next(names for names in tokenizing.FEATURES.values() if all(name in example for name in names))
    texts = [example.get(f"{name}_pretokenized") for name in names]
    ids = [token for name in names for token in example[name].tolist()]
    utf8_bytes = -1 if any(text is None for text in texts) else sum(len(text) for text in texts)
    yield shards.Document(ids, utf8_bytes, len(example["inputs"]) if "inputs" in names else 0)


def _plain_error(error: tf.errors.OpError) -> Exception:
  """Turns an error inside tf.data into one that other processes can read: the InputError it began as, if it did."""
  message = error.message or str(error)
  for line in message.splitlines():
    _, marker, text = line.partition("InputError: ")
    if marker:
      return errors.InputError(text)
  return RuntimeError(message)


def has_run() -> bool:
  """Tells whether TensorFlow has started its threads, which a forked process would lack."""
  threads = tf.config.threading.get_intra_op_parallelism_threads()
  try:
    tf.config.threading.set_intra_op_parallelism_threads(threads + 1)
  except RuntimeError:  # "cannot be modified after initialization"
    return True
  tf.config.threading.set_intra_op_parallelism_threads(threads)
  return False


def leave_gpus() -> None:
  """Has TensorFlow use no GPU in this process."""
  tf.config.set_visible_devices([], "GPU")


def tokenize(dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]) -> tf.data.Dataset:
  """Does as seqio.preprocessors.tokenize for features that have a GLMVocabulary, in groups of examples.

  What crosses from TensorFlow into Python or back costs as much for a document as for a group of them, 0.1 ms and more,
  in which a kilobyte is encoded.
  """

  def encode(group: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor | tf.RaggedTensor]:
    encoded = {}
    for name, strings in group.items():
      if name in output_features:
        encoded[f"{name}_pretokenized"] = strings
        strings = _ragged_ids(output_features[name].vocabulary.text_tokenizer, strings)
      encoded[name] = strings
    return encoded

  return dataset.batch(_GROUP_EXAMPLES).map(encode).unbatch()


def _ragged_ids(tokenizer: tokenizer_lib.Tokenizer, strings: tf.Tensor) -> tf.RaggedTensor:
  """Returns ids int32 [examples, (length)] of strings [examples]."""

  @tf.autograph.experimental.do_not_convert
  def encode(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = tokenizer.encode_arrays([text.decode("utf-8") for text in texts])
    return np.concatenate(rows), np.array([len(row) for row in rows], np.int64)

  ids, lengths = tf.numpy_function(encode, [strings], [tf.int32, tf.int64])
  ids, lengths = tf.ensure_shape(ids, [None]), tf.ensure_shape(lengths, [None])
  return tf.RaggedTensor.from_row_lengths(ids, lengths, validate=False)
