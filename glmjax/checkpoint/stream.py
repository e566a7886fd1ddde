"""A model for inference read array by array, layer by layer, each straight to the devices that own it.

The host never holds more than one array of one layer: every process reads the parts of its own devices. The sums are
taken where the arrays have come to lie, so that what was verified is what will be computed with.
"""

from collections.abc import Callable, Iterator, Mapping
import pathlib
from typing import Any

import jax
import numpy as np

from glmjax import errors
from glmjax.checkpoint import agreement
from glmjax.checkpoint import arrays
from glmjax.checkpoint import checksums
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load
from glmjax.checkpoint import mapped
from glmjax.checkpoint import source as source_lib
from glmjax.io import paths
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import processes

# Of a stored model, the bits of its kernels (None: float) and their groups (`source.Source.groups`), where its
# parameters go: a tree of ShapeDtypeStructs with shardings, its layers apart.
Targets = Callable[[config_lib.GLMConfig, int | None, Mapping[str, int]], Any]


def stream(folder: paths.Named, targets: Targets, rows: Targets | None = None) -> load.LoadedModel:
  """Reads a model from an export or a training run, verifying every array. Every process of a run must call it.

  Args:
    folder: either kind.
    targets: where everything goes; floats are cast to the dtype wanted there.
    rows: the parameters as programs take them where they read the layout "cpu", else None: a file of it on a disk is
      mapped then, and its arrays are those of the file.

  Raises:
    errors.InputError: when the folder is no model's, half-written, damaged, or its tokenizer does not fit.
  """
  folder = paths.named(folder, "checkpoint")

  def read(source: source_lib.Source) -> load.LoadedModel:
    source.check_size()
    processes.check_same({f"the model in {folder}": source.fingerprint})
    model, tree = (source.config.model, source.bits, source.groups), None
    if rows is not None and source.mapped is not None and isinstance(folder, pathlib.Path):
      tree = rows(*model)
    if tree is not None:
      wanted = arrays.named_leaves(tree)
      found = mapped.read(source.arrays, source.records, source.mapped, wanted)
    else:
      tree = targets(*model)
      wanted = arrays.named_leaves(tree)
      found = _read(source, wanted)
    params = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(tree), [found[name] for name in wanted])
    metadata = {
      "data": source.config.data,
      "tokenizer": source.config.tokenizer,
      "step": source.step,
      "weights": source.fingerprint,
    }
    return load.LoadedModel(source.config.model, params, folder / folder_lib.TOKENIZER, source.bits, metadata)

  return source_lib.use(folder, read)


def _read(source: source_lib.Source, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Reads all arrays by their names in `wanted`."""
  opened = agreement.together(lambda: arrays.check_files(source.arrays, source.records))
  found = {}
  for stored_name, stored in opened.items():
    name, record, sums = stored_name.removeprefix(source.prefix), source.records[stored_name], []
    for part, index in _parts(name, stored.shape):
      target = _target(wanted, part, stored.shape[len(index) :])
      x = agreement.together(lambda stored=stored, index=index, target=target: _to_devices(stored, index, target))
      start = (*index, *[0] * x.ndim)
      sums.append(checksums.part_sum(x, start, stored.shape, record.get("version", 1)))
      found[part] = jax.device_put(x.astype(target.dtype), target.sharding)  # some go on to the host's memory
    if checksums.total(sums) != record["sum"]:
      raise arrays.DamagedError(f"{name} (checksum differs: {stored.shown})")
  return found


def _parts(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Yields the names of the arrays that a stored one is read as, and where each is in it: layers one by one."""
  first, _, rest = name.partition("/")
  if first != params_lib.LAYERS:
    yield name, ()
  else:
    for i in range(shape[0]):
      yield f"{first}_{i}/{rest}", (i,)


def _target(wanted: Mapping[str, jax.ShapeDtypeStruct], name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  target = wanted.get(name)
  if target is None or target.shape != shape:
    there = "no such array" if target is None else list(target.shape)
    raise errors.InputError(
      f"{name} has {list(shape)} on disk and the model has {there}: put back the config.json that belongs to it"
    )
  return target


def _to_devices(stored: arrays.StoredArray, index: tuple[int, ...], target: jax.ShapeDtypeStruct) -> jax.Array:
  """Puts a part of a stored array on its devices; what several of them have is read once."""
  read: dict[str, np.ndarray] = {}

  def piece(region: tuple[slice, ...]) -> np.ndarray:
    key = str(region)
    if key not in read:
      read[key] = stored.read((*(slice(i, i + 1) for i in index), *region))
    return read[key].reshape(read[key].shape[len(index) :])

  sharding = target.sharding.with_memory_kind(None)  # the devices' own
  return jax.make_array_from_callback(target.shape, sharding, piece)
