"""GLM's model features from seqio tasks, and batches straight from an uncached seqio mixture.

The numpy code of rows.py makes the rows, as it does for the token cache; TensorFlow only carries them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import os
import re
import weakref

import numpy as np
import seqio
import tensorflow as tf

from glmjax import batch as batch_lib
from glmjax import errors
from glmjax import ranges
from glmjax import tokenizer
from glmjax.data import rows
from glmjax.data import sampler

TASK_FEATURES = ("text", "inputs", "targets")


class GLMFeatureConverter(seqio.FeatureConverter):
  """A converter of examples with text, or with inputs and targets, to the batch features of docs/architecture.md.

  A text (a window of infilling.window_length tokens, or less) becomes a row. Pairs are packed by the row
  builder, as many as fit; seqio's packing is not used, for it drops every legal zero. The row at place i of
  the dataset draws its spans from (seed, i), whatever the shuffling and the machine.
  """

  TASK_FEATURES = {name: seqio.FeatureConverter.FeatureSpec(tf.int32) for name in TASK_FEATURES}
  PACKING_FEATURE_DTYPES = {}

  def __init__(self, infilling: rows.BlankInfilling, seed: int = 0) -> None:
    self._shapes = {
      feature.name: feature.row_shape(infilling.seq_length, infilling.position_kind) for feature in batch_lib.FEATURES
    }
    self.MODEL_FEATURES = {
      feature.name: seqio.FeatureConverter.FeatureSpec(
        tf.as_dtype(feature.dtype), rank=len(shape), sequence_dim=len(shape) - 1
      )
      for feature, shape in zip(batch_lib.FEATURES, self._shapes.values())
    }
    self._infilling = infilling
    self._seed = seed
    super().__init__(pack=False, apply_length_check=False)  # shapes are static; tracing it takes seconds

  @property
  def task_feature_lengths(self) -> dict[str, int]:
    """The lengths to ask of the task."""
    length = self._infilling.seq_length
    return {"text": self._infilling.window_length, "inputs": length, "targets": length}

  def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    return dict.fromkeys(batch_lib.NAMES, self._infilling.seq_length)

  def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
    empty = tf.zeros([0], tf.int32)
    end = tf.data.Dataset.from_tensors(dict.fromkeys(TASK_FEATURES, empty))  # has the last pairs written
    ds = ds.map(lambda example: {name: example[name] for name in TASK_FEATURES}).concatenate(end)
    state = (tf.zeros([], tf.int64), tf.zeros([0, 2], tf.int32), empty)
    return ds.scan(state, self._absorb).unbatch()

  @tf.autograph.experimental.do_not_convert  # nothing to convert, and converting takes a second
  def _absorb(
    self, state: tuple[tf.Tensor, ...], example: Mapping[str, tf.Tensor]
  ) -> tuple[tuple[tf.Tensor, ...], dict[str, tf.Tensor]]:
    """Takes in an example; gives out the rows, none or one, that it completes."""
    arguments = [*state, *(example[name] for name in TASK_FEATURES)]
    results = tf.numpy_function(
      self._absorb_arrays,
      arguments,
      [tf.int64, tf.int32, tf.int32, *(spec.dtype for spec in self.MODEL_FEATURES.values())],
    )
    index, lengths, pending = results[:3]
    features = {
      name: tf.ensure_shape(array, [None, *shape])
      for (name, shape), array in zip(self._shapes.items(), results[3:], strict=True)
    }
    state = tf.ensure_shape(index, []), tf.ensure_shape(lengths, [None, 2]), tf.ensure_shape(pending, [None])
    return state, features

  def _absorb_arrays(
    self,
    index: np.ndarray,
    lengths: np.ndarray,
    pending: np.ndarray,
    text: np.ndarray,
    inputs: np.ndarray,
    targets: np.ndarray,
  ) -> list[np.ndarray]:
    """Takes in arrays of an example; index: rows so far; lengths [pairs, 2] and pending [tokens]: the pairs that
    wait for their row.
    """
    made = []
    is_pair, is_text = len(targets) > 0, len(text) > 1
    if len(lengths) and not is_text and not (is_pair and self._fits([*lengths, (len(inputs), len(targets))])):
      made.append(self._infilling.instruction_row(_split_pairs(lengths, pending)))
      lengths, pending = lengths[:0], pending[:0]
    if is_pair:
      lengths = np.concatenate([lengths, np.array([[len(inputs), len(targets)]], np.int32)])
      pending = np.concatenate([pending, inputs, targets])
    elif is_text:
      made.append(self._infilling.text_row(text, self._seed, int(index)))
    features = [
      np.stack([row[feature.name] for row in made])
      if made
      else np.zeros((0, *self._shapes[feature.name]), feature.dtype)
      for feature in batch_lib.FEATURES
    ]
    return [np.int64(index + len(made)), lengths, pending, *features]

  def _fits(self, lengths: Sequence[tuple[int, int]]) -> bool:
    places = sum(self._infilling.instruction_length(int(a), int(b)) for a, b in lengths)
    return places <= self._infilling.seq_length


def _split_pairs(lengths: np.ndarray, pending: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
  parts = np.split(pending, np.cumsum(lengths.reshape(-1))[:-1])
  return list(zip(parts[::2], parts[1::2], strict=True))


class _Owner:
  """Something that a finalizer can watch."""


@dataclasses.dataclass(frozen=True)
class SeqioMixture:
  """A DataSource over a registered seqio mixture or task, with no token cache: for notebooks and small texts.

  Sample i has the task that CachedMixture would give it, and is the next row of that task. So every host
  makes all rows and keeps its own, and a resumed run makes again, and skips, all rows before its first.
  """

  mixture: str  # its name; in gin @pretrain.register() gives it
  infilling: rows.BlankInfilling | Callable[..., rows.BlankInfilling]  # or what makes one from `specials`
  seed: int = 0
  split: str = "train"
  rate_changes: Sequence[sampler.RateChange] = ()  # other rates from a sample on; by task or pattern
  use_cached: bool = False  # read what seqio's own (Beam) caching has written
  shuffle_buffer_size: int = 1000  # windows or pairs of each task to draw from; filled before the first batch

  def __post_init__(self) -> None:
    ranges.whole("SeqioMixture.seed", self.seed, -(2**63), 2**64 - 1)
    ranges.flag("SeqioMixture.use_cached", self.use_cached)
    ranges.whole("SeqioMixture.shuffle_buffer_size", self.shuffle_buffer_size, 1)

  @property
  def seq_length(self) -> int:
    return self._infilling.seq_length

  @functools.cached_property
  def _rates(self) -> dict[seqio.Task, float]:
    """The tasks and their shares."""
    try:
      provider = seqio.get_mixture_or_task(self.mixture)
    except ValueError as error:
      known = sorted({*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()})
      raise errors.InputError(
        f"no seqio mixture or task {self.mixture!r} is registered; there are {', '.join(known) or 'none'}"
      ) from error
    if isinstance(provider, seqio.Task):
      return {provider: 1.0}
    rates = {task: provider.get_rate(task) for task in provider.tasks}
    if self.split == "train":
      return rates
    # Of a small instruction set nothing is held out; a text's size is not known without reading it.
    rates = {task: rate for task, rate in rates.items() if task.source.num_input_examples(self.split) != 0}
    if not rates:
      raise errors.InputError(
        f"the mixture {self.mixture} has nothing in the split {self.split!r}: of instruction "
        "pairs every 50th is held out; give more, or do without that split"
      )
    return rates

  @functools.cached_property
  def _tokenizer(self) -> tokenizer.Tokenizer:
    return next(iter(self._rates)).output_features["text"].vocabulary.text_tokenizer

  @functools.cached_property
  def _infilling(self) -> rows.BlankInfilling:
    if isinstance(self.infilling, rows.BlankInfilling):
      return self.infilling
    return self.infilling(specials=self._tokenizer.specials)

  @functools.cached_property
  def _weights(self) -> dict[str, int]:
    return sampler.rate_weights({task.name: rate for task, rate in self._rates.items()})

  @functools.cached_property
  def _changes(self) -> list[tuple[int, int, dict[str, int]]]:
    """The changes of rates as sampler.Timeline has them."""
    whole = {task.name: rate for task, rate in self._rates.items()}
    return [
      (
        change.first_sample,
        change.ramp_samples,
        sampler.rate_weights(sampler.share(change.rates, whole, whole, f"the mixture {self.mixture}")),
      )
      for change in self.rate_changes
    ]

  @functools.cached_property
  def _schedule(self) -> sampler.Timeline:
    return sampler.Timeline(self._weights, self._changes)

  def describe(self) -> dict:
    """Describes all that decides the rows, but for the text itself, which has no fingerprint here."""
    described = {
      "source": "seqio",
      "mixture": self.mixture,
      "tokenizer": self._tokenizer.fingerprint,
      "seed": self.seed,
      "split": self.split,
      "infilling": rows.described(self._infilling),
      "weights": dict(sorted(self._weights.items())),
    }
    if self.rate_changes:
      described["changes"] = [
        {"first_sample": first, "ramp_samples": length, "weights": dict(sorted(weights.items()))}
        for first, length, weights in self._changes
      ]
    return described

  def save_tokenizer(self, folder: str | os.PathLike) -> None:
    """Writes the tasks' tokenizer into the folder."""
    self._tokenizer.save(folder)

  def check(self) -> None:
    """Says before anything is computed what `batches` would come to later.

    Raises:
      errors.InputError: when the mixture, or of another split than "train" a task of it, gives no rows.
    """
    for name in self._schedule.names if self.split != "train" else ():
      self._advance(self._rows(name, shuffle=False), name, 0)

  def batches(
    self, plan: Iterator[tuple[int, int]], process_index: int = 0, process_count: int = 1
  ) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of this host's rows, one for each (first sample index, batch size) of the plan."""
    tf.config.set_visible_devices([], "GPU")  # the accelerator is JAX's
    streams: dict[str, Iterator[rows.Row]] = {}
    places: dict[str, int] = {}  # rows that each stream has given
    owner = _Owner()  # lives as long as this generator, and no longer than Python's threads may run
    weakref.finalize(owner, streams.clear)
    for first, size in plan:
      if size % process_count:
        raise errors.InputError(f"a batch of {size} rows does not divide over {process_count} hosts")
      local = size // process_count
      batch = []
      for index in range(first + process_index * local, first + (process_index + 1) * local):
        name, place = self._schedule.pick(index)
        if place < places.get(name, place + 1):
          streams[name], places[name] = self._rows(name), 0
        batch.append(self._advance(streams[name], name, place - places[name]))
        places[name] = place + 1
      yield {feature: np.stack([row[feature] for row in batch]) for feature in batch_lib.NAMES}

  def _rows(self, name: str, shuffle: bool = True) -> Iterator[rows.Row]:
    """Returns all rows of a task, epoch after epoch, each shuffled in its own way."""
    task = next(task for task in self._rates if task.name == name)
    converter = GLMFeatureConverter(self._infilling, self.seed)
    lengths = converter.task_feature_lengths
    ds = task.get_dataset(
      lengths,
      self.split,
      self.use_cached,
      shuffle=shuffle,
      seed=self.seed,
      num_epochs=None,
      shuffle_buffer_size=self.shuffle_buffer_size,
    )
    return converter(ds, lengths).as_numpy_iterator()

  def _advance(self, stream: Iterator[rows.Row], name: str, skip: int) -> rows.Row:
    """Returns the row behind the next `skip` rows."""
    try:
      return next(itertools.islice(stream, skip, None))
    except StopIteration:
      raise errors.InputError(
        f"task {name} has too little text in the split {self.split!r} for a row of "
        f"{self.seq_length} tokens: give more text, or a shorter seq_length"
      ) from None
    except tf.errors.OpError as error:
      raise input_error(error) or error from error


def input_error(error: tf.errors.OpError) -> errors.InputError | None:
  """Returns the user's mistake behind an error that a tf.data pipeline has wrapped, if there is one."""
  found = re.search(r"InputError: (.*)", str(error))
  return errors.InputError(found.group(1)) if found else None
