"""The chunked loss equals the plain one, in value and gradients, on one device and on eight."""

import jax
import numpy as np
import pytest

from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.train import losses

B, L, D, V = 8, 12, 16, 40


def inputs(density: float) -> tuple:
  """Random kernel, hidden states, targets, weights and objectives."""
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(D, V)).astype(np.float32)
  x = rng.normal(size=(B, L, D)).astype(np.float32)
  weights = ((rng.random((B, L)) < density) * rng.choice([1.0, 0.5], (B, L))).astype(np.float32)
  weights[3] = 0
  return kernel, x, rng.integers(0, V, (B, L)), weights, rng.integers(0, 3, (B, L))


def plain(kernel: jax.Array, x: jax.Array, targets: jax.Array, weights: jax.Array,
          objectives: jax.Array) -> losses.Sums:
  """All logits at once."""
  return losses.by_objective(losses.cross_entropy(x @ kernel, targets), weights, objectives)


@pytest.mark.parametrize("chunk", [512, 7])
def test_equals_plain(chunk: int):
  def both(f):
    loss = lambda p, x, *rest: (f(p, x, *rest).mean() * 3.0, f(p, x, *rest))
    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

  want, have = both(plain), both(lambda *args: losses.chunked(*args, chunk))
  alone = jax.jit(lambda *args: losses.chunked(*args, chunk))
  for density in (0.0, 0.1, 0.5, 1.0):
    args = inputs(density)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), have(*args), want(*args))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), alone(*args), have(*args)[1])


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(data=2, tensor=2, context=2), dict(context=4)])
def test_equals_plain_sharded(sizes: dict[str, int]):
  kernel, x, *rest = inputs(0.5)
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes))
  loss = lambda p, x: losses.chunked(p, x, *rest, 5).mean()
  want = jax.value_and_grad(lambda p, x: plain(p, x, *rest).mean(), argnums=(0, 1))(kernel, x)
  with partitioning.use(mesh):
    rows = partitioning.named(mesh, partitioning.FSDP, "batch", "length", None)
    split = partitioning.named(mesh, partitioning.FSDP, "embed", "vocab")
    have = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(jax.device_put(kernel, split), jax.device_put(x, rows))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), have, want)


def test_skips_chunks_without_weight():
  kernel, x, targets, weights, objectives = inputs(0.5)
  weights[:, :3], weights[:, 3:] = 1, 0
  broken = x.copy()
  broken[:, 3:] = np.nan  # never looked at: 8 x 3 tokens count, one chunk
  got = losses.chunked(kernel, broken, targets, weights, objectives, 24)
  assert np.isfinite(got.mean())
