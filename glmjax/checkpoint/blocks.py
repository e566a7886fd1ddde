"""Parameters written and read block by block, so that no weight is ever whole in memory.

A block of a stored array is one file, or one object of a bucket. A journal tells which ones are there, with the share
each has in its array's checksum: a file that a kill cut short is not in it.

The arrays are plain zarr with Orbax's own description beside them: Orbax reads them without glmjax.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
import threading
import time
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import checksums
from glmjax.checkpoint import described
from glmjax.checkpoint import files
from glmjax.checkpoint import stored as stored_lib
from glmjax.checkpoint import stored_weights
from glmjax.io import growing
from glmjax.io import lease
from glmjax.io import paths
from glmjax.io import progress
from glmjax.io import publish

_WORKERS = 2  # blocks in work at the same time: one is read or written while another is converted
JOURNAL = "journal.jsonl"  # there once a block is
_PUT_EVERY = 5.0  # seconds between two puts of the journal into a bucket: what a kill loses
_SMALL = 2**22  # elements of an array that is kept once it was read: biases and norms


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
  """Turns tensorstore's own errors of a full disk and the like into those that Python has."""
  try:
    yield
  except ValueError as error:
    refused = files.refusal(error)
    if isinstance(error, errors.InputError) or not isinstance(refused, OSError):
      raise
    raise refused from error


class Writer:
  """Writes weights into a folder that may hold some of them already, from an earlier try.

  Args:
    folder: made when missing; what is there must be from a Writer of the same weights, of others only on a disk.
    weights: everything that will be in the folder.
    elements: of the largest block; None: stored_weights.ELEMENTS.
  """

  def __init__(self, folder: paths.Path, weights: Sequence[stored_weights.StoredWeight], elements: int | None = None):
    self._folder, self._weights, self._elements = folder, weights, elements
    self._shapes: dict[str, tuple[int, ...]] = {}
    self._chunks: dict[str, tuple[tuple[int, ...], np.dtype]] = {}  # the shape of a file's part of an array; its dtype
    self._lock = threading.Lock()
    folder.mkdir(parents=True, exist_ok=True)
    for weight in weights:
      chunks = weight.stored([s.stop - s.start for s in next(weight.regions(elements))])
      for name, (shape, dtype) in weight.stored(weight.shape).items():
        header = stored_lib.header(shape, dtype, chunks[name][0])
        path = stored_lib.array_folder(folder, name)
        if isinstance(path, pathlib.Path):
          _remove_damaged(path, header)
        path.mkdir(exist_ok=True)
        with publish.file(path / ".zarray") as file:
          file.write(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
        self._shapes[name], self._chunks[name] = shape, (chunks[name][0], np.dtype(stored_lib.zarr_dtype(dtype)))
    journal = folder / JOURNAL
    if isinstance(journal, pathlib.Path) and os.path.lexists(journal) and not journal.is_file():
      publish.remove(journal)
    self._journal, self._put_at = growing.File(journal), time.monotonic()
    self._done = self._read_journal()

  def _read_journal(self) -> dict[str, Any]:
    """Reads the blocks written earlier, with their sums as they stand there; half a line counts for nothing."""
    path, done = self._journal.local, {}
    if path.exists():
      for line in path.read_bytes().splitlines():
        try:
          entry = json.loads(line)
          done[entry["block"]] = entry["sums"]
        except (ValueError, KeyError, TypeError):
          continue
      with open(path, "a", encoding="utf-8") as file:
        file.write("\n")
    return done

  def write(
    self, convert: Callable[[stored_weights.StoredWeight, stored_weights.Region], Mapping[str, np.ndarray]], label: str
  ) -> arrays.Records:
    """Fills the folder with what `convert` gives for each block, and describes it.

    Blocks that are there already are read back and kept if they are as they were written.
    """
    total = sum(weight.nbytes for weight in self._weights)
    with (
      contextlib.closing(self._journal),
      progress.bar(total=total, unit="B", unit_scale=True, desc=label, disable=None, mininterval=1) as bar,
      concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool,
    ):

      def one(weight: stored_weights.StoredWeight, region: stored_weights.Region) -> None:
        if not self._holds(weight, region):
          self._put(weight, region, convert(weight, region))
        with self._lock:
          bar.update(weight.nbytes * math.prod(s.stop - s.start for s in region) // math.prod(weight.shape))

      tasks = [
        pool.submit(one, weight, region) for weight in self._weights for region in weight.regions(self._elements)
      ]
      try:
        for task in tasks:
          task.result()
      finally:  # after a failure the rest need not be tried
        for task in tasks:
          task.cancel()
    return self._finish()

  def _holds(self, weight: stored_weights.StoredWeight, region: stored_weights.Region) -> bool:
    sums = self._done.get(_label(weight, region))
    if not isinstance(sums, dict) or sums.keys() != weight.stored(weight.shape).keys():  # none, or damaged
      return False
    try:
      return all(
        checksums.part_sum(self._read(name, weight.stored_region(name, region)), _start(region), self._shapes[name])
        == expected
        for name, expected in sums.items()
      )
    except (files.DamagedError, errors.InputError, OSError):  # whatever has become of it, it is written again
      return False

  def _file(self, name: str, region: stored_weights.Region) -> paths.Path:
    """Returns the file of the one block that a region of a stored array is."""
    place = (s.start // chunk for s, chunk in zip(region, self._chunks[name][0]))
    return stored_lib.array_folder(self._folder, name) / (".".join(map(str, place)) or "0")

  def _read(self, name: str, region: stored_weights.Region) -> np.ndarray:
    path, (chunk, dtype) = self._file(name, region), self._chunks[name]
    size = math.prod(chunk) * dtype.itemsize
    if len(data := files.read(path, path.name, size)) != size:
      raise files.DamagedError(f"{path.name} has {len(data)} bytes instead of {size}")
    return np.frombuffer(data, dtype).reshape(chunk)[tuple(slice(s.stop - s.start) for s in region)]

  def _bytes(self, name: str, x: np.ndarray) -> memoryview:
    """Returns a block as its file has it: the last along an axis is filled up with zeros."""
    chunk, dtype = self._chunks[name]
    if x.shape == chunk:
      whole = np.ascontiguousarray(x, dtype)
    else:
      whole = np.zeros(chunk, dtype)
      whole[tuple(map(slice, x.shape))] = x
    return whole.reshape(-1).view(np.uint8).data

  def _put(
    self, weight: stored_weights.StoredWeight, region: stored_weights.Region, block: Mapping[str, np.ndarray]
  ) -> None:
    lease.check()
    sums = {}
    for name, x in block.items():
      self._file(name, weight.stored_region(name, region)).write_bytes(self._bytes(name, x))
      sums[name] = checksums.part_sum(x, _start(region), self._shapes[name])
    with self._lock:
      self._done[_label(weight, region)] = sums
      with open(self._journal.local, "a", encoding="utf-8") as journal:
        journal.write(json.dumps({"block": _label(weight, region), "sums": sums}) + "\n")
      if time.monotonic() - self._put_at > _PUT_EVERY:
        self._put_at = time.monotonic()
        self._journal.put_soon()

  def _finish(self) -> arrays.Records:
    """Returns records of all arrays; puts Orbax's description beside them."""
    records = {}
    for weight in self._weights:
      blocks = [self._done[_label(weight, region)] for region in weight.regions(self._elements)]
      for name, (shape, dtype) in weight.stored(weight.shape).items():
        records[name] = {
          "shape": list(shape),
          "dtype": dtype,
          "sum": checksums.total(b[name] for b in blocks),
          "version": checksums.VERSION,
        }
    described.write(self._folder, list(records))
    if isinstance(self._folder, pathlib.Path):
      for path in self._folder.rglob("*"):  # once, here: until then the journal's sums tell what reached the disk
        publish.sync(path)
    return records

  def forget(self) -> None:
    """Removes the journal: the records are kept elsewhere now."""
    (self._folder / JOURNAL).unlink()


def _remove_damaged(array: pathlib.Path, header: Mapping[str, Any]) -> None:
  """Removes what an earlier try has left of an array that is not as it is written here; blocks tell by their sums."""
  if not os.path.lexists(array):
    return
  try:
    found = files.read_json(array / ".zarray", ".zarray")
  except files.DamagedError:
    found = None
  if array.is_symlink() or json.dumps(found, sort_keys=True) != json.dumps(header, sort_keys=True):
    publish.remove(array)
    return
  for entry in os.scandir(array):
    if not entry.is_file(follow_symlinks=False):
      publish.remove(pathlib.Path(entry.path))


def _label(weight: stored_weights.StoredWeight, region: stored_weights.Region) -> str:
  return f"{weight.name}[{','.join(f'{s.start}:{s.stop}' for s in region)}]"


def _start(region: stored_weights.Region) -> list[int]:
  return [s.start for s in region]


class Reader:
  """Reads regions of the arrays in an Orbax folder and checks each array's sum once all of it was read.

  Several threads may read. Raises as `arrays.check_files`, and when it reads as `stored.StoredArray.read`.
  """

  def __init__(self, folder: paths.Path, records: arrays.Records):
    self._arrays = arrays.check_files(folder, records)
    self._folder, self._records = folder, records
    self._sums: dict[str, dict[str, str]] = {name: {} for name in records}
    self._kept: dict[str, concurrent.futures.Future[np.ndarray]] = {}  # arrays that were read whole
    self._lock = threading.Lock()  # of _kept, never held while something is read

  def read(self, name: str, region: stored_weights.Region) -> np.ndarray:
    """Reads one part. Small arrays, and one whose files each reach over many parts, are read once and kept."""
    stored = self._arrays[name]
    times_read = math.prod(max(1, chunk / (s.stop - s.start)) for chunk, s in zip(stored.chunks, region))
    whole = self._is_small(name) or times_read > 4
    block = self._whole(name)[region] if whole else stored.read(region)
    version = self._records[name].get("version", 1)
    self._sums[name][str(region)] = checksums.part_sum(block, _start(region), stored.shape, version)
    return block

  def _whole(self, name: str) -> np.ndarray:
    """Returns an array read by the first thread that wants it, while others that want it wait."""
    with self._lock:
      kept = self._kept.get(name)
      if kept is None:
        if not self._is_small(name):  # one large array at a time
          self._kept = {other: x for other, x in self._kept.items() if self._is_small(other)}
        mine = self._kept[name] = concurrent.futures.Future()
    if kept is not None:
      return kept.result()
    try:
      mine.set_result(self._arrays[name].read())
    except BaseException as error:
      mine.set_exception(error)
    return mine.result()

  def _is_small(self, name: str) -> bool:
    return math.prod(self._arrays[name].shape) <= _SMALL

  def verify(self, names: Sequence[str] | None = None) -> None:
    """Raises DamagedError unless what was read, region by region, is what was written."""
    for name in self._records if names is None else names:
      if checksums.total(self._sums[name].values()) != self._records[name]["sum"]:
        raise arrays.DamagedError(f"{name} (checksum differs: {self._arrays[name].shown})")
