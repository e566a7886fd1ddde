"""Text to ids, a group of documents at a time: as a preprocessor of seqio tasks, and for the cache without TensorFlow.

What crosses from TensorFlow into Python or back costs as much for a document as for a group of them, 0.1 ms and more,
in which a kilobyte is encoded.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from glmjax import tokenizer as tokenizer_lib
from glmjax.data import shards

Strings = tuple[str, ...]  # of an example: one of each of its source's features

_GROUP_CHARACTERS = 1 << 17  # a group has less, or a single example
_GROUP_EXAMPLES = 16  # that are together in TensorFlow, whatever their lengths
_UTF8_CHUNK = 1 << 20


def groups(examples: Iterable[Strings]) -> Iterator[list[Strings]]:
  """Puts consecutive examples in groups of bounded size, so that memory is that of the longest example."""
  group: list[Strings] = []
  size = 0
  for example in examples:
    length = sum(map(len, example))
    if group and size + length > _GROUP_CHARACTERS:
      yield group
      group, size = [], 0
    group.append(example)
    size += length
  if group:
    yield group


def tokenize(dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]) -> tf.data.Dataset:
  """Does as seqio.preprocessors.tokenize for features that have a GLMVocabulary, in groups of examples."""

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


def is_direct(task: seqio.Task) -> bool:
  """Tells whether `documents` can do what the task does before its cache: its source gives strings, its steps are
  known.
  """
  steps = list(task.preprocessors)
  known = [tokenize, seqio.preprocessors.append_eos]
  end = next((i for i, step in enumerate(steps) if isinstance(step, seqio.CacheDatasetPlaceholder)), 0)
  return hasattr(task.source, "examples") and 0 < end <= 2 and steps[:end] == known[:end]


def documents(task: seqio.Task, examples: Iterable[Strings]) -> Iterator[shards.Document]:
  """Yields what a direct task's dataset holds at its CacheDatasetPlaceholder, of these examples of its source."""
  names: Sequence[str] = task.source.features
  features = [task.output_features[name] for name in names]
  appends_eos = seqio.preprocessors.append_eos in task.preprocessors
  ends = [np.int32([feature.vocabulary.eos_id] if appends_eos and feature.add_eos else []) for feature in features]
  is_pair = "inputs" in names
  for group in groups(examples):
    encoded = [
      feature.vocabulary.text_tokenizer.encode_arrays(column) for feature, column in zip(features, zip(*group))
    ]
    for strings, ids in zip(group, zip(*encoded)):
      parts = [part for of_feature, end in zip(ids, ends) for part in (of_feature, end) if part.size]
      tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
      yield shards.Document(tokens, sum(map(_utf8_bytes, strings)), len(ids[0]) + len(ends[0]) if is_pair else 0)


def _utf8_bytes(text: str) -> int:
  if text.isascii():
    return len(text)
  return sum(len(text[i : i + _UTF8_CHUNK].encode()) for i in range(0, len(text), _UTF8_CHUNK))
