"""Writes the one file of an export of the layout "cpu", block by block, each where mapped.py looks for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import threading
from typing import Any
import zlib

import numpy as np

from glmjax.checkpoint import checksums
from glmjax.checkpoint import mapped
from glmjax.checkpoint import stored as stored_lib
from glmjax.checkpoint import stored_weights
from glmjax.io import progress
from glmjax.models import params as params_lib

_WORKERS = 2  # blocks in work at the same time: one is read or written while another is converted
_ALIGNED, _PAGE = 64, 4096  # bytes: what XLA's CPU takes without a copy; of the header
# safetensors' names of the dtypes that there are in an export.
_KINDS = {"int8": "I8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}

Read = Callable[[stored_weights.StoredWeight, stored_weights.Region], Mapping[str, np.ndarray]]


def weights(found: Sequence[stored_weights.StoredWeight], dtype: str) -> list[stored_weights.StoredWeight]:
  """Returns weights as the layout has them: what is read in the compute dtype in that, norms and biases as they are."""
  return [
    dataclasses.replace(weight, dtype=dtype)
    if weight.bits is None and params_lib.known(weight.name).is_weight
    else weight
    for weight in found
  ]


def write(
  folder: pathlib.Path, found: Sequence[stored_weights.StoredWeight], read: Read, elements: int | None
) -> dict[str, Any]:
  """Writes all weights into a folder that it makes; returns {"arrays": records, "mapped": what `mapped.check` takes}.

  Args:
    folder: of the file.
    found: the weights.
    read: gives each block's arrays as they are to be stored.
    elements: of the largest block; None: stored_weights.ELEMENTS.
  """
  folder.mkdir(parents=True, exist_ok=True)
  arrays = {name: array for weight in found for name, array in weight.stored(weight.shape).items()}
  header, offsets, size = _layout(arrays)
  parts: dict[str, list[str]] = {name: [] for name in arrays}
  lock = threading.Lock()
  total = sum(weight.nbytes for weight in found)
  with (
    open(folder / mapped.FILE, "w+b") as file,
    progress.bar(total=total, unit="B", unit_scale=True, desc="parameters", disable=None, mininterval=1) as bar,
    concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool,
  ):
    file.write(header)
    file.truncate(size)

    def one(block: tuple[stored_weights.StoredWeight, stored_weights.Region]) -> None:
      weight, region = block
      for name, x in read(weight, region).items():
        place = weight.stored_region(name, region)
        _put(file.fileno(), name, arrays[name][0], offsets[name], place, x)
        part = checksums.part_sum(x, [s.start for s in place], arrays[name][0])
        with lock:
          parts[name].append(part)
          bar.update(x.nbytes)

    file.flush()
    for _ in pool.map(one, [(weight, region) for weight in found for region in weight.regions(elements)]):
      pass
    os.fsync(file.fileno())
  records = {
    name: {
      "shape": list(shape),
      "dtype": dtype,
      "sum": checksums.total(parts[name]),
      "version": checksums.VERSION,
      mapped.OFFSETS: offsets[name],
    }
    for name, (shape, dtype) in arrays.items()
  }
  recorded = {
    "bytes": size,
    "header_bytes": len(header),
    "header_crc32": f"{zlib.crc32(header):08x}",
    "sums": list(mapped.sums(_pieces(folder / mapped.FILE, size))),
  }
  return {"arrays": records, "mapped": recorded}


def _pieces(path: pathlib.Path, size: int) -> Iterator[np.ndarray]:
  """Reads the file's pieces, as copies, so that memory stays what one takes."""
  for start in range(0, size, 4 * mapped.PIECE):
    yield np.fromfile(path, np.uint32, mapped.PIECE, offset=start)


def _put(
  file: int, name: str, shape: Sequence[int], offsets: Sequence[int], region: stored_weights.Region, block: np.ndarray
) -> None:
  """Writes a block of a stored array, layer by layer."""
  lying, bounds = mapped.lying(name, shape), [(s.start, s.stop) for s in region]
  layers = [(offsets[0], block)]
  if mapped.is_stacked(name):
    (start, stop), *bounds = bounds
    layers = list(zip(offsets[start:stop], block))
  starts, length = lying.runs(bounds)
  for offset, x in layers:
    stretches = lying.to_file(x).reshape(len(starts), length)
    for at, stretch in zip(starts, stretches):
      _write_all(file, stretch.view(np.uint8).data, offset + at * x.dtype.itemsize)


def _write_all(file: int, data: memoryview, offset: int) -> None:
  while data:
    count = os.pwrite(file, data, offset)
    data, offset = data[count:], offset + count


def _layout(arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[bytes, dict[str, list[int]], int]:
  """Returns the file's header, the byte where each layer's array begins, and the bytes of the file.

  Tensors lie as a pass reads them, a layer's together. Between them the format knows no gaps: where one does not fill
  its 64 bytes, a tensor of padding follows.
  """
  entries: dict[str, Any] = {"__metadata__": {"layout": mapped.LAYOUT}}
  starts: dict[str, dict[int, int]] = {name: {} for name in arrays}
  end = 0

  def add(name: str, kind: str, shape: Sequence[int], size: int) -> None:
    nonlocal end
    entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
    end += size

  for name, layer in _in_order(arrays):
    shape, dtype = arrays[name]
    starts[name][layer] = end
    lies = mapped.lying(name, shape).file_shape
    size = math.prod(lies) * np.dtype(stored_lib.zarr_dtype(dtype)).itemsize
    add(mapped.tensor_names(name, shape)[layer], _KINDS[dtype], lies, size)
    if rest := -end % _ALIGNED:
      add(f"padding_{end}", "U8", [rest], rest)
  text = json.dumps(entries, separators=(",", ":")).encode()
  text += b" " * (-(8 + len(text)) % _PAGE)
  header = len(text).to_bytes(8, "little") + text
  offsets = {name: [len(header) + at for _, at in sorted(layers.items())] for name, layers in starts.items()}
  return header, offsets, len(header) + end


def _in_order(arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> Iterator[tuple[str, int]]:
  """Yields arrays and layers (0 of what is not stacked): embeddings, layer by layer, the rest."""
  stacked = [name for name in arrays if mapped.is_stacked(name)]
  others = [name for name in arrays if name not in stacked]
  first = [name for name in others if name.startswith("embedding")]
  yield from ((name, 0) for name in first)
  yield from ((name, layer) for layer in range(arrays[stacked[0]][0][0]) for name in stacked)
  yield from ((name, 0) for name in others if name not in first)
