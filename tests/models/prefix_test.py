"""P-Tuning v2: trained keys and values in front of every layer's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax.kernels import attention
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning

LENGTH, HEADS, PREFIX = 7, 3, 5
SIZES = dict(vocab_size=40, num_layers=3, embed_dim=16, num_heads=2, mlp_dim=24, max_length=32)


def prepended(
  q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, prefix_key: np.ndarray, prefix_value: np.ndarray
) -> np.ndarray:
  """Query by query, in float64, with the prefix as the first keys and values of every row."""
  batch, length, heads, size = q.shape
  out = np.zeros(q.shape)
  for b, i, h in np.ndindex(batch, length, heads):
    keys = np.concatenate([prefix_key[h], k[b, mask[b, i], h]])
    values = np.concatenate([prefix_value[h], v[b, mask[b, i], h]])
    scores = np.exp(keys @ q[b, i, h] / np.sqrt(size))
    out[b, i, h] = scores / scores.sum() @ values
  return out


def test_attention_with_prepended_keys():
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, 2, LENGTH, HEADS, 4))
  prefix = rng.normal(size=(2, HEADS, PREFIX, 4))
  start = rng.integers(0, LENGTH, (2, LENGTH))
  end = np.minimum(start + rng.integers(0, LENGTH, (2, LENGTH)), LENGTH)  # some see the prefix alone
  mask = (np.arange(LENGTH) >= start[..., None]) & (np.arange(LENGTH) < end[..., None])
  expected = prepended(q, k, v, mask, *prefix)

  def attend(q, start, end):
    return attention.attend(
      partitioning.target(),
      *(jnp.array(x, jnp.float32) for x in (q, k, v)),
      start,
      end,
      prefix=tuple(jnp.array(prefix, jnp.float32)),
    )

  np.testing.assert_allclose(attend(q, start, end), expected, atol=1e-5)
  for i in (0, 3):  # decoding's own path
    one = attend(q[:, i : i + 1], start[:, i : i + 1], end[:, i : i + 1])
    np.testing.assert_allclose(one, expected[:, i : i + 1], atol=1e-5)


def test_each_layer_has_its_own_and_all_are_trained():
  """Parameters as counted; scanned and unrolled give the same; every entry gets a gradient, at any position."""
  config = config_lib.GLMConfig(**SIZES, positions="rotary_2d", mlp="gelu_tanh", prefix_length=PREFIX)
  params = glm.init_params(config, jax.random.key(0))
  shape = params["layers"]["attention"]["prefix_key"].shape
  assert shape == params["layers"]["attention"]["prefix_value"].shape == (3, 2, PREFIX, 8)
  assert sum(x.size for x in jax.tree.leaves(params)) == params_lib.count(config)
  line = jnp.arange(LENGTH)[None]
  arrays = (line, jnp.stack([line, 0 * line], 1), 0 * line, line + 1)

  def run(config: config_lib.GLMConfig, params: dict) -> tuple[jax.Array, dict]:
    def loss(p):
      return jnp.square(glm.GLM(config).apply({"params": p}, *arrays)).mean()

    return jax.jit(jax.value_and_grad(loss))(params)

  loss, grads = run(config, params)
  for name in ("prefix_key", "prefix_value"):
    assert bool((grads["layers"]["attention"][name] != 0).all())
  apart, _ = run(dataclasses.replace(config, scan_layers=False), glm.unstack_layers(params))
  np.testing.assert_allclose(apart, loss, rtol=1e-5)
  sublayer = params["layers"]["attention"]
  sublayer = sublayer | {"prefix_value": sublayer["prefix_value"].at[2].add(1.0)}
  assert not np.allclose(run(config, params | {"layers": params["layers"] | {"attention": sublayer}})[0], loss)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_is_split_by_heads():
  config = config_lib.GLMConfig(**SIZES, prefix_length=PREFIX)
  boxed = jax.eval_shape(lambda key: glm.init(config, key), jax.random.key(0))
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
  found = partitioning.shardings(boxed, mesh)["layers"]["attention"]["prefix_key"]
  assert tuple(found.spec) + (None,) * (4 - len(found.spec)) == ("stage", "tensor", None, None)


def test_negative_length():
  with pytest.raises(errors.InputError, match="prefix_length is -1: give a whole number, 0 or more"):
    config_lib.GLMConfig(**SIZES, prefix_length=-1)
