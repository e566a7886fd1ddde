"""What a folder or file of weights holds: ours (runs, exports) and theirs (the Hub's, ranks, single files)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import hashlib
import math
import os
import pathlib
import re
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import blocks
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import manager
from glmjax.checkpoint import mapped
from glmjax.checkpoint import source as ours_lib
from glmjax.checkpoint import stored_weights
from glmjax.io import bucket_path
from glmjax.io import globs
from glmjax.io import paths
from glmjax.io import printable
from glmjax.io import progress
from glmjax.io import user_json
from glmjax.io import user_text
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.thudm import shards as shards_lib
from glmjax.thudm import source as source_lib
from glmjax.thudm import zips

_FAMILY_SIGN = "transformer.position_embeddings.weight"  # a key that only the GLMs up to 10B have
_LAYER = re.compile(r"(?<=layers[./])\d+(?=[./])")


def inspect(path: paths.Named, hashes: bool = False) -> dict[str, Any]:
  """Describes a run, an export, a model in THUDM's files, or one file of tensors.

  Args:
    path: the folder or file.
    hashes: reads everything: sha256 of their files; our arrays against their recorded checksums.

  Returns:
    {"path", "kind", "model" (sizes), "parameters", "bits", "tensors" [{"name", "shape", "dtype", "count",
    "bytes", "sum"}], "array_bytes", "files" [{"name", "bytes", "sha256"}], "file_bytes", "problem", "note"}; layers
    are put together; "problem" is what import or loading would say, None when all is well; "note" what import would.

  Raises:
    errors.InputError: when it is nothing that glmjax knows.
  """
  path = paths.named(path, "the path")
  try:
    return _inspect(path, hashes)
  except OSError as error:
    raise errors.InputError(f"cannot read {error.filename or path}: {errors.reason(error)}") from error


def _inspect(path: paths.Path, hashes: bool) -> dict[str, Any]:
  if path.is_file():
    opened = shards_lib.open_file(path)
    return _report(path, "file", {}, None, _table(opened.items()), [path], hashes, None)
  if not path.is_dir():
    what = "it is no regular file" if path.exists() else "no such file or folder"
    raise errors.InputError(f"{path}: {what}; give a run, an export, a model in THUDM's files, or one file")
  if (path / folder_lib.PARAMS).is_dir() or (path / folder_lib.CHECKPOINTS).is_dir():
    return _inspect_ours(path, hashes)
  return _inspect_theirs(path, hashes)


def _inspect_ours(path: paths.Path, hashes: bool) -> dict[str, Any]:
  config = folder_lib.read_config(path)
  kind = "export" if (path / folder_lib.PARAMS).is_dir() else "run"
  steps = manager.steps(path / folder_lib.CHECKPOINTS) if kind == "run" else []
  source, problem = _newest(path, hashes)
  rows = (
    []
    if source is None
    else [
      {
        "name": name.removeprefix(source.prefix),
        "shape": record["shape"],
        "dtype": record["dtype"],
        "count": 1,
        "bytes": _nbytes(record["shape"], record["dtype"]),
        "sum": record["sum"],
      }
      for name, record in source.records.items()
    ]
  )
  if source is not None and kind == "run" and steps and source.step < steps[-1]:
    problem = problem or f"step {steps[-1]} is damaged: step {source.step} is used instead"
  if kind == "run":
    problem = problem or _problem_of_metrics(path / "metrics.jsonl")
  report = _report(path, kind, vars(config.model), config.export.get("bits"), rows, [], False, problem)
  report |= {"files": _by_folder(path), "verified": hashes and problem is None, "layout": config.export.get("layout")}
  report["file_bytes"] = sum(entry["bytes"] for entry in report["files"])
  if config.base:
    report["base"] = dict(config.base)
  if kind == "run":
    report["steps"] = steps
  if source is not None:
    report["step"] = source.step
  return report


def _newest(path: paths.Path, hashes: bool) -> tuple[ours_lib.Source | None, str | None]:
  """Returns the parameters that loading would take, and what is wrong with them; steps that a run deletes are left."""
  tries = 3
  while True:
    source, tries = None, tries - 1
    try:
      source = ours_lib.use(path, _itself)
      source.check_size()
      arrays.check_files(source.arrays, source.records)
      if hashes:
        _verify(source)
      return source, None
    except (errors.InputError, arrays.DamagedError, FileNotFoundError) as error:
      if errors.may_pass(error):
        raise
      if not tries or source is None or source.arrays.exists():
        return source, printable.line(error)


def _itself(source: ours_lib.Source) -> ours_lib.Source:
  return source


def _problem_of_metrics(path: paths.Path) -> str | None:
  """Says what is wrong with a run's metrics; its last line may be half-written."""
  if not path.is_file():
    return None
  bad = None
  try:
    for number, line in user_text.lines(path):
      if bad is not None:  # and not the last
        return f"{bad}; `report` will ask for the line to be removed"
      try:
        user_json.parse(line, f"{path}, line {number}")
      except errors.InputError as error:
        bad = str(error)
  except errors.InputError as error:
    if errors.may_pass(error):
      raise
    return str(error)
  return None


def _verify(source: ours_lib.Source) -> None:
  """Reads all arrays, a part at a time, and compares their sums; of a file that is mapped its own sums first."""
  if source.mapped is not None and isinstance(source.arrays, pathlib.Path):
    mapped.open_file(source.arrays, source.mapped)
  reader = blocks.Reader(source.arrays, source.records)
  for name, record in progress.bar(source.records.items(), desc="verifying", disable=None):
    each = max(1, stored_weights.ELEMENTS // max(1, math.prod(record["shape"][1:])))
    rest = [slice(0, n) for n in record["shape"][1:]]
    for start in range(0, record["shape"][0], each):
      reader.read(name, (slice(start, min(start + each, record["shape"][0])), *rest))
    reader.verify([name])


def _by_folder(path: paths.Path) -> list[dict[str, Any]]:
  """Counts the bytes of the folder's own files and of each folder in it; what a run deletes meanwhile is passed
  over.
  """
  sizes: dict[str, int] = {}
  for file, size in _sizes(path):
    parts = file.relative_to(path).parts
    name = parts[0] + ("/" if len(parts) > 1 else "")
    sizes[name] = sizes.get(name, 0) + size
  return [{"name": name, "bytes": size} for name, size in sorted(sizes.items())]


def _sizes(path: paths.Path) -> Iterator[tuple[paths.Path, int]]:
  """Yields all files below a folder, and their bytes."""
  if isinstance(path, bucket_path.BucketPath):
    yield from path.sizes().items()
    return
  for parent, _, files in os.walk(path):
    for file in files:
      with contextlib.suppress(FileNotFoundError):
        yield (place := pathlib.Path(parent, file)), place.stat().st_size


def _inspect_theirs(path: paths.Path, hashes: bool) -> dict[str, Any]:
  is_ranks = any((path / name).is_file() for name in shards_lib.LATEST) or any(globs.inside(path, "mp_rank_*"))
  opened = shards_lib.open_ranks(path) if is_ranks else shards_lib.open_hub(path)
  rows = _table(item for rank in opened.ranks for item in rank.items())
  kind = f"{len(opened.ranks)} tensor-parallel ranks" if is_ranks else "Hub"
  files = list(opened.files)
  if not is_ranks and (config := _our_config(path)) is not None:
    return _report(path, "safetensors export", vars(config.model), config.export.get("bits"), rows, files, hashes, None)
  family = "chatglm-6b"
  if is_ranks:
    family = "glm-10b" if _FAMILY_SIGN in opened.ranks[0] else "glm-130b"
  problem, model, bits, note, has_tokenizer = None, {}, None, None, False
  try:
    has_tokenizer = (path / "ice_text.model").is_file() or (path / folder_lib.TOKENIZER).is_dir()
    found = source_lib.open_source(family, path, None if has_tokenizer else "none")
    model, bits, note = vars(found.config), found.bits, found.note
  except errors.InputError as error:
    if errors.may_pass(error):
      raise
    problem = str(error)
  report = _report(path, kind, model, bits, rows, files, hashes, problem)
  return report | {
    "family": family,
    "iteration": opened.iteration,
    "note": note,
    "has_tokenizer": problem is None and has_tokenizer,
  }


def _our_config(path: paths.Path) -> folder_lib.FolderConfig | None:
  """Reads the config.json that `export --format=safetensors` has written; None: it is another's, or missing."""
  try:
    is_ours = isinstance(shards_lib.read_json(path / folder_lib.CONFIG).get("model"), Mapping)
  except errors.InputError as error:
    if errors.may_pass(error):
      raise
    return None
  return folder_lib.read_config(path) if is_ours else None


def _table(tensors: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
  """Lists tensors by name, those of all layers and ranks in one row where they are alike."""
  rows: dict[tuple[Any, ...], dict[str, Any]] = {}
  for key, tensor in tensors:
    name = _LAYER.sub("*", key)
    row = rows.setdefault(
      (name, tensor.shape, tensor.dtype.name),
      {"name": name, "shape": list(tensor.shape), "dtype": tensor.dtype.name, "count": 0, "bytes": 0},
    )
    row["count"] += 1
    row["bytes"] += tensor.nbytes
  return list(rows.values())


def _nbytes(shape: Sequence[int], dtype: str) -> int:
  return math.prod(shape) * np.dtype(arrays.zarr_dtype(dtype)).itemsize


def _report(
  path: paths.Path,
  kind: str,
  model: dict[str, Any],
  bits: int | None,
  rows: list[dict[str, Any]],
  files: Sequence[paths.Path],
  hashes: bool,
  problem: str | None,
) -> dict[str, Any]:
  described = [{"name": file.name, "bytes": file.stat().st_size} for file in files]
  if hashes:
    for entry, file in zip(described, progress.bar(files, desc="hashing", disable=None)):
      with file.open("rb") as stream:
        entry["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
      if file.suffix != ".safetensors" and (bad := zips.damaged_member(file)):
        problem = problem or (f"{file} is damaged: {printable.line(bad, 80)} is not what its CRC says; copy it again")
  return {
    "path": str(path),
    "kind": kind,
    "model": dict(model),
    "bits": bits,
    "parameters": params_lib.count(config_lib.GLMConfig(**model)) if model else None,
    "tensors": rows,
    "array_bytes": sum(row["bytes"] for row in rows),
    "files": described,
    "file_bytes": sum(entry["bytes"] for entry in described),
    "problem": problem,
  }


def show(report: Mapping[str, Any]) -> None:
  """Prints a report for people."""
  layout = f"layout {report['layout']}" if report.get("layout") else None
  kind = report["kind"] + "".join(f", {word}" for word in (report.get("family"), layout) if word)
  bits = f", INT{report['bits']} kernels" if report["bits"] else ""
  print(f"{printable.line(report['path'])}: {kind}{bits}")
  if report["parameters"]:
    model = report["model"]
    prefix = f", prefix of {model['prefix_length']}" if model["prefix_length"] else ""
    head = "head tied to the table" if model["tie_embeddings"] else "a head of its own"
    print(
      f"parameters  {report['parameters']:,}: {model['num_layers']} layers, width {model['embed_dim']}, "
      f"{model['num_heads']} heads, mlp {model['mlp_dim']}, vocabulary {model['vocab_size']}, "
      f"{model['positions']}, {head}{prefix}"
    )
  if base := report.get("base"):
    print(f"adapter     {_adapter(report['model'])}, of {printable.line(_base(base))}")
  print(f"tensors     {_size(report['array_bytes'])}")
  print(f"files       {_size(report['file_bytes'])}")
  if "steps" in report:
    print(f"steps       {', '.join(map(str, report['steps'])) or 'none'}")
  for row in report["tensors"]:
    times = f" x {row['count']}" if row["count"] > 1 else ""
    name = printable.line(row["name"], 200)
    print(f"  {name:62} {row['dtype']:9} {row['shape']}{times}  {row.get('sum', '')}".rstrip())
  for entry in report["files"]:
    print(f"  {printable.line(entry['name']):42} {entry['bytes']:>15,}  {entry.get('sha256', '')}".rstrip())
  if report.get("note"):
    print(f"note: {printable.line(report['note'])}")
  print(
    f"problem: {printable.line(report['problem'])}"
    if report["problem"]
    else "everything is as recorded"
    if report.get("verified")
    else "complete"
  )


def _adapter(model: Mapping[str, Any]) -> str:
  """Says what kind of adapter a model has."""
  if model["lora_rank"]:
    kernels = model["lora_kernels"].replace(",", ", ")
    return f"LoRA of rank {model['lora_rank']}, scale {model['lora_scale']:g}, beside {kernels}"
  return f"a prefix of {model['prefix_length']}" + (" by projection" if model["prefix_hidden"] else "")


def _base(base: Mapping[str, Any]) -> str:
  """Names the model that an adapter adapts."""
  bits = f", INT{base['bits']}" if base.get("bits") else ""
  return f"{base.get('folder')} ({str(base.get('fingerprint'))[:8]}{bits})"


def _size(count: int) -> str:
  return f"{count:,} bytes = {count / 1e9:.3f} GB = {count / 2**30:.3f} GiB"
