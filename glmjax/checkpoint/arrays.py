"""Arrays on disk: one folder per array, written by Orbax, verified when read.

Trees are stored as dicts of names such as params/layers/mlp/wo/kernel, whatever containers they were made
of, so that a reader can ask for a part of a tree and every complaint names an array.
"""

from collections.abc import Iterable, Iterator, Mapping
import json
import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from glmjax import errors
from glmjax.checkpoint import checksums

_CHUNK_BYTES = 128 * 2**20  # largest file: parallel reading, and less to read for a part of an array

Records = dict[str, dict[str, Any]]  # name -> {"shape", "dtype", "sum", and for PRNG keys "key": algorithm}


class DamagedError(Exception):
  """What was read is not what was written; the message names arrays and files in one line."""


def handler() -> ocp.PyTreeCheckpointHandler:
  """Plain zarr, a folder per array: a damaged file is an array with a name. Float weights hardly compress."""
  return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)


def flatten(tree: Any) -> dict[str, Any]:
  """Names to leaves; None and empty containers hold none."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_key(leaf: Any) -> bool:
  return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The dict tree that `flatten` names."""
  nested: dict[str, Any] = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    inner = nested
    for parent in parents:
      inner = inner.setdefault(parent, {})
    inner[last] = leaf
  return nested


def _storable(leaf: Any) -> jax.Array | np.ndarray:
  if _is_key(leaf):
    return jax.random.key_data(leaf)
  return leaf if isinstance(leaf, jax.Array) else np.array(leaf)  # a copy: the caller may write into its own


def prepare(tree: Any) -> tuple[ocp.args.PyTreeSave, Records]:
  """What Orbax is to write, and the record of every array to write beside it."""
  leaves = flatten(tree)
  stored = {name: _storable(leaf) for name, leaf in leaves.items()}
  sums = checksums.array_sums(stored)
  records = {name: {"shape": list(x.shape), "dtype": x.dtype.name, "sum": sums[name]}
             for name, x in stored.items()}
  for name, leaf in leaves.items():
    if _is_key(leaf):
      records[name]["key"] = str(jax.random.key_impl(leaf))
  save_args = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in stored}
  return ocp.args.PyTreeSave(nest(stored), save_args=nest(save_args)), records


def _stored_form(target: Any) -> tuple[tuple[int, ...], jax.sharding.Sharding | None]:
  """Shape as stored, and where to put it (None: the first device)."""
  if _is_key(target):
    return jax.eval_shape(jax.random.key_data, target).shape, getattr(target, "sharding", None)
  return tuple(np.shape(target)), getattr(target, "sharding", None)


def check_same_model(wanted: Mapping[str, Any], records: Records, where: pathlib.Path) -> None:
  """Compares names and shapes before anything is read.

  Raises:
    errors.InputError: naming the first array that differs, with both shapes.
  """
  for name in dict.fromkeys([*wanted, *records]):
    ours = list(_stored_form(wanted[name])[0]) if name in wanted else "no such array"
    theirs = records[name]["shape"] if name in records else "no such array"
    if ours != theirs:
      raise errors.InputError(f"{where} is from another model: {name} has {theirs} there and {ours} here; "
                              "use the configuration that it was trained with, or another folder")


def _check_divides(name: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> None:
  try:
    if sharding is not None:
      sharding.shard_shape(shape)
  except ValueError as error:
    raise errors.InputError(f"{name} of shape {list(shape)} does not divide over the mesh as "
                            f"{sharding.spec}: use another mesh") from error


def array_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Where Orbax keeps the array."""
  return folder / name.replace("/", ".")


def _broken_files(folder: pathlib.Path, name: str) -> Iterator[str]:
  """Files of an array that are missing or have the wrong size; its header when unreadable."""
  where = array_folder(folder, name)
  header_file = where / ".zarray"
  try:
    header = json.loads(header_file.read_bytes())
    shape, chunks = header["shape"], header["chunks"]
    size = math.prod(chunks) * np.dtype(zarr_dtype(header["dtype"])).itemsize
  except FileNotFoundError:
    yield f"{header_file.relative_to(folder.parent)} is missing"
    return
  except (OSError, ValueError, KeyError, TypeError):
    yield f"{header_file.relative_to(folder.parent)} is unreadable"
    return
  for place in np.ndindex(*(-(-n // c) for n, c in zip(shape, chunks))):
    chunk = where / (".".join(map(str, place)) or "0")
    found = chunk.stat().st_size if chunk.exists() else None
    if found != size:
      what = "is missing" if found is None else f"has {found} bytes instead of {size}"
      yield f"{chunk.relative_to(folder.parent)} {what}"


def zarr_dtype(name: str) -> Any:
  """What numpy makes of a dtype's name in a zarr header or in Records."""
  return jnp.bfloat16 if name == "bfloat16" else name


def read(folder: pathlib.Path, wanted: Mapping[str, Any], records: Records) -> dict[str, Any]:
  """Reads the named arrays, verifies each, and gives each the kind, dtype and sharding of its target.

  Args:
    folder: where Orbax wrote them.
    wanted: names to targets: arrays, ShapeDtypeStructs (without a sharding: for the first device), numbers.
    records: from `prepare`, names and shapes already checked against `wanted`.

  Raises:
    DamagedError: naming every array and, where known, file that is not as it was written.
    errors.InputError: when an array does not divide over its target's mesh.
  """
  for name, target in wanted.items():
    _check_divides(name, *_stored_form(target))
  _agree(_missing_files(folder, wanted))
  local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  on_host = {name for name in wanted if np.dtype(records[name]["dtype"]).itemsize == 8}
  restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) if name in on_host else
                  ocp.ArrayRestoreArgs(sharding=_stored_form(target)[1] or local)
                  for name, target in wanted.items()}
  failure, stored = "", {}
  try:
    with ocp.Checkpointer(handler()) as checkpointer:
      item = ocp.args.PyTreeRestore(nest(dict.fromkeys(wanted, 0)), restore_args=nest(restore_args),
                                    partial_restore=True)
      stored = flatten(checkpointer.restore(folder, args=item))
  except Exception as error:  # Orbax, TensorStore and JAX each raise their own
    failure = one_line(error)
  _agree(failure)
  sums = checksums.array_sums(stored)
  _agree(_listed([f"{name} (checksum differs: {array_folder(folder, name).relative_to(folder.parent)})"
                  for name in wanted if sums[name] != records[name]["sum"]]))
  return {name: _as_target(stored.pop(name), target, records[name]) for name, target in wanted.items()}


def _missing_files(folder: pathlib.Path, names: Iterable[str]) -> str:
  return _listed([f"{name} ({problem})" for name in names for problem in _broken_files(folder, name)])


def check_files(folder: pathlib.Path, names: Iterable[str]) -> None:
  """Raises DamagedError when a file of these arrays is missing or has the wrong size."""
  if problems := _missing_files(folder, names):
    raise DamagedError(problems)


def _listed(problems: list[str]) -> str:
  return "; ".join(problems[:4]) + (f" and {len(problems) - 4} more" if len(problems) > 4 else "")


def one_line(error: BaseException) -> str:
  """The start of an error's message, on one line."""
  return re.sub(r"\s+", " ", str(error) or type(error).__name__)[:300]


def _agree(failure: str) -> None:
  """Raises on every host when any failed, so that none waits for the others for ever."""
  failed = bool(failure)
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils  # pylint: disable=g-import-not-at-top
    failed = bool(np.any(multihost_utils.process_allgather(np.array(failed))))
  if failed:
    raise DamagedError(failure or "another host could not read its part")


def _as_target(x: Any, target: Any, record: Mapping[str, Any]) -> Any:
  if "key" in record and _is_key(target):
    return jax.random.wrap_key_data(x, impl=record["key"])
  if isinstance(target, bool | int | float):
    return type(target)(x)
  if isinstance(target, np.ndarray | np.generic):
    return np.asarray(x, target.dtype)
  return x if x.dtype == target.dtype else x.astype(target.dtype)
