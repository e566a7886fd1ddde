"""The flash kernels, interpreted: the numbers and gradients of dense attention, whatever the intervals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import target
from glmjax.models import attention
from glmjax.models import config as config_lib
from glmjax.models import flash
from glmjax.models import flash_gpu
from glmjax.models import glm
from glmjax.parallel import collectives
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning

Intervals = tuple[np.ndarray, np.ndarray]


def gmask(length: int, seed: int) -> Intervals:
  """A context of any size, then causal."""
  places = np.arange(length)
  return np.zeros(length), np.maximum(places + 1, np.random.default_rng(seed).integers(1, length))


def packed(length: int, seed: int) -> Intervals:
  """Samples behind one another, each with a context of its own; some of a token only."""
  rng, start, end = np.random.default_rng(seed), np.zeros(length), np.zeros(length)
  edges = np.concatenate([[0], np.sort(rng.choice(np.arange(1, length), 7, replace=False)), [length]])
  for first, last in zip(edges, edges[1:]):
    start[first:last] = first
    end[first:last] = np.maximum(np.arange(first, last) + 1, rng.integers(first, last) + 1)
  return start, end


def alone(length: int, seed: int) -> Intervals:
  """Padding: each place sees itself."""
  del seed
  return np.arange(length), np.arange(length) + 1


def anywhere(length: int, seed: int) -> Intervals:
  """Intervals of no order."""
  rng = np.random.default_rng(seed)
  start = rng.integers(0, length, length)
  return start, start + 1 + rng.integers(0, length - start)


def draw(rows: int, length: int, keys: int, heads: int, width: int, dtype: str = "float32") -> list[jax.Array]:
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal((rows, size, heads, width)), dtype) for size in (length, keys, keys, length)]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", [gmask, packed, alone, anywhere])
def test_numbers_and_gradients_of_dense_attention(kind, width):
  q, k, v, d = draw(2, 256, 256, 2, width)
  start, end = (jnp.asarray(np.stack(x), jnp.int32) for x in zip(kind(256, 0), kind(256, 1)))
  want, pull = jax.vjp(lambda *x: attention.dense(*x, start, end), q, k, v)
  out, sums = flash_gpu.forward(q, k, v, start, end, interpret=True)
  np.testing.assert_allclose(out, want, atol=1e-5)
  delta = jnp.swapaxes((out * d).sum(-1), 1, 2)
  for got, exact in zip(flash_gpu.backward(q, k, v, start, end, sums, delta, d, interpret=True), pull(d)):
    np.testing.assert_allclose(got, exact, atol=2e-5)


@pytest.mark.parametrize("keys", [128, 640])
def test_one_query_over_the_cache(keys):
  q, k, v, _ = draw(3, 1, keys, 2, 64)
  start, end = jnp.array([[0], [5], [keys - 1]], jnp.int32), jnp.array([[keys], [77], [keys]], jnp.int32)
  got = flash_gpu.decode(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), start, end, interpret=True)
  np.testing.assert_allclose(got, attention.dense(q, k, v, start, end), atol=1e-5)


def test_blocks_that_no_query_sees_are_not_read():
  """A key of NaN behind the diagonal changes nothing, and its gradient is zero."""
  q, k, v, d = draw(1, 256, 256, 1, 64)
  k, v = (x.at[:, 192:].set(jnp.nan) for x in (k, v))
  end = jnp.minimum(jnp.arange(256, dtype=jnp.int32)[None] + 1, 128)
  start = jnp.zeros_like(end)
  out, sums = flash_gpu.forward(q, k, v, start, end, interpret=True)
  assert np.isfinite(out).all()
  delta = jnp.swapaxes((out * d).sum(-1), 1, 2)
  dq, dk, dv = flash_gpu.backward(q, k, v, start, end, sums, delta, d, interpret=True)
  assert np.isfinite(dq).all() and not np.asarray(dk[:, 192:]).any() and not np.asarray(dv[:, 192:]).any()


@pytest.fixture
def interpreted(monkeypatch):
  """Eight devices that take the GPU's kernels."""
  if jax.device_count() < 8:
    pytest.skip("needs 8 devices")
  monkeypatch.setattr(target, "runs_triton", lambda: True)
  for name in ("forward", "backward"):
    monkeypatch.setattr(flash_gpu, name, functools.partial(getattr(flash_gpu, name), interpret=True))


@pytest.mark.parametrize("sizes, apart", [(dict(data=2, context=2, tensor=2), False),
                                          (dict(data=2, context=4), True)])
def test_split_over_tokens(interpreted, sizes, apart):
  """Each device has its own queries attend to all keys; `apart`: in a shard_map over rows, as ZeRO-1 has it."""
  q, k, v, d = draw(2, 512, 512, 2, 64, "bfloat16")
  start, end = (jnp.asarray(np.stack([a, b]), jnp.int32) for a, b in zip(packed(512, 0), gmask(512, 1)))
  run = lambda q, k, v, d, start, end: (lambda out, pull: (out, *pull(d)))(*jax.vjp(
      lambda *x: attention.attend(*x, start, end), q, k, v))
  want = run(q, k, v, d, start, end)
  P = jax.sharding.PartitionSpec

  def shard(*args: jax.Array) -> tuple[jax.Array, ...]:
    with partitioning.rows_apart():
      return run(*args)

  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes))
  with partitioning.use(mesh):
    sharding = partitioning.named(mesh, partitioning.FSDP, "batch", "length", "act_heads", None)
    args = *(jax.device_put(x, sharding) for x in (q, k, v, d)), start, end
    rows = P(partitioning.ROW_AXES)
    call = jax.shard_map(shard, in_specs=rows, out_specs=rows, axis_names={*partitioning.ROW_AXES},
                         check_vma=False) if apart else run
    compiled = jax.jit(call).lower(*args).compile()
    got = compiled(*args)
  gathered = [c for c in collectives.of(compiled.as_text(), mesh) if c.kind == "all-gather"]
  assert len(gathered) == 2 and all(c.axes == ("context",) for c in gathered)  # keys and values
  for a, b in zip(got, want):
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mesh_shape", [(8, 1), (2, 4)])
def test_split_over_rows_and_heads(interpreted, mesh_shape):
  """Each device attends to its part: the same numbers, and no device gathers another's."""
  q, k, v, d = draw(8, 128, 128, 4, 64, "bfloat16")
  start, end = (jnp.asarray(np.tile(x, (8, 1)), jnp.int32) for x in gmask(128, 0))
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=mesh_shape[0], tensor=mesh_shape[1]))
  run = lambda q, k, v: (lambda out, pull: (out, *pull(d)))(*jax.vjp(
      lambda *x: attention.attend(*x, start, end), q, k, v))
  want = run(q, k, v)
  with partitioning.use(mesh):
    sharding = partitioning.named(mesh, partitioning.FSDP, "batch", None, "act_heads", None)
    compiled = jax.jit(run).lower(*(jax.device_put(x, sharding) for x in (q, k, v))).compile()
    got = compiled(*(jax.device_put(x, sharding) for x in (q, k, v)))
  assert "all-gather" not in compiled.as_text()
  for a, b in zip(got, want):
    np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


def test_dots_remat_repeats_no_product():
  """What backward computes again is element by element: full remat's products are not among it."""
  config = config_lib.GLMConfig(vocab_size=64, num_layers=4, embed_dim=64, num_heads=2, mlp_dim=512, max_length=16,
                                scan_layers=False)
  tokens = jnp.ones((4, 16), jnp.int32)

  def flops(remat: str) -> float:
    model = glm.GLM(dataclasses.replace(config, remat=remat))
    stacked = dataclasses.replace(config, scan_layers=True)
    params = jax.eval_shape(lambda: glm.unstack_layers(glm.init_params(stacked, jax.random.key(0))))
    loss = lambda p: model.apply({"params": p}, tokens, tokens, tokens * 0, tokens * 16).sum()
    return jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]

  none, dots, full = map(flops, ("none", "dots", "full"))
  assert none <= dots < none + 0.2 * (full - none)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", [gmask, packed, anywhere])
def test_on_the_gpu(kind, width):
  q, k, v, d = draw(2, 1024, 1024, 4, width, "bfloat16")
  start, end = (jnp.asarray(np.stack(x), jnp.int32) for x in zip(kind(1024, 0), kind(1024, 1)))
  assert flash.fits(q, k)
  run = lambda way: jax.jit(lambda q, k, v: (lambda out, pull: (out, *pull(d.astype(out.dtype))))(
      *jax.vjp(lambda *x: way(*x, start, end), q, k, v)))
  exact = run(attention.dense)(*(x.astype(jnp.float32) for x in (q, k, v)))
  for got, want in zip(run(flash.attend)(q, k, v), exact):
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert error < 1e-2, error
