"""What was compiled: what programs take of each device besides weights and cache, at the points of compiled.json.

`glmjax plan --table` writes that file; the table of docs/hardware.md, the calculator's page and footprints are made of
it. Between compiled points figures are linear in the batch and in the context; outside of them there are none.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from glmjax.models import config as config_lib
from glmjax.plan import targets

FILE = pathlib.Path(__file__).with_name("compiled.json")
# Of a model: what its weights and programs depend on. Rotary positions have no rows to be as many as the tokens.
_SIZES = (
  *("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim", "max_length", "positions", "norm", "mlp"),
  *("causal", "tie_embeddings", "embedding_norm", "prefix_length", "lora_rank", "softmax_dtype"),
)


@dataclasses.dataclass(frozen=True)
class Cell:
  """What programs are compiled for: a model's name and precision, an architecture of cards, and how many of them."""

  model: str
  bits: int  # 16: float16
  architecture: str  # as `architecture` names it
  count: int


@dataclasses.dataclass(frozen=True)
class Point:
  """What the programs of one batch and context take of each device."""

  batch: int  # rows
  context: int  # tokens of each, prompt and answer
  layers: int  # of the programs that were compiled
  decode: int  # bytes besides weights and cache while each row is given a token
  prompt: int  # while prompts as long as the context are read
  seconds: Mapping[str, float]  # by card: a token of each row at best, by the roofline; may be empty


@dataclasses.dataclass(frozen=True)
class Taken:
  """What programs take at a batch and context."""

  temporaries: int  # bytes of each device besides weights and cache, reading prompts or adding tokens
  seconds: float | None  # of a token of each row at best; None: not known of this card
  interpolated: bool  # from the compiled points around it


@dataclasses.dataclass(frozen=True)
class Table:
  """All compiled points."""

  jax: str  # the version that compiled them
  models: Mapping[str, config_lib.GLMConfig]
  cells: Mapping[Cell, Sequence[Point]]

  def name_of(self, config: config_lib.GLMConfig) -> str | None:
    """Returns the name of the model whose sizes these are; None: it was not compiled."""
    return next((name for name, each in self.models.items() if sizes(each) == sizes(config)), None)

  def taken(self, cell: Cell, card: str, batch: int, context: int) -> Taken | None:
    """Returns what the cell's programs take; None: neither compiled nor between compiled points."""
    points = {(point.batch, point.context): point for point in self.cells.get(cell, ())}
    rows = around(sorted({b for b, _ in points}), batch)
    lengths = around(sorted({c for _, c in points}), context)
    corners = [[points.get((b, c)) for c in lengths] for b in rows]
    if not rows or not lengths or any(point is None for line in corners for point in line):
      return None

    def between(figure: Callable[[Any], float]) -> float:
      lines = [_line(lengths, [figure(point) for point in line], context) for line in corners]
      return _line(rows, lines, batch)

    timed = all(card in point.seconds for line in corners for point in line)
    return Taken(
      math.ceil(max(between(lambda point: point.decode), between(lambda point: point.prompt))),
      between(lambda point: point.seconds[card]) if timed else None,
      len(rows) * len(lengths) > 1,
    )


def around(known: Sequence[int], value: int) -> list[int]:
  """Returns the value where it is known, or the nearest known below and above; none where there is not both."""
  below = [x for x in known if x <= value][-1:]
  above = [x for x in known if x >= value][:1]
  return sorted({*below, *above}) if below and above else []


def _line(places: Sequence[int], figures: Sequence[float], place: int) -> float:
  """Returns what lies at `place` on the line through the figures of one place or two."""
  first, last = figures[0], figures[-1]
  return first if len(places) == 1 else first + (last - first) * ((place - places[0]) / (places[1] - places[0]))


def architecture(card: str) -> str:
  """Names the architecture of a GPU, whose cards share programs: its compute capability, as "8.6"."""
  return ".".join(map(str, targets.CHIPS[card].compute_capability))


@functools.cache
def shipped() -> Table:
  """Returns the table that comes with glmjax."""
  return read(FILE.read_text(encoding="utf-8"))


def read(text: str) -> Table:
  """Returns the table that `text` wrote."""
  found = json.loads(text)
  models = {
    name: config_lib.GLMConfig(**fields, dtype="float16", param_dtype="float16")
    for name, fields in found["models"].items()
  }
  cells = {
    Cell(**{field.name: cell[field.name] for field in dataclasses.fields(Cell)}): tuple(
      Point(**point) for point in cell["points"]
    )
    for cell in found["cells"]
  }
  return Table(found["jax"], models, cells)


def text(table: Table) -> str:
  """Returns the table as JSON, a point a line."""
  models = _block(
    f"    {json.dumps(name)}: {json.dumps({field: getattr(config, field) for field in _SIZES})}"
    for name, config in table.models.items()
  )
  cells = _block(
    f"    {json.dumps(dataclasses.asdict(cell))[:-1]}, "
    f'"points": [\n{_block("      " + json.dumps(dataclasses.asdict(point)) for point in points)}\n    ]}}'
    for cell, points in table.cells.items()
  )
  return f'{{\n  "jax": {json.dumps(table.jax)},\n  "models": {{\n{models}\n  }},\n  "cells": [\n{cells}\n  ]\n}}\n'


def _block(lines: Iterable[str]) -> str:
  return ",\n".join(lines)


def sizes(config: config_lib.GLMConfig) -> tuple[Any, ...]:
  """Returns that of a model on which its weights and programs depend, but for dtypes."""
  learned = not config.position_kind.rotary_parts  # whose tables have max_length places
  return tuple(getattr(config, name) for name in _SIZES if learned or name != "max_length")
