"""Parameters written and read block by block, so that no weight is ever whole in memory.

A weight is cut along its layers and along one of the axes that a product does not sum over, so that each
block can be converted and quantized by itself. A block of a stored array is one file: it is there whole or
not at all, and a journal tells which ones are, with the share each has in its array's checksum.

The arrays are plain zarr with Orbax's own description beside them: Orbax reads them without glmjax.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
import tqdm

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import checksums
from glmjax.checkpoint import files
from glmjax.checkpoint import stored as stored_lib
from glmjax.io import publish
from glmjax.models import params as params_lib
from glmjax.quantize import qarray

ELEMENTS = 2**25  # largest block; 64 MiB of float16
_LEAST = 2**20  # smallest block that makes sense: smaller ones are files too many
# Bytes that a process takes before and around the blocks (Python, JAX, Orbax), and for each element of its blocks:
# both workers' copies, quantizing among them, and what malloc keeps of earlier ones. Measured, with room.
_FIXED, _PER_ELEMENT = 0.45 * 2**30, 88
_WORKERS = 2  # blocks in work at the same time: one is read or written while another is converted
_JOURNAL = "journal.jsonl"
_PART = 2**18  # elements that are looked at together
_SMALL = 2**22  # elements of an array that is kept once it was read: biases and norms

Region = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
  """One parameter as it is to be stored: a float array, or codes and scales.

  Raises:
    errors.InputError: for INT4 codes that do not pair.
  """

  name: str  # layers/mlp/wo/kernel
  shape: tuple[int, ...]  # of the weight itself, whatever it is stored as
  dtype: str  # as stored when float
  bits: int | None = None  # 4 or 8 when quantized
  groups: int = 1  # parts of the first input axis, each with scales of its own

  def __post_init__(self) -> None:
    if self.bits == 4 and self.shape[self._param.inputs[-1]] % 2:
      raise errors.InputError(
        f"INT4 packs two inputs in a byte, and {self.name} of shape {list(self.shape)} has an "
        "odd number of them: use 8 bits"
      )

  @property
  def _param(self) -> params_lib.Param:
    return params_lib.known(self.name)

  @property
  def stacked(self) -> bool:
    """Whether the first axis counts layers."""
    return self.name.startswith(f"{params_lib.LAYERS}/")

  def regions(self, elements: int | None = None) -> Iterator[Region]:
    """The blocks, in order; all but the last along an axis have the same shape."""
    sizes = self._block_shape(ELEMENTS if elements is None else elements)
    for place in np.ndindex(*(-(-n // size) for n, size in zip(self.shape, sizes))):
      yield tuple(slice(i * size, min((i + 1) * size, n)) for i, size, n in zip(place, sizes, self.shape))

  @property
  def smallest(self) -> int:
    """Elements of the smallest block that it can be cut into."""
    axis = self._param.cut
    return math.prod(self.shape) // (self.shape[0] if self.stacked else 1) // (1 if axis is None else self.shape[axis])

  def _block_shape(self, elements: int) -> tuple[int, ...]:
    shape = list(self.shape)
    layers = shape[0] if self.stacked else 1
    each = math.prod(shape) // layers
    if self.stacked:
      shape[0] = _even(layers, max(1, elements // each))
    axis = self._param.cut
    if axis is not None:
      per_row = each // shape[axis]
      shape[axis] = _even(shape[axis], max(1, elements // per_row))
    return tuple(shape)

  def stored(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Array names, shapes and dtypes that a block of this shape (or the whole) is stored as."""
    if self.bits is None:
      return {self.name: (tuple(shape), self.dtype)}
    axes = self._param.inputs
    values, scale = list(shape), list(shape)
    values[axes[-1]] //= 8 // self.bits
    for axis in axes:
      scale[axis] = 1
    scale[axes[0]] = self.groups
    return {f"{self.name}/values": (tuple(values), "int8"), f"{self.name}/scale": (tuple(scale), "float16")}

  def stored_region(self, name: str, region: Region) -> Region:
    """Where a block lies in one of the stored arrays: input axes are never cut."""
    shape = self.stored([s.stop - s.start for s in region])[name][0]
    return tuple(slice(s.start, s.start + n) for s, n in zip(region, shape))

  @property
  def nbytes(self) -> int:
    """Of everything that is stored."""
    return sum(
      math.prod(shape) * np.dtype(arrays.zarr_dtype(dtype)).itemsize
      for shape, dtype in self.stored(self.shape).values()
    )

  def convert(self, block: np.ndarray) -> dict[str, np.ndarray]:
    """A block of the float weight as it is stored.

    Raises:
      errors.NotFiniteError: when it is not finite, or not in the type that it is stored in.
    """
    check_finite({self.name: block}, "is not finite")  # here, as XLA's max passes over what is no number
    if self.bits is None:
      with np.errstate(over="ignore"):
        stored = {self.name: block.astype(arrays.zarr_dtype(self.dtype), copy=False)}
    else:
      quantized = qarray.quantize_layers(jnp.asarray(block), self.bits, self._param.inputs_from_end)
      stored = {f"{self.name}/values": np.asarray(quantized.values), f"{self.name}/scale": np.asarray(quantized.scale)}
    if stored.get(self.name) is not block:
      check_finite(stored, "has values beyond the type that it is to be stored in: give --dtype=float32 or bfloat16")
    return stored


def check_finite(block: Mapping[str, np.ndarray], problem: str) -> None:
  """Raises NotFiniteError, naming the array, unless all of a block is finite; codes always are."""
  for name, x in block.items():
    if x.dtype.kind not in "iub" and not is_finite(x):
      raise errors.NotFiniteError(f"the array {name} {problem}")


def is_finite(x: np.ndarray) -> bool:
  """Whether all of an array of floats is finite.

  By the bits of 16-bit ones, a part at a time: numpy's own isfinite takes ten times as long for them.
  """
  if x.dtype.itemsize != 2:
    return bool(np.isfinite(x).all())
  words = np.ascontiguousarray(x).view(np.uint16).reshape(-1)
  infinity = np.array(np.inf, x.dtype).view(np.uint16)
  return all((words[at : at + _PART] & 0x7FFF).max() < infinity for at in range(0, words.size, _PART))


def elements_within(gib: float, weights: Sequence[Weight]) -> int:
  """Largest blocks with which writing these weights stays within so much memory.

  Raises:
    errors.InputError: when not even the smallest do.
  """
  least = max(_LEAST, *(weight.smallest for weight in weights))
  needed = (_FIXED + _PER_ELEMENT * least) / 2**30
  if not gib >= needed:
    needed = math.ceil(needed * 100) / 100
    raise errors.InputError(
      f"memory_limit_gib is {gib:g}, and these weights take {needed:g} GiB at least: give as much, or leave it out"
    )
  return int(min(ELEMENTS, (gib * 2**30 - _FIXED) // _PER_ELEMENT))


def _even(size: int, limit: int) -> int:
  """The length of parts no longer than `limit` that are as alike as can be."""
  return -(-size // -(-size // limit))


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
  """tensorstore's own errors of a full disk and the like, as Python has them."""
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
    folder: made when missing; what is there must be from a Writer of the same weights.
    weights: everything that will be in the folder.
    elements: of the largest block; None: ELEMENTS.
  """

  def __init__(self, folder: pathlib.Path, weights: Sequence[Weight], elements: int | None = None):
    self._folder, self._weights, self._elements = folder, weights, elements
    self._stores: dict[str, tensorstore.TensorStore] = {}
    self._shapes: dict[str, tuple[int, ...]] = {}
    self._lock = threading.Lock()
    folder.mkdir(parents=True, exist_ok=True)
    for weight in weights:
      chunks = weight.stored([s.stop - s.start for s in next(weight.regions(elements))])
      for name, (shape, dtype) in weight.stored(weight.shape).items():
        metadata = stored_lib.header(shape, dtype, chunks[name][0])
        path = stored_lib.array_folder(folder, name)
        _remove_damaged(path, metadata)
        self._shapes[name] = shape
        self._stores[name] = tensorstore.open(
          {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(path)},
            "metadata": metadata,
            "create": True,
            "open": True,
            "store_data_equal_to_fill_value": True,
            "context": {"file_io_sync": False},
          }
        ).result()
    self._done = self._read_journal()

  def _read_journal(self) -> dict[str, dict[str, str]]:
    """Blocks written earlier, with their sums; a line cut off by a kill counts for nothing."""
    path, done = self._folder / _JOURNAL, {}
    if os.path.lexists(path) and not path.is_file():
      publish.remove(path)
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

  def write(self, convert: Callable[[Weight, Region], Mapping[str, np.ndarray]], label: str) -> arrays.Records:
    """Fills the folder with what `convert` gives for each block, and describes it.

    Blocks that are there already are read back and kept if they are as they were written.
    """
    total = sum(weight.nbytes for weight in self._weights)
    with (
      tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=None, mininterval=1) as bar,
      concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool,
    ):

      def one(weight: Weight, region: Region) -> None:
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

  def _holds(self, weight: Weight, region: Region) -> bool:
    sums = self._done.get(_label(weight, region))
    if sums is None:
      return False
    for name, expected in sums.items():
      part = self._stores[name][weight.stored_region(name, region)]
      try:
        found = checksums.part_sum(np.asarray(part.read().result()), _start(region), self._shapes[name])
      except ValueError:  # tensorstore's word for unreadable
        return False
      if found != expected:
        return False
    return True

  def _put(self, weight: Weight, region: Region, block: Mapping[str, np.ndarray]) -> None:
    sums = {}
    for name, x in block.items():
      self._stores[name][weight.stored_region(name, region)].write(x).result()
      sums[name] = checksums.part_sum(x, _start(region), self._shapes[name])
    with self._lock:
      self._done[_label(weight, region)] = sums
      with open(self._folder / _JOURNAL, "a", encoding="utf-8") as journal:
        journal.write(json.dumps({"block": _label(weight, region), "sums": sums}) + "\n")

  def _finish(self) -> arrays.Records:
    """Records of all arrays; Orbax's description is put beside them."""
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
    _describe_for_orbax(self._folder, list(records))
    for path in self._folder.rglob("*"):  # once, here: until then the journal's sums tell what reached the disk
      publish.sync(path)
    return records

  def forget(self) -> None:
    """Removes the journal: the records are kept elsewhere now."""
    (self._folder / _JOURNAL).unlink()


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


def _describe_for_orbax(folder: pathlib.Path, names: Sequence[str]) -> None:
  """What Orbax itself writes beside arrays of these names; it is asked to save numbers under them."""
  skeleton = folder.with_name(f"{folder.name}.skeleton")
  shutil.rmtree(skeleton, ignore_errors=True)
  tree_of_numbers = params_lib.nest({name: np.zeros((), np.int8) for name in names})
  with ocp.Checkpointer(arrays.handler()) as checkpointer:
    checkpointer.save(skeleton, args=ocp.args.PyTreeSave(tree_of_numbers))
  for child in skeleton.iterdir():
    if not (child / ".zarray").exists():
      publish.remove(folder / child.name)
      child.rename(folder / child.name)
  shutil.rmtree(skeleton)


def _label(weight: Weight, region: Region) -> str:
  return f"{weight.name}[{','.join(f'{s.start}:{s.stop}' for s in region)}]"


def _start(region: Region) -> list[int]:
  return [s.start for s in region]


class Reader:
  """Reads regions of the arrays in an Orbax folder and checks each array's sum once all of it was read.

  Several threads may read. Raises as `arrays.check_files`, and when it reads as `stored.StoredArray.read`.
  """

  def __init__(self, folder: pathlib.Path, records: arrays.Records):
    self._arrays = arrays.check_files(folder, records)
    self._folder, self._records = folder, records
    self._sums: dict[str, dict[str, str]] = {name: {} for name in records}
    self._kept: dict[str, concurrent.futures.Future[np.ndarray]] = {}  # arrays that were read whole
    self._lock = threading.Lock()  # of _kept, never held while something is read

  def read(self, name: str, region: Region) -> np.ndarray:
    """One part. Small arrays, and one whose files each reach over many parts, are read once and kept."""
    stored = self._arrays[name]
    times_read = math.prod(max(1, chunk / (s.stop - s.start)) for chunk, s in zip(stored.chunks, region))
    whole = self._is_small(name) or times_read > 4
    block = self._whole(name)[region] if whole else stored.read(region)
    version = self._records[name].get("version", 1)
    self._sums[name][str(region)] = checksums.part_sum(block, _start(region), stored.shape, version)
    return block

  def _whole(self, name: str) -> np.ndarray:
    """An array read by the first thread that wants it, while others that want it wait."""
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
        where = stored_lib.array_folder(self._folder, name).name
        raise arrays.DamagedError(f"{name} (checksum differs: {self._folder.name}/{where})")


def need_room(folder: pathlib.Path, weights: Sequence[Weight], there: int = 0) -> None:
  """Raises InputError when the disk cannot hold the weights beside the bytes that are there already."""
  while not folder.exists():
    folder = folder.parent
  needed, free = sum(weight.nbytes for weight in weights) - there, shutil.disk_usage(folder).free
  if needed > free:
    raise errors.InputError(
      f"{folder} has {_size(free)} free and {_size(needed)} are needed: free some space, or choose another folder"
    )


def _size(count: int) -> str:
  """In units that leave a number to be read."""
  return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
