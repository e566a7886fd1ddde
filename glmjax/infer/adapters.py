"""Adapters put beside a model that was loaded for inference."""

import dataclasses
import functools

import jax
import numpy as np

from glmjax.checkpoint import adapter as adapter_lib
from glmjax.checkpoint import load
from glmjax.infer import placement as placement_lib
from glmjax.io import paths
from glmjax.models import params as params_lib


def beside(
  adapter: adapter_lib.Adapter, loaded: load.LoadedModel, model: paths.Named, placement: placement_lib.Placement
) -> load.LoadedModel:
  """Returns a model that was loaded from the folder `model`, with an adapter.

  Raises:
    errors.InputError: where that was trained for a model of other sizes.
  """
  settings = adapter.settings(loaded.config, model, load.fingerprint(model))
  adapted = dataclasses.replace(loaded.config, **settings)
  targets = params_lib.flatten(placement.params(placement_lib.inference_config(adapted, placement.target)))
  found = {}
  for path, x in placement_lib.apart(adapter.params):
    x = x.astype(targets[path].dtype)
    found[path] = jax.make_array_from_callback(x.shape, targets[path].sharding, functools.partial(_part, x))
  return dataclasses.replace(loaded, config=adapted, params=params_lib.merge(loaded.params, params_lib.nest(found)))


def _part(x: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
  return x[index]
