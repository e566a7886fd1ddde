"""Exports of the layout "cpu": one file of arrays as the library of products on CPUs reads them, mapped into memory.

  EXPORT/params/weights.safetensors   a tensor for each array of each layer, so named as programs have them:
                                      the blocks' kernels and the head [outputs, inputs] (4 bits: two inputs a byte),
                                      scales [groups, outputs], all else as it is

The header fills whole pages and every tensor begins at a multiple of 64 bytes, where XLA's CPU takes it without a copy.
The records beside it are those of any export, sums included, and say where in the file each layer's array begins:
whoever does not map it reads parts of the arrays as they were before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import itertools
import math
import mmap
import pathlib
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from glmjax import errors
from glmjax.checkpoint import checksums
from glmjax.checkpoint import files
from glmjax.checkpoint import stored as stored_lib
from glmjax.io import paths
from glmjax.models import params as params_lib

LAYOUT, FILE = "cpu", "weights.safetensors"
OFFSETS = "offsets"  # in an array's record: the byte of the file where each layer's begins, or the whole one's
PIECE = 2**24  # 32-bit words that are summed at a time: one program for all but the last
_VALUES, _SCALE = "/values", "/scale"


@dataclasses.dataclass(frozen=True)
class Lying:
  """How an array of one layer lies in the file: its first `num_inputs` axes behind all others."""

  shape: tuple[int, ...]
  num_inputs: int
  file_shape: tuple[int, ...]  # of the tensor: [outputs, inputs] of a kernel, [groups, outputs] of scales

  def runs(self, bounds: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Returns where a region's stretches of the file begin, and how long each is, in elements; inputs are whole."""
    outputs, parts = self.shape[self.num_inputs :], bounds[self.num_inputs :]
    cut = max((i for i, (n, part) in enumerate(zip(outputs, parts)) if part != (0, n)), default=0)
    inner = math.prod(outputs[cut + 1 :]) * math.prod(self.shape[: self.num_inputs])
    starts = []
    for place in itertools.product(*(range(*part) for part in parts[:cut])):
      index = 0
      for n, i in zip(outputs, (*place, parts[cut][0])):
        index = index * n + i
      starts.append(index * inner)
    return starts, (parts[cut][1] - parts[cut][0]) * inner

  def from_file(self, x: np.ndarray, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns a region of the array from all its stretches, as a view."""
    sizes = [stop - start for start, stop in bounds[self.num_inputs :]]
    whole = x.reshape(*sizes, *self.shape[: self.num_inputs])
    axes = (*range(len(sizes), whole.ndim), *range(len(sizes)))
    return whole.transpose(axes)[tuple(slice(*part) for part in bounds[: self.num_inputs])]

  def to_file(self, x: np.ndarray) -> np.ndarray:
    """Returns a region of the array, its inputs whole, as its stretches in the file follow one another."""
    return np.ascontiguousarray(x.transpose(*range(self.num_inputs, x.ndim), *range(self.num_inputs))).reshape(-1)


def is_stacked(name: str) -> bool:
  """Tells whether an array's first axis counts layers."""
  return name.startswith(f"{params_lib.LAYERS}/")


def lying(name: str, shape: Sequence[int]) -> Lying:
  """Returns how a stored array of this name and shape lies in the file; of stacked ones each layer."""
  shape = tuple(shape[1:] if is_stacked(name) else shape)
  if name.endswith(f"kernel{_SCALE}"):
    return Lying(shape, 0, (shape[0], math.prod(shape[1:])))
  inputs = params_lib.row_inputs(name.removesuffix(_VALUES))
  return Lying(shape, inputs, (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else shape)


def tensor_names(name: str, shape: Sequence[int]) -> list[str]:
  """Returns what the tensors of a stored array are called: as leaves of the parameters that programs take."""
  if name.endswith(f"kernel{_SCALE}"):
    name += "_GO"
  elif not name.endswith(_VALUES) and params_lib.row_inputs(name):
    name += _VALUES
  if not is_stacked(name):
    return [name]
  rest = name.removeprefix(f"{params_lib.LAYERS}/")
  return [f"{params_lib.LAYERS}_{i}/{rest}" for i in range(shape[0])]


class MappedArray:
  """An array of the file, read in parts as `stored.StoredArray` is.

  Args:
    folder: where the file is.
    name: of the array.
    record: its shape, dtype and places.

  Raises:
    files.DamagedError: when its places are not those of its layers.
  """

  def __init__(self, folder: paths.Path, name: str, record: Mapping[str, Any]):
    self.shape, self.dtype = tuple(record["shape"]), np.dtype(stored_lib.zarr_dtype(record["dtype"]))
    self.shown = f"{folder.name}/{FILE}"
    self._path, self._stacked, self._offsets = folder / FILE, is_stacked(name), record[OFFSETS]
    self._lying = lying(name, self.shape)
    if len(self._offsets) != (self.shape[0] if self._stacked else 1):
      raise files.DamagedError(f"{name} ({self.shown}: {len(self._offsets)} places for {list(self.shape)})")
    sizes = self.shape[1:] if self._stacked else self.shape
    inputs = sizes[: self._lying.num_inputs]
    ones = [1] * (len(self.shape) - len(inputs))
    self.chunks = (*ones[:1], *inputs, *ones[1:]) if self._stacked else (*inputs, *ones)  # what is read at the least

  def begin(self, region: Sequence[slice], under_way: stored_lib.Reading) -> Callable[[], np.ndarray]:
    """Begins to read a part; as `stored.StoredArray.begin`."""
    bounds = [s.indices(n)[:2] for s, n in zip(region, self.shape)]
    out = stored_lib.aligned([stop - start for start, stop in bounds], self.dtype)
    if not self._stacked:
      layers = [(self._offsets[0], bounds, out)]
    else:
      layers = [(self._offsets[i], bounds[1:], out[k]) for k, i in enumerate(range(*bounds[0]))]
    tasks = [under_way.submit(self._read, *layer) for layer in layers] if out.size else []

    def wait() -> np.ndarray:
      for task in tasks:
        task.result()
      return out

    return wait

  def read(self, region: Sequence[slice] | None = None) -> np.ndarray:
    """Returns a part of the array; None: all of it."""
    with stored_lib.reading() as under_way:
      return self.begin([slice(None)] * len(self.shape) if region is None else region, under_way)()

  def _read(self, offset: int, bounds: Sequence[tuple[int, int]], out: np.ndarray) -> None:
    """Reads a region of one layer; of its inputs all, which lie side by side."""
    starts, length = self._lying.runs(bounds)
    found = np.empty((len(starts), length), self.dtype)
    for start, stretch in zip(starts, found):
      files.fill(self._path, self.shown, stretch.view(np.uint8).data, offset + start * self.dtype.itemsize)
    out[...] = self._lying.from_file(found, bounds)


def check(folder: paths.Path, recorded: Mapping[str, Any]) -> None:
  """Checks the file's size and its header, which no reader here needs, and those of other programs do.

  Args:
    folder: where the file is.
    recorded: its "bytes", and of its header "header_bytes" and "header_crc32"; "sums" as `sums` gives them.

  Raises:
    files.DamagedError: when they are not what was written.
    errors.InputError, OSError: when the system refuses.
  """
  for problem in files.size_problems(folder, folder.name, [FILE], recorded["bytes"]):
    raise files.DamagedError(problem)
  header = bytearray(recorded["header_bytes"])
  files.fill(folder / FILE, f"{folder.name}/{FILE}", memoryview(header), 0)
  if f"{zlib.crc32(header):08x}" != recorded["header_crc32"]:
    raise files.DamagedError(f"{folder.name}/{FILE} (checksum of its header differs)")


def sums(pieces: Iterable[np.ndarray]) -> Iterator[str]:
  """Yields the sums of a file's pieces of PIECE words, uint32."""
  for piece in pieces:
    yield from checksums.array_sums({"": jax.device_put(piece, may_alias=True)}).values()


def open_file(folder: pathlib.Path, recorded: Mapping[str, Any]) -> np.ndarray:
  """Maps the file, uint8 [bytes], once all of it is known to be what was written; arguments and errors as `check`."""
  shown = f"{folder.name}/{FILE}"
  try:
    with open(folder / FILE, "rb") as stream:
      memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
  except OSError as error:
    files.raise_refusal(error, folder / FILE, shown)
  if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: pages are read ahead in larger steps, a cold load took a third less time
    with contextlib.suppress(OSError):
      memory.madvise(mmap.MADV_HUGEPAGE)
  file = np.frombuffer(memory, np.uint8)
  if file.size != recorded["bytes"]:
    raise files.DamagedError(f"{shown} has {file.size} bytes instead of {recorded['bytes']}")
  words = file.view(np.uint32)
  pieces = (words[start : start + PIECE] for start in range(0, words.size, PIECE))
  for i, (found, expected) in enumerate(itertools.zip_longest(sums(pieces), recorded["sums"])):
    if found != expected:
      raise files.DamagedError(f"{shown} (checksum differs between bytes {4 * i * PIECE} and {4 * (i + 1) * PIECE})")
  return file


def read(
  folder: pathlib.Path, records: Mapping[str, Any], recorded: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """Maps the file, verifies all of it, and returns its tensors, which processes share and no copy is made of.

  What is wanted in another dtype is a copy.

  Args:
    folder: where the file is, checked already.
    records: of the arrays.
    recorded: of the file, as `check` takes it.
    wanted: tensors' names to ShapeDtypeStructs of one device; uint16: the bits of bfloat16.

  Raises:
    files.DamagedError: when it is not what was written.
    errors.InputError, OSError: when the system refuses.
  """
  file = open_file(folder, recorded)
  tensors = {}
  for name, record in records.items():
    dtype, shape = np.dtype(stored_lib.zarr_dtype(record["dtype"])), lying(name, record["shape"]).file_shape
    for tensor, offset in zip(tensor_names(name, record["shape"]), record[OFFSETS]):
      tensors[tensor] = file[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
  found = {}
  for name, target in wanted.items():
    if name not in tensors or tensors[name].shape != target.shape:
      there = list(tensors[name].shape) if name in tensors else "no such tensor"
      raise errors.InputError(
        f"{name} has {there} on disk and the model has {list(target.shape)}: put back the config.json that belongs to "
        "it"
      )
    found[name] = jax.device_put(_as(tensors[name], target.dtype), target.sharding, may_alias=True)
  return found


def _as(x: np.ndarray, dtype: Any) -> np.ndarray:
  """Returns x in a dtype, of which uint16 means the bits of bfloat16; x itself where it is that already."""
  if dtype == np.uint16:
    return x.astype(jnp.bfloat16, copy=False).view(np.uint16)
  return x.astype(dtype, copy=False)
