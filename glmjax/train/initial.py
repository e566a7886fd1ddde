"""The state that a new run begins with: random weights, or those of a model that is there already."""

import dataclasses
from typing import Any

import jax
import optax

from glmjax.checkpoint import load
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.train import base as base_lib
from glmjax.train import state as state_lib


def create(
  model: config_lib.GLMConfig,
  tx: optax.GradientTransformation,
  seed: int,
  abstract: state_lib.TrainState,
  weights: paths.Named | None,
  data: dict[str, Any],
  loss_scale: state_lib.DynamicLossScale = state_lib.DynamicLossScale(),
  base: base_lib.Base | None = None,
) -> state_lib.TrainState:
  """Makes a new run's trained state, each array where `abstract` wants it: with the parameters in `weights`, random
  ones (None), or those of a new adapter beside `base`.
  """
  is_trained = params_lib.always if base is None else base.trainable.is_trained
  state = state_lib.create(model, tx, seed, abstract.trained(), loss_scale, is_trained)
  if weights is None or base is not None:
    return state
  base_lib.check(weights, model, data)
  state = dataclasses.replace(state, params=None)  # room for the others
  loaded = load.load(weights, "float32", jax.tree.map(lambda x: x.sharding, abstract.params))
  return dataclasses.replace(state, params=loaded.params)
