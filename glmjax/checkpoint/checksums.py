"""Checksums of arrays, computed where the arrays live, and JSON that knows its own.

An array's sum does not depend on how the array is split over devices or hosts: every element is mixed
with its index in C order and the results are added modulo 2^32, so that each device sums its own part at
memory speed and nothing is gathered. Changing one element always changes the sum; changing several goes
unnoticed once in 2^64.
"""

from collections.abc import Mapping
import json
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

_ODD = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)  # xxHash's and MurmurHash's multipliers


def _mix(x: jax.Array, multiplier: int) -> jax.Array:
  """A bijection of 32-bit words that spreads every bit."""
  x = (x ^ (x >> 16)) * jnp.uint32(multiplier)
  return x ^ (x >> 15)


def _words(x: jax.Array) -> jax.Array:
  """The elements' bits, one uint32 each."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
  """uint32 [2]. One variadic reduction: ten times the speed of two sums on a CPU."""
  words = _words(x)
  index, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in reversed(range(words.ndim)):
    index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
    stride *= words.shape[axis]
  first = _mix(words + _mix(index * jnp.uint32(_ODD[0]), _ODD[1]), _ODD[2])
  second = _mix(first, _ODD[3])
  zero = np.uint32(0)
  return jnp.stack(jax.lax.reduce((first, second), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]),
                                  tuple(range(words.ndim))))


def array_sums(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
  """Sixteen hexadecimal digits for each array."""
  sums = {}
  for name, x in arrays.items():
    if x.dtype.itemsize == 8:  # 64-bit numbers live on the host only
      x = np.ascontiguousarray(x).reshape(-1).view(np.uint32)
    sums[name] = _sum(x)
  return {name: "".join(f"{word:08x}" for word in np.asarray(value)) for name, value in sums.items()}


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
