"""P-Tuning v2 (Liu et al. 2021, arXiv 2110.07602) by projection: a small table and a perceptron that make the keys and
values in front of every layer's. Only they train; what they make is all that inference needs.

P prefix, D model, E hidden, N layers, H heads, K head dimension.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from glmjax.models import config as config_lib
from glmjax.models import layers
from glmjax.models import params as params_lib


def project(encoder: Mapping[str, jax.Array]) -> jax.Array:
  """Returns keys and values [N, 2, H, P, K] of an encoder's parameters by their names, in their dtype, as ChatGLM-6B's
  PrefixEncoder computes them.
  """
  hidden_PE = jnp.tanh(encoder["table"] @ encoder["hidden_kernel"] + encoder["hidden_bias"])
  found_PNTHK = jnp.einsum("PE,ENTHK->PNTHK", hidden_PE, encoder["out_kernel"]) + encoder["out_bias"]
  return found_PNTHK.transpose(1, 2, 3, 0, 4)


class Encoder(nn.Module):
  """Declares an encoder's parameters and projects them."""

  config: config_lib.GLMConfig

  @nn.compact
  def __call__(self) -> jax.Array:
    declared: dict[str, Any] = {}
    for name, param in params_lib.prefix_encoder(self.config).items():
      declared[name] = layers.declare(self, name, param, self.config.param_dtype)
    return project(declared)


def made(
  config: config_lib.GLMConfig, flat: Mapping[str, jax.Array]
) -> tuple[config_lib.GLMConfig, dict[str, jax.Array]]:
  """Returns a model and its parameters by path, layers stacked, with the prefix that its perceptron makes in place of
  the perceptron.
  """
  start = "prefix_encoder/"
  key, value = layers.unstack(
    project({path.removeprefix(start): x for path, x in flat.items() if path.startswith(start)}), 1
  )
  rest = {path: x for path, x in flat.items() if not path.startswith(start)}
  at = f"{params_lib.LAYERS}/attention/prefix_"
  return dataclasses.replace(config, prefix_hidden=0), rest | {f"{at}key": key, f"{at}value": value}
