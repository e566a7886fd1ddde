"""Models for inference, written from a run's newest good step or from another export.

  EXPORT/  config.json   tokenizer/   params/<array>/...   checksums.json   (appears by one rename; in a bucket it is
                                                                          whole once checksums.json is there)

Parameters only, never the optimizer; one block at a time is read, converted and written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import logging
import pathlib
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.checkpoint import adapter as adapter_lib
from glmjax.checkpoint import blocks
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import mapped
from glmjax.checkpoint import mapped_write
from glmjax.checkpoint import source as source_lib
from glmjax.checkpoint import stored_weights
from glmjax.io import folders
from glmjax.io import lock
from glmjax.io import paths
from glmjax.io import publish
from glmjax.io import seal
from glmjax.io import tokenizer_folder
from glmjax.models import config as config_lib
from glmjax.quantize import qarray

PLAN = "plan"  # in the note of an import that is unfinished: what it is of

_log = logging.getLogger("glmjax")


# Reads the stored arrays of a block.
ReadBlock = Callable[[stored_weights.StoredWeight, stored_weights.Region], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class ExportSource:
  """What is to be written: everything but the place."""

  config: folder_lib.FolderConfig
  tokenizer: paths.Path | None  # folder
  weights: Sequence[stored_weights.StoredWeight]
  read: ReadBlock
  verify: Callable[[], None]  # called when all was read, before it counts
  elements: int | None = None  # of our format's largest block; None: stored_weights.ELEMENTS


# Writes the content in another format into a folder that it makes.
FormatWriter = Callable[[ExportSource, paths.Path], None]


def export(
  checkpoint: paths.Named,
  out: paths.Named,
  bits: int | None = None,
  dtype: str | None = None,
  overwrite: bool = False,
  write_format: FormatWriter | None = None,
  layout: str | None = None,
  adapter: paths.Named | None = None,
) -> dict[str, Any]:
  """Writes an inference model from a training run's newest good step, or from another export.

  Args:
    checkpoint: the run's or the export's folder.
    out: folder to write.
    bits: 8 or 4 quantizes the blocks' kernels; None leaves them as they are.
    dtype: of the float parameters: embeddings, norms, biases and unquantized kernels; None: float16 beside
      kernels that are quantized here, as in the original's files, else as they are. Of the layout "cpu": float32 or
      bfloat16, of embeddings and unquantized kernels, and what the model computes in; None: what it does; norms and
      biases are as they are.
    overwrite: replace an export that is there.
    write_format: writes another format than ours.
    layout: of our format; "cpu": one file that CPUs map into memory (mapped.py), None: an array a folder.
    adapter: a run that trained one beside this model, or its export: it is merged into the weights; None: they are as
      they are.

  Returns:
    {"out", "step", "bits", "dtype", "array_bytes", "disk_bytes"}; disk_bytes counts all files of the folder. Of kernels
    that an adapter was merged into and that are quantized also "merge_error": what quantizing changed of them, root
    mean square over theirs.

  Raises:
    errors.InputError: when the source cannot be used or `out` is there already.
  """
  checkpoint = paths.named(checkpoint, "checkpoint")
  _check_settings(bits, dtype, layout, out)
  merged = None if adapter is None else adapter_lib.Adapter.read(adapter)
  read_from = (checkpoint,) if adapter is None else (checkpoint, paths.named(adapter, "adapter"))
  with claimed(out, overwrite, *read_from) as out:

    def write(source: source_lib.Source) -> dict[str, Any]:
      content, merging = _content(source, checkpoint, merged, bits, dtype, layout)
      stored_weights.need_room(out, content.weights)
      try:
        last = source_lib.CHECKSUMS if write_format is None else None
        with publish.folder(out, last, overwrite) as folder:
          (write_format or write_folder)(content, folder)
          described = describe(content, folder)
        if merging is not None and merging.error is not None:
          described["merge_error"] = round(merging.error, 6)
        return {"out": str(out)} | described
      except OSError as error:
        raise errors.InputError(
          f"{out} could not be written ({errors.reason(error)}): nothing was left there"
        ) from error

    return source_lib.use(checkpoint, write)


def _content(
  source: source_lib.Source,
  checkpoint: paths.Path,
  merged: adapter_lib.Adapter | None,
  bits: int | None,
  dtype: str | None,
  layout: str | None,
) -> tuple[ExportSource, adapter_lib.Merging | None]:
  """Returns what is to be written, and what merges an adapter into it."""
  config, weights = _exported(source, bits, dtype, layout)
  if not source.config.export and (run := folder_lib.run_id(checkpoint)):
    config = dataclasses.replace(config, export=config.export | {"run": run})
  if not config.base:
    source.check_size()
  reader = blocks.Reader(source.arrays, source.records)
  read, merging = functools.partial(source.read_block, reader), None
  if merged is not None:
    merging = adapter_lib.Merging(merged, source, reader, checkpoint)
    config, weights, read = merging.config(config), merging.weights(weights), merging.read
  tokenizer = checkpoint / folder_lib.TOKENIZER
  content = ExportSource(
    config,
    tokenizer if tokenizer.is_dir() else None,
    weights,
    functools.partial(_read_finite, source, read),
    reader.verify,
  )
  return content, merging


@contextlib.contextmanager
def claimed(out: paths.Named, overwrite: bool, *sources: paths.Path) -> Iterator[paths.Path]:
  """Yields the real path of an export that is to be written, and keeps other writers away from it.

  Raises:
    errors.InputError: when it is there and may not be overwritten, is of another kind, or is being written.
  """
  out = folders.claim(out, folders.Kind.EXPORT, "out", sources=sources)
  with publish.parent(out), lock.held(lock.beside(out), f"{out} is being written by another export or import"):
    publish.put_back(out)
    if not is_importing(out):
      publish.sweep(out)
    folders.claim(out, folders.Kind.EXPORT, "out", overwrite=overwrite)
    if not overwrite and not is_importing(out) and out.is_dir() and any(out.iterdir()):
      raise errors.InputError(f"{out} is there already: choose another folder, or give --overwrite")
    for left in publish.left_elsewhere(out):
      _log.warning("%s is of an export on another machine: delete it if none is at work there", left)
    yield out


def importing(out: paths.Path) -> paths.Path:
  """Returns the folder where thudm/load.py prepares an import to `out`: it outlives a kill, and is gone on with."""
  return out.with_name(f".{out.name}.importing") if isinstance(out, pathlib.Path) else out


def is_importing(out: paths.Path) -> bool:
  """Tells whether a folder in a bucket is an import that did not come to its end, and is gone on with there."""
  return publish.in_work(out) and PLAN in publish.begun(out)


def _read_finite(
  source: source_lib.Source, read: ReadBlock, weight: stored_weights.StoredWeight, region: stored_weights.Region
) -> dict[str, np.ndarray]:
  """Reads a block as it is to be stored.

  Raises:
    errors.NotFiniteError: naming the array that no model can compute with.
    files.DamagedError: where that is not what was saved.
  """
  try:
    block = read(weight, region)
    if weight.bits is not None:  # whose scales may come as they are; what was a float here is checked already
      stored_weights.check_finite(block, "is not finite")
    return block
  except errors.NotFiniteError as error:
    wanted = source.targets()
    source.read({name: target for name, target in wanted.items() if name.startswith(weight.name)})  # verified, whole
    advice = "" if ": " in str(error) else "; give an older checkpoint, or rename the newest to use the one before"
    step = "" if source.step is None else f" (step {source.step})"
    raise errors.NotFiniteError(f"{source.arrays}{step}: {error}{advice}") from error


def _check_settings(bits: int | None, dtype: str | None, layout: str | None, out: paths.Named) -> None:
  if bits not in (None, *qarray.BITS):
    raise errors.InputError(f"bits is {bits}: give 8 or 4, or leave it out for float")
  if dtype not in (None, *config_lib.DTYPES):
    raise errors.InputError(f"dtype is {dtype!r}: choose one of {', '.join(config_lib.DTYPES)}")
  if layout is None:
    return
  if layout != mapped.LAYOUT:
    raise errors.InputError(f"layout is {layout!r}: {mapped.LAYOUT} is known")
  if dtype not in (None, *config_lib.CPU_DTYPES):
    raise errors.InputError(
      f"dtype is {dtype!r}: CPUs compute in {' or '.join(config_lib.CPU_DTYPES)}, and so is this layout"
    )
  if not isinstance(paths.named(out, "out"), pathlib.Path):
    raise errors.InputError(f"{out}: the layout {layout} is for files that are mapped: export to a disk, and copy it")


def _exported(
  source: source_lib.Source, bits: int | None, dtype: str | None, layout: str | None
) -> tuple[folder_lib.FolderConfig, list[stored_weights.StoredWeight]]:
  """Returns what an export says of itself, and its weights."""
  if source.bits is not None and bits is not None:
    raise errors.InputError(
      f"{source.arrays.parent} is an INT{source.bits} model: export from the training run or a float export"
    )
  if source.config.base and not (bits is None and dtype is None and layout is None):
    raise errors.InputError(
      f"{source.arrays} holds an adapter, which stays float32: leave --bits, --dtype and --format=cpu out"
    )
  model, exported = source.config.model, dict(source.config.export)
  exported.pop("layout", None)
  if layout is None:
    dtype = dtype or (None if bits is None else "float16")
    weights = source.weights(bits, dtype)
    model = dataclasses.replace(model, param_dtype=dtype or model.param_dtype)
    dtype = dtype or exported.get("dtype") or model.param_dtype
  else:
    dtype = dtype or model.dtype
    if dtype not in config_lib.CPU_DTYPES:
      raise errors.InputError(f"{source.arrays.parent} computes in {dtype}, and CPUs do not: give --dtype=bfloat16")
    weights = mapped_write.weights(source.weights(bits), dtype)
    model = dataclasses.replace(model, dtype=dtype)
    exported["layout"] = layout
  exported |= {"bits": bits or source.bits, "dtype": dtype, "step": source.step}
  return dataclasses.replace(source.config, model=model, export=exported), weights


def describe(content: ExportSource, folder: paths.Path) -> dict[str, Any]:
  """Returns what `export` tells of the content that was written into a folder, all but the folder's name."""
  disk_bytes = sum(_files(folder).values())
  described = {key: content.config.export[key] for key in ("bits", "dtype", "step")}
  return described | {"array_bytes": sum(weight.nbytes for weight in content.weights), "disk_bytes": disk_bytes}


def _files(folder: paths.Path) -> dict[str, int]:
  """Returns the bytes of all files below a folder, by their paths in it; what notes that it is unfinished is none."""
  if isinstance(folder, pathlib.Path):
    found = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
  else:
    found = folder.sizes()
  sizes = {path.relative_to(folder).as_posix(): size for path, size in sorted(found.items())}
  return {name: size for name, size in sizes.items() if name != publish.IN_WORK}


def write_folder(content: ExportSource, folder: paths.Path) -> None:
  """Writes our own format into a folder; parameters that an earlier try has left there are checked and used."""
  for child in folder.iterdir():
    if child.name not in (folder_lib.PARAMS, publish.IN_WORK):
      publish.remove(child)  # half a tokenizer, say: nothing unfinished is ever published
  folder_lib.write_config(folder, content.config)
  if content.tokenizer is not None:
    tokenizer_folder.copy(content.tokenizer, folder / folder_lib.TOKENIZER)
  params, writer = folder / folder_lib.PARAMS, None
  with blocks.as_os_errors():
    if content.config.export.get("layout") is None:
      writer = blocks.Writer(params, content.weights, content.elements)
      written = {"arrays": writer.write(content.read, "parameters")}
    else:
      written = mapped_write.write(params, content.weights, content.read, content.elements)
  content.verify()
  names = [name for name in _files(folder) if not name.startswith(f"{folder_lib.PARAMS}/")]
  crcs = {name: source_lib.file_crc(folder / name, name) for name in names}
  publish.finish(folder / source_lib.CHECKSUMS, seal.seal(written | {"files": crcs}))
  if writer is not None:
    writer.forget()
