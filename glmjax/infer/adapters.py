"""Adapters (LoRA, P-Tuning v2) put beside the model that they were trained for."""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp

from glmjax import errors
from glmjax.checkpoint import load
from glmjax.checkpoint import recorded
from glmjax.checkpoint import source as source_lib
from glmjax.infer import placement as placement_lib
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.models import prefix as prefix_lib

_log = logging.getLogger("glmjax")
_FREE = (*recorded.FREE, "param_dtype", "init_std")  # what does not decide what a model computes


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What a run trained beside a model."""

  folder: paths.Path
  config: config_lib.GLMConfig  # of the model with it
  params: Mapping[str, jax.Array]  # its own, by path, layers stacked
  base: Mapping[str, Any]  # what config.json says of the model: folder, fingerprint, bits

  @classmethod
  def read(cls, folder: paths.Named) -> "Adapter":
    """Reads the newest checkpoint of a run that trained an adapter; a prefix is made by its perceptron.

    Raises:
      errors.InputError: where there is none, or it is damaged.
    """

    def of(source: source_lib.Source) -> "Adapter":
      if not source.config.base:
        raise errors.InputError(f"{folder} holds a model, not an adapter: give it as --checkpoint")
      config, found = source.config.model, source.read(source.targets())
      if config.prefix_hidden:
        config, found = prefix_lib.made(config, found)
      return cls(paths.named(folder), config, found, source.config.base)

    return source_lib.use(folder, of)

  def beside(
    self, loaded: load.LoadedModel, model: paths.Named, placement: placement_lib.Placement
  ) -> load.LoadedModel:
    """Returns a model that was loaded from the folder `model`, with the adapter.

    Raises:
      errors.InputError: where it was trained for a model of other sizes.
    """
    if (fingerprint := load.fingerprint(model)) != self.base.get("fingerprint"):
      _log.warning(
        "%s was trained beside %s (%.8s), and %s is not the same (%.8s): another precision, or another model",
        self.folder,
        self.base.get("folder"),
        self.base.get("fingerprint"),
        model,
        fingerprint,
      )
    adapted = dataclasses.replace(loaded.config, **self._settings(loaded.config, model))
    targets = params_lib.flatten(placement.params(placement_lib.inference_config(adapted, placement.target)))
    found = {}
    for path, x in placement_lib.apart(self.params):
      found[path] = jax.device_put(jnp.asarray(x, targets[path].dtype), targets[path].sharding)
    return dataclasses.replace(loaded, config=adapted, params=params_lib.merge(loaded.params, params_lib.nest(found)))

  def _settings(self, config: config_lib.GLMConfig, model: paths.Named) -> dict[str, Any]:
    """Returns the adapter's settings, once the model is known to have its sizes."""
    own = {}
    for field in dataclasses.fields(config):
      there, here = getattr(self.config, field.name), getattr(config, field.name)
      if field.name in config_lib.ADAPTER_FIELDS:
        own[field.name] = there
      elif field.name not in _FREE and there != here:
        raise errors.InputError(
          f"{self.folder} was trained beside another model than {model}: {field.name} is {there} there and {here} here"
        )
    return own
