"""What a step's record says of its run, so that a config.json that was changed or damaged is told.

Each step is saved with the settings of its model (`of`); config.json, which nothing seals, must say the same.
"""

from collections.abc import Collection
import dataclasses
from typing import Any

from glmjax import errors
from glmjax.checkpoint import folder
from glmjax.io import paths
from glmjax.models import config as config_lib

# What may change from one start of a run to the next: how it is computed, not what it is.
FREE = (
  "dtype",
  "softmax_dtype",
  "kv_cache_dtype",
  "activation_bits",
  "head_bits",
  "scan_layers",
  "remat",
  "hidden_dropout",
  "attention_dropout",
  "prefix_dropout",
  "lora_dropout",
)


def of(model: config_lib.GLMConfig) -> dict[str, Any]:
  """Returns the entry of a step's metadata about its model."""
  return {"model": dataclasses.asdict(model)}


def difference(model: config_lib.GLMConfig, metadata: dict[str, Any]) -> str | None:
  """Says in words the first setting that the model has other than the record; None: none, or an older record."""
  ours = dataclasses.asdict(model)
  for name, there in (metadata.get("model") or {}).items():
    if name not in FREE and name in ours and ours[name] != there:
      return f"{name} is {ours[name]!r} there and {there!r} in the checkpoints"
  return None


def checked(config: folder.FolderConfig, metadata: dict[str, Any], step: paths.Path) -> folder.FolderConfig:
  """Returns a run's config.json, compared with a step's record; what describes the data is the record's.

  Args:
    config: of the run's folder.
    metadata: that the step was saved with.
    step: the step's folder.

  Raises:
    errors.InputError: naming the setting that differs.
  """
  where = step.parent.parent / folder.CONFIG
  if found := difference(config.model, metadata):
    raise errors.InputError(f"{where} is not the one of this run: {found}: set it back, or restore a copy")
  data = metadata["data"] if isinstance(metadata.get("data"), dict) else config.data
  fingerprint, trained = config.tokenizer.get("fingerprint"), data.get("tokenizer")
  if isinstance(trained, str) and fingerprint and fingerprint != trained:
    raise errors.InputError(
      f"{where} names tokenizer {fingerprint[:8]}, and step {step.name} was trained with "
      f"{trained[:8]}: restore config.json and tokenizer/"
    )
  return dataclasses.replace(config, data=data)


def other_model(there: config_lib.GLMConfig, here: config_lib.GLMConfig, free: Collection[str] = ()) -> str | None:
  """Says in words the first setting that makes one model another than the other; None: their weights are alike.

  Of rotary models rows may have any length; a table of positions has so many places.
  """
  free = {*FREE, "param_dtype", "init_std", *free} | ({"max_length"} if here.position_kind.rotary_parts else set())
  for field in dataclasses.fields(here):
    theirs, ours = getattr(there, field.name), getattr(here, field.name)
    if field.name not in free and theirs != ours:
      return f"{field.name} is {theirs} there and {ours} here"
  return None
