"""Models for inference, written from a run's newest good step or from another export.

  EXPORT/  config.json   tokenizer/   params/<array>/...   checksums.json   (appears by one rename)

Parameters only, never the optimizer; one block at a time is read, converted and written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.checkpoint import blocks
from glmjax.checkpoint import folder as folder_lib
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

_log = logging.getLogger("glmjax")


@dataclasses.dataclass(frozen=True)
class ExportSource:
  """What is to be written: everything but the place."""

  config: folder_lib.FolderConfig
  tokenizer: pathlib.Path | None  # folder
  weights: Sequence[stored_weights.StoredWeight]
  read: Callable[[stored_weights.StoredWeight, stored_weights.Region], Mapping[str, Any]]  # stored arrays of a block
  verify: Callable[[], None]  # called when all was read, before it counts
  elements: int | None = None  # of our format's largest block; None: stored_weights.ELEMENTS


# Writes the content in another format into a folder that it makes.
FormatWriter = Callable[[ExportSource, pathlib.Path], None]


def export(
  checkpoint: str | os.PathLike,
  out: str | os.PathLike,
  bits: int | None = None,
  dtype: str | None = None,
  overwrite: bool = False,
  write_format: FormatWriter | None = None,
) -> dict[str, Any]:
  """Writes an inference model from a training run's newest good step, or from another export.

  Args:
    checkpoint: the run's or the export's folder.
    out: folder to write.
    bits: 8 or 4 quantizes the blocks' kernels; None leaves them as they are.
    dtype: of the float parameters: embeddings, norms, biases and unquantized kernels; None: float16 beside
      kernels that are quantized here, as in the original's files, else as they are.
    overwrite: replace an export that is there.
    write_format: writes another format than ours.

  Returns:
    {"out", "step", "bits", "dtype", "array_bytes", "disk_bytes"}; disk_bytes counts all files of the folder.

  Raises:
    errors.InputError: when the source cannot be used or `out` is there already.
  """
  checkpoint = paths.local(checkpoint, "checkpoint")
  if bits not in (None, *qarray.BITS):
    raise errors.InputError(f"bits is {bits}: give 8 or 4, or leave it out for float")
  if dtype not in (None, *config_lib.DTYPES):
    raise errors.InputError(f"dtype is {dtype!r}: choose one of {', '.join(config_lib.DTYPES)}")
  dtype = dtype or (None if bits is None else "float16")
  with claimed(out, overwrite, checkpoint) as out:

    def write(source: source_lib.Source) -> dict[str, Any]:
      config = _exported(source, bits, dtype)
      source.check_size()
      reader = blocks.Reader(source.arrays, source.records)
      weights = source.weights(bits, dtype)
      tokenizer = checkpoint / folder_lib.TOKENIZER
      content = ExportSource(
        config,
        tokenizer if tokenizer.is_dir() else None,
        weights,
        functools.partial(_read_finite, source, reader),
        reader.verify,
      )
      stored_weights.need_room(out, weights)
      try:
        with publish.folder(out, overwrite) as folder:
          (write_format or write_folder)(content, folder)
          described = describe(content, folder)
        return {"out": str(out)} | described
      except OSError as error:
        raise errors.InputError(
          f"{out} could not be written ({errors.reason(error)}): nothing was left there"
        ) from error

    return source_lib.use(checkpoint, write)


@contextlib.contextmanager
def claimed(out: str | os.PathLike, overwrite: bool, source: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the real path of an export that is to be written, and keeps other writers away from it.

  Raises:
    errors.InputError: when it is there and may not be overwritten, is of another kind, or is being written.
  """
  out = folders.claim(out, folders.Kind.EXPORT, "out", sources=[source])
  with publish.parent(out), lock.held(lock.beside(out), f"{out} is being written by another export or import"):
    publish.put_back(out)
    publish.sweep(out)
    if not (importing(out) / "export").exists():  # killed when all was done
      publish.remove(importing(out))
    folders.claim(out, folders.Kind.EXPORT, "out", overwrite=overwrite)
    if not overwrite and out.is_dir() and any(out.iterdir()):
      raise errors.InputError(f"{out} is there already: choose another folder, or give --overwrite")
    for left in publish.left_elsewhere(out):
      _log.warning("%s is of an export on another machine: delete it if none is at work there", left)
    yield out


def importing(out: pathlib.Path) -> pathlib.Path:
  """Returns the folder where thudm/load.py prepares an import to `out`: it outlives a kill, and is gone on with."""
  return out.with_name(f".{out.name}.importing")


def _read_finite(
  source: source_lib.Source, reader: blocks.Reader, weight: stored_weights.StoredWeight, region: stored_weights.Region
) -> dict[str, np.ndarray]:
  """Reads a block as it is to be stored.

  Raises:
    errors.NotFiniteError: naming the array that no model can compute with.
    files.DamagedError: where that is not what was saved.
  """
  try:
    block = source.read_block(reader, weight, region)
    if weight.bits is not None:  # whose scales may come as they are; what was a float here is checked already
      stored_weights.check_finite(block, "is not finite")
    return block
  except errors.NotFiniteError as error:
    wanted = source.targets()
    source.read({name: target for name, target in wanted.items() if name.startswith(weight.name)})  # verified, whole
    advice = "" if ": " in str(error) else "; give an older checkpoint, or rename the newest to use the one before"
    step = "" if source.step is None else f" (step {source.step})"
    raise errors.NotFiniteError(f"{source.arrays}{step}: {error}{advice}") from error


def _exported(source: source_lib.Source, bits: int | None, dtype: str | None) -> folder_lib.FolderConfig:
  if source.bits is not None and bits is not None:
    raise errors.InputError(
      f"{source.arrays.parent} is an INT{source.bits} model: export from the training run or a float export"
    )
  dtype = dtype or source.config.model.param_dtype
  model = dataclasses.replace(source.config.model, param_dtype=dtype)
  exported = source.config.export | {"bits": bits or source.bits, "dtype": dtype, "step": source.step}
  return dataclasses.replace(source.config, model=model, export=exported)


def describe(content: ExportSource, folder: pathlib.Path) -> dict[str, Any]:
  """Returns what `export` tells of the content that was written into a folder, all but the folder's name."""
  disk_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
  described = {key: content.config.export[key] for key in ("bits", "dtype", "step")}
  return described | {"array_bytes": sum(weight.nbytes for weight in content.weights), "disk_bytes": disk_bytes}


def write_folder(content: ExportSource, folder: pathlib.Path) -> None:
  """Writes our own format into a folder; parameters that an earlier try has left there are checked and used."""
  for child in folder.iterdir():
    if child.name != folder_lib.PARAMS:  # half a tokenizer, say: nothing unfinished is ever published
      publish.remove(child)
  folder_lib.write_config(folder, content.config)
  if content.tokenizer is not None:
    tokenizer_folder.copy(content.tokenizer, folder / folder_lib.TOKENIZER)
  with blocks.as_os_errors():
    writer = blocks.Writer(folder / folder_lib.PARAMS, content.weights, content.elements)
    records = writer.write(content.read, "parameters")
  content.verify()
  files = [
    path.relative_to(folder)
    for path in sorted(folder.rglob("*"))
    if path.is_file() and folder_lib.PARAMS not in path.relative_to(folder).parts
  ]
  crcs = {
    str(file): source_lib.file_crc(folder / file, str(file)) for file in files if str(file) != source_lib.CHECKSUMS
  }
  publish.write_json(folder / source_lib.CHECKSUMS, seal.seal({"arrays": records, "files": crcs}))
  writer.forget()
