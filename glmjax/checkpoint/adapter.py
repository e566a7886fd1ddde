"""Adapters (LoRA, P-Tuning v2): what a run trained beside a model that stayed as it was; read, and merged into it."""

from collections.abc import Mapping
import dataclasses
import logging
import math
import threading
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.checkpoint import blocks
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import recorded
from glmjax.checkpoint import source as source_lib
from glmjax.checkpoint import stored_weights
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.models import lowrank
from glmjax.models import params as params_lib
from glmjax.models import prefix as prefix_lib

_log = logging.getLogger("glmjax")


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What was trained."""

  folder: paths.Path
  config: config_lib.GLMConfig  # of the model with it
  params: Mapping[str, np.ndarray]  # its own, by path, layers stacked
  base: Mapping[str, Any]  # what config.json says of the model: folder, fingerprint, bits
  fingerprint: str

  @classmethod
  def read(cls, folder: paths.Named) -> "Adapter":
    """Reads the newest checkpoint of a run that trained an adapter, or its export; a prefix is made by its perceptron.

    Raises:
      errors.InputError: where there is none, or it is damaged.
    """

    def of(source: source_lib.Source) -> "Adapter":
      if not source.config.base:
        raise errors.InputError(f"{folder} holds a model, not an adapter: give it as --checkpoint")
      config, found = source.config.model, source.read(source.targets())
      if any(path.startswith("prefix_encoder/") for path in found):
        config, found = prefix_lib.made(config, found)
      own = {path: np.asarray(x) for path, x in found.items()}
      return cls(paths.named(folder), config, own, source.config.base, source.fingerprint)

    return source_lib.use(folder, of)

  @property
  def has_prefix(self) -> bool:
    """Tells whether it is a prefix (P-Tuning), and not factors (LoRA)."""
    return any("/prefix_" in path for path in self.params)

  def settings(self, config: config_lib.GLMConfig, where: paths.Named, fingerprint: str) -> dict[str, Any]:
    """Returns what the adapter changes of a model's configuration; says so where it is not the model adapted.

    Args:
      config: the model's.
      where: its folder.
      fingerprint: of what is in there.

    Raises:
      errors.InputError: where the adapter was trained for a model of other sizes, or brings a prefix more.
    """
    if self.has_prefix and config.prefix_length:
      raise errors.InputError(
        f"{self.folder} holds a prefix (P-Tuning), and {where} has one of {config.prefix_length} already: give the "
        "model without it"
      )
    # The rest is the model's own: a prefix that a LoRA was trained beside, or without.
    own = config_lib.PREFIX_FIELDS if self.has_prefix else config_lib.LORA_FIELDS
    if changed := recorded.other_model(self.config, config, own):
      raise errors.InputError(f"{self.folder} was trained beside another model than {where}: {changed}")
    if (known := self.base.get("fingerprint")) != fingerprint:
      _log.warning(
        "%s was trained beside %s (%.8s), and %s is not the same (%.8s): another precision, or another model",
        self.folder,
        self.base.get("folder"),
        known,
        where,
        fingerprint,
      )
    return {name: getattr(self.config, name) for name in own}


class Merging:
  """A model's weights with an adapter in them: kernels with the products of their factors added, or a prefix more."""

  def __init__(self, adapter: Adapter, source: source_lib.Source, reader: blocks.Reader, where: paths.Named) -> None:
    self._adapter, self._source, self._reader = adapter, source, reader
    self._settings = adapter.settings(source.config.model, where, source.fingerprint)
    self._stored = {weight.name: weight for weight in source.weights()}
    self._kernels = {f"{params_lib.LAYERS}/{path}/kernel" for path in adapter.config.adapted}
    self._lock, self._squares = threading.Lock(), [0.0, 0.0]  # of what rounding changed, of all

  def config(self, config: folder_lib.FolderConfig) -> folder_lib.FolderConfig:
    """Returns what the merged model's folder says of it."""
    prefix = {name: value for name, value in self._settings.items() if name.startswith("prefix_")}
    model = dataclasses.replace(config.model, **prefix)
    return dataclasses.replace(config, model=model, export=config.export | {"adapter": self._adapter.fingerprint})

  def weights(self, weights: list[stored_weights.StoredWeight]) -> list[stored_weights.StoredWeight]:
    """Returns the weights to store: kernels that were changed are quantized anew, with one scale for each output."""
    found = [dataclasses.replace(x, groups=1) if x.name in self._kernels else x for x in weights]
    dtype = next(x.dtype for x in weights if x.bits is None and params_lib.known(x.name).is_matrix)
    prefix = {name: x for name, x in self._adapter.params.items() if "/prefix_" in name}
    return found + [stored_weights.StoredWeight(name, x.shape, dtype) for name, x in prefix.items()]

  def read(self, weight: stored_weights.StoredWeight, region: stored_weights.Region) -> Mapping[str, np.ndarray]:
    """Reads a block of a merged weight as it is to be stored."""
    if weight.name not in self._stored:
      return weight.convert(np.asarray(self._adapter.params[weight.name][region]))
    if weight.name not in self._kernels:
      return self._source.read_block(self._reader, weight, region)
    whole = self._float(weight.name, region) + self._added(weight.name, region)
    stored = weight.convert(whole)
    if weight.bits is not None:
      self._count(whole, weight.floats(stored))
    return stored

  @property
  def error(self) -> float | None:
    """What quantizing the merged kernels changed of them, root mean square over theirs; None: nothing."""
    changed, whole = self._squares
    return math.sqrt(changed / whole) if whole else None

  def _float(self, name: str, region: stored_weights.Region) -> np.ndarray:
    stored = self._stored[name]
    return stored.floats(self._source.read_block(self._reader, stored, region))

  def _added(self, name: str, region: stored_weights.Region) -> np.ndarray:
    """Returns what the factors add to a block, [layers, *inputs, *outputs]: input axes are never cut."""
    a, b = (np.asarray(self._adapter.params[name.replace("/kernel", f"/lora_{each}")]) for each in "ab")
    inputs = a.ndim - 2
    layers, outputs = region[0], region[1 + inputs :]
    scale = self._adapter.config.lora_scale
    return np.stack([lowrank.added(x, y[:, *outputs], scale) for x, y in zip(a[layers], b[layers], strict=True)])

  def _count(self, whole: np.ndarray, rounded: np.ndarray) -> None:
    squares = (float(np.square(x, dtype=np.float64).sum()) for x in (rounded - whole, whole))
    with self._lock:
      self._squares = [have + more for have, more in zip(self._squares, squares)]
