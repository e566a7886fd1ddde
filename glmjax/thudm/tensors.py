"""Tensors inside files, read part by part: safetensors here, torch's own formats in torch_files.

Nothing is mapped into memory: a part that is read is a copy, so that memory stays what is asked for.
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from glmjax import errors

# safetensors' names of the dtypes that weights come in.
DTYPES = {"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
          "I64": np.dtype("i8"), "I32": np.dtype("i4"), "I16": np.dtype("i2"), "I8": np.dtype("i1"),
          "U8": np.dtype("u1"), "BOOL": np.dtype("?")}
_MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors library


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file, not read yet."""

  path: pathlib.Path
  offset: int  # bytes from the start of the file to the first element
  dtype: np.dtype
  shape: tuple[int, ...]
  strides: tuple[int, ...]  # in elements, none negative

  @property
  def nbytes(self) -> int:
    """Of its elements."""
    return math.prod(self.shape) * self.dtype.itemsize

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Elements [start, stop) of the first axis."""
    shape = (stop - start, *self.shape[1:])
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, self.strides)) if math.prod(shape) else 0
    found = read_bytes(self.path, self.offset + start * self.strides[0] * self.dtype.itemsize,
                       extent * self.dtype.itemsize).view(self.dtype)
    if self.strides == contiguous(self.shape):
      return found.reshape(shape)
    strides = [stride * self.dtype.itemsize for stride in self.strides]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(found, shape, strides, writeable=False))

  def whole(self) -> np.ndarray:
    """All of it."""
    return self.rows(0, self.shape[0]) if self.shape else read_bytes(
        self.path, self.offset, self.dtype.itemsize).view(self.dtype).reshape(())


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Strides, in elements, of an array that is stored row by row."""
  return tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))


def read_bytes(path: pathlib.Path, offset: int, size: int) -> np.ndarray:
  """uint8 [size].

  Raises:
    errors.InputError: when the file ends before.
  """
  try:
    found = np.fromfile(path, np.uint8, size, offset=offset)
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {error.strerror or error}") from error
  if found.size != size:
    raise errors.InputError(f"{path} is truncated: it ends at byte {os.path.getsize(path)}, and a tensor reaches to "
                            f"{offset + size}; copy it again")
  return found


def open_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a safetensors file.

  Raises:
    errors.InputError: when the file is damaged or ends too early.
  """
  try:
    size = path.stat().st_size
    with open(path, "rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
      header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: _tensor(path, 8 + length, entry) for name, entry in header.items()}
  except errors.InputError:  # a ValueError, too
    raise
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {error.strerror or error}") from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.InputError(f"{path} is damaged or no safetensors file ({str(error)[:100]}): copy it again") from error


def _tensor(path: pathlib.Path, start: int, entry: dict[str, Any]) -> Tensor:
  dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
  first, last = (int(n) for n in entry["data_offsets"])
  if min((0, *shape)) < 0 or first < 0 or last - first != math.prod(shape) * dtype.itemsize:
    raise ValueError(f"a tensor of shape {list(shape)} from byte {first} to {last}")
  check_inside(path, start + last)
  return Tensor(path, start + first, dtype, shape, contiguous(shape))


def check_inside(path: pathlib.Path, end: int) -> None:
  """Raises InputError when the file ends before byte `end`."""
  size = path.stat().st_size
  if size < end:
    raise errors.InputError(f"{path} is truncated: it has {size} bytes, and its tensors take {end}; copy it again")


def safetensors_header(entries: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
  """What a safetensors file with these tensors, in this order and without gaps, begins with."""
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
