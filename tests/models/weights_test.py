"""Quantizing a model's parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.quantize import qarray
from glmjax.models import weights


def _config(**changes: object) -> config_lib.GLMConfig:
  sizes = {"vocab_size": 96, "num_layers": 2, "embed_dim": 32, "num_heads": 4, "mlp_dim": 86, "max_length": 16}
  return config_lib.GLMConfig(**sizes | changes)


def _inputs() -> tuple[jax.Array, ...]:
  tokens = jax.random.randint(jax.random.key(3), (2, 8), 0, 96)
  index = jnp.broadcast_to(jnp.arange(8), (2, 8))
  return tokens, index, jnp.zeros_like(index), index + 1


def _params(config: config_lib.GLMConfig) -> dict:
  from flax.core import meta  # pylint: disable=g-import-not-at-top

  return meta.unbox(jax.jit(glm.GLM(config).init)(jax.random.key(0), *_inputs())["params"])


@pytest.mark.parametrize(
  "bits, changes", [(8, {}), (4, {}), (4, {"scan_layers": False}), (8, {"mlp": "gelu", "tie_embeddings": False})]
)
def test_model_runs_on_quantized_parameters(bits: int, changes: dict):
  config = _config(**changes)
  params = _params(config)
  quantized = weights.quantize(params, bits)

  def is_q(x):
    return isinstance(x, qarray.QuantizedArray)

  found = [x for x in jax.tree.leaves(quantized, is_leaf=is_q) if is_q(x)]
  assert len(found) == (4 if config.scan_layers else 4 * config.num_layers)
  untouched = [x for x in jax.tree.leaves(quantized, is_leaf=is_q) if not is_q(x)]
  assert len(untouched) == len(jax.tree.leaves(params)) - len(found)
  back = jax.tree.map(lambda x: qarray.dequantize(x) if is_q(x) else x, quantized, is_leaf=is_q)
  assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, params)
  run = jax.jit(lambda params: glm.GLM(config).apply({"params": params}, *_inputs()))
  logits, expected, original = run(quantized), run(back), run(params)
  np.testing.assert_allclose(logits, expected, atol=1e-4)
  assert float(jnp.abs(logits - original).max()) < {8: 0.1, 4: 2.0}[bits] * float(jnp.abs(original).max())


def test_stacked_layers_have_scales_of_their_own():
  params = {
    "layers": {
      "mlp": {"wo": {"kernel": jnp.stack([jnp.ones((4, 6)), jnp.full((4, 6), 50.0)]), "bias": jnp.ones((2, 6))}}
    }
  }
  q = weights.quantize(params, 8)["layers"]["mlp"]["wo"]["kernel"]
  assert q.scale.shape == (2, 1, 6) and q.axis == -2
  np.testing.assert_allclose(qarray.dequantize(q), params["layers"]["mlp"]["wo"]["kernel"], rtol=1e-3)


def _bytes(params: dict) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(params))


def test_bytes_and_abstract_trees():
  params = _params(_config())
  sizes = {bits: _bytes(weights.quantize(params, bits)) for bits in qarray.BITS}
  kernels = _config().num_layers * (4 * 32 * 32 + 3 * 32 * 86)
  assert sizes[8] - sizes[4] == kernels // 2
  assert _bytes(params) == 4 * params_lib.count(_config())
  abstract = jax.eval_shape(lambda p: weights.quantize(p, 4), params)
  concrete = weights.quantize(params, 4)
  assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
  assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, concrete)
