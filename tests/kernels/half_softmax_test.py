"""Attention whose scores and softmax are float16: what numpy makes of it, what overflows, what stays hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.kernels import attention
from glmjax.kernels import matmul
from glmjax.parallel import partitioning

B, L, H, K = 2, 12, 3, 8
LINE = np.tile(np.arange(L, dtype=np.int32), (B, 1))


def intervals() -> tuple[np.ndarray, np.ndarray]:
  """Causal, but for a query that sees nothing and one that sees a stretch in the middle."""
  start, end = np.zeros_like(LINE), LINE + 1
  start[0, 7], end[1, 4] = 3, 0
  return start, end


def numbers(size: float = 1.0, mean: float = 0.0) -> list[np.ndarray]:
  """Queries and keys of a size around a mean, and values."""
  r = np.random.default_rng(0)
  q, k, v = r.normal(size=(3, B, L, H, K))
  return [x.astype(np.float16) for x in (mean + size * q, mean + size * k, v)]


def attend(arrays: list[np.ndarray], scores_dtype: str, prefix: tuple | None = None) -> jax.Array:
  start, end = map(jnp.asarray, intervals())

  @jax.jit
  def run(q, k, v):
    return attention.attend(partitioning.target(), q, k, v, start, end, None, prefix, scores_dtype)

  return run(*arrays)


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
  """The same in numpy: products and sums in float32, all that comes of them rounded to float16."""
  half, (start, end) = np.float16, intervals()
  q = q * half(K**-0.5)
  scores = np.einsum("blhk,bmhk->bhlm", q.astype(np.float32), k.astype(np.float32)).astype(half)
  keys = np.arange(L)
  seen = ((keys >= start[..., None]) & (keys < end[..., None]))[:, None]
  largest = np.where(seen, scores, -np.inf).max(-1, keepdims=True, initial=-65504.0).astype(half)
  powers = np.where(seen, np.exp(np.where(seen, scores, largest) - largest), half(0))
  sums = powers.astype(np.float32).sum(-1, keepdims=True).astype(half)
  weights = powers / np.maximum(sums, half(1e-7))
  assert weights.dtype == half
  return np.einsum("bhlm,bmhk->blhk", weights.astype(np.float32), v.astype(np.float32)).astype(half)


def test_values_are_those_of_numpy():
  """Scores around 400, which differ by one or so, and which float16 knows to a quarter: rounding them shows."""
  arrays = numbers(0.1, mean=12)
  found = np.asarray(attend(arrays, "float16"))
  assert found.dtype == np.float16
  np.testing.assert_allclose(found, expected(*arrays), rtol=2e-3, atol=2e-3)
  assert np.abs(found.astype(np.float32) - np.asarray(attend(arrays, "float32"), np.float32)).max() > 0.05
  np.testing.assert_array_equal(found[1, 4], np.zeros((H, K)))


def test_scores_beyond_float16_are_no_number_and_those_of_other_queries_stay():
  q, k, v = numbers()
  plain = np.asarray(attend([q, k, v], "float16"))
  q[0, 3, 1], k[0, 2, 1] = 300, 300
  found = np.asarray(attend([q, k, v], "float16"))
  assert np.isfinite(np.asarray(attend([q, k, v], "float32"))).all()
  assert np.isnan(found[0, 3, 1]).all()
  k[0, 2, 1] = -300  # the other keys have it
  assert np.isfinite(np.asarray(attend([q, k, v], "float16"))).all()
  q[0, 0, 1], k[0, 0, 1] = 300, -300  # a query that sees no other
  assert np.isnan(np.asarray(attend([q, k, v], "float16"))[0, 0, 1]).all()
  np.testing.assert_array_equal(found[1], plain[1])


@pytest.mark.parametrize("prefix", [False, True])
def test_gradients_follow_float32_and_hidden_keys_have_none(prefix: bool):
  arrays, pair = numbers(), None
  if prefix:
    pair = tuple(jnp.asarray(np.random.default_rng(3).normal(size=(H, 2, K)), jnp.float16) for _ in range(2))

  def gradients(scores_dtype: str):
    return jax.grad(lambda *x: (attend(x, scores_dtype, pair).astype(jnp.float32) ** 2).sum(), (0, 1, 2))(*arrays)

  for half, exact in zip(gradients("float16"), gradients("float32")):
    half, exact = np.asarray(half, np.float32), np.asarray(exact, np.float32)
    assert np.linalg.norm(half - exact) < 0.01 * np.linalg.norm(exact)
    np.testing.assert_array_equal(half == 0, exact == 0)


def test_what_one_product_gives_another_is_rounded():
  """As on hardware that computes in float16, and infinite where it is beyond; sums are float32."""
  target, (x, y, z) = partitioning.target(), (x[0, :, 0].astype(np.float32) for x in numbers())
  y, z = y.T[:, :K] * 100, z

  @jax.jit
  def run(x):
    inner = matmul.matmul(target, "ab,bc->ac", x, jnp.asarray(y))
    return inner, matmul.matmul(target, "ab,bc->ac", inner, jnp.asarray(z[:K]), jnp.float32)

  half, product = np.float16, x.astype(np.float16).astype(np.float32) @ y.astype(np.float16).astype(np.float32)
  _, found = run(jnp.asarray(x, half))
  rounded = product.astype(half).astype(np.float32) @ z[:K].astype(half).astype(np.float32)
  exact = product @ z[:K].astype(half).astype(np.float32)
  assert np.abs(found - rounded).max() < 0.1 * np.abs(found - exact).max()
  assert np.isinf(run(jnp.full((1, K), 60_000, half))[0]).any()
