"""Adapters put beside a model that was loaded for inference: one that is always on, or several by name.

Of several each row of a batch has its own, by its number: 0 is none, and the others count from 1 in the order of their
names. Their factors are stacked, so that the program is the same for any mix (models/lowrank.py).
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from glmjax import errors
from glmjax.checkpoint import adapter as adapter_lib
from glmjax.checkpoint import load
from glmjax.infer import placement as placement_lib
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.models import lowrank
from glmjax.models import params as params_lib

NONE = "none"  # what the model without any is called where names are asked for
Adapters = paths.Named | Mapping[str, paths.Named] | None  # a folder, folders by name, or the model alone


def names(adapters: Adapters) -> tuple[str, ...]:
  """Returns the names of several adapters, in the order of their numbers; of one that is always on, none."""
  return tuple(adapters) if isinstance(adapters, Mapping) else ()


def read(adapters: Adapters) -> adapter_lib.Adapter | dict[str, adapter_lib.Adapter] | None:
  """Reads what was trained.

  Raises:
    errors.InputError: where a folder holds no adapter; for a name that cannot be; for a prefix among several.
  """
  if adapters is None:
    return None
  if not isinstance(adapters, Mapping):
    return adapter_lib.Adapter.read(adapters)
  found = {}
  for name, folder in adapters.items():
    if not isinstance(name, str) or not name.strip() or name != name.strip() or name == NONE:
      raise errors.InputError(f"adapter: {name!r} is no name for one: give another word, and not {NONE!r}")
    found[name] = adapter_lib.Adapter.read(folder)
    if found[name].has_prefix:
      raise errors.InputError(
        f"{found[name].folder} holds a prefix (P-Tuning), which each answer's cache has in front of it: load it alone, "
        "without a name; several adapters are LoRA's"
      )
  return found or None


def beside(
  adapter: adapter_lib.Adapter | Mapping[str, adapter_lib.Adapter],
  loaded: load.LoadedModel,
  model: paths.Named,
  placement: placement_lib.Placement,
) -> load.LoadedModel:
  """Returns a model that was loaded from the folder `model`, with an adapter, or several by name.

  Raises:
    errors.InputError: where one was trained for a model of other sizes, or is a prefix and the model has its own.
  """
  every = [*adapter.values()] if isinstance(adapter, Mapping) else [adapter]
  settings = [each.settings(loaded.config, model, loaded.metadata["weights"]) for each in every]
  if isinstance(adapter, Mapping):
    adapted = dataclasses.replace(loaded.config, **_of_all(settings))
    parts = _stacks(every, adapted)
  else:
    adapted = dataclasses.replace(loaded.config, **settings[0])
    parts = dict(placement_lib.apart(adapter.params))
  targets = params_lib.flatten(placement.params(placement_lib.inference_config(adapted, placement.target)))
  found = {path: _put(x, targets[path], isinstance(adapter, Mapping)) for path, x in parts.items()}
  return dataclasses.replace(loaded, config=adapted, params=params_lib.merge(loaded.params, params_lib.nest(found)))


def _of_all(settings: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns what a model's configuration has with all adapters: the largest rank, and each kernel that one adapts."""
  adapted = {name for each in settings for name in each["lora_kernels"].split(",")}
  kernels = [name for name in config_lib.KERNELS if name in adapted]
  return {"lora_rank": max(each["lora_rank"] for each in settings), "lora_kernels": ",".join(kernels)}


def _stacks(adapters: list[adapter_lib.Adapter], config: config_lib.GLMConfig) -> dict[str, np.ndarray]:
  """Returns the factors of all adapters by path, float32 [adapters + 1, ...]: zeros in number 0, in ranks that one
  lacks, and beside kernels that it does not adapt; its scale is in the second factor.
  """
  each = [dict(placement_lib.apart(adapter.params)) for adapter in adapters]
  found = {}
  for path, param in params_lib.apart(config):
    if not path.endswith(("/lora_a", "/lora_b")):
      continue
    is_second = path.endswith("b")
    stack = np.zeros((1 + len(adapters), *param.shape), np.float32)
    for number, (adapter, own) in enumerate(zip(adapters, each, strict=True), 1):
      if path in own:
        ranks = slice(adapter.config.lora_rank)
        place = (number, ranks) if is_second else (number, ..., ranks)
        stack[place] = own[path].astype(np.float32) * (adapter.config.lora_scale if is_second else 1.0)
    found[path] = stack
  return found


def _put(x: np.ndarray, target: jax.ShapeDtypeStruct, is_stack: bool) -> jax.Array | lowrank.Stacked:
  """Returns an array as a parameter lies; of a stack each part does, and every device has its part of all."""
  sharding = target.sharding
  if is_stack:
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, *sharding.spec))
  x = x.astype(target.dtype)
  array = jax.make_array_from_callback(x.shape, sharding, functools.partial(_part, x))
  return lowrank.Stacked(array) if is_stack else array


def _part(x: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
  return x[index]
