"""Import: a THUDM model's files to our export folder, block by block, going on where a killed import stopped.

On a disk it is prepared in a folder beside its place, and put there by a rename; in a bucket in its place. Until it is
whole `.unfinished` in that folder notes by which plan.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.checkpoint import blocks
from glmjax.checkpoint import export
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load as load_lib
from glmjax.checkpoint import source as ours_lib
from glmjax.checkpoint import stored_weights
from glmjax.io import bucket_path
from glmjax.io import folders
from glmjax.io import lease
from glmjax.io import paths
from glmjax.io import publish
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.quantize import qarray
from glmjax.thudm import peft
from glmjax.thudm import prefix as prefix_lib
from glmjax.thudm import source as source_lib

_FORMAT = 2  # of what an unfinished import leaves

_log = logging.getLogger("glmjax")


def import_model(
  family: str,
  source: paths.Named,
  out: paths.Named,
  dtype: str | None = None,
  bits: int | None = None,
  tokenizer: paths.Named | None = None,
  num_heads: int | None = None,
  rotary_rounding: str = "half_table",
  prefix: paths.Named | None = None,
  memory_limit_gib: float | None = None,
  overwrite: bool = False,
) -> dict[str, Any]:
  """Writes an export folder from a model in THUDM's own files.

  What a killed import left beside `out` is checked and used when it is of the same files and options.

  Args:
    family: glm-130b, glm-10b (and the smaller GLMs) or chatglm-6b.
    source: folder of the files.
    out: folder to write.
    dtype: of the float parameters; None: as in the files.
    bits: 8 or 4 quantizes the blocks' kernels; None leaves them as they are. Files of INT8 and INT4 stay that.
    tokenizer: ice_text.model or a tokenizer folder; None: either in `source`; "none": weights alone.
    num_heads: of glm-10b's family where heads are not 64 wide.
    rotary_rounding: none, half_frequencies or half_table, as the published models are run.
    prefix: folder or file of a P-Tuning v2 prefix for chatglm-6b; one in `source` itself is found there.
    memory_limit_gib: most memory to take; None: what full-sized blocks take, about 1.2 GiB.
    overwrite: replace an export that is there, and what an import of other files or options has left beside it.

  Returns:
    As `export.export`; "family", "parameters", "source_bytes" of all tensors, "note": what there is to know, or None.

  Raises:
    errors.InputError: when anything about the files is wrong; nothing was written then.
  """
  if bits not in (None, *qarray.BITS):
    raise errors.InputError(f"bits is {bits}: give 8 or 4, or leave it out")
  if dtype not in (None, *config_lib.DTYPES):
    raise errors.InputError(f"dtype is {dtype!r}: choose one of {', '.join(config_lib.DTYPES)}")
  source = paths.named(source, "the source folder")
  with export.claimed(out, overwrite, source) as out:
    opened = source_lib.open_source(family, source, tokenizer, num_heads, rotary_rounding, prefix)
    if opened.bits is not None and bits not in (None, opened.bits):
      raise errors.InputError(
        f"{source} holds INT{opened.bits} weights: they cannot become INT{bits} without loss, so "
        "leave --bits out or import the float files"
      )
    if opened.note:
      _log.warning("%s", opened.note)
    content = _content(opened, bits, dtype)
    if memory_limit_gib is not None:
      elements = stored_weights.elements_within(memory_limit_gib, content.weights)
      content = dataclasses.replace(content, elements=elements)
    try:
      described = _write(opened, content, out, overwrite)
    except OSError as error:
      raise errors.InputError(
        f"{out} could not be written ({errors.reason(error)}): the same command goes on from here"
      ) from error
  about = {"family": family, "source_bytes": opened.nbytes, "note": opened.note}
  return {"out": str(out)} | described | about | {"parameters": params_lib.count(content.config.model)}


def import_adapter(source: paths.Named, base: paths.Named, out: paths.Named, overwrite: bool = False) -> dict[str, Any]:
  """Writes an adapter's folder from what PEFT wrote of one (peft.py), or ChatGLM-6B's ptuning/ (prefix.py).

  Args:
    source: the folder that either wrote.
    base: folder of the model that was adapted.
    out: folder to write.
    overwrite: replace an export that is there.

  Returns:
    As `export.export`, and "parameters", of the adapter.

  Raises:
    errors.InputError: when anything about the files is wrong; nothing was written then.
  """
  source, base = paths.named(source, "the source folder"), paths.named(base, "--base")
  with export.claimed(out, overwrite, source, base) as out:
    content = _adapter(source, base)
    stored_weights.need_room(out, content.weights)
    try:
      with publish.folder(out, ours_lib.CHECKSUMS, overwrite) as folder:
        export.write_folder(content, folder)
        described = export.describe(content, folder)
    except OSError as error:
      raise errors.InputError(f"{out} could not be written ({errors.reason(error)}): nothing was left there") from error
  sizes = [math.prod(weight.shape) for weight in content.weights]
  return {"out": str(out)} | described | {"parameters": sum(sizes)}


def _adapter(source: paths.Path, base: paths.Path) -> export.ExportSource:
  """Reads an adapter of the model in the folder `base`."""
  found = folder_lib.read_config(base)
  if found.base:
    raise errors.InputError(f"{base} holds an adapter of {found.base.get('folder')}: give the model itself")
  read = prefix_lib.read if prefix_lib.is_there(source) and not peft.is_there(source) else peft.read
  model, arrays = read(source, base, found.model)
  described = {"folder": str(base), "fingerprint": load_lib.fingerprint(base), "bits": found.export.get("bits")}
  exported = {"bits": None, "dtype": "float32", "step": None}
  config = dataclasses.replace(found, model=model, data={}, export=exported, base=described)
  tokenizer = base / folder_lib.TOKENIZER

  def block(weight: stored_weights.StoredWeight, region: stored_weights.Region) -> Mapping[str, np.ndarray]:
    return {weight.name: arrays[weight.name][region]}

  weights = [stored_weights.StoredWeight(name, x.shape, "float32") for name, x in arrays.items()]
  return export.ExportSource(config, tokenizer if tokenizer.is_dir() else None, weights, block, lambda: None)


def _write(opened: source_lib.Source, content: export.ExportSource, out: paths.Path, overwrite: bool) -> dict[str, Any]:
  """Writes the export where it is prepared, and puts it in its place; returns what it holds."""
  work = export.importing(out)
  _begin(work, _plan(opened, content), content, overwrite)
  try:
    with tempfile.TemporaryDirectory() as scratch:
      if opened.tokenizer is not None:
        opened.tokenizer.save(pathlib.Path(scratch) / folder_lib.TOKENIZER)
        content = dataclasses.replace(content, tokenizer=pathlib.Path(scratch) / folder_lib.TOKENIZER)
      export.write_folder(content, work)
  except errors.NotFiniteError:  # nothing there is to be gone on with
    lease.check()
    publish.remove(work)
    raise
  publish.end(work)
  if work != out:
    publish.put_in_place(work, out, overwrite)
  return export.describe(content, out)


def _begin(work: paths.Path, plan: str, content: export.ExportSource, overwrite: bool) -> None:
  """Makes the working folder, or keeps what an import that stopped has left there by the same plan.

  Raises:
    errors.InputError: when that was by another plan, and is not to be overwritten.
  """
  there, begun = 0, publish.begun(work).get(export.PLAN)
  if begun == plan and not (work / ours_lib.CHECKSUMS).is_file():
    there = _bytes_of(work)
    _log.info("going on with the import that stopped after %.0f MB", there / 1e6)
  elif begun is not None and begun != plan and not overwrite and (work / folder_lib.PARAMS / blocks.JOURNAL).is_file():
    raise _of_another_plan(work)
  stored_weights.need_room(work.parent, content.weights, there)
  if not there:
    if strange := next(folders.strangers(work, folders.Kind.EXPORT), None):
      raise errors.InputError(f"{work} holds {strange}, which no import wrote: move it away")
    publish.restart(work, ours_lib.CHECKSUMS, **{export.PLAN: plan})


def _bytes_of(folder: paths.Path) -> int:
  """Returns the bytes that are taken by what is in a folder."""
  if isinstance(folder, bucket_path.BucketPath):
    return sum(folder.sizes().values())
  return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _of_another_plan(work: paths.Path) -> errors.InputError:
  return errors.InputError(
    f"{work} holds an import of other files or options that stopped: give the same again to go on with it, or "
    "--overwrite to begin anew"
  )


def _content(opened: source_lib.Source, bits: int | None, dtype: str | None) -> export.ExportSource:
  bits = opened.bits or bits
  kind = dtype or opened.config.param_dtype
  fields = {"param_dtype": kind} | ({"dtype": "float32" if kind == "float32" else "bfloat16"} if dtype else {})
  model = dataclasses.replace(opened.config, **fields)
  known = (
    {}
    if opened.tokenizer is None
    else {"fingerprint": opened.tokenizer.fingerprint, "vocab_size": opened.tokenizer.vocab_size}
  )
  described = {"bits": bits, "dtype": kind, "step": None, "family": opened.family, "iteration": opened.shards.iteration}
  config = folder_lib.FolderConfig(model, {}, known, described)
  return export.ExportSource(
    config,
    None,  # it comes into a folder when that is there
    opened.weights(bits, dtype),
    functools.partial(_read_finite, opened),
    lambda: None,
  )


def _read_finite(
  opened: source_lib.Source, weight: stored_weights.StoredWeight, region: stored_weights.Region
) -> Mapping[str, np.ndarray]:
  """Reads a block as it is to be stored; an array that is not finite is an error, and never becomes part of a model."""
  try:
    block = opened.read(weight, region)
    if weight.bits is not None:  # whose scales may come as they are; what was a float here is checked already
      stored_weights.check_finite(block, "is not finite")
    return block
  except errors.NotFiniteError as error:
    advice = "" if ": " in str(error) else ": download the files again"
    raise errors.NotFiniteError(f"{opened.files[0].parent}: {error}{advice}") from error


def _plan(opened: source_lib.Source, content: export.ExportSource) -> str:
  """Returns a hash of all that decides what will be written."""
  files = [(_real(path), (found := path.stat()).st_size, found.st_mtime_ns) for path in opened.files]
  weights = [repr(weight) for weight in content.weights]
  plan = [_FORMAT, content.elements or stored_weights.ELEMENTS, files, repr(content.config), weights]
  return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def _real(path: paths.Path) -> str:
  return os.path.realpath(path) if isinstance(path, pathlib.Path) else str(path)
