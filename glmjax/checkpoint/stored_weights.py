"""Parameters as they are to be stored: shapes, types and bytes, the blocks they are cut into, and what these take.

A weight is cut along its layers and along one of the axes that a product does not sum over, so that each block can be
converted and quantized by itself.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from glmjax import errors
from glmjax.checkpoint import stored as stored_lib
from glmjax.io import paths
from glmjax.models import params as params_lib
from glmjax.quantize import qarray

ELEMENTS = 2**25  # largest block; 64 MiB of float16
_LEAST = 2**20  # smallest block that makes sense: smaller ones are files too many
# Bytes that a process takes before and around the blocks (Python, JAX, Orbax), and for each element of its blocks:
# both workers' copies, quantizing among them, and what malloc keeps of earlier ones. Measured, with room.
_FIXED, _PER_ELEMENT = 0.45 * 2**30, 88
_PART = 2**18  # elements that are looked at together

Region = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class StoredWeight:
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
    """Yields the blocks, in order; all but the last along an axis have the same shape."""
    sizes = self._block_shape(ELEMENTS if elements is None else elements)
    for place in np.ndindex(*(-(-n // size) for n, size in zip(self.shape, sizes))):
      yield tuple(slice(i * size, min((i + 1) * size, n)) for i, size, n in zip(place, sizes, self.shape))

  @property
  def smallest(self) -> int:
    """The elements of the smallest block that it can be cut into."""
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
    """Returns array names, shapes and dtypes that a block of this shape (or the whole) is stored as."""
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
    """Says where a block lies in one of the stored arrays: input axes are never cut."""
    shape = self.stored([s.stop - s.start for s in region])[name][0]
    return tuple(slice(s.start, s.start + n) for s, n in zip(region, shape))

  @property
  def nbytes(self) -> int:
    """The bytes of everything that is stored."""
    return sum(
      math.prod(shape) * np.dtype(stored_lib.zarr_dtype(dtype)).itemsize
      for shape, dtype in self.stored(self.shape).values()
    )

  def convert(self, block: np.ndarray) -> dict[str, np.ndarray]:
    """Converts a block of the float weight to what is stored.

    Raises:
      errors.NotFiniteError: when it is not finite, or not in the type that it is stored in.
    """
    check_finite({self.name: block}, "is not finite")  # here, as XLA's max passes over what is no number
    if self.bits is None:
      with np.errstate(over="ignore"):
        stored = {self.name: block.astype(stored_lib.zarr_dtype(self.dtype), copy=False)}
    else:
      quantized = qarray.quantize_layers(jnp.asarray(block), self.bits, self._param.inputs_from_end)
      stored = {f"{self.name}/values": np.asarray(quantized.values), f"{self.name}/scale": np.asarray(quantized.scale)}
    if stored.get(self.name) is not block:
      check_finite(stored, "has values beyond the type that it is to be stored in: give --dtype=float32 or bfloat16")
    return stored

  def floats(self, block: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns what a stored block stands for, float32."""
    if self.bits is None:
      return block[self.name].astype(np.float32)
    axis = self._param.inputs_from_end[-1]
    codes = qarray.QuantizedArray(block[f"{self.name}/values"], block[f"{self.name}/scale"], self.bits, axis)
    return np.asarray(qarray.dequantize(jax.tree.map(jnp.asarray, codes)))


def check_finite(block: Mapping[str, np.ndarray], problem: str) -> None:
  """Raises NotFiniteError, naming the array, unless all of a block is finite; codes always are."""
  for name, x in block.items():
    if x.dtype.kind not in "iub" and not is_finite(x):
      raise errors.NotFiniteError(f"the array {name} {problem}")


def is_finite(x: np.ndarray) -> bool:
  """Tells whether all of an array of floats is finite.

  By the bits of 16-bit ones, a part at a time: numpy's own isfinite takes ten times as long for them.
  """
  if x.dtype.itemsize != 2:
    return bool(np.isfinite(x).all())
  words = np.ascontiguousarray(x).view(np.uint16).reshape(-1)
  infinity = np.array(np.inf, x.dtype).view(np.uint16)
  return all((words[at : at + _PART] & 0x7FFF).max() < infinity for at in range(0, words.size, _PART))


def elements_within(gib: float, weights: Sequence[StoredWeight]) -> int:
  """Returns the largest blocks with which writing these weights stays within so much memory.

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
  """Returns the length of parts no longer than `limit` that are as alike as can be."""
  return -(-size // -(-size // limit))


def need_room(folder: paths.Path, weights: Sequence[StoredWeight], there: int = 0) -> None:
  """Raises InputError when the disk cannot hold the weights beside the bytes that are there already; buckets can."""
  if not isinstance(folder, pathlib.Path):
    return
  while not folder.exists():
    folder = folder.parent
  needed, free = sum(weight.nbytes for weight in weights) - there, shutil.disk_usage(folder).free
  if needed > free:
    raise errors.InputError(
      f"{folder} has {_size(free)} free and {_size(needed)} are needed: free some space, or choose another folder"
    )


def _size(count: int) -> str:
  """Writes a size in units that leave a number to be read."""
  return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
