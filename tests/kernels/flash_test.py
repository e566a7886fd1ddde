"""The flash kernels, interpreted: the numbers and gradients of dense attention, whatever the intervals."""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import target as target_lib
from glmjax.kernels import attention
from glmjax.kernels import dropout as dropout_lib
from glmjax.models import config as config_lib
from glmjax.kernels import flash
from glmjax.kernels import flash_blocks
from glmjax.kernels import flash_gpu
from glmjax.kernels import flash_tpu
from glmjax.kernels import registry
from glmjax.models import glm
from glmjax.parallel import collectives
from glmjax.parallel import hlo
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning

HERE = target_lib.Target.of(jax.devices()[0])
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


def nothing(length: int, seed: int) -> Intervals:
  """Some queries see no key, and some blocks of queries none at all."""
  start, end = packed(length, seed)
  hidden = np.random.default_rng(seed).random(length) < 0.3
  hidden[length // 2 :] = True
  return start, np.where(hidden, start, end)


KINDS = [gmask, packed, alone, anywhere, nothing]


def both(kind) -> tuple[jax.Array, jax.Array]:
  """Of two rows of 256 tokens."""
  return tuple(jnp.asarray(np.stack(x), jnp.int32) for x in zip(kind(256, 0), kind(256, 1)))


def draw(rows: int, length: int, keys: int, heads: int, width: int, dtype: str = "float32") -> list[jax.Array]:
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal((rows, size, heads, width)), dtype) for size in (length, keys, keys, length)]


def dropping(rows: int, heads: int, length: int) -> dropout_lib.Dropout:
  return dropout_lib.make(0.3, jax.random.split(jax.random.key(7), rows), heads, length)


@pytest.fixture
def small_blocks(monkeypatch):
  """Several blocks and parts, of different sizes, in few tokens."""
  monkeypatch.setattr(flash_tpu, "_FORWARD", (128, 256))
  monkeypatch.setattr(flash_tpu, "_BACKWARD", (128, 128))


@pytest.mark.parametrize(
  "kernels, width, drops",
  [(flash_gpu, 64, False), (flash_gpu, 128, True), (flash_tpu, 128, False), (flash_tpu, 128, True)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_gradients_of_dense_attention(small_blocks, kind, kernels: ModuleType, width: int, drops: bool):
  q, k, v, d = draw(2, 256, 256, 2, width)
  start, end = both(kind)
  dropout = dropping(2, 2, 256) if drops else None

  def dense(*x):
    return attention.dense(HERE, *x, start, end, dropout)

  want, pull = jax.vjp(dense, q, k, v)
  run = jax.jit(functools.partial(kernels.forward, dropout=dropout, interpret=True))
  out, sums = run(q, k, v, start, end)
  np.testing.assert_allclose(out, want, atol=1e-5)
  delta = jnp.swapaxes((out * d).sum(-1), 1, 2)
  back = jax.jit(functools.partial(kernels.backward, HERE, dropout=dropout, interpret=True))
  for got, exact in zip(back(q, k, v, start, end, sums, delta, d), pull(d)):
    np.testing.assert_allclose(got, exact, atol=3e-5)


def test_tpu_gradients_of_queries_in_parts(monkeypatch, small_blocks):
  """More queries than fit vector memory: their parts' gradients of keys and values add up."""
  q, k, v, d = draw(2, 256, 256, 1, 128)
  start, end = both(packed)
  dropout = dropping(2, 1, 256)
  out, sums = jax.jit(functools.partial(flash_tpu.forward, dropout=dropout, interpret=True))(q, k, v, start, end)
  inputs = q, k, v, start, end, sums, jnp.swapaxes((out * d).sum(-1), 1, 2), d

  def run():
    return jax.jit(functools.partial(flash_tpu.backward, HERE, dropout=dropout, interpret=True))(*inputs)

  whole = run()
  monkeypatch.setattr(flash_tpu, "_QUERIES", 128)
  for got, want in zip(run(), whole):
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_block_sizes_divide():
  for length, most, want in ((2048, 1024, 1024), (1536, 1024, 768), (640, 512, 128), (384, 1024, 384)):
    of = flash_tpu._Blocks((most, most), (1, length, 1, 128), length)
    assert of.block_q == of.block_k == want


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_hold_all_that_is_seen(kind):
  start, end = both(kind)
  seen = np.asarray(attention.interval_mask(start, end, 256)).reshape(2, 4, 64, 8, 32).any((2, 4))
  first, last = map(np.asarray, flash_blocks.key_range(start, end, 64, 32, 256))
  blocks = np.arange(8)
  assert not (seen & ~((blocks >= first[..., None]) & (blocks < last[..., None]))).any()
  first, last = map(np.asarray, flash_blocks.query_range(start, end, 64, 32, 256))
  blocks = np.arange(4)[:, None]
  assert not (seen & ~((blocks >= first[:, None]) & (blocks < last[:, None]))).any()


@pytest.mark.parametrize("keys", [128, 640])
def test_one_query_over_the_cache(keys):
  q, k, v, _ = draw(3, 1, keys, 2, 64)
  start, end = jnp.array([[0], [77], [keys - 1]], jnp.int32), jnp.array([[keys], [77], [keys]], jnp.int32)
  got = flash_gpu.decode(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), start, end, interpret=True)
  np.testing.assert_allclose(got, attention.dense(HERE, q, k, v, start, end), atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_one_query_over_the_cache_in_its_own_layout():
  """Without the kernel, on a mesh: dense attention, of which no device needs another's keys."""
  q, k, v, _ = draw(2, 1, 32, 4, 16)
  start, end = jnp.zeros((2, 1), jnp.int32), jnp.array([[7], [32]], jnp.int32)
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, tensor=4))
  with partitioning.use(mesh):
    target = dataclasses.replace(partitioning.target(), platform="gpu", features=frozenset({"gpu"}))
    way = attention.DECODE.choose(target, flash.Inputs(q, k, v, start, end))
    assert way.needs == ("gpu",)
    split = jax.NamedSharding(mesh, jax.P("data", None, "tensor", None))
    compiled = (
      jax.jit(lambda *x: way.run(target, flash.Inputs(*x)), out_shardings=split)
      .lower(*(jax.device_put(x, split) for x in (q, k, v)), start, end)
      .compile()
    )
    got = compiled(*(jax.device_put(x, split) for x in (q, k, v)), start, end)
  np.testing.assert_allclose(got, attention.dense(HERE, q, k, v, start, end), atol=1e-5)
  assert not collectives.of(hlo.read(compiled.as_text()), mesh)


@pytest.mark.parametrize("kernels", [flash_gpu, flash_tpu])
def test_blocks_that_no_query_sees_are_not_read(monkeypatch, kernels: ModuleType):
  """A key of NaN behind the diagonal changes nothing, and its gradient is zero."""
  for name in ("_FORWARD", "_BACKWARD"):
    monkeypatch.setattr(flash_tpu, name, (128, 128))
  q, k, v, d = draw(1, 256, 256, 1, 128)
  k, v = (x.at[:, 128:].set(jnp.nan) for x in (k, v))
  end = jnp.minimum(jnp.arange(256, dtype=jnp.int32)[None] + 1, 128)
  start = jnp.zeros_like(end)
  out, sums = jax.jit(functools.partial(kernels.forward, interpret=True))(q, k, v, start, end)
  assert np.isfinite(out).all()
  delta = jnp.swapaxes((out * d).sum(-1), 1, 2)
  dq, dk, dv = jax.jit(functools.partial(kernels.backward, HERE, interpret=True))(q, k, v, start, end, sums, delta, d)
  assert np.isfinite(dq).all() and not np.asarray(dk[:, 128:]).any() and not np.asarray(dv[:, 128:]).any()


@pytest.fixture(params=["gpu", "tpu"])
def interpreted(monkeypatch, request):
  """Eight devices that take the GPU's kernels, or the TPU's."""
  if jax.device_count() < 8:
    pytest.skip("needs 8 devices")
  interpret_kernels(monkeypatch, request.param)


def _attend(*arrays) -> jax.Array:
  """By the way that is chosen for the target in scope."""
  return attention.attend(partitioning.target(), *arrays)


def interpret_kernels(monkeypatch, platform: str) -> None:
  features = frozenset({platform, {"gpu": "triton", "tpu": "mosaic"}[platform]})
  target = partitioning.target

  def made():
    return dataclasses.replace(target(), platform=platform, features=features)

  monkeypatch.setattr(partitioning, "target", made)
  for module in (flash_gpu, flash_tpu):
    for name in ("forward", "backward"):
      monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))


@pytest.mark.parametrize("sizes, apart", [(dict(data=2, context=2, tensor=2), False), (dict(data=2, context=4), True)])
def test_split_over_tokens(interpreted, sizes, apart):
  """Each device has its own queries attend to all keys; `apart`: in a shard_map over rows, as ZeRO-1 has it."""
  q, k, v, d = draw(2, 512, 512, 2, 128, "bfloat16")  # blocks of 128 for each of four devices
  start, end = (jnp.asarray(np.stack([a, b]), jnp.int32) for a, b in zip(packed(512, 0), gmask(512, 1)))
  keys = jax.random.split(jax.random.key(7), 2)

  def run(attend, q, k, v, d, start, end, keys):  # what comes out, and gradients
    dropout = dropout_lib.make(0.3, keys, 2, 512)
    out, pull = jax.vjp(lambda *x: attend(*x, start, end, dropout), q, k, v)
    return out, *pull(d)

  want = jax.jit(functools.partial(run, functools.partial(attention.dense, HERE)))(q, k, v, d, start, end, keys)
  run = functools.partial(run, _attend)
  P = jax.sharding.PartitionSpec

  def shard(*args: jax.Array) -> tuple[jax.Array, ...]:
    with partitioning.rows_apart():
      return run(*args)

  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes))
  with partitioning.use(mesh):
    sharding = partitioning.named(mesh, partitioning.FSDP, "batch", "length", "act_heads", None)
    args = *(jax.device_put(x, sharding) for x in (q, k, v, d)), start, end, keys
    rows = P(partitioning.ROW_AXES)
    call = (
      jax.shard_map(shard, in_specs=rows, out_specs=rows, axis_names={*partitioning.ROW_AXES}, check_vma=False)
      if apart
      else run
    )
    compiled = jax.jit(call).lower(*args).compile()
    got = compiled(*args)
  gathered = [c for c in collectives.of(hlo.read(compiled.as_text()), mesh) if c.kind == "all-gather"]
  assert len(gathered) == 2 and all(c.axes == ("context",) for c in gathered)  # keys and values
  for a, b in zip(got, want):
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mesh_shape", [(8, 1), (2, 4)])
def test_split_over_rows_and_heads(interpreted, mesh_shape):
  """Each device attends to its part: the same numbers, and no device gathers another's."""
  q, k, v, d = draw(8, 128, 128, 4, 128, "bfloat16")
  start, end = (jnp.asarray(np.tile(x, (8, 1)), jnp.int32) for x in gmask(128, 0))
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=mesh_shape[0], tensor=mesh_shape[1]))
  dropout = dropping(8, 4, 128)

  def run(attend, q, k, v):
    return (lambda out, pull: (out, *pull(d)))(*jax.vjp(lambda *x: attend(*x, start, end, dropout), q, k, v))

  want = jax.jit(functools.partial(run, functools.partial(attention.dense, HERE)))(q, k, v)
  run = functools.partial(run, _attend)
  with partitioning.use(mesh):
    sharding = partitioning.named(mesh, partitioning.FSDP, "batch", None, "act_heads", None)
    compiled = jax.jit(run).lower(*(jax.device_put(x, sharding) for x in (q, k, v))).compile()
    got = compiled(*(jax.device_put(x, sharding) for x in (q, k, v)))
  assert "all-gather" not in compiled.as_text()
  for a, b in zip(got, want):
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_model_with_dropout_is_the_same_through_the_kernel(monkeypatch, platform):
  """Logits and gradients of a model in float32, its masks included."""
  config = config_lib.GLMConfig(
    vocab_size=64,
    num_layers=1,
    embed_dim=256,
    num_heads=2,
    mlp_dim=64,
    max_length=128,
    hidden_dropout=0.1,
    attention_dropout=0.3,
  )
  params = glm.init_params(config, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, 64)
  places = jnp.tile(jnp.arange(128, dtype=jnp.int32), (2, 1))

  def run() -> tuple[jax.Array, jax.Array]:
    model, rngs = glm.GLM(config, deterministic=False), {"dropout": jax.random.key(3)}

    def loss(p):
      return jnp.square(
        model.apply({"params": p}, tokens, places, places * 0, jnp.maximum(places + 1, 50), rngs=rngs)
      ).mean()

    return jax.jit(jax.value_and_grad(loss))(params)

  want = run()
  interpret_kernels(monkeypatch, platform)
  if platform == "gpu":  # in float32, for the test's sake
    way = dataclasses.replace(attention.ATTENTION.implementations[0], fits=registry.always)
    monkeypatch.setattr(attention, "ATTENTION", dataclasses.replace(attention.ATTENTION, implementations=(way,)))
  calls = []
  for module in (flash_gpu, flash_tpu):
    forward = module.forward
    monkeypatch.setattr(
      module, "forward", lambda *a, forward=forward, module=module: (calls.append(module), forward(*a))[1]
    )
  got = run()
  assert set(calls) == {flash_gpu if platform == "gpu" else flash_tpu}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_dots_remat_repeats_no_product():
  """What backward computes again is element by element: full remat's products are not among it."""
  config = config_lib.GLMConfig(
    vocab_size=64, num_layers=4, embed_dim=64, num_heads=2, mlp_dim=512, max_length=16, scan_layers=False
  )
  tokens = jnp.ones((4, 16), jnp.int32)

  def flops(remat: str) -> float:
    model = glm.GLM(dataclasses.replace(config, remat=remat))
    stacked = dataclasses.replace(config, scan_layers=True)
    params = jax.eval_shape(lambda: glm.unstack_layers(glm.init_params(stacked, jax.random.key(0))))

    def loss(p):
      return model.apply({"params": p}, tokens, tokens, tokens * 0, tokens * 16).sum()

    return jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]

  none, dots, full = map(flops, ("none", "dots", "full"))
  assert none <= dots < none + 0.2 * (full - none)


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [None, 0.1])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", [gmask, packed, anywhere])
def test_on_the_gpu(kind, width, rate):
  q, k, v, d = draw(2, 1024, 1024, 4, width, "bfloat16")
  start, end = (jnp.asarray(np.stack(x), jnp.int32) for x in zip(kind(1024, 0), kind(1024, 1)))
  dropout = rate and dropout_lib.make(rate, jax.random.split(jax.random.key(7), 2), 4, 1024)
  assert attention.ATTENTION.choose(HERE, flash.Inputs(q, k, v, start, end, dropout)).needs == ("triton",)

  def run(way):
    return jax.jit(
      lambda q, k, v: (lambda out, pull: (out, *pull(d.astype(out.dtype))))(
        *jax.vjp(lambda *x: way(*x, start, end, dropout), q, k, v)
      )
    )

  exact = run(functools.partial(attention.dense, HERE))(*(x.astype(jnp.float32) for x in (q, k, v)))
  for got, want in zip(run(functools.partial(attention.attend, HERE))(q, k, v), exact):
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert error < 1e-2, error
