"""What answering takes of memory, by precision and context, and which GPUs hold it: without compiling.

Weights and cache are exact arithmetic (memory.py). What programs take besides is known where they were compiled
(compiled.py); elsewhere a set is said to be of arithmetic, and may be too small by that.
"""

import dataclasses
from collections.abc import Sequence

from glmjax import errors
from glmjax import ranges
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import compiled
from glmjax.plan import memory
from glmjax.plan import programs
from glmjax.plan import targets

BITS = (16, 8, 4)
CONTEXTS = (512, 1024, 2048)
CARDS = tuple(name for name, chip in targets.CHIPS.items() if chip.platform == "cuda")
COMPILED, INTERPOLATED, ARITHMETIC = "compiled", "interpolated", "arithmetic"  # what a set's figures are from


@dataclasses.dataclass(frozen=True)
class CardSet:
  """A number of one card, over which the model is split, and what each of them holds."""

  card: str  # as targets.CHIPS names it
  count: int
  weights_bytes: int
  cache_bytes: int
  temporaries_bytes: int | None  # what programs take besides; None: not compiled
  usable_bytes: int  # of a card
  tokens_per_second: float | None  # of all rows, at best, as their answers grow; None: not compiled
  basis: str  # COMPILED, INTERPOLATED between compiled points, or ARITHMETIC: weights and cache alone

  @property
  def peak_bytes(self) -> int:
    """The bytes that each holds, as far as they are known."""
    return self.weights_bytes + self.cache_bytes + (self.temporaries_bytes or 0)

  @property
  def fits(self) -> bool:
    """Whether that is no more than what a program may take of the card."""
    return self.peak_bytes <= self.usable_bytes


@dataclasses.dataclass(frozen=True)
class Footprint:
  """What a model takes at one precision and context."""

  bits: int  # of a kernel's number: 16 (half precision), 8 or 4
  context: int  # tokens of prompt and answer of each row
  batch: int  # rows that are answered at once
  weights_bytes: int  # of all devices together where nothing is kept twice: of one that holds all
  cache_bytes: int
  sets: tuple[CardSet, ...]  # the smallest of each card that fits, in the order of the cards; a card may have none

  @property
  def recommended(self) -> tuple[CardSet, ...]:
    """The sets, those of least memory in all first, but behind compiled ones those of arithmetic."""
    return tuple(sorted(self.sets, key=lambda each: (each.basis == ARITHMETIC, each.count * each.usable_bytes)))


def footprint(
  config: config_lib.GLMConfig,
  bits: Sequence[int] = BITS,
  contexts: Sequence[int] | None = None,
  batch: int = 1,
  cards: Sequence[str] = CARDS,
  table: compiled.Table | None = None,
) -> list[Footprint]:
  """Returns what a model takes while it answers, a row for each precision and context.

  Args:
    config: of the model; one that computes in float32 is counted in half precision, as GPUs run it.
    contexts: None: 512, 1,024 and 2,048 tokens, as far as the model goes; its own end where that is less.
    batch: rows that are answered at once.
    table: what was compiled; None: what comes with glmjax.

  Raises:
    errors.InputError: for a precision, context or card that there is not.
  """
  if not isinstance(config, config_lib.GLMConfig):
    raise errors.InputError(f"config is of type {type(config).__name__}: give a {config_lib.__name__}.GLMConfig")
  for size in bits:
    if size not in BITS:
      raise errors.InputError(f"bits: {size!r} is not known; there are {', '.join(map(str, BITS))}")
  if contexts is None:
    contexts = [context for context in CONTEXTS if context <= config.max_length] or [config.max_length]
  for context in contexts:
    ranges.whole("contexts", context, 1, config.max_length)
  for card in cards:
    ranges.choice("cards", card, CARDS)
  model, table = in_half_precision(config), table or compiled.shipped()
  rows = []
  for size in bits:
    for context in contexts:
      workload = programs.Decode(batch, context, None if size == 16 else size)
      weights, cache = _held(model, workload, 1)
      found = (smallest(model, workload, card, table) for card in cards)
      rows.append(Footprint(size, context, batch, weights, cache, tuple(filter(None, found))))
  return rows


def in_half_precision(config: config_lib.GLMConfig) -> config_lib.GLMConfig:
  """Returns the model as GPUs run it: float16, or bfloat16 where it says so."""
  dtype = "float16" if config.dtype == "float32" else config.dtype
  return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def smallest(
  model: config_lib.GLMConfig, workload: programs.Decode, card: str, table: compiled.Table
) -> CardSet | None:
  """Returns the smallest set of a card that holds what is known of it; None: none over which the model is split."""
  sets = (card_set(model, workload, card, count, table) for count in memory.sets(model))
  return next((each for each in sets if each.fits), None)


def card_set(
  model: config_lib.GLMConfig, workload: programs.Decode, card: str, count: int, table: compiled.Table
) -> CardSet:
  """Returns what so many of a card hold, whether or not it fits."""
  weights, cache = _held(model, workload, count)
  name = table.name_of(model)
  cell = compiled.Cell(name or "", workload.bits or 16, compiled.architecture(card), count)
  taken = table.taken(cell, card, workload.batch, workload.context)
  return CardSet(
    card,
    count,
    weights,
    cache,
    taken.temporaries if taken else None,
    targets.room(targets.CHIPS[card]),
    workload.batch / taken.seconds if taken and taken.seconds else None,
    ARITHMETIC if taken is None else INTERPOLATED if taken.interpolated else COMPILED,
  )


def _held(model: config_lib.GLMConfig, workload: programs.Decode, count: int) -> tuple[int, int]:
  """Returns the bytes of weights and of cache on each of so many devices."""
  parts = memory.decoding(model, workload, mesh_lib.MeshConfig(data=1, tensor=count)).parts
  cache = round(parts["KV cache"])
  return round(sum(parts.values())) - cache, cache
