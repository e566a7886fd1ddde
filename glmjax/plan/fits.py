"""`glmjax plan --fits`: the smallest set of each GPU that runs each model, at each precision and context.

Weights and cache are exact arithmetic, and rule out most sets. Of the rest, what reading a prompt and adding a token
take besides is read from the compiled programs: of a few of the layers at their full width, as temporaries hardly grow
with depth, and of all layers where a set fits or fails by a hair.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tqdm

from glmjax import errors
from glmjax import ranges
from glmjax.io import folders, paths, publish, user_text
from glmjax.models import config as config_lib
from glmjax.plan import compiled
from glmjax.plan import compiler as compiler_lib
from glmjax.plan import footprint
from glmjax.plan import memory
from glmjax.plan import programs
from glmjax.plan import targets


def smallest(
  models: Mapping[str, config_lib.GLMConfig],
  bits: Sequence[int] = footprint.BITS,
  contexts: Sequence[int] = (),
  batches: Sequence[int] = (1,),
  gpus: Sequence[str] = footprint.CARDS,
  layers: int = 8,
  out: paths.Named | None = None,
  table: paths.Named | None = None,
) -> list[dict[str, Any]]:
  """Finds for each model, precision, batch, context and GPU how many, of 1, 2, 4, ..., hold so many rows and tokens.

  Args:
    bits: 16 computes and keeps weights in float16; 8 and 4 keep them quantized.
    contexts: tokens of a row; without any 512, and as many as the model reads.
    batches: rows that are answered at once.
    layers: of the programs that are compiled; 0: all.
    out: JSON lines file of what was compiled. Another run takes from it the programs that are the same.
    table: JSON file (compiled.py) that gets the points of each set that is found, at every batch and context, in place
      of those that it has of them.

  Raises:
    errors.InputError: when the compiler is missing.
  """
  _check(bits, contexts, batches, gpus)
  ranges.whole("layers", layers)
  compiler = compiler_lib.Compiler(layers, None if out is None else folders.claim_file(out, "--out"))
  kept = None if table is None else _Kept(table)
  rows = []
  cells = [(name, size, gpu) for name in models for size in bits for gpu in gpus]
  for name, size, gpu in tqdm.tqdm(cells, desc="models x bits x GPUs", disable=None):
    config = dataclasses.replace(models[name], dtype="float16", param_dtype="float16")
    works = [
      programs.Decode(batch, context, None if size == 16 else size)
      for batch in batches
      for context in contexts or sorted({min(512, config.max_length), config.max_length})
    ]
    tried = [_tried(config, work, gpu, compiler) for work in works]
    for work, sets in zip(works, tried, strict=True):
      rows.append({"model": name, "bits": size, "gpu": gpu} | _row(config, work, gpu, compiler, sets))
    if kept is not None:
      for count in sorted({count for sets in tried for count, _ in sets}):
        points = [compiler.point(config, work, gpu, count) for work in works if work.context <= config.max_length]
        kept.add(config, compiled.Cell(name, size, compiled.architecture(gpu), count), points)
      kept.write()
  return rows


def _check(bits: Sequence[int], contexts: Sequence[int], batches: Sequence[int], gpus: Sequence[str]) -> None:
  for gpu in gpus:
    if gpu not in footprint.CARDS:
      raise errors.InputError(f"gpus: {gpu!r} is not known; there are {', '.join(footprint.CARDS)}")
  for name, values in (("contexts", contexts), ("batches", batches)):
    for value in values:
      ranges.whole(name, value, 1)
  for size in bits:
    if size not in footprint.BITS:
      raise errors.InputError(f"bits: {size} is not known; there are 16, 8, 4")


def _tried(
  config: config_lib.GLMConfig, workload: programs.Decode, gpu: str, compiler: compiler_lib.Compiler
) -> list[tuple[int, int]]:
  """Returns the counts that hold weights and cache, each with its peak, up to the first that holds its programs too."""
  room, tried = targets.room(targets.CHIPS[gpu]), []
  for count in memory.sets(config) if workload.context <= config.max_length else ():
    if compiler_lib.held(config, workload, count) <= room:
      tried.append((count, compiler.peak(config, workload, gpu, count)))
      if tried[-1][1] <= room:
        break
  return tried


def _row(
  config: config_lib.GLMConfig,
  workload: programs.Decode,
  gpu: str,
  compiler: compiler_lib.Compiler,
  tried: Sequence[tuple[int, int]],
) -> dict[str, Any]:
  """Returns the answer of one workload and GPU."""
  row = {"batch": workload.batch, "context": workload.context, "count": None}
  if workload.context > config.max_length:
    return row | {"why": f"the model ends at {config.max_length} tokens"}
  if not tried or tried[-1][1] > targets.room(targets.CHIPS[gpu]):
    return row | {"why": f"{memory.sets(config)[-1]} do not hold it, and its heads do not split further"}
  count, peak = tried[-1]
  seconds = compiler.point(config, workload, gpu, count).seconds[gpu]
  return row | {"count": count, "peak_bytes_per_device": peak, "tokens_per_second": workload.batch / seconds}


def rows_of(table: compiled.Table, batch: int = 1) -> list[dict[str, Any]]:
  """Returns the rows of a batch, as `smallest` has them, that a table's compiled points give."""
  rows = []
  for name, config in table.models.items():
    contexts = {point.context for cell, points in table.cells.items() if cell.model == name for point in points}
    for size in footprint.BITS:
      for each in footprint.footprint(config, [size], sorted(contexts), batch, table=table):
        rows += [
          {
            "model": name,
            "bits": size,
            "gpu": found.card,
            "batch": batch,
            "context": each.context,
            "count": found.count,
            "peak_bytes_per_device": found.peak_bytes,
            "tokens_per_second": found.tokens_per_second,
          }
          for found in each.sets
          if found.basis == footprint.COMPILED
        ]
  return rows


class _Kept:
  """The file of a table, and what is compiled for it.

  Raises:
    errors.InputError: where the file is of another kind, or of another version of JAX.
  """

  def __init__(self, path: paths.Named) -> None:
    self._path = folders.claim_file(path, "--table")
    self._models: dict[str, config_lib.GLMConfig] = {}
    self._points: dict[compiled.Cell, dict[tuple[int, int], compiled.Point]] = {}
    self._new: set[tuple[compiled.Cell, int, int]] = set()
    if not self._path.exists():
      return
    try:
      table = compiled.read(user_text.read(self._path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise errors.InputError(f"{self._path} is not a table of --fits: name another with --table") from error
    if table.jax != jax.__version__:
      raise errors.InputError(f"{self._path} was compiled by jax {table.jax}, not {jax.__version__}: name another")
    self._models |= table.models
    for cell, points in table.cells.items():
      self._points[cell] = {(point.batch, point.context): point for point in points}

  def add(self, config: config_lib.GLMConfig, cell: compiled.Cell, points: Sequence[compiled.Point]) -> None:
    """Adds points, each in place of what an earlier run had there, or of fewer layers than another card asked for."""
    if compiled.sizes(self._models.setdefault(cell.model, config)) != compiled.sizes(config):
      self._models[cell.model] = config
      self._points = {each: points for each, points in self._points.items() if each.model != cell.model}
    known = self._points.setdefault(cell, {})
    for point in points:
      place = (point.batch, point.context)
      if (cell, *place) not in self._new or known[place].layers < point.layers:
        known[place] = point
        self._new.add((cell, *place))

  def write(self) -> None:
    """Writes the file."""
    cells = {
      cell: [self._points[cell][place] for place in sorted(self._points[cell])]
      for cell in sorted(self._points, key=dataclasses.astuple)
    }
    publish.write_text(self._path, compiled.text(compiled.Table(jax.__version__, self._models, cells)))
