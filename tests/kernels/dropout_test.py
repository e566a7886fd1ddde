"""Attention's dropout: the share it keeps, and that nothing it depends on is forgotten."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax.kernels import attention
from glmjax.parallel import partitioning
from glmjax.kernels import dropout as dropout_lib
from glmjax.models import config

ROWS, HEADS, LENGTH, KEYS = 4, 4, 128, 192


def masks(
  rate: float, seed: int = 0, rows: int = ROWS, heads: int = HEADS, length: int = LENGTH, keys: int = KEYS
) -> np.ndarray:
  """Kept, [B, H, L, M]."""
  dropout = dropout_lib.make(rate, jax.random.split(jax.random.key(seed), rows), heads, length)
  return np.asarray(dropout_lib.keep(rate, dropout.seeds[..., None], jnp.arange(keys, dtype=jnp.int32)))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_keeps_its_share_everywhere(rate: float):
  """Of all pairs, and of each row, head, query and key: within five standard deviations of a fair draw."""
  kept = masks(rate)
  for axes in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2), (2, 3), (3,), (2,)):
    share = kept.mean(axes)
    deviation = np.sqrt(rate * (1 - rate) / (kept.size / share.size))
    assert np.abs(share - (1 - rate)).max() < (6 if share.size > 1000 else 5) * deviation, axes


@pytest.mark.parametrize("seed", [0, 1])
def test_pairs_are_independent(seed: int):
  """Masks of neighbours and of strangers along each axis agree as often as fair draws do."""
  kept = masks(0.5, seed, length=256, keys=256) * 2.0 - 1
  for axis in range(4):
    for by in (1, 2, 3, 16, 64):
      if by < kept.shape[axis]:
        here, there = (np.take(kept, range(at, kept.shape[axis] - by + at), axis) for at in (0, by))
        assert abs((here * there).mean()) < 5 / np.sqrt(here.size), (axis, by)
  assert np.abs(np.corrcoef(kept[0, 0]) - np.eye(256)).max() < 6 / np.sqrt(256)  # queries
  assert np.abs(np.corrcoef(kept[0, 0].T) - np.eye(256)).max() < 6 / np.sqrt(256)  # keys
  diagonal = (kept[..., :-1, :-1] * kept[..., 1:, 1:]).mean()
  square = (kept[..., :-1, :-1] * kept[..., 1:, 1:] * kept[..., :-1, 1:] * kept[..., 1:, :-1]).mean()
  assert max(abs(diagonal), abs(square)) < 5 / np.sqrt(kept.size)


def test_counts_of_runs_and_blocks_spread_as_draws_do():
  """The number kept of 64 keys, over many queries, has a binomial's variance."""
  counts = masks(0.1, length=512, keys=256).reshape(-1, 64).sum(-1)
  assert counts.var() == pytest.approx(64 * 0.1 * 0.9, rel=0.05)


def test_is_numbered_globally():
  """A part of the heads, queries or keys is a part of the whole's mask; keys of rows decide."""
  whole = masks(0.3)
  np.testing.assert_array_equal(masks(0.3, heads=2, length=64, keys=96), whole[:, :2, :64, :96])
  agree = (masks(0.5, seed=1) == masks(0.5)).mean()
  assert abs(agree - 0.5) < 0.01


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_any_kind_of_key(implementation: str):
  keys = jax.random.split(jax.random.key(0, impl=implementation), 3)
  seeds = np.asarray(dropout_lib.make(0.1, keys, 2, 8).seeds)
  assert len(np.unique(seeds)) == seeds.size


def test_means_stay():
  """Weights are scaled up, so that the mean over many masks is the weights' own; half precision too."""
  weights = jnp.full((ROWS, HEADS, LENGTH, KEYS), 1 / KEYS, jnp.float32)
  dropout = dropout_lib.make(0.1, jax.random.split(jax.random.key(0), ROWS), HEADS, LENGTH)
  dropped = dropout_lib.apply(dropout, weights)
  assert float(dropped.mean()) == pytest.approx(1 / KEYS, rel=1e-3)
  assert set(np.unique(np.asarray(dropped) * KEYS).round(5)) == {0.0, np.float32(1 / 0.9).round(5)}
  q = jnp.zeros((ROWS, LENGTH, HEADS, 8))
  v = jnp.ones((ROWS, LENGTH, HEADS, 8))
  zeros = jnp.zeros((ROWS, LENGTH), jnp.int32)
  out = attention.dense(partitioning.target(), q, q, v, zeros, zeros + LENGTH, dropout)
  np.testing.assert_allclose(
    out[..., 0].swapaxes(1, 2),
    dropout_lib.apply(dropout, jnp.full((ROWS, HEADS, LENGTH, LENGTH), 1 / LENGTH)).sum(-1),
    rtol=1e-5,
  )


@pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout"])
@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_are_shares(name: str, rate: float):
  with pytest.raises(errors.InputError, match=f"GLMConfig.{name} is {rate}: give a number from 0 to below 1"):
    config.GLMConfig(vocab_size=8, num_layers=1, embed_dim=8, num_heads=1, mlp_dim=8, **{name: rate})
