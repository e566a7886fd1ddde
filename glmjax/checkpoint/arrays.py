"""Arrays on disk: one folder per array, written by Orbax, verified when read.

Trees are stored as dicts of names such as params/layers/mlp/wo/kernel, whatever containers they were made
of, so that a reader can ask for a part of a tree and every complaint names an array.
"""

from collections.abc import Callable, Iterable, Mapping
import functools
import logging
import math
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from glmjax import errors
from glmjax.checkpoint import agreement
from glmjax.checkpoint import checksums
from glmjax.checkpoint import files
from glmjax.checkpoint import mapped
from glmjax.checkpoint import stored as stored_lib
from glmjax.io import paths
from glmjax.models import params as params_lib

if TYPE_CHECKING:
  import orbax.checkpoint as ocp

CHUNK_BYTES = 128 * 2**20  # largest file: parallel reading, and less to read for a part of an array
_AHEAD_BYTES = 2**28  # of arrays that are read at the same time, unless one has more

# name -> {"shape", "dtype", "sum", "version" of the sum (none: 1), and for PRNG keys "key": algorithm}
Records = dict[str, dict[str, Any]]
StoredArray = stored_lib.StoredArray | mapped.MappedArray


DamagedError, zarr_dtype = files.DamagedError, stored_lib.zarr_dtype  # they live below us


def handler(among: "ocp.options.MultiprocessingOptions | None" = None) -> "ocp.PyTreeCheckpointHandler":
  """Makes Orbax's handler for plain zarr, a folder per array: a damaged file is an array with a name. Float weights
  hardly compress. `among`: the processes that save together; None: all.
  """
  import orbax.checkpoint as ocp  # here, as reading needs none of it, and it takes long to load

  among = among or ocp.options.MultiprocessingOptions()
  made = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, multiprocessing_options=among)
  made.finalize = functools.partial(_finalize, made.finalize)  # no class of its own, whose name Orbax would record
  return made


def _finalize(finalize: Callable[[pathlib.Path], None], directory: pathlib.Path) -> None:
  """Ends a save, without Orbax's warning that it finds nothing of OCDBT to merge: plain zarr never has any."""

  def is_another(record: logging.LogRecord) -> bool:
    return pathlib.Path(record.pathname).name != "ocdbt_utils.py"

  logger = logging.getLogger("absl")
  logger.addFilter(is_another)
  try:
    finalize(directory)
  finally:
    logger.removeFilter(is_another)


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns the leaves of any tree by their names; None and empty containers hold none."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _is_key(leaf: Any) -> bool:
  return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(leaf: Any) -> jax.Array | np.ndarray:
  if _is_key(leaf):
    return jax.random.key_data(leaf)
  return leaf if isinstance(leaf, jax.Array) else np.array(leaf)  # a copy: the caller may write into its own


def prepare(tree: Any) -> tuple[dict[str, jax.Array | np.ndarray], Records]:
  """Returns the arrays that are to be written, by their names, and the record of every one to write beside them."""
  leaves = named_leaves(tree)
  stored = {name: _storable(leaf) for name, leaf in leaves.items()}
  sums = checksums.array_sums(stored)
  records = {
    name: {"shape": list(x.shape), "dtype": x.dtype.name, "sum": sums[name], "version": checksums.VERSION}
    for name, x in stored.items()
  }
  for name, leaf in leaves.items():
    if _is_key(leaf):
      records[name]["key"] = str(jax.random.key_impl(leaf))
  return stored, records


def orbax_args(stored: Mapping[str, jax.Array | np.ndarray]) -> "ocp.args.PyTreeSave":
  """Returns what has Orbax write the arrays."""
  import orbax.checkpoint as ocp

  save_args = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in stored}
  return ocp.args.PyTreeSave(params_lib.nest(stored), save_args=params_lib.nest(save_args))


def _stored_form(target: Any) -> tuple[tuple[int, ...], jax.sharding.Sharding | None]:
  """Returns the shape as stored, and where to put it (None: the first device)."""
  if _is_key(target):
    return jax.eval_shape(jax.random.key_data, target).shape, getattr(target, "sharding", None)
  return tuple(np.shape(target)), getattr(target, "sharding", None)


def check_same_model(wanted: Mapping[str, Any], records: Records, where: paths.Path) -> None:
  """Compares names and shapes before anything is read.

  Raises:
    errors.InputError: naming the first array that differs, with both shapes.
  """
  for name in dict.fromkeys([*wanted, *records]):
    ours = list(_stored_form(wanted[name])[0]) if name in wanted else "no such array"
    theirs = records[name]["shape"] if name in records else "no such array"
    if ours != theirs:
      raise errors.InputError(
        f"{where} is from another model: {name} has {theirs} there and {ours} here; "
        "use the configuration that it was trained with, or another folder"
      )


def _check_divides(name: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> None:
  try:
    if sharding is not None:
      sharding.shard_shape(shape)
  except ValueError as error:
    raise errors.InputError(
      f"{name} of shape {list(shape)} does not divide over the mesh as {sharding.spec}: use another mesh"
    ) from error


def read(folder: paths.Path, wanted: Mapping[str, Any], records: Records) -> dict[str, Any]:
  """Reads the named arrays, verifies each, and gives each the kind, dtype and sharding of its target.

  Every process of a run must call it, and it raises in all of them or in none.

  Args:
    folder: where Orbax wrote them.
    wanted: names to targets: arrays, ShapeDtypeStructs (without a sharding: for the first device), numbers.
    records: from `prepare`, names and shapes already checked against `wanted`.

  Raises:
    DamagedError: naming every array and, where known, file that is not as it was written.
    errors.InputError: when an array does not divide over its target's mesh; when the system refuses, memory included.
    OSError: when the disk or the network fails.
  """
  for name, target in wanted.items():
    _check_divides(name, *_stored_form(target))
  with files.enough_memory(folder):
    opened = agreement.together(lambda: check_files(folder, {name: records[name] for name in wanted}))
    stored = agreement.together(lambda: _read_all(opened, wanted))
    sums = checksums.array_sums(stored, {name: records[name].get("version", 1) for name in wanted})
    agreement.together(
      lambda: _raise_problems(
        [f"{name} (checksum differs: {opened[name].shown})" for name in wanted if sums[name] != records[name]["sum"]]
      )
    )
    return {name: _as_target(stored.pop(name), target, records[name]) for name, target in wanted.items()}


def _read_all(opened: Mapping[str, StoredArray], wanted: Mapping[str, Any]) -> dict[str, np.ndarray | jax.Array]:
  """Reads the arrays to the devices of their targets; elements of eight bytes stay on the host.

  The next ones are read while one goes to its devices, as long as all that is under way is not too much.
  """
  found: dict[str, np.ndarray | jax.Array] = {}
  under_way: dict[str, tuple[int, Callable[[], np.ndarray | jax.Array]]] = {}
  with stored_lib.reading() as reading:
    for name, target in wanted.items():
      x, sharding = opened[name], None
      if x.dtype.itemsize < 8:
        sharding = _stored_form(target)[1] or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      size = _bytes_here(x, sharding)
      while under_way and size + sum(other for other, _ in under_way.values()) > _AHEAD_BYTES:
        first = next(iter(under_way))
        found[first] = under_way.pop(first)[1]()
      under_way[name] = size, _begin(x, sharding, reading)
    return found | {name: finish() for name, (_, finish) in under_way.items()}


def _parts(x: StoredArray, sharding: jax.sharding.Sharding) -> dict[str, tuple[slice, ...]]:
  """Returns the parts that this process's devices hold, each once."""
  return {str(region): region for region in sharding.addressable_devices_indices_map(x.shape).values()}


def _bytes_here(x: StoredArray, sharding: jax.sharding.Sharding | None) -> int:
  shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
  return math.prod(shape) * x.dtype.itemsize * (1 if sharding is None else len(_parts(x, sharding)))


def _begin(
  x: StoredArray, sharding: jax.sharding.Sharding | None, reading: stored_lib.Reading
) -> Callable[[], np.ndarray | jax.Array]:
  """Begins to read an array; returns a function that waits for it and puts it where it belongs."""
  if sharding is None:
    return x.begin([slice(None)] * len(x.shape), reading)
  waits = {key: x.begin(region, reading) for key, region in _parts(x, sharding).items()}
  return lambda: jax.make_array_from_callback(x.shape, sharding, lambda region: waits[str(region)](), dtype=x.dtype)


def check_files(folder: paths.Path, records: Records) -> dict[str, StoredArray]:
  """Opens the arrays of `records`, whose headers and files must be what was written.

  Raises:
    DamagedError: naming files that are missing, of the wrong size or no files; a header that differs.
    errors.InputError, OSError: when the system refuses.
  """
  opened, problems = {}, {}

  def open_one(name: str) -> None:
    try:
      kind = mapped.MappedArray if mapped.OFFSETS in records[name] else stored_lib.StoredArray
      opened[name] = kind(folder, name, records[name])
    except DamagedError as error:
      problems[name] = str(error)

  with stored_lib.reading() as reading:  # several at a time: in a bucket each takes two answers
    for task in [reading.submit(open_one, name) for name in records]:
      task.result()
  by_orbax = not any(mapped.OFFSETS in record for record in records.values())
  described = _description_problems(folder, records) if by_orbax else []
  _raise_problems([problems[name] for name in records if name in problems] + described)
  return {name: opened[name] for name in records}


def _raise_problems(problems: list[str]) -> None:
  if problems:
    raise DamagedError("; ".join(problems[:4]) + (f" and {len(problems) - 4} more" if len(problems) > 4 else ""))


def _description_problems(folder: paths.Path, names: Iterable[str]) -> list[str]:
  """Says what is wrong with Orbax's list of the arrays, which we do not need, and who reads them without us does."""
  shown = f"{folder.name}/_METADATA"
  try:
    described = files.read_json(folder / "_METADATA", shown)
    listed = {"/".join(key["key"] for key in entry["key_metadata"]) for entry in described["tree_metadata"].values()}
  except DamagedError as error:
    return [str(error)]
  except (KeyError, TypeError, AttributeError):
    return [f"{shown} is damaged"]
  missing = next((name for name in names if name not in listed), None)
  return [] if missing is None else [f"{shown} does not list {missing}"]


def _as_target(x: Any, target: Any, record: Mapping[str, Any]) -> Any:
  if "key" in record and _is_key(target):
    return jax.random.wrap_key_data(x, impl=record["key"])
  if isinstance(target, bool | int | float):
    return type(target)(x)
  if isinstance(target, np.ndarray | np.generic):
    return np.asarray(x, target.dtype)
  return x if x.dtype == target.dtype else x.astype(target.dtype)
