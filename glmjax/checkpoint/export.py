"""Models for inference: written from a run's newest good step, read back from an export or a run.

  EXPORT/  config.json   tokenizer/   params/<array>/...   checksums.json   (appears by one rename)

Parameters only, never the optimizer; one array at a time is read, converted and dropped.
"""

from collections.abc import Callable, Mapping
import dataclasses
import os
import pathlib
import shutil
from typing import Any, TypeVar
import zlib

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import orbax.checkpoint as ocp

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import checksums
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import manager
from glmjax.models import config as config_lib
from glmjax.quantize import qarray
from glmjax.quantize import tree

_CHECKSUMS = "checksums.json"
_STATE_PARAMS = "params/"  # where a TrainState has them

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """What inference needs."""

  config: config_lib.GLMConfig
  params: Any
  tokenizer_dir: pathlib.Path
  bits: int | None  # None: float
  metadata: dict[str, Any]  # data, tokenizer and step, as recorded


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where parameters are, and what is known of them."""

  config: folder_lib.FolderConfig
  step: int | None
  arrays: pathlib.Path  # Orbax's folder
  prefix: str  # of the parameters' names in it
  records: arrays.Records  # of the parameters, by their names there

  def read(self, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Verified arrays by name without prefix, each placed as its target."""
    stored = {self.prefix + name: target for name, target in targets.items()}
    found = arrays.read(self.arrays, stored, self.records)
    return {name.removeprefix(self.prefix): x for name, x in found.items()}

  def targets(self, shardings: Mapping[str, Any] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every array, by name without prefix."""
    targets = {}
    for name, record in self.records.items():
      name = name.removeprefix(self.prefix)
      sharding = None if shardings is None else _sharding(shardings, name, record["shape"])
      targets[name] = jax.ShapeDtypeStruct(record["shape"], record["dtype"], sharding=sharding)
    return targets


def _sharding(shardings: Mapping[str, Any], name: str, shape: list[int]) -> jax.sharding.Sharding:
  """The array's own; for codes and scales their weight's, but axes of length 1 are not split."""
  if name in shardings:
    return shardings[name]
  weight = shardings[name.rsplit("/", 1)[0]]
  spec = (None if n == 1 else axis for n, axis in zip(shape, weight.spec))
  return NamedSharding(weight.mesh, PartitionSpec(*spec))


def export(checkpoint: str | os.PathLike, out: str | os.PathLike, bits: int | None = None,
           dtype: str | None = None, overwrite: bool = False) -> dict[str, Any]:
  """Writes an inference model from a training run's newest good step, or from a float export.

  Args:
    checkpoint: the run's or the export's folder.
    out: folder to write.
    bits: 8 or 4 quantizes the blocks' kernels; None writes floats.
    dtype: of the float parameters: embeddings, norms, biases and unquantized kernels; None: float16 beside
      quantized kernels, as in the original's files, else float32.
    overwrite: replace an export that is there.

  Returns:
    {"out", "step", "bits", "dtype", "array_bytes", "disk_bytes"}; disk_bytes counts all files of the folder.

  Raises:
    errors.InputError: when the source cannot be used or `out` is there already.
  """
  out = pathlib.Path(out).absolute()
  if bits not in (None, *qarray.BITS):
    raise errors.InputError(f"bits is {bits}: give 8 or 4, or leave it out for float")
  dtype = dtype or ("float32" if bits is None else "float16")
  if dtype not in config_lib.DTYPES:
    raise errors.InputError(f"dtype is {dtype!r}: choose one of {', '.join(config_lib.DTYPES)}")
  _check_out(out, pathlib.Path(checkpoint), overwrite)

  def write(source: _Source) -> dict[str, Any]:
    config = _exported(source, bits, dtype)
    params = {name: _convert(name, source.read({name: target})[name], bits, dtype)
              for name, target in source.targets().items()}
    _check_size(source, params)
    return _write(out, pathlib.Path(checkpoint) / folder_lib.TOKENIZER, config, params)

  return _with_source(checkpoint, write)


def load(folder: str | os.PathLike, dtype: str | None = None, shardings: Any = None) -> LoadedModel:
  """Reads a model for inference from an export or a training run, verifying every array.

  Args:
    folder: either kind.
    dtype: casts the float parameters; None: as stored.
    shardings: a tree of NamedShardings for the float model's parameters; None: the first device.

  Raises:
    errors.InputError: when the folder is no model's, half-written, damaged, or its tokenizer does not fit.
  """
  flat = None if shardings is None else arrays.flatten(shardings)

  def read(source: _Source) -> LoadedModel:
    params = source.read(source.targets(flat))
    if dtype is not None:
      params = {name: _cast(name, x, dtype) for name, x in params.items()}
    bits = source.config.export.get("bits")
    _check_size(source, params)
    metadata = {"data": source.config.data, "tokenizer": source.config.tokenizer, "step": source.step}
    tokenizer_dir = pathlib.Path(folder) / folder_lib.TOKENIZER
    return LoadedModel(source.config.model, _unflatten(params, bits), tokenizer_dir, bits, metadata)

  return _with_source(folder, read)


def _with_source(folder: str | os.PathLike, use: Callable[[_Source], T]) -> T:
  """`use` of the folder's parameters; with an older step's when a run's newest is damaged."""
  folder = pathlib.Path(folder)
  config = folder_lib.read_config(folder)
  folder_lib.check_tokenizer(folder, config)
  if (folder / folder_lib.PARAMS).is_dir():
    try:
      return use(_export_source(folder, config))
    except arrays.DamagedError as error:
      raise errors.InputError(f"{folder} is damaged: {error}; export it again") from error
  found = manager.read_newest(folder / folder_lib.CHECKPOINTS, lambda step: use(_step_source(step, config)))
  if found is None:
    raise errors.InputError(f"{folder} has no complete checkpoint yet: train further, or give another folder")
  return found[1]


def _step_source(step_folder: pathlib.Path, config: folder_lib.FolderConfig) -> _Source:
  records = manager.read_record(step_folder)["arrays"]
  params = {name: record for name, record in records.items() if name.startswith(_STATE_PARAMS)}
  return _Source(config, int(step_folder.name), step_folder / manager.STATE, _STATE_PARAMS, params)


def _export_source(folder: pathlib.Path, config: folder_lib.FolderConfig) -> _Source:
  try:
    content = checksums.unseal((folder / _CHECKSUMS).read_bytes())
  except FileNotFoundError as error:
    raise errors.InputError(f"{folder} is half-written: it has no {_CHECKSUMS}; export it again") from error
  except (OSError, ValueError) as error:
    raise arrays.DamagedError(f"{_CHECKSUMS}: {arrays.one_line(error)}") from error
  for name, crc in content["files"].items():
    if _file_crc(folder / name) != crc:
      raise arrays.DamagedError(f"{name} (checksum differs)")
  return _Source(config, config.export.get("step"), folder / folder_lib.PARAMS, "", content["arrays"])


def _file_crc(path: pathlib.Path) -> str | None:
  return f"{zlib.crc32(path.read_bytes()):08x}" if path.is_file() else None


def _convert(name: str, x: jax.Array, bits: int | None, dtype: str) -> Any:
  """As exported, on the host."""
  axes = tree.kernel_axes(tuple(name.split("/")))
  x = tree.quantize_kernel(x, bits, axes) if bits is not None and axes is not None else x.astype(dtype)
  return jax.tree.map(np.asarray, x)


def _cast(name: str, x: jax.Array, dtype: str) -> jax.Array:
  is_code_or_scale = name.endswith(("/kernel/values", "/kernel/scale"))
  return x if is_code_or_scale else x.astype(dtype)


def _unflatten(flat: Mapping[str, Any], bits: int | None) -> dict[str, Any]:
  """The dict tree of names, with QuantizedArrays where there are codes."""
  params = arrays.nest(flat)
  if bits is None:
    return params

  def join(names: tuple[str, ...], node: Any) -> Any:
    if not isinstance(node, dict):
      return node
    axes = tree.kernel_axes(names)
    if axes is not None:
      return qarray.QuantizedArray(node["values"], node["scale"], bits, axes[-1])
    return {key: join((*names, key), child) for key, child in node.items()}

  return join((), params)


def _check_size(source: _Source, params: Mapping[str, Any]) -> None:
  """config.json must be about these parameters."""
  per_byte = 8 // (source.config.export.get("bits") or 8)
  count = 0
  for name, x in params.items():
    if isinstance(x, qarray.QuantizedArray):
      count += int(np.prod(x.shape))
    elif not name.endswith("/kernel/scale"):
      count += x.size * (per_byte if name.endswith("/kernel/values") else 1)
  expected = source.config.model.num_parameters()
  if count != expected:
    raise errors.InputError(f"{source.arrays} holds {count} parameters and its config.json describes "
                            f"{expected}: put back the config.json that belongs to it")


def _exported(source: _Source, bits: int | None, dtype: str) -> folder_lib.FolderConfig:
  found = source.config.export.get("bits")
  if found is not None:
    raise errors.InputError(f"{source.arrays.parent} is an INT{found} model: export from the training run or "
                            "a float export")
  model = dataclasses.replace(source.config.model, param_dtype=dtype)
  return dataclasses.replace(source.config, model=model,
                             export={"bits": bits, "dtype": dtype, "step": source.step})


def _check_out(out: pathlib.Path, checkpoint: pathlib.Path, overwrite: bool) -> None:
  if not out.exists():
    return
  if not overwrite:
    raise errors.InputError(f"{out} is there already: choose another folder, or say overwrite")
  is_export = (out / _CHECKSUMS).is_file() and not (out / folder_lib.CHECKPOINTS).exists()
  if out == checkpoint.absolute() or not is_export:
    raise errors.InputError(f"{out} is no export that may be overwritten: choose another folder")


def _write(out: pathlib.Path, tokenizer: pathlib.Path, config: folder_lib.FolderConfig,
           params: Mapping[str, Any]) -> dict[str, Any]:
  temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    temporary.mkdir(parents=True)
    folder_lib.write_config(temporary, config)
    folder_lib.copy_tokenizer(tokenizer, temporary)
    to_save, records = arrays.prepare(arrays.nest(params))
    with ocp.Checkpointer(arrays.handler()) as checkpointer:
      checkpointer.save(temporary / folder_lib.PARAMS, args=to_save)
    files = [path.relative_to(temporary) for path in sorted(temporary.rglob("*"))
             if path.is_file() and folder_lib.PARAMS not in path.relative_to(temporary).parts]
    crcs = {str(file): _file_crc(temporary / file) for file in files}
    folder_lib.write_json(temporary / _CHECKSUMS, checksums.seal({"arrays": records, "files": crcs}))
    disk_bytes = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    _put_in_place(temporary, out)
  except (OSError, ValueError) as error:
    if isinstance(error, errors.InputError):
      raise
    reason = arrays.one_line(error)
    raise errors.InputError(f"{out} could not be written ({reason}): nothing was left there") from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  array_bytes = sum(x.nbytes for x in params.values())
  return {"out": str(out), **config.export, "array_bytes": array_bytes, "disk_bytes": disk_bytes}


def _put_in_place(temporary: pathlib.Path, out: pathlib.Path) -> None:
  """Renames; the export that is replaced leaves by a rename, too."""
  old = out.with_name(f".{out.name}.{os.getpid()}.old")
  if out.exists():
    out.rename(old)
  try:
    temporary.rename(out)
  except OSError:
    if old.exists():
      old.rename(out)
    raise
  folder_lib.sync(out.parent)
  shutil.rmtree(old, ignore_errors=True)
