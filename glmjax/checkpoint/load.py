"""Models for inference, read from an export or a training run. Nothing on disk is changed."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from glmjax.checkpoint import arrays
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import source as source_lib
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.quantize import qarray


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """What inference needs."""

  config: config_lib.GLMConfig
  params: Any
  tokenizer_dir: paths.Path
  bits: int | None  # None: float
  metadata: dict[str, Any]  # data, tokenizer and step, as recorded; weights: their fingerprint


def load(folder: paths.Named, dtype: str | None = None, shardings: Any = None) -> LoadedModel:
  """Reads a model for inference from an export or a training run, verifying every array.

  Args:
    folder: either kind.
    dtype: casts the float parameters; None: as stored.
    shardings: a tree of NamedShardings for the float model's parameters, or one sharding for all; None: the first
      device.

  Raises:
    errors.InputError: when the folder is no model's, half-written, damaged, or its tokenizer does not fit.
  """
  folder = paths.named(folder, "checkpoint")
  one = shardings is None or isinstance(shardings, jax.sharding.Sharding)
  flat = shardings if one else arrays.named_leaves(shardings)

  def read(source: source_lib.Source) -> LoadedModel:
    source.check_size()
    params = source.read(source.targets(flat))
    if dtype is not None:
      params = {name: _cast(name, x, dtype) for name, x in params.items()}
    metadata = {
      "data": source.config.data,
      "tokenizer": source.config.tokenizer,
      "step": source.step,
      "weights": source.fingerprint,
    }
    tokenizer_dir = folder / folder_lib.TOKENIZER
    return LoadedModel(source.config.model, _unflatten(params, source.bits), tokenizer_dir, source.bits, metadata)

  return source_lib.use(folder, read)


def fingerprint(folder: paths.Named) -> str:
  """Returns the fingerprint of what `load` would read, from its checksums alone (`source.Source.fingerprint`)."""
  return source_lib.use(paths.named(folder, "checkpoint"), lambda source: source.fingerprint)


def _cast(name: str, x: jax.Array, dtype: str) -> jax.Array:
  is_code_or_scale = name.endswith(("/kernel/values", "/kernel/scale"))
  return x if is_code_or_scale else x.astype(dtype)


def _unflatten(flat: Mapping[str, Any], bits: int | None) -> dict[str, Any]:
  """Returns the dict tree of names, with QuantizedArrays where there are codes."""
  params = params_lib.nest(flat)
  if bits is None:
    return params

  def join(path: str, node: Any) -> Any:
    if not isinstance(node, dict):
      return node
    if "values" in node:
      return qarray.QuantizedArray(node["values"], node["scale"], bits, params_lib.quantized_inputs(path)[-1])
    return {key: join(f"{path}/{key}" if path else key, child) for key, child in node.items()}

  return join("", params)
