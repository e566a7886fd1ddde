"""Where parameters come from: an exported folder, or the newest good step of a training run."""

from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import json
import math
from typing import Any, TypeVar
import zlib

import jax
import numpy as np

from glmjax import errors
from glmjax.checkpoint import agreement
from glmjax.checkpoint import arrays
from glmjax.checkpoint import blocks
from glmjax.checkpoint import checksums
from glmjax.checkpoint import files
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import manager
from glmjax.checkpoint import mapped
from glmjax.checkpoint import recorded
from glmjax.checkpoint import stored_weights
from glmjax.io import paths
from glmjax.models import params as params_lib
from glmjax.parallel import partitioning

CHECKSUMS = "checksums.json"
_STATE_PARAMS = "params/"  # where a TrainState has them
_VALUES, _SCALE = "/kernel/values", "/kernel/scale"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Source:
  """Where parameters are, and what is known of them."""

  config: folder_lib.FolderConfig
  step: int | None
  arrays: paths.Path  # Orbax's folder
  prefix: str  # of the parameters' names in it
  records: arrays.Records  # of the parameters, by their names there
  mapped: Mapping[str, Any] | None = None  # of the file that has all of them (mapped.py), as `mapped.check` takes it

  @property
  def bits(self) -> int | None:
    """The bits of the kernels; None: float."""
    return self.config.export.get("bits")

  @property
  def groups(self) -> dict[str, int]:
    """The parts of the inputs that have scales of their own, where there are several, by a kernel's path in its layer:
    GLM-130B's files have one for each rank.
    """
    stacked = f"{params_lib.LAYERS}/"
    return {weight.name.removeprefix(stacked): weight.groups for weight in self.weights() if weight.groups > 1}

  @property
  def fingerprint(self) -> str:
    """The fingerprint of all that decides what the model says: copies have the same; other steps, precisions and
    settings do not.
    """
    model = {
      field.name: value
      for field in dataclasses.fields(self.config.model)
      if (value := getattr(self.config.model, field.name)) != field.default
    }
    sums = sorted((name.removeprefix(self.prefix), record["sum"]) for name, record in self.records.items())
    content = [model, self.config.tokenizer.get("fingerprint"), sums]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

  def read(self, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Reads verified arrays by name without prefix, each placed as its target."""
    stored = {self.prefix + name: target for name, target in targets.items()}
    found = arrays.read(self.arrays, stored, self.records)
    return {name.removeprefix(self.prefix): x for name, x in found.items()}

  def targets(
    self, shardings: Mapping[str, Any] | jax.sharding.Sharding | None = None
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape, dtype and sharding of every array, by name without prefix."""
    targets = {}
    for name, record in self.records.items():
      name = name.removeprefix(self.prefix)
      sharding = _sharding(shardings, name) if isinstance(shardings, Mapping) else shardings
      targets[name] = jax.ShapeDtypeStruct(record["shape"], record["dtype"], sharding=sharding)
    return targets

  def weights(self, bits: int | None = None, dtype: str | None = None) -> list[stored_weights.StoredWeight]:
    """Returns the parameters, as they are or as they are to be: quantized to `bits`, floats in `dtype`."""
    found = []
    for stored, record in self.records.items():
      name, shape = stored.removeprefix(self.prefix), list(record["shape"])
      if name.endswith(_SCALE):
        continue
      if name.endswith(_VALUES):
        name = name.removesuffix("/values")
        inputs = params_lib.known(name).inputs
        shape[inputs[-1]] *= 8 // self.bits
        groups = self.records[f"{self.prefix}{name}/scale"]["shape"][inputs[0]]
        found.append(stored_weights.StoredWeight(name, tuple(shape), "float16", self.bits, groups))
      else:
        found.append(
          stored_weights.StoredWeight(
            name, tuple(shape), dtype or record["dtype"], bits if params_lib.known(name).quantizes else None
          )
        )
    return found

  def read_block(
    self, reader: blocks.Reader, weight: stored_weights.StoredWeight, region: stored_weights.Region
  ) -> dict[str, np.ndarray]:
    """Reads a block as `weight` wants it stored: converted, or the codes and scales that are there."""
    if self.bits is None or weight.bits is None:
      return weight.convert(reader.read(self.prefix + weight.name, region))
    return {
      name: reader.read(self.prefix + name, weight.stored_region(name, region)) for name in weight.stored(weight.shape)
    }

  def check_size(self) -> None:
    """Checks that config.json is about these parameters."""
    if base := self.config.base:
      raise errors.InputError(
        f"{self.arrays} holds an adapter of {base.get('folder')}: give that as --checkpoint, and the run as --adapter"
      )
    count = sum(math.prod(weight.shape) for weight in self.weights())
    expected = params_lib.count(self.config.model)
    if count != expected:
      raise errors.InputError(
        f"{self.arrays} holds {count} parameters and its config.json describes "
        f"{expected}: put back the config.json that belongs to it"
      )


def _sharding(shardings: Mapping[str, Any], name: str) -> jax.sharding.Sharding:
  """Returns the array's own sharding; for codes and scales their weight's, but a scale's few input places are not
  split.
  """
  if name in shardings:
    return shardings[name]
  weight, part = name.rsplit("/", 1)
  param = params_lib.known(weight)
  return partitioning.unsplit(shardings[weight], param.inputs if part == "scale" else (), len(param.shape))


def use(folder: paths.Named, function: Callable[[Source], T]) -> T:
  """Applies `function` to the folder's parameters; to an older step's when a run's newest is damaged.

  Raises:
    errors.InputError: when it is no model's, damaged, or the system refuses to read it, memory included.
    OSError: when the disk or the network fails.
  """
  with files.enough_memory(folder):
    return _use(paths.named(folder, "the model's folder"), function)


def _use(folder: paths.Path, function: Callable[[Source], T]) -> T:
  config = folder_lib.read_config(folder)
  folder_lib.check_tokenizer(folder, config)
  if _is_export(folder, config):
    try:
      return function(agreement.together(lambda: _from_export(folder, config)))
    except files.DamagedError as error:
      raise errors.InputError(f"{folder} is damaged: {error}; export it again") from error
  found = manager.read_newest(folder / folder_lib.CHECKPOINTS, lambda step: function(_from_step(step, config)))
  if found is None:
    raise errors.InputError(f"{folder} has no complete checkpoint yet: train further, or give another folder")
  return found[1]


def export_groups(folder: paths.Named, config: folder_lib.FolderConfig) -> dict[str, int]:
  """Returns `Source.groups` of a folder, from its checksums alone; {} of what is no quantized export.

  Each process looks by itself: what it is needed for must not be where all of them have to agree.

  Raises:
    files.DamagedError, errors.InputError, OSError: when these cannot be read.
  """
  folder = paths.named(folder, "the model's folder")
  if not config.export.get("bits"):
    return {}
  content = checksums.read_sealed(folder / CHECKSUMS, CHECKSUMS, ("files", "arrays"))
  return Source(config, None, folder / folder_lib.PARAMS, "", content["arrays"]).groups


def _is_export(folder: paths.Path, config: folder_lib.FolderConfig) -> bool:
  """Tells whether it is an export, whatever it lacks: a run has none of these."""
  return bool(config.export) or any(_is_there(folder / name) for name in (CHECKSUMS, folder_lib.PARAMS))


def _is_there(path: paths.Path) -> bool:
  return path.is_symlink() or path.exists()


def _from_step(step_folder: paths.Path, config: folder_lib.FolderConfig) -> Source:
  record = agreement.together(lambda: manager.read_record(step_folder))
  config = recorded.checked(config, record["metadata"], step_folder)
  params = {name: record for name, record in record["arrays"].items() if name.startswith(_STATE_PARAMS)}
  return Source(config, int(step_folder.name), step_folder / manager.STATE, _STATE_PARAMS, params)


def _from_export(folder: paths.Path, config: folder_lib.FolderConfig) -> Source:
  if not _is_there(folder / CHECKSUMS):
    raise errors.InputError(f"{folder} is half-written: it has no {CHECKSUMS}; export it again")
  content = checksums.read_sealed(folder / CHECKSUMS, CHECKSUMS, ("files", "arrays"))
  for name, crc in content["files"].items():
    if file_crc(folder / name, name) != crc:
      raise files.DamagedError(f"{name} (checksum differs)")
  params = folder / folder_lib.PARAMS
  if "mapped" in content:
    mapped.check(params, content["mapped"])
  return Source(config, config.export.get("step"), params, "", content["arrays"], content.get("mapped"))


def file_crc(path: paths.Path, shown: str) -> str:
  """Returns the CRC-32 of a small file; raises as `files.read`."""
  return f"{zlib.crc32(files.read(path, shown)):08x}"
