"""GeGLU's product: values and gradients as differentiation gives them, and the kernel as the plain form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import target as target_lib
from glmjax.kernels import geglu as geglu_kernels
from glmjax.kernels import geglu_gpu
from glmjax.kernels import layer_norm_gpu
from glmjax.kernels import layer_norm
from glmjax.models import geglu
from glmjax.models import weights
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.quantize import qarray


CPU = target_lib.Target.of(jax.devices()[0])


def _arrays(dtype: str, rows: int = 2, length: int = 256, width: int = 128, out: int = 8) -> tuple[jax.Array, ...]:
  keys = jax.random.split(jax.random.key(0), 4)
  return (
    3 * jax.random.normal(keys[0], (rows, length, 2, width), dtype),
    jax.random.normal(keys[1], (2, width), jnp.float32),
    jax.random.normal(keys[2], (width, out), jnp.float32) / 16,
    jax.random.normal(keys[3], (rows, length, out), dtype),
  )


def test_product_equals_plain_differentiation() -> None:
  hidden, bias, kernel, g = _arrays("float32")

  def plain(bias: jax.Array, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    up, gate = jnp.moveaxis(hidden + bias, 2, 0)
    return (up * jax.nn.gelu(gate, approximate=False)) @ kernel

  value, back = jax.vjp(lambda b, h, k: geglu.product(CPU, b, h, weights.Float(k)), bias, hidden, kernel)
  expected, expected_back = jax.vjp(plain, bias, hidden, kernel)
  np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
  for got, want in zip(back(g), expected_back(g)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernel_equals_plain_form(dtype: str) -> None:
  hidden, bias, kernel, g = _arrays(dtype)
  d = (g.astype(jnp.float32) @ kernel.T).astype(dtype)
  wide = jnp.linspace(-40, 40, hidden[:, :, 1].size).reshape(hidden[:, :, 1].shape).astype(dtype)
  for inputs in (hidden, hidden.at[:, :, 1].set(wide)):
    *got, sums = geglu_gpu.gradient(inputs, bias, d, interpret=True)
    assert sums.shape == (2, 2, 2, 128)
    for made, want in zip((*got, sums.sum((0, 1))), geglu_kernels.plain(CPU, inputs, bias, d)):
      assert made.dtype == want.dtype
      tolerance = 2e-5 if dtype == "float32" else 2**-6
      high = float(jnp.abs(want).max())
      np.testing.assert_allclose(
        made.astype(jnp.float32),
        want.astype(jnp.float32),
        rtol=tolerance,
        atol=tolerance * high if made.ndim == 2 else tolerance,
      )


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_kernels_on_a_mesh(monkeypatch) -> None:
  """Each device's part of GeGLU's and LayerNorm's kernels (interpreted), rows, tokens and mlp split, is the whole's."""
  hidden, bias, kernel, g = _arrays("bfloat16", width=256)
  d = (g.astype(jnp.float32) @ kernel.T).astype("bfloat16")
  x, scale = hidden[:, :, 0], bias[0]

  def backward(target: target_lib.Target, x: jax.Array, scale: jax.Array) -> tuple[jax.Array, ...]:
    def norm(x, scale):
      return layer_norm.layer_norm(target, 1e-5, "bfloat16", x, scale, jnp.zeros(256))

    return *geglu_kernels.BACKWARD.run(target, hidden, bias, d), *jax.vjp(norm, x, scale)[1](d)

  want = backward(CPU, x, scale)
  calls = []
  for module, name in ((geglu_gpu, "gradient"), (layer_norm_gpu, "backward")):
    run = functools.partial(getattr(module, name), interpret=True)
    monkeypatch.setattr(module, name, lambda *a, run=run, name=name: (calls.append(name), run(*a))[1])
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, context=2, tensor=2), jax.devices()[:8])
  with partitioning.use(mesh):
    target = dataclasses.replace(partitioning.target(), platform="gpu", features=frozenset({"gpu", "triton"}))
    got = jax.jit(functools.partial(backward, target))(x, scale)
  assert calls == ["gradient", "backward"]
  for made, expected in zip(got, want, strict=True):
    high = float(jnp.abs(expected).max())
    np.testing.assert_allclose(
      made.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-6, atol=2**-6 * (high if made.ndim < 3 else 1)
    )


def test_backward_keeps_only_what_went_in() -> None:
  hidden, bias, kernel, _ = _arrays("bfloat16")
  for weight in (weights.Float(kernel), qarray.quantize(kernel, 4, (0,))):
    _, back = jax.vjp(functools.partial(geglu.product, CPU), bias, hidden, weight)
    kept = sorted(x.shape for x in jax.tree.leaves(back))
    assert kept == sorted(x.shape for x in jax.tree.leaves((hidden, bias, weight)))


@pytest.mark.parametrize("bits", qarray.BITS)
def test_quantized_product_equals_the_dequantized(bits: int) -> None:
  hidden, bias, kernel, g = _arrays("float32")
  q = qarray.quantize(kernel, bits, (0,))

  def run(weight, bias, hidden):
    return geglu.product(CPU, bias, hidden, weight)

  value, back = jax.vjp(functools.partial(run, q), bias, hidden)
  expected, expected_back = jax.vjp(functools.partial(run, weights.Float(qarray.dequantize(q))), bias, hidden)
  np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)
  for got, want in zip(back(g), expected_back(g)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
