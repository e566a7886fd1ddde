"""Filters and draws of the next token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax.infer import sampling

VOCAB = 50
jitted = jax.jit(sampling.sample)


def logits(rows: int = 4) -> jax.Array:
  return 3 * jax.random.normal(jax.random.key(0), (rows, VOCAB))


def draw(
  logits_BV: jax.Array,
  requests: list[sampling.Sampling],
  seeds: list[int],
  suppressed: tuple[int, ...] = (),
  step: int = 0,
) -> np.ndarray:
  suppressed_V = jnp.zeros(VOCAB, bool).at[jnp.array(suppressed, int)].set(True)
  return np.asarray(jitted(logits_BV, suppressed_V, sampling.draws(requests, seeds), jnp.full(len(logits_BV), step)))


@pytest.mark.parametrize(
  "request_", [sampling.Sampling(), sampling.Sampling(temperature=0.7, top_k=1), sampling.Sampling(temperature=1e-3)]
)
def test_greedy_ways(request_: sampling.Sampling):
  x = logits()
  np.testing.assert_array_equal(draw(x, [request_] * 4, [0, 1, 2, 3]), jnp.argmax(x, -1))


def test_suppressed_tokens_never_come():
  x = logits().at[:, 7].set(100.0)
  for request in (sampling.Sampling(), sampling.Sampling(temperature=5.0), sampling.Sampling(temperature=1.0, top_k=3)):
    assert 7 not in draw(x, [request] * 4, [0, 1, 2, 3], suppressed=(7,))


def test_filters_keep_what_they_should():
  x = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.06, 0.04]]))

  def kept(k, p):
    return np.flatnonzero(
      np.asarray(sampling.filter_logits(x, jnp.array([k]), jnp.array([p], jnp.float32)))[0] > -1e4
    ).tolist()

  assert kept(0, 1.0) == [0, 1, 2, 3, 4]
  assert kept(2, 1.0) == [0, 1]
  assert kept(99, 1.0) == [0, 1, 2, 3, 4]
  assert kept(0, 0.3) == [0]
  assert kept(0, 0.5) == [0, 1]  # the token that crosses p stays
  assert kept(0, 0.95) == [0, 1, 2, 3]
  assert kept(2, 0.6) == [0, 1]  # of what top-k left: 0.4 / 0.7 = 0.57 does not reach it alone
  assert kept(2, 0.55) == [0]


def test_ties_with_the_kth_stay():
  x = jnp.array([[1.0, 2.0, 1.0, 0.0]])
  out = sampling.filter_logits(x, jnp.array([2]), jnp.array([1.0]))
  np.testing.assert_array_equal(out, [[1.0, 2.0, 1.0, sampling.FILTERED]])


@pytest.mark.parametrize("few", [1, 4, 16, 128])
def test_looking_at_a_few_is_sorting_all(few: int, monkeypatch: pytest.MonkeyPatch):
  """Rows of every kind together, ties among them."""
  monkeypatch.setattr(sampling, "_FEW", few)
  rng, filtered = np.random.default_rng(few), jax.jit(lambda *x: sampling.filter_logits(*x))
  by_sorting = jax.jit(sampling._filter_sorted)
  for scale in (0.3, 2, 8):
    x = jnp.array(np.round(scale * rng.standard_normal((40, VOCAB))) + 0.0, jnp.float32)  # no -0.0
    top_k = jnp.array(rng.choice([0, 1, 3, few, 40, 99], 40), jnp.int32)
    top_p = jnp.array(rng.choice([0.1, 0.5, 0.7, 0.9, 1.0], 40), jnp.float32)
    expected = by_sorting(x, top_k, top_p)
    np.testing.assert_array_equal(filtered(x, top_k, top_p), expected)
    for row in range(0, 40, 8):  # alone, which takes the short way more often
      at = slice(row, row + 1)
      np.testing.assert_array_equal(filtered(x[at], top_k[at], top_p[at]), expected[at])


def test_a_row_beside_one_that_needs_sorting():
  """Whose sums round otherwise: what stays of a row is what stays of it beside its like."""
  rng, filtered = np.random.default_rng(0), jax.jit(sampling.filter_logits)
  flat, compared = jnp.zeros(1000), 0
  for _ in range(40):
    row = jnp.asarray(4 * rng.normal(size=1000), jnp.float32)
    ordered = jnp.sort(row, descending=True)
    odds = jnp.exp(ordered - ordered[0])
    few, whole = (
      jnp.cumsum(probs) - probs for probs in (odds[:128] / jnp.exp(row - ordered[0]).sum(), jax.nn.softmax(ordered))
    )
    for top_p in np.minimum(few, whole[:128])[np.asarray(few != whole[:128])][1:4]:  # a cut that only rounding decides
      if 0 < top_p < 0.95:
        cuts, all_ = jnp.array([top_p, top_p]), jnp.array([0, 0])
        like = filtered(jnp.stack([row, row]), all_, cuts)
        beside = filtered(jnp.stack([row, flat]), all_, cuts.at[1].set(0.9))
        np.testing.assert_array_equal(beside[0], like[0])
        compared += 1
  assert compared > 20


def test_a_row_depends_on_its_seed_alone():
  x = logits(1).repeat(4, 0)
  request = sampling.Sampling(temperature=1.0, top_p=0.9)
  together = draw(x, [request, sampling.Sampling(), request, request], [5, 6, 5, 8])
  assert together[0] == together[2] == draw(x[:1], [request], [5])[0]
  assert together[1] == np.argmax(x[1])
  steps = {int(draw(x[:1], [sampling.Sampling(temperature=2.0)], [5], step=s)[0]) for s in range(20)}
  assert len(steps) > 3


def test_frequencies_follow_the_filtered_distribution():
  x = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  request = sampling.Sampling(temperature=2.0, top_k=3)
  n = 4000
  out = np.asarray(
    sampling.sample(x.repeat(n, 0), jnp.zeros(4, bool), sampling.draws([request] * n, range(n)), jnp.full(n, 3))
  )
  expected = np.sqrt([0.5, 0.3, 0.15, 0.0])
  np.testing.assert_allclose(np.bincount(out, minlength=4) / n, expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize(
  "wrong", [dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=0), dict(top_p=1.5)]
)
def test_values_out_of_range(wrong: dict):
  with pytest.raises(errors.InputError, match=next(iter(wrong))):
    sampling.Sampling(**wrong)


@pytest.mark.parametrize("vocab", [5, 128, 300, 1000])
def test_drawn_as_often_as_they_are_likely(vocab: int):
  """And those that are ruled out never, wherever they stand."""
  r = np.random.default_rng(vocab)
  odds = r.dirichlet(np.full(vocab, 0.3)) * (r.random(vocab) < 0.7)
  logits_BV = jnp.where(odds > 0, jnp.log(odds), sampling.FILTERED)[None]
  count = 50_000
  draws = sampling.draws([sampling.Sampling(1.0)] * count, range(count))
  drawn = jax.jit(sampling.sample)(jnp.repeat(logits_BV, count, 0), jnp.zeros(vocab, bool), draws, jnp.full(count, 3))
  found, expected = np.bincount(drawn, minlength=vocab), odds / odds.sum() * count
  assert not found[odds == 0].any()
  often = expected > 5
  squares = ((found - expected)[often] ** 2 / expected[often]).sum()
  assert squares < often.sum() + 5 * np.sqrt(2 * often.sum())  # chi-squared, five standard deviations


@pytest.mark.parametrize("temperature", [1e-39, 1e-30, 1e-6])
@pytest.mark.parametrize("offset", [0.0, -40.0])
def test_next_to_no_temperature_is_greedy(temperature: float, offset: float):
  """Neither what is ruled out nor what is behind the vocabulary comes out where all others are all but impossible."""
  logits_BV = jax.random.normal(jax.random.key(0), (8, 300)) * 5 + offset
  suppressed_V = jnp.arange(300) % 3 == 0
  expected = jnp.where(suppressed_V, -jnp.inf, logits_BV).argmax(-1)
  for filters in ({}, {"top_k": 9}, {"top_p": 0.8}):
    draws = sampling.draws([sampling.Sampling(temperature, **filters)] * 8, range(8))
    np.testing.assert_array_equal(sampling.sample(logits_BV, suppressed_V, draws, jnp.zeros(8, jnp.int32)), expected)
