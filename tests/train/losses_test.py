"""The chunked loss equals the plain one, in value and gradients, on one device and on eight."""

import jax
import jax.numpy as jnp
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


def plain(
  kernel: jax.Array, x: jax.Array, targets: jax.Array, weights: jax.Array, objectives: jax.Array
) -> losses.Loss:
  """All logits at once, differentiated by JAX."""
  sums = losses.by_objective(losses.cross_entropy(x @ kernel, targets), weights, objectives)
  return losses.Loss(sums.loss.sum(), sums)


def mean(loss: losses.Loss) -> jax.Array:
  """The loss per weighted token, to be differentiated."""
  return loss.total / jnp.maximum(jax.lax.stop_gradient(loss.sums.weight).sum(), 1.0)


@pytest.mark.parametrize("chunk", [512, 7])
def test_equals_plain(chunk: int):
  def both(f):
    def loss(p, x, *rest):
      return (mean(f(p, x, *rest)) * 3.0, f(p, x, *rest))  # the second is not differentiated

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

  def loss(p, x):
    return mean(losses.chunked(p, x, *rest, 5))

  want = jax.value_and_grad(lambda p, x: mean(plain(p, x, *rest)), argnums=(0, 1))(kernel, x)
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
  assert np.isfinite(got.total)


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (0.5, 3.0, 1.0), (0.0, 1.0, 0.0)])
def test_objectives_of_different_weight(chunk: int, factors: tuple[float, ...]):
  """The gradient is that of the plain sums, each multiplied by its objective's factor."""
  kernel, x, targets, weights, objectives = inputs(0.5)
  factors += (1.0,) * (losses.NUM_OBJECTIVES - len(factors))

  def want(kernel, x):
    return (plain(kernel, x, targets, weights, objectives).sums.loss * np.array(factors)).sum()

  def have(kernel, x):
    weighted = weights * np.array(factors, np.float32)[objectives]
    return losses.chunked(kernel, x, targets, weighted, objectives, chunk).total

  for a, b in zip(*(jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(kernel, x) for f in (have, want)), strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.parametrize(
  "of_sums",
  [
    lambda sums: sums.loss[1],
    lambda sums: (sums.loss * np.arange(losses.NUM_OBJECTIVES)).sum(),
    lambda sums: sums.loss.sum(),
    lambda sums: sums.weight.sum(),
  ],
)
def test_what_is_only_to_be_read_has_no_gradient_that_passes_for_one(of_sums):
  kernel, x, *rest = inputs(0.5)
  for gradient in jax.grad(lambda p, x: of_sums(losses.chunked(p, x, *rest, 7).sums), argnums=(0, 1))(kernel, x):
    assert np.isnan(gradient).all()


def test_a_target_that_is_no_id_counts_alike_on_any_mesh():
  kernel, x, targets, weights, objectives = inputs(1.0)
  targets[0, :3] = (-1, V, 2**31 - 1)
  one = losses.chunked(kernel, x, targets, weights, objectives, 5)
  with partitioning.use(mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, tensor=4))):
    many = jax.jit(lambda kernel, x: losses.chunked(kernel, x, targets, weights, objectives, 5))(kernel, x)
  assert np.isfinite(one.total)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, many)


@pytest.mark.parametrize("which", range(5))
def test_shapes_that_do_not_belong_together_are_told(which: int):
  args = list(inputs(0.5))
  args[which] = args[which][:-1]
  with pytest.raises(AssertionError, match="Chex"):
    losses.chunked(*args)
