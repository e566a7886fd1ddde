"""The kernel of LayerNorm's backward, interpreted, against differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.kernels import layer_norm
from glmjax.kernels import layer_norm_gpu
from glmjax.parallel import partitioning


@pytest.mark.parametrize("width", [128, 384, 1024])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernel_equals_differentiation(width: int, dtype: str) -> None:
  keys = jax.random.split(jax.random.key(0), 3)
  x, g = (3 * jax.random.normal(key, (2, 64, width), dtype) + 1 for key in keys[:2])
  scale = jax.random.normal(keys[2], width)
  dx, sums = layer_norm_gpu.backward(1e-5, x, scale, g, interpret=True)
  assert dx.dtype == x.dtype and sums.shape == (2, 2, 2, width)
  norm = functools.partial(layer_norm.layer_norm, partitioning.target(), 1e-5, "float32")
  _, back = jax.vjp(norm, x, scale, jnp.zeros(width))
  tolerance = 1e-4 if dtype == "float32" else 2**-7
  for got, want in zip((dx, *sums.sum((0, 1))), back(g.astype(jnp.float32))):
    np.testing.assert_allclose(
      got.astype(jnp.float32), want.astype(jnp.float32), rtol=tolerance, atol=tolerance if got.ndim == 3 else 1e-3
    )


def test_which_widths_fit() -> None:
  assert all(map(layer_norm_gpu.fits, (768, 1024, 2048, 4096, 12_288)))
  assert not any(map(layer_norm_gpu.fits, (64, 100, 128 * 17, 32_768)))
