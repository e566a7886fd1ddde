"""A step on its way into a bucket, as the folder that Orbax leaves on a disk.

Every process copies what its devices hold to the host's memory, and threads put it, an object a chunk. Then it tells
process 0, by the coordination service, since a step of training may be under way in JAX's collectives. Process 0 waits
for all, and publishes the step by its record.
"""

from collections.abc import Iterator, Mapping, Sequence
import concurrent.futures
import errno
import itertools
import json
import math
import threading
from typing import Any, NamedTuple

import jax
import numpy as np

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import described
from glmjax.checkpoint import step_folder
from glmjax.checkpoint import stored as stored_lib
from glmjax.io import bucket_path
from glmjax.io import growing
from glmjax.io import lease
from glmjax.io import publish
from glmjax.parallel import processes

AT_ONCE = 8  # objects that a process puts, or has copied, at the same time
_TINY = 64  # part of the largest chunk
_OTHERS = 900.0  # seconds for which a process, itself done, waits for another

_numbers = itertools.count()  # of what was saved, the same in every process

_PASSES = "passes"  # begins what a process says of a failure that the next try may not meet


class _Chunk(NamedTuple):
  """What becomes one object."""

  path: bucket_path.BucketPath
  data: np.ndarray


def chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
  """Returns the shape of the chunks that a shard is cut into, which divides it: of at most arrays.CHUNK_BYTES, unless
  they would be tiny then, as where an axis is a large prime.
  """
  chunks, most = [max(1, n) for n in shape], arrays.CHUNK_BYTES
  while (size := math.prod(chunks) * itemsize) > most:
    fits = [_largest_divisor(n, most * n // size) for n in chunks]
    axis = next(axis for axis, n in enumerate(chunks) if n > 1)
    if fits[axis]:  # this one will do: or another that leaves larger chunks, the first of several, as it lies together
      axis = max(range(len(chunks)), key=lambda each: fits[each] / chunks[each])
      if size // chunks[axis] * fits[axis] < most // _TINY:
        break
    chunks[axis] = max(1, fits[axis])
  return tuple(chunks)


def _largest_divisor(number: int, most: int) -> int:
  """Returns the largest divisor of a number that is at most so large; 0: none is."""
  return next((d for d in range(min(most, number), 0, -1) if number % d == 0), 0)


class Saving:
  """One step that is being written.

  When this object is there, the caller may change or donate the arrays.

  Args:
    folder: of the step; nothing is in it.
    stored: the arrays, by their names.
    record: of the step; the same in all processes.
    lines: put before the step is published.
  """

  def __init__(
    self,
    folder: bucket_path.BucketPath,
    stored: Mapping[str, jax.Array | np.ndarray],
    record: Mapping[str, Any],
    lines: Sequence[growing.File] = (),
  ):
    self._folder, self._record, self._lines = folder, record, lines
    self._process, self._processes = jax.process_index(), jax.process_count()
    self._told = f"saved/{next(_numbers)}"
    self._shapes = {name: _chunks_of(x) for name, x in stored.items()}
    self._chunks = list(self._copied(stored))
    self._error: BaseException | None = None
    self._thread = threading.Thread(target=self._write, name=f"saves {folder}", daemon=True)
    self._thread.start()

  def wait(self) -> None:
    """Returns when the step is published; raises what failed, in the processes where it did InputError or OSError."""
    self._thread.join()
    if self._error is not None:
      raise self._error
    if self._process:
      self._hear(0)

  def _copied(self, stored: Mapping[str, jax.Array | np.ndarray]) -> Iterator[_Chunk]:
    """Yields this process's chunks, of which every array is copied once."""
    for x in stored.values():
      for shard in _shards(x):
        shard.data.copy_to_host_async()
    for name, x in stored.items():
      where, chunks = stored_lib.array_folder(self._folder / step_folder.STATE, name), self._shapes[name]
      if isinstance(x, np.ndarray):
        parts = [((0,) * x.ndim, x)] if self._process == 0 else []
      else:
        parts = [(_start(shard.index), _on_host(shard.data)) for shard in _shards(x)]
      for start, part in parts:
        for place in itertools.product(*(range(0, n, c) for n, c in zip(part.shape, chunks))):
          at = ".".join(str((first + p) // c) for first, p, c in zip(start, place, chunks)) or "0"
          yield _Chunk(where / at, part[tuple(slice(p, p + c) for p, c in zip(place, chunks))])

  def _write(self) -> None:
    try:
      self._put_chunks()
      if not self._process:
        for other in range(1, self._processes):
          self._hear(other)
        self._publish()
    except BaseException as error:  # of any kind: `wait` raises it
      self._error = error
    if self._processes > 1:
      processes.tell(self._told, _said(self._error) if self._error else "")

  def _hear(self, process: int) -> None:
    """Waits until another process is done."""
    failure = processes.told(self._told, process, _OTHERS)
    if failure is None:
      raise OSError(errno.ETIMEDOUT, f"process {process} has not written its part in {_OTHERS:g} s")
    if failure:
      kind, _, message = failure.partition(" ")
      raise errors.InputError(f"process {process}: {message}", passes=kind == _PASSES)

  def _put_chunks(self) -> None:
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
      tasks = [pool.submit(_put, chunk) for chunk in self._chunks]
      self._chunks.clear()  # each is freed when it was put
      try:
        for task in concurrent.futures.as_completed(tasks):
          task.result()
      finally:  # after a failure the rest need not be tried
        for task in tasks:
          task.cancel()

  def _publish(self) -> None:
    state = self._folder / step_folder.STATE
    headers = [
      _Chunk(
        stored_lib.array_folder(state, name) / ".zarray",
        np.frombuffer(_header(entry["shape"], entry["dtype"], self._shapes[name]), np.uint8),
      )
      for name, entry in self._record["arrays"].items()
    ]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
      list(pool.map(_put, headers))
    described.write_step(self._folder, list(self._record["arrays"]))
    for file in self._lines:
      file.put()
    publish.finish(self._folder / step_folder.MARK, self._record)


def _shards(x: jax.Array | np.ndarray) -> list[jax.Shard]:
  """Returns the shards that this process is to write."""
  return [] if isinstance(x, np.ndarray) else [shard for shard in x.addressable_shards if shard.replica_id == 0]


def _chunks_of(x: jax.Array | np.ndarray) -> tuple[int, ...]:
  """Returns the shape of an array's chunks, the same in all processes."""
  shape = x.shape if isinstance(x, np.ndarray) else x.sharding.shard_shape(x.shape)
  return chunk_shape(shape, x.dtype.itemsize)


def _said(error: BaseException) -> str:
  """Says for the other processes whether the next try may go well, and what has happened."""
  kind = _PASSES if errors.may_pass(error) else "failed"
  where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
  return f"{kind} {where}{errors.reason(error) if isinstance(error, OSError) else errors.one_line(error)}"


def _start(index: Sequence[slice]) -> tuple[int, ...]:
  return tuple(s.start or 0 for s in index)


def _on_host(data: jax.Array) -> np.ndarray:
  """Returns a device's array in the host's memory, by a copy that no donation of it changes."""
  shares_memory = next(iter(data.devices())).platform == "cpu"
  return np.array(data) if shares_memory else np.asarray(data)


def _put(chunk: _Chunk) -> None:
  lease.check()
  chunk.path.write_bytes(memoryview(np.ascontiguousarray(chunk.data).reshape(-1).view(np.uint8)))


def _header(shape: Sequence[int], dtype: str, chunks: Sequence[int]) -> bytes:
  """Returns a zarr header as TensorStore writes it."""
  return json.dumps(stored_lib.header(shape, dtype, chunks), sort_keys=True, separators=(",", ":")).encode()
