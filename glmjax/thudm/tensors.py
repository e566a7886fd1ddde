"""Tensors inside files, read part by part: safetensors here, torch's own formats in torch_files.

Nothing is mapped into memory: a part that is read is a copy, so that memory stays what is asked for.
"""

from collections.abc import Mapping
import dataclasses
import json
import math
from typing import Any

import ml_dtypes
import numpy as np

from glmjax import errors
from glmjax.io import bucket_path
from glmjax.io import downloads
from glmjax.io import paths
from glmjax.io import printable
from glmjax.io import user_json
from glmjax.io import user_text

# safetensors' names of the dtypes that weights come in.
DTYPES = {
  "F64": np.dtype("f8"),
  "F32": np.dtype("f4"),
  "F16": np.dtype("f2"),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype("i8"),
  "I32": np.dtype("i4"),
  "I16": np.dtype("i2"),
  "I8": np.dtype("i1"),
  "U8": np.dtype("u1"),
  "BOOL": np.dtype("?"),
}
_MAX_HEADER = 8 << 20  # bytes, of 60,000 tensors; Python's objects may take 25 times as many
_MAX_AXES = 32
_LARGEST_NUMBER = 1 << 62
_SPARSE = 8  # times its elements that a part's stretch of the file may have, to be read in one piece
_PAGE = 4096  # bytes that are read in one piece in any case


class Damaged(ValueError):
  """Bytes that torch.save does not write."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file, not read yet."""

  path: paths.Path
  offset: int  # bytes from the start of the file to the first element
  dtype: np.dtype
  shape: tuple[int, ...]
  strides: tuple[int, ...]  # in elements, none negative

  @property
  def nbytes(self) -> int:
    """The bytes of its elements."""
    return math.prod(self.shape) * self.dtype.itemsize

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Reads elements [start, stop) of the first axis."""
    shape = (stop - start, *self.shape[1:])
    offset = self.offset + start * self.strides[0] * self.dtype.itemsize
    if self.strides == contiguous(self.shape):
      return read_bytes(self.path, offset, math.prod(shape) * self.dtype.itemsize).view(self.dtype).reshape(shape)
    out = np.empty(shape, self.dtype)
    self._read(out, offset, self.strides)
    return out

  def _read(self, out: np.ndarray, offset: int, strides: tuple[int, ...]) -> None:
    """Fills `out`; a stretch that holds little of it is read in parts, along the axis that lies furthest apart."""
    if not out.size:
      return
    extent = 1 + sum((n - 1) * stride for n, stride in zip(out.shape, strides))
    if extent * self.dtype.itemsize <= max(_PAGE, _SPARSE * out.nbytes):
      found = read_bytes(self.path, offset, extent * self.dtype.itemsize).view(self.dtype)
      out[...] = np.lib.stride_tricks.as_strided(
        found, out.shape, [stride * self.dtype.itemsize for stride in strides], writeable=False
      )
      return
    axis = max(range(out.ndim), key=lambda i: (out.shape[i] - 1) * strides[i])
    half = out.shape[axis] // 2
    first, second = (tuple([*[slice(None)] * axis, part]) for part in (slice(half), slice(half, None)))
    self._read(out[first], offset, strides)
    self._read(out[second], offset + half * strides[axis] * self.dtype.itemsize, strides)

  def whole(self) -> np.ndarray:
    """Reads all elements."""
    return (
      self.rows(0, self.shape[0])
      if self.shape
      else read_bytes(self.path, self.offset, self.dtype.itemsize).view(self.dtype).reshape(())
    )


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the strides, in elements, of an array that is stored row by row."""
  return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def read_bytes(path: paths.Path, offset: int, size: int) -> np.ndarray:
  """Reads so many bytes, uint8 [size].

  Raises:
    errors.InputError: when the file ends before.
  """
  try:
    if isinstance(path, bucket_path.BucketPath):
      found = np.empty(size, np.uint8)
      found = found[: path.read_into(found.data, offset)]
    else:
      found = np.fromfile(path, np.uint8, size, offset=offset)
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {errors.reason(error)}") from error
  if found.size != size:
    raise errors.InputError(
      f"{path} is truncated: it ends at byte {path.stat().st_size}, and a tensor reaches to "
      f"{offset + size}; copy it again"
    )
  return found


def open_safetensors(path: paths.Path) -> dict[str, Tensor]:
  """Returns the tensors of a safetensors file.

  Raises:
    errors.InputError: when the file is damaged, ends too early, or is a failed download.
  """
  user_text.check_regular(path)
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      start = file.read(downloads.HEAD)
      downloads.check(start, str(path))
      length = int.from_bytes(start[:8], "little")
      if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
      file.seek(8)
      header = file.read(length)
    entries = user_json.parse(header, "the header")
    entries.pop("__metadata__", None)
    found = {name: _tensor(path, 8 + length, name, entry) for name, entry in entries.items()}
    _check_places(path, 8 + length, size, found)
    return found
  except errors.InputError as error:  # a ValueError, too
    if str(error).startswith("the header"):
      raise errors.InputError(
        f"{path} is damaged or no safetensors file ({printable.line(error, 200)}): copy it again"
      ) from error
    raise
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {errors.reason(error)}") from error
  except ValueError as error:
    raise errors.InputError(
      f"{path} is damaged or no safetensors file ({printable.line(error, 200)}): copy it again"
    ) from error


def _tensor(path: paths.Path, start: int, name: str, entry: Any) -> Tensor:
  fields = [entry.get(field) for field in ("dtype", "shape", "data_offsets")] if isinstance(entry, dict) else [None] * 3
  kind, shape, place = fields
  if (
    not isinstance(kind, str)
    or kind not in DTYPES
    or not _are_sizes(shape)
    or not _are_sizes(place)
    or (len(place) != 2 or len(shape) > _MAX_AXES)
  ):
    raise ValueError(f"{printable.line(name, 60)!r} is {printable.line(json.dumps(entry)[:80], 80)}")
  if place[1] - place[0] != math.prod(shape) * DTYPES[kind].itemsize:
    raise ValueError(f"{printable.line(name, 60)!r} of shape {str(shape)[:60]} from byte {place[0]} to {place[1]}")
  return Tensor(path, start + place[0], DTYPES[kind], tuple(shape), contiguous(tuple(shape)))


def _are_sizes(numbers: Any) -> bool:
  return isinstance(numbers, list) and all(type(n) is int and 0 <= n <= _LARGEST_NUMBER for n in numbers)


def _check_places(path: paths.Path, start: int, size: int, found: Mapping[str, Tensor]) -> None:
  """Checks that the tensors fill the file, each byte being in one of them, as the format asks."""
  free = start
  for name, tensor in sorted(found.items(), key=_place):
    if tensor.offset < free:
      raise ValueError(f"{printable.line(name, 60)!r} overlaps another tensor")
    if tensor.offset > free:
      raise ValueError(f"{tensor.offset - free} bytes in front of {printable.line(name, 60)!r} are no tensor's")
    free = tensor.offset + tensor.nbytes
  check_inside(path, size, free)
  if free < size:
    raise ValueError(f"{size - free} bytes behind the last tensor")


def _place(named: tuple[str, Tensor]) -> tuple[int, int]:
  return named[1].offset, named[1].nbytes


def check_inside(path: paths.Path, size: int, end: int) -> None:
  """Raises InputError when the file, of so many bytes, ends before byte `end`."""
  if size < end:
    raise errors.InputError(f"{path} is truncated: it has {size} bytes, and its tensors take {end}; copy it again")


def safetensors_header(entries: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
  """Returns what a safetensors file with these tensors, in this order and without gaps, begins with."""
  names = {dtype: name for name, dtype in DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers takes the file for TensorFlow's
  offset = 0
  for name, (dtype, shape) in entries.items():
    end = offset + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
    offset = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text
