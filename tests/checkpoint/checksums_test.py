"""Checksums depend on every bit and on nothing else."""

import itertools

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.checkpoint import checksums

_DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.uint8, jnp.int32, jnp.bool_]


def _sum(x: jax.Array | np.ndarray) -> str:
  return checksums.array_sums({"x": x})["x"]


def _device_sum(x: jax.Array) -> str:
  words = np.asarray(checksums._device_sum(x))  # pylint: disable=protected-access
  return "".join(f"{word:08x}" for word in words)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 8)])
def test_host_and_device_agree(shape: tuple[int, ...], dtype: jnp.dtype):
  x = (jax.random.normal(jax.random.key(0), shape) * 50).astype(dtype)
  assert _sum(np.asarray(x)) == _sum(x) == _device_sum(x)


@pytest.mark.parametrize("spec", [P(), P("a"), P(None, "b"), P("a", "b"), P(("a", "b")), P("b", "a")])
def test_layout_does_not_matter(spec: P):
  x = jax.random.normal(jax.random.key(0), (16, 24, 3))
  mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  assert _device_sum(jax.device_put(x, NamedSharding(mesh, spec))) == _sum(np.asarray(x))


def test_every_bit_counts():
  x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
  sums = {_sum(x)}
  for i, bit in itertools.product(range(64), range(32)):
    y = x.view(np.uint32).copy()
    y[i] ^= np.uint32(1 << bit)
    sums.add(_sum(y.view(np.float32)))
  assert len(sums) == 1 + 64 * 32


def test_pairs_of_changes_and_swaps_count():
  x = np.random.default_rng(1).standard_normal(256).astype(np.float32)
  sums = {_sum(x)}
  for i, j in itertools.combinations(range(0, 256, 5), 2):
    signs = x.copy()
    signs[[i, j]] *= -1
    swapped = x.copy()
    swapped[[i, j]] = x[[j, i]]
    sums |= {_sum(signs), _sum(swapped)}
  assert len(sums) == 1 + 2 * (52 * 51 // 2)


def test_nan_payloads_and_zeros_differ():
  words = [0, 0x80000000, 0x7FC00000, 0x7FC00001, 0xFFC00000]
  assert len({_sum(np.full(3, w, np.uint32).view(np.float32)) for w in words}) == len(words)
  assert len({_sum(jnp.zeros(n)) for n in range(1, 6)}) == 5


def test_seal():
  content = {"a": [1, 2.5, None], "b": {"c": "é"}}
  import json  # pylint: disable=g-import-not-at-top
  text = json.dumps(checksums.seal(content))
  assert checksums.unseal(text) == content
  for broken in (text.replace("2.5", "2.6"), "{}", "[]", text[:-1]):
    with pytest.raises(ValueError):
      checksums.unseal(broken)
