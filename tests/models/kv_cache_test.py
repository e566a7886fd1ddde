"""The cache of keys and values: what int8 keeps of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax import target as target_lib
from glmjax.kernels import attention
from glmjax.models import config as config_lib
from glmjax.models import kv_cache
from glmjax.parallel import partitioning

CONFIG = config_lib.GLMConfig(vocab_size=8, num_layers=3, embed_dim=24, num_heads=3, mlp_dim=8, kv_cache_dtype="int8")


def target() -> target_lib.Target:
  return partitioning.target()


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
  """Rows of sizes from 1e-30 to 1e30."""
  r = np.random.default_rng(seed)
  return (r.normal(size=shape) * 10.0 ** r.integers(-30, 30, (*shape[:-1], 1))).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_int8_is_as_near_as_a_code_is(dtype):
  x = jnp.asarray(numbers(5, 3, 7, 8) if dtype != jnp.float16 else np.clip(numbers(5, 3, 7, 8), -6e4, 6e4), dtype)
  slots = kv_cache.Slots.keep(x, jnp.dtype(jnp.int8))
  assert slots.kept.dtype == jnp.int8 and slots.scale.shape == (5, 3, 7, 1)
  x, kept = np.asarray(x, np.float64), np.asarray(slots.computed(jnp.float32), np.float64)
  half_a_code = np.abs(x).max(-1, keepdims=True) / 254
  assert (np.abs(kept - x) <= half_a_code * 1.001 + 1e-37).all()


def test_zeros_stay_zeros_and_what_is_not_finite_spoils_its_slot_alone():
  x = numbers(2, 3, 4, 8)
  x[0, 0, 0], x[0, 1, 1, 3], x[1, 2, 3, 0] = 0, np.nan, np.inf
  found = np.asarray(kv_cache.Slots.keep(jnp.asarray(x), jnp.dtype(jnp.int8)).computed(jnp.float32))
  assert (found[0, 0, 0] == 0).all()
  finite = np.isfinite(found).all(-1)
  assert not finite[0, 1, 1] and not finite[1, 2, 3] and finite.sum() == 2 * 3 * 4 - 2


def test_a_slot_holds_the_same_whatever_it_was_written_with():
  k, v = (jnp.asarray(numbers(2, 6, 3, 8, seed=seed)) for seed in (1, 2))
  prompt = kv_cache.of_prompt(target(), CONFIG, k, v)
  one_by_one = kv_cache.empty(target(), dataclasses.replace(CONFIG, scan_layers=False), 2, 6)["layers_0"]
  for i in range(6):
    one_by_one = one_by_one.append(k[:, i : i + 1], v[:, i : i + 1], jnp.full(2, i))
  jax.tree.map(np.testing.assert_array_equal, prompt, one_by_one)


def test_it_takes_an_eighth_of_a_byte_more_than_a_number_of_heads_of_32():
  config = dataclasses.replace(CONFIG, embed_dim=96)
  cache = jax.eval_shape(lambda: kv_cache.empty(target(), config, 2, 10))
  assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) == 2 * 3 * 2 * 10 * 96 * (1 + 4 / 32)


@pytest.mark.parametrize("scores_dtype", ["float32", "bfloat16"])
def test_the_library_has_its_softmax_in_float32_alone(monkeypatch, scores_dtype: str):
  config = dataclasses.replace(CONFIG, kv_cache_dtype=None, dtype="bfloat16")
  k, v, q = (jax.random.normal(jax.random.key(i), (2, 6, 3, 8), jnp.bfloat16) for i in range(3))
  called = []

  def library(q_BHK, *rest):
    called.append(rest)
    return q_BHK

  monkeypatch.setattr(kv_cache.cpu_attention, "attend", library)
  monkeypatch.setattr(kv_cache.KVCache, "_reads_as_kept", lambda self, target, q_BLHK: True)
  ends = jnp.full((2, 1), 6)
  found = kv_cache.of_prompt(target(), config, k, v).attend(target(), q[:, :1], ends, None, scores_dtype)
  assert bool(called) == (scores_dtype == "float32")
  if not called:
    exact = attention.dense(target(), q[:, :1], k, v, ends * 0, ends)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, exact)), atol=0.05)


def test_other_dtypes_are_refused():
  with pytest.raises(errors.InputError, match="GLMConfig.kv_cache_dtype is 'fp8': choose one of int8"):
    dataclasses.replace(CONFIG, kv_cache_dtype="fp8")
