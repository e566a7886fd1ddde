"""Steps between a source's strings and the features that GLMFeatureConverter takes.

A text task's example is a document before seqio's cache and a window of it behind; an instruction task's is a
pair. Every task has the features text, inputs and targets, those not its own empty, so that they mix.
"""

from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf

from glmjax.data import filtering
from glmjax.data import filters as filters_lib


def output_features(vocabulary: seqio.Vocabulary) -> dict[str, seqio.Feature]:
  """Returns the features of every task: a text ends in </s>, a pair's end is for the row builder to mark."""
  return {
    "text": seqio.Feature(vocabulary, add_eos=True, required=False),
    "inputs": seqio.Feature(vocabulary, add_eos=False, required=False),
    "targets": seqio.Feature(vocabulary, add_eos=False, required=False),
  }


def cut_windows(dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None) -> tf.data.Dataset:
  """Lays documents end to end and cuts them into windows of sequence_length["text"]; whole if there is no length.

  What is left at the end of a finite dataset is less than a window, and dropped.
  """
  if not sequence_length or not sequence_length.get("text"):
    return dataset
  length = sequence_length["text"]

  def absorb(rest: tf.Tensor, example: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    tokens = tf.concat([rest, example["text"]], 0)
    used = tf.size(tokens) // length * length
    return tokens[used:], tf.reshape(tokens[:used], [-1, length])

  windows = dataset.scan(tf.zeros([0], tf.int32), absorb).unbatch()
  return windows.map(lambda window: {"text": window})


def filter_documents(
  dataset: tf.data.Dataset, filters: Sequence[filters_lib.Filter], feature: str = "text"
) -> tf.data.Dataset:
  """Leaves out examples, and changes their feature of text, as filters that judge a document by itself do.

  For tasks of your own, before `tokenize`: `functools.partial(filter_documents, filters=[filters.Length(100)])`.

  Raises:
    errors.InputError: for filters of duplicates, which must see all documents first.
  """
  filters_lib.check(filters, single=True)

  @tf.autograph.experimental.do_not_convert
  def judge(text: bytes) -> tuple[bool, bytes]:
    found = filtering.judged(filters, text.decode("utf-8"))
    return found is not None, (found or "").encode()

  def mark(example: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    kept, text = tf.numpy_function(judge, [example[feature]], [tf.bool, tf.string])
    return tf.ensure_shape(kept, []), dict(example) | {feature: tf.ensure_shape(text, [])}

  return dataset.map(mark).filter(lambda kept, _: kept).map(lambda _, example: example)


def fill_features(dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]) -> tf.data.Dataset:
  """Gives every example every output feature, empty where it has none."""

  def fill(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {name: tf.zeros([0], tf.int32) for name in output_features} | dict(example)

  return dataset.map(fill)
