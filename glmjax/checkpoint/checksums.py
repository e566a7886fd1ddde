"""Checksums of arrays, computed where the arrays live, and JSON that knows its own.

An array's sum does not depend on how the array is split over devices or hosts: every element is mixed
with its index in C order and the results are added modulo 2^32, so that each device sums its own part at
memory speed and nothing is gathered. Changing one element always changes the sum; changing several goes
unnoticed once in 2^64.
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
import json
import math
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

_ODD = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)  # xxHash's and MurmurHash's multipliers
_SMALL = 1 << 20  # bytes; below, numpy has the sum before a program would be compiled


def _mix(x: Any, multiplier: int) -> Any:
  """A bijection of 32-bit words that spreads every bit."""
  x = (x ^ (x >> 16)) * np.uint32(multiplier)
  return x ^ (x >> 15)


def _mixed(words: Any, index: Any) -> tuple[Any, Any]:
  first = _mix(words + _mix(index * np.uint32(_ODD[0]), _ODD[1]), _ODD[2])
  return first, _mix(first, _ODD[3])


@functools.partial(jax.jit, static_argnames="shape")
def _device_sum(x: jax.Array, shape: tuple[int, ...] | None = None, start: jax.Array | None = None) -> jax.Array:
  """uint32 [2], of a whole array or of the part at `start` of one of this shape.

  One variadic reduction: ten times the speed of two sums on a CPU.
  """
  if x.dtype == jnp.bool_:
    words = x.astype(jnp.uint32)
  else:
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
  index, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in reversed(range(words.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    index += (along if start is None else along + start[axis]) * jnp.uint32(stride % 2**32)
    stride *= (shape or words.shape)[axis]
  zero = np.uint32(0)
  return jnp.stack(jax.lax.reduce(_mixed(words, index), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]),
                                  tuple(range(words.ndim))))


def _host_sum(x: np.ndarray, shape: Sequence[int], start: Sequence[int]) -> np.ndarray:
  """The same in numpy, 64-bit elements as two words."""
  flat = np.ascontiguousarray(x).reshape(-1)
  words = flat.view(f"uint{8 * min(x.dtype.itemsize, 4)}").astype(np.uint32)
  index = np.zeros(x.shape, np.uint32)
  for axis in range(x.ndim):
    stride = np.uint32(math.prod(shape[axis + 1:]) % 2**32)
    along = np.arange(start[axis], start[axis] + x.shape[axis], dtype=np.int64).astype(np.uint32) * stride
    index += along.reshape(-1, *[1] * (x.ndim - axis - 1))
  per_element = words.size // max(1, x.size)
  if per_element > 1:
    index = (index[..., None] * np.uint32(per_element) + np.arange(per_element, dtype=np.uint32))
  return np.array([np.add.reduce(part, dtype=np.uint32) for part in _mixed(words, index.reshape(-1))])


def _hexadecimal(value: Iterable[int]) -> str:
  return "".join(f"{int(word):08x}" for word in value)


def array_sums(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
  """Sixteen hexadecimal digits for each array."""
  sums = {}
  for name, x in arrays.items():
    on_host = isinstance(x, np.ndarray) or x.is_fully_addressable and x.nbytes < _SMALL
    sums[name] = _host_sum(np.asarray(x), x.shape, [0] * x.ndim) if on_host else _device_sum(x)
    if jax.process_count() > 1:  # several sums that wait for others can take all of XLA's threads
      jax.block_until_ready(sums[name])
  return {name: _hexadecimal(np.asarray(value)) for name, value in sums.items()}


def part_sum(x: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> str:
  """The share that the part of an array beginning at `start` has in the sum of the whole, of that shape."""
  host = x.nbytes < _SMALL or x.dtype.itemsize == 8
  found = _host_sum(x, shape, start) if host else _device_sum(x, tuple(shape), np.array(start, np.uint32))
  return _hexadecimal(np.asarray(found))


def total(parts: Iterable[str]) -> str:
  """An array's sum from those of its parts."""
  words = [0, 0]
  for part in parts:
    words = [(words[i] + int(part[8 * i:8 * i + 8], 16)) % 2**32 for i in (0, 1)]
  return _hexadecimal(words)


def _crc(content: Mapping[str, Any]) -> str:
  return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
  """`content` with its own checksum."""
  return {**content, "crc32": _crc(content)}


def unseal(text: str | bytes) -> dict[str, Any]:
  """What `seal` was given.

  Raises:
    ValueError: when the text is not what was written.
  """
  content = json.loads(text)
  if not isinstance(content, dict) or content.pop("crc32", None) != _crc(content):
    raise ValueError("checksum differs")
  return content
