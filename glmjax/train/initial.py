"""The state that a run begins with: its own newest checkpoint, random parameters, or a model that is there already."""

import dataclasses
from typing import Any

import jax
import optax

from glmjax.checkpoint import load
from glmjax.checkpoint import manager as manager_lib
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.train import base as base_lib
from glmjax.train import state as state_lib


@dataclasses.dataclass(frozen=True)
class Beginning:
  """What a run begins with where it has no checkpoint of its own."""

  weights: paths.Named | None  # the model; None: random parameters
  base: base_lib.Base | None  # the same model where an adapter trains beside it; None: it trains itself
  data: dict[str, Any]  # what the data source says of itself
  seed: int = 0
  loss_scale: state_lib.DynamicLossScale = state_lib.DynamicLossScale()

  def state(
    self,
    manager: manager_lib.Manager,
    model: config_lib.GLMConfig,
    tx: optax.GradientTransformation,
    abstract: state_lib.TrainState,
  ) -> tuple[state_lib.TrainState, bool]:
    """Returns the state, each array where `abstract` wants it, and whether it is a checkpoint's."""
    restored = manager.restore(abstract.trained())
    state = restored[0] if restored else self._new(model, tx, abstract)
    if self.base is not None:
      state = dataclasses.replace(state, frozen=self.base.read(abstract.frozen))
    return state, restored is not None

  def _new(
    self, model: config_lib.GLMConfig, tx: optax.GradientTransformation, abstract: state_lib.TrainState
  ) -> state_lib.TrainState:
    is_trained = params_lib.always if self.base is None else self.base.trainable.is_trained
    state = state_lib.create(model, tx, self.seed, abstract.trained(), self.loss_scale, is_trained)
    if self.weights is None or self.base is not None:
      return state
    base_lib.check(self.weights, model, self.data)
    state = dataclasses.replace(state, params=None)  # room for the others
    loaded = load.load(self.weights, "float32", jax.tree.map(lambda x: x.sharding, abstract.params))
    return dataclasses.replace(state, params=loaded.params)
