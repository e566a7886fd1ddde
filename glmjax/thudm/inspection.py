"""What a folder or file of weights holds: ours (runs, exports) and theirs (the Hub's, ranks, single files)."""

import hashlib
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tqdm

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import blocks
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import manager
from glmjax.checkpoint import source as ours_lib
from glmjax.models import config as config_lib
from glmjax.thudm import shards as shards_lib
from glmjax.thudm import source as source_lib

_FAMILY_SIGN = "transformer.position_embeddings.weight"  # a key that only the GLMs up to 10B have
_LAYER = re.compile(r"(?<=layers[./])\d+(?=[./])")


def inspect(path: str | os.PathLike, hashes: bool = False) -> dict[str, Any]:
  """Describes a run, an export, a model in THUDM's files, or one file of tensors.

  Args:
    path: the folder or file.
    hashes: reads everything: sha256 of their files; our arrays against their recorded checksums.

  Returns:
    {"path", "kind", "model" (sizes), "parameters", "bits", "tensors" [{"name", "shape", "dtype", "count",
    "bytes", "sum"}], "array_bytes", "files" [{"name", "bytes", "sha256"}], "file_bytes", "problem"}; layers are
    put together; "problem" is what import or loading would say, None when all is well.

  Raises:
    errors.InputError: when it is nothing that glmjax knows.
  """
  path = pathlib.Path(path)
  if path.is_file():
    opened = shards_lib.open_file(path)
    return _report(path, "file", {}, None, _table(opened.items()), [path], hashes, None)
  if not path.is_dir():
    raise errors.InputError(f"{path}: no such file or folder")
  if (path / folder_lib.PARAMS).is_dir() or (path / folder_lib.CHECKPOINTS).is_dir():
    return _inspect_ours(path, hashes)
  return _inspect_theirs(path, hashes)


def _inspect_ours(path: pathlib.Path, hashes: bool) -> dict[str, Any]:
  config = folder_lib.read_config(path)
  kind = "export" if (path / folder_lib.PARAMS).is_dir() else "run"
  problem, source = None, None
  try:
    source = ours_lib.use(path, lambda found: found)
    source.check_size()
    arrays.check_files(source.arrays, source.records)
    if hashes:
      _verify(source)
  except (errors.InputError, arrays.DamagedError) as error:
    problem = str(error)
  rows = [] if source is None else [
      {"name": name.removeprefix(source.prefix), "shape": record["shape"], "dtype": record["dtype"], "count": 1,
       "bytes": _nbytes(record["shape"], record["dtype"]), "sum": record["sum"]}
      for name, record in source.records.items()]
  files = sorted(file for file in path.rglob("*") if file.is_file())
  report = _report(path, kind, vars(config.model), config.export.get("bits"), rows, files, False, problem)
  report["files"] = _by_folder(path, files)
  if kind == "run":
    report["steps"] = manager.steps(path / folder_lib.CHECKPOINTS)
  if source is not None:
    report["step"] = source.step
  return report | {"verified": hashes and problem is None}


def _verify(source: ours_lib.Source) -> None:
  """Reads all arrays, a part at a time, and compares their sums."""
  reader = blocks.Reader(source.arrays, source.records)
  for name, record in tqdm.tqdm(source.records.items(), desc="verifying", disable=None):
    each = max(1, blocks.ELEMENTS // max(1, math.prod(record["shape"][1:])))
    rest = [slice(0, n) for n in record["shape"][1:]]
    for start in range(0, record["shape"][0], each):
      reader.read(name, (slice(start, min(start + each, record["shape"][0])), *rest))
    reader.verify([name])


def _by_folder(path: pathlib.Path, files: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
  """The bytes of the folder's own files and of each folder in it."""
  sizes: dict[str, int] = {}
  for file in files:
    parts = file.relative_to(path).parts
    name = parts[0] + ("/" if len(parts) > 1 else "")
    sizes[name] = sizes.get(name, 0) + file.stat().st_size
  return [{"name": name, "bytes": size} for name, size in sizes.items()]


def _inspect_theirs(path: pathlib.Path, hashes: bool) -> dict[str, Any]:
  is_ranks = (path / "latest").is_file() or (path / "latest_checkpointed_iteration.txt").is_file() or any(
      path.glob("mp_rank_*"))
  opened = shards_lib.open_ranks(path) if is_ranks else shards_lib.open_hub(path)
  family = "chatglm-6b"
  if is_ranks:
    family = "glm-10b" if _FAMILY_SIGN in opened.ranks[0] else "glm-130b"
  problem, model, bits = None, {}, None
  try:
    has_tokenizer = (path / "ice_text.model").is_file() or (path / folder_lib.TOKENIZER).is_dir()
    found = source_lib.open_source(family, path, None if has_tokenizer else "none")
    model, bits = vars(found.config), found.bits
  except errors.InputError as error:
    problem = str(error)
  rows = _table(item for rank in opened.ranks for item in rank.items())
  report = _report(path, "Hub" if not is_ranks else f"{len(opened.ranks)} tensor-parallel ranks", model, bits, rows,
                   list(opened.files), hashes, problem)
  return report | {"family": family, "iteration": opened.iteration, "has_tokenizer": problem is None and has_tokenizer}


def _table(tensors: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
  """Tensors by name, those of all layers and ranks in one row where they are alike."""
  rows: dict[tuple[Any, ...], dict[str, Any]] = {}
  for key, tensor in tensors:
    name = _LAYER.sub("*", key)
    row = rows.setdefault((name, tensor.shape, tensor.dtype.name), {
        "name": name, "shape": list(tensor.shape), "dtype": tensor.dtype.name, "count": 0, "bytes": 0})
    row["count"] += 1
    row["bytes"] += tensor.nbytes
  return list(rows.values())


def _nbytes(shape: Sequence[int], dtype: str) -> int:
  return math.prod(shape) * np.dtype(arrays.zarr_dtype(dtype)).itemsize


def _report(path: pathlib.Path, kind: str, model: dict[str, Any], bits: int | None, rows: list[dict[str, Any]],
            files: Sequence[pathlib.Path], hashes: bool, problem: str | None) -> dict[str, Any]:
  described = [{"name": file.name, "bytes": file.stat().st_size} for file in files]
  if hashes:
    for entry, file in zip(described, tqdm.tqdm(files, desc="hashing", disable=None)):
      with open(file, "rb") as stream:
        entry["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
      if file.suffix in (".pt", ".bin") and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
          bad = archive.testzip()
        if bad:
          problem = problem or f"{file} is damaged: {bad} is not what its CRC says; copy it again"
  return {"path": str(path), "kind": kind, "model": dict(model), "bits": bits,
          "parameters": config_lib.GLMConfig(**model).num_parameters() if model else None,
          "tensors": rows, "array_bytes": sum(row["bytes"] for row in rows), "files": described,
          "file_bytes": sum(entry["bytes"] for entry in described), "problem": problem}


def show(report: dict[str, Any]) -> None:
  """Prints a report for people."""
  size = lambda n: f"{n:,} bytes = {n / 1e9:.3f} GB = {n / 2**30:.3f} GiB"
  kind = report["kind"] + "".join(f", {word}" for word in (report.get("family"),) if word)
  bits = f", INT{report['bits']} kernels" if report["bits"] else ""
  print(f"{report['path']}: {kind}{bits}")
  if report["parameters"]:
    model = report["model"]
    prefix = f", prefix of {model['prefix_length']}" if model["prefix_length"] else ""
    print(f"parameters  {report['parameters']:,}: {model['num_layers']} layers, width {model['embed_dim']}, "
          f"{model['num_heads']} heads, mlp {model['mlp_dim']}, vocabulary {model['vocab_size']}, {model['positions']}"
          f"{prefix}")
  print(f"tensors     {size(report['array_bytes'])}")
  print(f"files       {size(report['file_bytes'])}")
  if "steps" in report:
    print(f"steps       {', '.join(map(str, report['steps'])) or 'none'}")
  for row in report["tensors"]:
    times = f" x {row['count']}" if row["count"] > 1 else ""
    print(f"  {row['name']:62} {row['dtype']:9} {row['shape']}{times}  {row.get('sum', '')}".rstrip())
  for entry in report["files"]:
    print(f"  {entry['name']:42} {entry['bytes']:>15,}  {entry.get('sha256', '')}".rstrip())
  print(f"problem: {report['problem']}" if report["problem"] else
        "everything is as recorded" if report.get("verified") else "complete")
