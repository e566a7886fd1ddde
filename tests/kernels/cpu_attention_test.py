"""Attention over a cache by the C++ library: against float64, over types, sizes and ends; each row as it is alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax.kernels.cpu import attention
from glmjax.kernels.cpu import library
from glmjax.models import kv_cache

NOW = library.status()
pytestmark = pytest.mark.skipif(not NOW.available, reason=NOW.words)


def inputs(rows: int, heads: int, slots: int, width: int, kind: str, q_dtype: str = "float32") -> tuple:
  """q, keys, values, ends and scales (none but of int8); and keys and values as float64."""
  r = np.random.default_rng(rows + heads + slots + width)
  q = jnp.asarray(r.normal(size=(rows, heads, width)) * 2, q_dtype)
  floats = [jnp.asarray(r.normal(size=(rows, heads, slots, width)), jnp.float32) for _ in range(2)]
  dtype = {"float32": jnp.float32, "bfloat16": jnp.uint16, "int8": jnp.int8}[kind]
  of = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
  key, value = (kv_cache.Slots.keep(x.astype(of), jnp.dtype(dtype)) for x in floats)
  end = jnp.asarray(r.integers(1, slots + 1, rows), jnp.int32)
  scales = () if kind != "int8" else (key.scale[..., 0], value.scale[..., 0])
  exact = [np.asarray(x.computed(of), np.float64) for x in (key, value)]
  return (q, key.kept, value.kept, end, *scales), exact


def expected(q, key, value, end) -> np.ndarray:
  q = np.asarray(q, np.float64)
  out = np.zeros(q.shape)
  for b, h in itertools.product(*map(range, q.shape[:2])):
    scores = key[b, h, : end[b]] @ q[b, h] / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(initial=0))
    out[b, h] = weights / weights.sum() @ value[b, h, : end[b]] if end[b] else 0
  return out


@pytest.mark.parametrize("isa", NOW.sets)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_it_is_softmax_of_scores_times_values(monkeypatch, isa, kind):
  monkeypatch.setenv(library.ISA, isa)
  for sizes in [(1, 1, 1, 1), (1, 2, 17, 16), (3, 2, 40, 20), (2, 3, 64, 128), (5, 1, 33, 80), (2, 2, 9, 300)]:
    arguments, exact = inputs(*sizes, kind)
    found = jax.jit(attention.attend)(*arguments)
    np.testing.assert_allclose(found, expected(arguments[0], *exact, arguments[3]), rtol=2e-5, atol=2e-6)


def test_rows_of_bfloat16_come_out_rounded_to_the_nearest():
  arguments, exact = inputs(2, 3, 50, 64, "bfloat16", "bfloat16")
  found, wanted = attention.attend(*arguments), expected(arguments[0], *exact, arguments[3])
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=2**-8 + 1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_row_is_the_same_alone_among_others_and_with_more_slots(kind):
  arguments, _ = inputs(6, 2, 48, 64, kind)
  together = np.asarray(attention.attend(*arguments))
  for row in range(6):
    alone = [x[row : row + 1] for x in arguments]
    np.testing.assert_array_equal(attention.attend(*alone)[0], together[row])
    q, key, value, end, *scales = alone
    more = [jnp.pad(x, [(0, 0), (0, 0), (0, 16), *[(0, 0)] * (x.ndim - 3)], constant_values=3) for x in (key, value)]
    scales = [jnp.pad(x, [(0, 0), (0, 0), (0, 16)], constant_values=3) for x in scales]
    np.testing.assert_array_equal(attention.attend(q, *more, end, *scales)[0], together[row])


def test_nothing_seen_is_zeros_and_what_is_not_finite_spoils_its_row_alone():
  (q, key, value, end), _ = inputs(4, 2, 20, 32, "float32")
  end = end.at[0].set(0).at[1:].set(20)
  key, value = key.at[1, 0, 3, 5].set(jnp.nan), value.at[2, 1, 7, 0].set(jnp.inf)
  found = np.asarray(attention.attend(q.at[3].mul(1e30), key, value, end))
  assert (found[0] == 0).all()
  assert np.isnan(found[1, 0]).all() and np.isfinite(found[1, 1]).all()
  assert not np.isfinite(found[2, 1, 0]) and np.isfinite(found[2, 1, 1:]).all() and np.isfinite(found[2, 0]).all()
  assert np.isfinite(found[3]).all()  # one slot has all the weight


def test_large_ones_are_shared_by_threads_and_loops_compile():
  arguments, exact = inputs(4, 8, 300, 64, "float32")

  @jax.jit
  def twice(q, *rest):
    return jax.lax.fori_loop(0, 2, lambda _, x: attention.attend(x, *rest), q)

  once = expected(arguments[0], *exact, arguments[3])
  np.testing.assert_allclose(twice(*arguments), expected(once, *exact, arguments[3]), rtol=1e-4, atol=1e-5)


def test_wrong_shapes_and_types_are_told():
  (q, key, value, end, *scales), _ = inputs(2, 2, 8, 16, "int8")
  for arguments, words in (
    ((q[:1], key, value, end, *scales), r"q is \(1, 2, 16\)"),
    ((q, key, value[:, :, :4], end, *scales), "twice"),
    ((q, key, value, end), "int8 keys and values need float32 scales"),
    ((q, key, value.astype(jnp.float32), end, *scales), "they must be alike"),
    ((q.astype(jnp.float16), key, value, end, *scales), "q is float16"),
    ((q, key, value, end.astype(jnp.uint32), *scales), "ends uint32"),
  ):
    with pytest.raises(errors.InputError, match=words):
      attention.attend(*arguments)
