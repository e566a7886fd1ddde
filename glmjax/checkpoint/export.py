"""Models for inference, written from a run's newest good step or from another export.

  EXPORT/  config.json   tokenizer/   params/<array>/...   checksums.json   (appears by one rename)

Parameters only, never the optimizer; one block at a time is read, converted and written.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
import pathlib
import re
import shutil
from typing import Any

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.io import publish
from glmjax.checkpoint import blocks
from glmjax.checkpoint import checksums
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import source as source_lib
from glmjax.models import config as config_lib
from glmjax.quantize import qarray


@dataclasses.dataclass(frozen=True)
class Content:
  """What is to be written: everything but the place."""

  config: folder_lib.FolderConfig
  tokenizer: pathlib.Path | None  # folder
  weights: Sequence[blocks.Weight]
  read: Callable[[blocks.Weight, blocks.Region], Mapping[str, Any]]  # stored arrays of a block
  verify: Callable[[], None]  # called when all was read, before it counts
  elements: int | None = None  # of our format's largest block; None: blocks.ELEMENTS


# Writes the content in another format into a folder that it makes.
FormatWriter = Callable[[Content, pathlib.Path], None]


def export(checkpoint: str | os.PathLike, out: str | os.PathLike, bits: int | None = None,
           dtype: str | None = None, overwrite: bool = False, write_format: FormatWriter | None = None
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
  out = pathlib.Path(out).absolute()
  if bits not in (None, *qarray.BITS):
    raise errors.InputError(f"bits is {bits}: give 8 or 4, or leave it out for float")
  if dtype not in (None, *config_lib.DTYPES):
    raise errors.InputError(f"dtype is {dtype!r}: choose one of {', '.join(config_lib.DTYPES)}")
  dtype = dtype or (None if bits is None else "float16")
  check_out(out, pathlib.Path(checkpoint), overwrite)

  def write(source: source_lib.Source) -> dict[str, Any]:
    config = _exported(source, bits, dtype)
    source.check_size()
    reader = blocks.Reader(source.arrays, source.records)
    weights = source.weights(bits, dtype)
    tokenizer = pathlib.Path(checkpoint) / folder_lib.TOKENIZER
    content = Content(config, tokenizer if tokenizer.is_dir() else None, weights,
                      lambda weight, region: source.read_block(reader, weight, region), reader.verify)
    blocks.need_room(out, weights)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
      return put(content, temporary, out, write_format or write_folder)
    except OSError as error:
      reason = arrays.one_line(error)
      raise errors.InputError(f"{out} could not be written ({reason}): nothing was left there") from error
    finally:
      shutil.rmtree(temporary, ignore_errors=True)

  return source_lib.use(checkpoint, write)


def _exported(source: source_lib.Source, bits: int | None, dtype: str | None) -> folder_lib.FolderConfig:
  if source.bits is not None and bits is not None:
    raise errors.InputError(f"{source.arrays.parent} is an INT{source.bits} model: export from the training run or "
                            "a float export")
  dtype = dtype or source.config.model.param_dtype
  model = dataclasses.replace(source.config.model, param_dtype=dtype)
  exported = source.config.export | {"bits": bits or source.bits, "dtype": dtype, "step": source.step}
  return dataclasses.replace(source.config, model=model, export=exported)


def check_out(out: pathlib.Path, source: pathlib.Path, overwrite: bool) -> None:
  """Raises InputError unless `out` is free, or an export that may be overwritten."""
  recover(out)
  for path in [*_left_over(out, "tmp"), *_left_over(out, "old")]:  # half of a new one, one that was replaced
    shutil.rmtree(path, ignore_errors=True)
  if not out.exists():
    return
  if not overwrite:
    raise errors.InputError(f"{out} is there already: choose another folder, or say overwrite")
  is_export = (out / source_lib.CHECKSUMS).is_file() and not (out / folder_lib.CHECKPOINTS).exists()
  if out == source.absolute() or not is_export:
    raise errors.InputError(f"{out} is no export that may be overwritten: choose another folder")


def put(content: Content, temporary: pathlib.Path, out: pathlib.Path, write: FormatWriter) -> dict[str, Any]:
  """Writes the content to `temporary` and renames that to `out`; says what `export` returns."""
  temporary.mkdir(parents=True, exist_ok=True)
  write(content, temporary)
  disk_bytes = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
  _put_in_place(temporary, out)
  described = {key: content.config.export[key] for key in ("bits", "dtype", "step")}
  return {"out": str(out), **described, "array_bytes": sum(weight.nbytes for weight in content.weights),
          "disk_bytes": disk_bytes}


def write_folder(content: Content, folder: pathlib.Path) -> None:
  """Our own format. What an earlier try has left of the same content in `folder` is used."""
  folder_lib.write_config(folder, content.config)
  if content.tokenizer is not None:
    folder_lib.copy_tokenizer(content.tokenizer, folder)
  with blocks.as_os_errors():
    writer = blocks.Writer(folder / folder_lib.PARAMS, content.weights, content.elements)
    records = writer.write(content.read, "parameters")
  content.verify()
  files = [path.relative_to(folder) for path in sorted(folder.rglob("*"))
           if path.is_file() and folder_lib.PARAMS not in path.relative_to(folder).parts]
  crcs = {str(file): source_lib.file_crc(folder / file) for file in files if str(file) != source_lib.CHECKSUMS}
  publish.write_json(folder / source_lib.CHECKSUMS, checksums.seal({"arrays": records, "files": crcs}))
  writer.forget()


def _put_in_place(temporary: pathlib.Path, out: pathlib.Path) -> None:
  """Renames; the export that is replaced leaves by a rename, too (`recover` if we die in between)."""
  old = out.with_name(f".{out.name}.{os.getpid()}.old")
  if out.exists():
    out.rename(old)
  try:
    temporary.rename(out)
  except OSError:
    if old.exists():
      old.rename(out)
    raise
  publish.sync(out.parent)
  shutil.rmtree(old, ignore_errors=True)


def recover(out: pathlib.Path) -> None:
  """Puts back the export that a process killed between two renames had moved aside."""
  if out.exists():
    return
  for old in _left_over(out, "old"):
    try:
      old.rename(out)
    except OSError as error:
      raise errors.InputError(f"{out} was being replaced when that was killed: rename {old.name} there back to "
                              f"{out.name}") from error
    return


def _left_over(out: pathlib.Path, suffix: str) -> list[pathlib.Path]:
  """What exports to `out` whose processes are gone have left beside it."""
  name = re.compile(rf"\.{re.escape(out.name)}\.(\d+)\.{suffix}")
  beside = out.parent.iterdir() if out.parent.is_dir() else ()
  return [path for path in beside if (match := name.fullmatch(path.name)) and not _runs(int(match[1]))]


def _runs(process: int) -> bool:
  try:
    os.kill(process, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except OSError:  # another user's
    pass
  return True
