"""Checksums depend on every bit and on nothing else."""

import itertools
import json

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax.checkpoint import checksums
from glmjax.checkpoint import files
from glmjax.io import seal

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


def test_a_record_that_was_changed(tmp_path):
  content = {"a": [1, 2.5, None], "b": {"c": "é"}}
  text = json.dumps(seal.seal(content))
  (tmp_path / "record").write_text(text)
  assert checksums.read_sealed(tmp_path / "record", "record", ("b",)) == content
  for broken in (text.replace("2.5", "2.6"), "{}", "[]", text[:-1], "[" * 100_000):
    (tmp_path / "record").write_text(broken)
    with pytest.raises(files.DamagedError, match="record is damaged"):
      checksums.read_sealed(tmp_path / "record", "record", ("b",))


# Arrays of more than 2^32 words: parts of them, at their places, stand for the whole.

_WI, _WO = (70, 12288, 2, 32768), (70, 32768, 12288)  # GLM-130B's


@pytest.mark.parametrize("shape, apart", [(_WI, 16), (_WI, 32), (_WO, 32), (_WO, 64), (_WI, 1), (_WO, 5)])
def test_layers_that_changed_places(shape: tuple[int, ...], apart: int):
  rng = np.random.default_rng(0)
  size = (1, 8, *shape[2:-1], 64)
  first, second = (rng.standard_normal(size).astype(np.float16) for _ in range(2))
  place = [[layer, 32, *[0] * (len(shape) - 3), 128] for layer in (3, 3 + apart)]

  def both(a: np.ndarray, b: np.ndarray, version: int) -> str:
    return checksums.total(checksums.part_sum(x, start, shape, version) for x, start in zip((a, b), place))

  assert both(first, second, 2) != both(second, first, 2)
  assert (both(first, second, 1) == both(second, first, 1)) == (apart >= 16)  # what version 1 could not see


def test_places_far_apart_have_words_of_their_own():
  """Of the same element, in all layers and at places that 2^32 words part."""
  x = np.ones((1, 1, 1, 1), np.float32)
  places = [
    (layer, row, half, column) for layer in range(70) for row in (0, 12287) for half in (0, 1) for column in (0, 32767)
  ]
  assert len({checksums.part_sum(x, place, _WI) for place in places}) == len(places)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize("version", [1, 2])
def test_host_and_device_agree_on_parts_of_large_arrays(dtype: jnp.dtype, version: int):
  x = (jax.random.normal(jax.random.key(0), (2, 3, 2, 5)) * 50).astype(dtype)
  start = [37, 12000, 0, 32000]
  host = checksums.part_sum(np.asarray(x), start, _WI, version)
  device = np.asarray(checksums._device_sum(x, _WI, np.array(start, np.uint32), version))
  assert host == "".join(f"{word:08x}" for word in device)


def test_eight_bytes_are_two_words():
  """An array of 2^31 of them has more words than an index tells apart."""
  x, shape = np.arange(1, 3, dtype=np.int64), (4, 2**30)
  swapped = [
    checksums.total(checksums.part_sum(row[None], (layer, 7), shape) for row, layer in zip(rows, (0, 2)))
    for rows in ((x, -x), (-x, x))
  ]
  assert swapped[0] != swapped[1]
  parts = [checksums.part_sum(x[None, i : i + 1], (3, 7 + i), shape) for i in (0, 1)]
  assert checksums.total(parts) == checksums.part_sum(x[None], (3, 7), shape)


def test_smaller_arrays_have_the_sums_they_had():
  """What version 1 wrote of them is what version 2 writes."""
  x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  assert _sum(x) == "f3b20c4364d54821" == checksums.array_sums({"x": x}, {"x": 1})["x"]
  for shape in ((2, 3, 4), (2**16, 2**12, 16)):
    assert checksums.part_sum(x, (0, 0, 0), shape, 1) == checksums.part_sum(x, (0, 0, 0), shape, 2)


def test_a_version_to_come(tmp_path):
  record = {"arrays": {"x": {"shape": [1], "dtype": "int8", "sum": "0" * 16, "version": 3}}, "metadata": {}}
  (tmp_path / "record").write_text(json.dumps(seal.seal(record)))
  with pytest.raises(errors.InputError, match="record: a newer glmjax wrote it: update this one"):
    checksums.read_sealed(tmp_path / "record", "record", ("arrays",))
