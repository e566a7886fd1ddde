"""Batches from a data source to the devices: checked, cut into micro-batches, sent ahead of the step."""

import dataclasses
import functools
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from glmjax import batch as batch_lib
from glmjax import errors
from glmjax import positions as positions_lib
from glmjax.parallel import partitioning
from glmjax.train import losses
from glmjax.train import objective as objective_lib
from glmjax.train import step as step_lib

HostBatch = dict[str, np.ndarray]
Plan = Iterator[tuple[int, int]]


class DataSource(Protocol):
  """Rows by number: data.loader.CachedMixture, or data.feature_converter.SeqioMixture."""

  seq_length: int
  # Sources with a tokenizer also have save_tokenizer(folder), and the run gets a copy. Those that know when a sample
  # first comes again have samples_once(), how many are before that one: a probe (probe.py) compares no others.

  def describe(self) -> dict:
    """Describes all that decides the rows."""

  def batches(self, plan: Plan, process_index: int = 0, process_count: int = 1) -> Iterator[HostBatch]:
    """Yields this host's contiguous rows of each (first sample, batch size) of the plan."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a batch of up to num_micro x rows rows lies on the devices: [num_micro, rows, L] per feature."""

  mesh: jax.sharding.Mesh
  rules: partitioning.Rules
  num_micro: int
  rows: int  # of a micro-batch, over all hosts
  length: int
  positions: positions_lib.Positions
  vocab_size: int
  num_positions: int | None = None  # rows of the position tables; None: the model has none

  @classmethod
  def make(
    cls,
    mesh: jax.sharding.Mesh,
    rules: partitioning.Rules,
    batch: int,
    micro_batch: int | None,
    length: int,
    positions: positions_lib.Positions,
    vocab_size: int,
    num_positions: int | None = None,
  ) -> "Layout":
    """Makes a layout for batches of up to `batch` rows, `micro_batch` of them (None: all) at a time.

    Raises:
      errors.InputError: when they do not divide over mesh and hosts.
    """
    shards = partitioning.batch_shards(mesh)
    name, rows = ("batch size", batch) if micro_batch is None else ("micro_batch", micro_batch)
    if rows < 1 or rows % shards:
      sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in ("data", "fsdp") if mesh.shape[axis] > 1)
      raise errors.InputError(
        f"{name} {rows} does not divide over the mesh's {shards} batch shards ({sizes}): use a "
        f"multiple of {shards}, or a mesh with fewer"
      )
    if length % mesh.shape["context"]:
      raise errors.InputError(
        f"rows of {length} tokens do not divide over the mesh's context={mesh.shape['context']}: change either"
      )
    return cls(mesh, rules, -(-batch // rows), rows, length, positions, vocab_size, num_positions)

  @functools.cached_property
  def part(self) -> tuple[int, int]:
    """The part of every batch that this process reads, and of how many; processes with the same rows read the same
    part.

    Raises:
      errors.InputError: when its devices hold no such part.
    """
    indices = self.sharding(batch_lib.FEATURES[0]).addressable_devices_indices_map(
      (self.num_micro, self.rows, self.length)
    )
    spans = {index[1].indices(self.rows)[:2] for index in indices.values()}
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    size = last - first
    if sum(stop - start for start, stop in spans) != size or self.rows % size or first % size:
      raise errors.InputError(
        f"the mesh gives process {jax.process_index()} the rows {sorted(spans)} of {self.rows}, "
        "which are no part of a batch: make data x fsdp a multiple of the hosts, or a divisor"
      )
    return first // size, self.rows // size

  def check_sizes(self, name: str, sizes: Sequence[int]) -> None:
    """Raises InputError where one of the sizes does not divide over the parts that hosts read."""
    count = self.part[1]
    for size in sizes:
      if size % count:
        raise errors.InputError(
          f"{name} {size} does not divide over the {count} parts that {jax.process_count()} "
          f"hosts read of it: use multiples of {count}, or a mesh with fewer batch shards"
        )

  def sharding(self, feature: batch_lib.Feature) -> jax.sharding.NamedSharding:
    """Returns the sharding of one feature on the devices."""
    axes: tuple[str | None, ...] = (None,) * len(self._row_shape(feature))
    return partitioning.named(self.mesh, self.rules, None, "batch", *axes[:-1], *(["length"] if axes else []))

  def abstract(self) -> objective_lib.Batch:
    """Returns shapes and shardings of a batch on the devices."""
    return {
      feature.name: jax.ShapeDtypeStruct(
        (self.num_micro, self.rows, *self._row_shape(feature)), feature.dtype, sharding=self.sharding(feature)
      )
      for feature in (*batch_lib.FEATURES, batch_lib.ROWS)
    }

  def put(self, host: HostBatch) -> objective_lib.Batch:
    """Puts this host's rows, filled up with rows without loss, on the devices."""
    index, parts = self.part
    local_rows = self.rows // parts
    numbers = self.row_numbers(len(host["tokens"]) * parts)[:, index * local_rows : (index + 1) * local_rows]
    put = {}
    for feature in batch_lib.FEATURES:
      array = feature.padding(self.num_micro * local_rows, self.length, self.positions)
      array[: len(host[feature.name])] = host[feature.name]
      put[feature.name] = self._to_devices(feature, array.reshape(self.num_micro, local_rows, *array.shape[1:]))
    return put | {batch_lib.ROWS.name: self._to_devices(batch_lib.ROWS, numbers)}

  def row_numbers(self, size: int) -> np.ndarray:
    """Returns the numbers, in a batch of `size` rows, of the rows of all micro-batches [num_micro, rows]; more where
    none is.

    Each part of a micro-batch holds rows of one part of the batch: the hosts' own.
    """
    parts, local_rows = self.part[1], self.rows // self.part[1]
    micro, part, row = np.ogrid[: self.num_micro, :parts, :local_rows]
    own = micro * local_rows + row
    numbers = np.where(own < size // parts, part * (size // parts) + own, size + own * parts + part)
    return numbers.reshape(self.num_micro, self.rows).astype(np.int32)

  def check(self, host: HostBatch, first: int, size: int) -> None:
    """Raises InputError where a batch is not what the model takes."""
    for feature in batch_lib.FEATURES:
      wanted = (size // self.part[1], *self._row_shape(feature))
      found = host[feature.name].shape if feature.name in host else None
      if found != wanted:
        raise errors.InputError(
          f"data: {feature.name} of samples {first} to {first + size - 1} has shape {found}, the "
          f"model takes {wanted}: use a source with the model's positions and sequence length"
        )
    for name, what, end, advice in (
      ("tokens", "token", self.vocab_size, "vocab_size {}: use the tokenizer's vocab_size or more"),
      ("targets", "token", self.vocab_size, "vocab_size {}: use the tokenizer's vocab_size or more"),
      ("objective", "objective", losses.NUM_OBJECTIVES, "{} (tokens.OBJECTIVES): mend the source"),
      ("positions", "position", self.num_positions, "{} (max_length + 1): use a larger max_length"),
    ):
      low, high = int(host[name].min()), int(host[name].max())
      if end is not None and (low < 0 or high >= end):
        raise errors.InputError(
          f"data: samples {first} to {first + size - 1} hold {what} {high if low >= 0 else low}, "
          f"the model has {advice.format(end)}"
        )

  def _row_shape(self, feature: batch_lib.Feature) -> tuple[int, ...]:
    return feature.row_shape(self.length, self.positions)

  def _to_devices(self, feature: batch_lib.Feature, array: np.ndarray) -> jax.Array:
    """Puts this host's part of a feature, [num_micro, its rows, ...], on the devices."""
    return jax.make_array_from_process_local_data(
      self.sharding(feature), np.ascontiguousarray(array), (self.num_micro, self.rows, *array.shape[2:])
    )


class Evaluated(NamedTuple):
  """Rows of a source that are evaluated together."""

  first: int  # number of the first sample
  size: int  # rows, over all hosts
  rows: HostBatch  # this host's


def read_held_out(source: DataSource, layout: Layout, samples: int, name: str) -> list[Evaluated]:
  """Reads this host's part of the first samples of a source, a micro-batch at a time.

  Args:
    source: what loop.train's argument `name` is, "validation" or "probe".
    layout: of batches on the devices.
    samples: how many.
    name: says in errors which source it is.

  Raises:
    errors.InputError: when it has none, or none that predicts anything.
  """
  plan = [(first, min(layout.rows, samples - first)) for first in range(0, samples, layout.rows)]
  without = {"validation": "Intervals.evaluate = 0", "probe": "loop.train.probe = None"}[name]
  advice = f"hold some text out when the cache is made, or set {without}"
  try:
    source.describe()  # whatever is wrong with the whole of it is found here, not by a helper process
    batches = list(source.batches(iter(plan), *layout.part))
  except errors.InputError as error:
    raise errors.InputError(f"the {name} source has no rows to evaluate: {error}; {advice}") from error
  if len(batches) != len(plan):
    raise errors.InputError(f"the {name} source gives {len(batches)} of {len(plan)} batches: {advice}")
  for (first, size), rows in zip(plan, batches):
    layout.check(rows, first, size)
  if not any((rows["loss_weights"] > 0).any() for rows in batches):
    raise errors.InputError(f"the {samples} rows of the {name} source have nothing to predict: {advice}")
  return [Evaluated(first, size, rows) for (first, size), rows in zip(plan, batches)]


class Item(NamedTuple):
  """One step's batch."""

  first: int  # number of its first sample
  size: int  # rows, over all hosts
  batch: objective_lib.Batch
  info: step_lib.StepInfo


class Feed:
  """Iterates over the plan's batches on the devices, made and sent ahead by a thread."""

  def __init__(self, source: DataSource, plan: Plan, start: int, layout: Layout, depth: int = 2):
    """Begins the plan's batches; `start` is the number of samples seen before its first step."""
    self._queue: queue.Queue[Item | BaseException | None] = queue.Queue(depth)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._work, args=(source, plan, start, layout), name="feed", daemon=True)
    self._thread.start()

  def __iter__(self) -> Iterator[Item]:
    while True:
      item = self._queue.get()
      if item is None:
        return
      if isinstance(item, BaseException):
        raise item
      yield item

  def close(self) -> None:
    """Stops the thread, and whatever the source started."""
    self._stop.set()
    while self._thread.is_alive():
      try:
        self._queue.get(timeout=0.05)
      except queue.Empty:
        pass
    self._thread.join()

  def _offer(self, item: Item | BaseException | None) -> None:
    while not self._stop.is_set():
      try:
        return self._queue.put(item, timeout=0.1)
      except queue.Full:
        pass

  def _work(self, source: DataSource, plan: Plan, position: int, layout: Layout) -> None:
    replicated = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec())
    asked, planned = itertools.tee(plan)
    batches = None
    try:
      batches = source.batches(asked, *layout.part)
      for first, size in planned:
        host = next(batches, None)
        if self._stop.is_set():
          break
        if host is None:
          raise errors.InputError(
            f"data: the source ends before sample {first}, and the run goes on: give more, or a smaller total_samples"
          )
        layout.check(host, first, size)
        info = step_lib.StepInfo(*(everywhere(np.uint32(n), replicated) for n in (position, first, size)))
        self._offer(Item(first, size, layout.put(host), info))
        position = first + size
      self._offer(None)
    except BaseException as error:  # raised again where the items are taken
      self._offer(error)
    finally:
      if hasattr(batches, "close"):  # a generator: ends its helper processes
        batches.close()


def everywhere(value: np.ndarray | np.generic, replicated: jax.sharding.NamedSharding) -> jax.Array:
  """Puts the same value on all devices. (device_put would compare it with the other hosts', a collective beside the
  step's.)
  """
  return jax.make_array_from_callback(value.shape, replicated, lambda index: value[index])
