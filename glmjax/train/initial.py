"""The state that a new run begins with: random weights, or those of a model that is there already."""

import dataclasses
from typing import Any

import jax
import optax

from glmjax import errors
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load
from glmjax.checkpoint import recorded
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.train import state as state_lib

# What a new run may have other than the model it begins with: how it is computed, as at any start, and what says how
# that model was made: in which dtype and spread, and how far its cosines were rounded where it was deployed.
_FREE = (*recorded.FREE, "param_dtype", "init_std", "rotary_rounding")


def check(weights: paths.Named, model: config_lib.GLMConfig, data: dict[str, Any]) -> None:
  """Raises InputError where the folder's model or tokenizer is not the run's; reads its config.json alone.

  Args:
    data: what the data source says of itself.
  """
  found = folder_lib.read_config(weights)
  if found.export.get("bits"):
    raise errors.InputError(f"{weights} is quantized to {found.export['bits']} bits: give float weights")
  free = _FREE if not model.position_kind.rotary_parts else (*_FREE, "max_length")  # a table has so many places
  for field in dataclasses.fields(model):
    there, here = getattr(found.model, field.name), getattr(model, field.name)
    if field.name not in free and there != here:
      raise errors.InputError(
        f"{weights} is another model: {field.name} is {there} there and {here} here; "
        "give the gin file of the model that it is"
      )
  ours, theirs = data.get("tokenizer"), found.tokenizer.get("fingerprint")
  if ours and theirs and ours != theirs:
    raise errors.InputError(
      f"{weights} has another tokenizer than the data ({theirs[:8]}, not {ours[:8]}): "
      "make the cache with the tokenizer in that folder"
    )


def create(
  model: config_lib.GLMConfig,
  tx: optax.GradientTransformation,
  seed: int,
  abstract: state_lib.TrainState,
  weights: paths.Named | None,
  data: dict[str, Any],
  loss_scale: state_lib.DynamicLossScale = state_lib.DynamicLossScale(),
) -> state_lib.TrainState:
  """Makes a new run's state, each array where `abstract` wants it; `weights` as in `check`, None: random ones."""
  state = state_lib.create(model, tx, seed, abstract, loss_scale)
  if weights is None:
    return state
  check(weights, model, data)
  state = dataclasses.replace(state, params=None)  # room for the others
  loaded = load.load(weights, "float32", jax.tree.map(lambda x: x.sharding, abstract.params))
  return dataclasses.replace(state, params=loaded.params)
