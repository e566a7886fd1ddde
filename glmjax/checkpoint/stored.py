"""One array on disk as Orbax and blocks.Writer leave it: plain zarr, each chunk the bytes of a file.

It is read here, not by TensorStore, which ends the process where memory is short, and whose complaints do not tell a
damaged file from a refusal of the system. Nothing in the header is believed: it must be what the record says.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np

from glmjax.checkpoint import files
from glmjax.io import paths

_LARGEST_HEADER = 1 << 16  # bytes
_ALIGNED = 64
_AT_ONCE = 8  # chunks that are read at the same time

Region = tuple[slice, ...]


def array_folder(folder: paths.Path, name: str) -> paths.Path:
  """Returns the folder where Orbax keeps the array."""
  return folder / name.replace("/", ".")


def zarr_dtype(name: str) -> Any:
  """Returns what numpy makes of a dtype's name in a zarr header or in a record."""
  return jnp.bfloat16 if name == "bfloat16" else name


def header(shape: Sequence[int], dtype: str, chunks: Sequence[int]) -> dict[str, Any]:
  """Returns the zarr header of an array: C order, uncompressed, no filters, every chunk written."""
  name = dtype if dtype == "bfloat16" else np.dtype(dtype).str
  return {
    "shape": list(shape),
    "chunks": list(chunks),
    "dtype": name,
    "order": "C",
    "compressor": None,
    "filters": None,
    "fill_value": None,
    "dimension_separator": ".",
    "zarr_format": 2,
  }


class Reading:
  """Chunks that are being read: what `StoredArray.begin` has asked the threads for."""

  def __init__(self) -> None:
    self._tasks: list[concurrent.futures.Future[None]] = []

  def submit(self, action: Callable[..., None], *arguments: Any) -> concurrent.futures.Future[None]:
    """Has a thread call `action`, when one is free."""
    self._tasks.append(_pool().submit(action, *arguments))
    return self._tasks[-1]

  def end(self) -> None:
    """Drops what no thread has begun, and waits for the rest."""
    for task in self._tasks:
      task.cancel()
    concurrent.futures.wait(self._tasks)


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """Returns an array of anything, where XLA's CPU takes it without a copy: at a multiple of 64 bytes."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + _ALIGNED, np.uint8)
  start = -memory.ctypes.data % _ALIGNED
  return memory[start : start + size].view(dtype).reshape(shape)


@contextlib.contextmanager
def reading() -> Iterator[Reading]:
  """Yields a Reading for `StoredArray.begin`; what the threads have not begun when an error comes is not read."""
  under_way = Reading()
  try:
    yield under_way
  finally:
    under_way.end()


@functools.cache
def _pool() -> concurrent.futures.Executor:
  """Returns the threads that read, all begun at once and kept: Python (3.11) waits for ever for a thread that, as it
  begins, finds too little memory, and memory is short where large arrays are read.
  """
  pool = concurrent.futures.ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="read")
  all_there = threading.Barrier(_AT_ONCE + 1)
  for _ in range(_AT_ONCE):
    pool.submit(all_there.wait)
  all_there.wait()
  return pool


class StoredArray:
  """An array whose header and files are what its record says.

  Args:
    folder: Orbax's, where the array has a folder of its own.
    name: of the array.
    record: its shape and dtype.

  Raises:
    files.DamagedError: naming up to four files that are missing, no files, or not as the record has them.
    errors.InputError, OSError: when the system refuses.
  """

  def __init__(self, folder: paths.Path, name: str, record: Mapping[str, Any]):
    self.shape, self.dtype = tuple(record["shape"]), np.dtype(zarr_dtype(record["dtype"]))
    self._where, self.shown = array_folder(folder, name), f"{folder.name}/{name.replace('/', '.')}"
    self.chunks = self._read_header(name, record["dtype"])
    self._chunk_bytes = math.prod(self.chunks) * self.dtype.itemsize
    problems = list(itertools.islice(self._problems(), 5))
    if problems:
      more = " and more" if len(problems) > 4 else ""
      raise files.DamagedError("; ".join(f"{name} ({problem})" for problem in problems[:4]) + more)

  def _read_header(self, name: str, dtype: str) -> tuple[int, ...]:
    shown = f"{self.shown}/.zarray"
    try:
      found = files.read_json(self._where / ".zarray", shown, _LARGEST_HEADER)
    except files.DamagedError as error:
      raise files.DamagedError(f"{name} ({error})") from error
    chunks = found.get("chunks")
    whole = (
      isinstance(chunks, list)
      and len(chunks) == len(self.shape)
      and all(type(c) is int and 1 <= c <= max(n, 1) for c, n in zip(chunks, self.shape))
    )
    wanted = header(self.shape, dtype, chunks if whole else self.shape)
    for field in dict.fromkeys([*wanted, *found]):
      here, there = (json.dumps(fields.get(field, "nothing"))[:60] for fields in (wanted, found))
      if here != there:
        raise files.DamagedError(f"{name} ({shown} has {field} {there}, not {here})")
    return tuple(chunks)

  def _problems(self) -> Iterator[str]:
    names = map(self._chunk_name, np.ndindex(*self._grid(0)))
    yield from files.size_problems(self._where, self.shown, names, self._chunk_bytes)

  def _grid(self, first: int) -> list[int]:
    """Counts the chunks along each axis from `first` on."""
    return [-(-n // c) for n, c in zip(self.shape[first:], self.chunks[first:])]

  @staticmethod
  def _chunk_name(place: Sequence[int]) -> str:
    return ".".join(map(str, place)) or "0"

  def begin(self, region: Sequence[slice], under_way: Reading) -> Callable[[], np.ndarray]:
    """Begins to read a part, given by slices without steps; returns a function that waits for it and returns it.

    The function raises files.DamagedError when a file has changed meanwhile; errors.InputError or OSError when the
    system refuses.

    Raises:
      MemoryError: when there is none for the part.
    """
    bounds = [s.indices(n)[:2] for s, n in zip(region, self.shape)]
    out = aligned([stop - start for start, stop in bounds], self.dtype)
    places = itertools.product(*(range(start // c, -(-stop // c)) for (start, stop), c in zip(bounds, self.chunks)))
    tasks = [under_way.submit(self._read_chunk, place, bounds, out) for place in places] if out.size else []

    def wait() -> np.ndarray:
      for task in tasks:
        task.result()
      return out

    return wait

  def read(self, region: Sequence[slice] | None = None) -> np.ndarray:
    """Returns a part of the array; None: all of it. Raises what `begin` and its function raise."""
    with reading() as under_way:
      return self.begin([slice(None)] * len(self.shape) if region is None else region, under_way)()

  def _read_chunk(self, place: Sequence[int], bounds: Sequence[tuple[int, int]], out: np.ndarray) -> None:
    """Reads what a chunk has of the region into its place in `out`, and no rows of the first axis but those."""
    inside, outside = [], []
    for i, c, (start, stop) in zip(place, self.chunks, bounds):
      low, high = max(start, i * c), min(stop, (i + 1) * c)
      inside.append(slice(low - i * c, high - i * c))
      outside.append(slice(low - start, high - start))
    if not inside:  # no axes
      inside, outside = [slice(0, 1)], [slice(0, 1)]
      out = out.reshape(1)
    rows, rest = inside[0], self.chunks[1:]
    target = out[tuple(outside)]
    straight = target.flags.c_contiguous and target.shape[1:] == tuple(rest)
    buffer = target if straight else np.empty((rows.stop - rows.start, *rest), self.dtype)
    self._read_bytes(self._chunk_name(place), rows.start * math.prod(rest) * self.dtype.itemsize, buffer)
    if not straight:
      target[...] = buffer[(slice(None), *inside[1:])]

  def _read_bytes(self, name: str, offset: int, buffer: np.ndarray) -> None:
    view = memoryview(buffer.reshape(-1).view(np.uint8))
    if len(view):
      files.fill(self._where / name, f"{self.shown}/{name}", view, offset)
