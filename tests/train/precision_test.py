"""bfloat16 follows float32, whatever the shapes: XLA's CPU has gaps there that raise, or hide in a slow path."""

import dataclasses

import jax
import numpy as np
import pytest

from glmjax.models import glm
from glmjax.train import objective as objective_lib


@pytest.mark.parametrize(
  "changes",
  [
    dict(num_heads=1, mlp_dim=50, scan_layers=False),
    dict(positions="learned_2d", norm="pre", mlp="gelu_tanh", tie_embeddings=False, embed_dim=36, remat="dots"),
  ],
)
def test_gradients_follow_float32(tiny, source, changes: dict):
  config = dataclasses.replace(tiny, **changes)
  source = dataclasses.replace(source, wide=config.positions == "learned_2d")
  batch = next(source.batches(iter([(0, 6)])))
  params = glm.init_params(dataclasses.replace(config, scan_layers=True), jax.random.key(0))

  def grads(dtype: str):
    objective = objective_lib.Objective(dataclasses.replace(config, dtype=dtype), chunk=16)
    return jax.jit(jax.grad(lambda p: objective.loss(p, batch).total / batch["loss_weights"].sum()))(params)

  def close(low: jax.Array, high: jax.Array):
    assert low.dtype == np.float32
    assert np.linalg.norm(low - high) <= 0.03 * np.linalg.norm(high) + 1e-6

  jax.tree.map(close, grads("bfloat16"), grads("float32"))
