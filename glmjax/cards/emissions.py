"""CO2 of energy: a range of kilowatt-hours, times a data center's PUE, times what its grid emits."""

import dataclasses
from typing import Any

from glmjax import errors
from glmjax import ranges

_MOST_KG = 3.0  # of a kWh: no fuel comes near that, and grams given for kilograms do


@dataclasses.dataclass(frozen=True)
class Grid:
  """What a grid emits, as its source says: no country and no year is assumed."""

  kg_co2_per_kwh: float  # of CO2, or of its equivalent, as the source has it
  source: str
  year: int

  def __post_init__(self) -> None:
    ranges.number("Grid.kg_co2_per_kwh", self.kg_co2_per_kwh, 0, _MOST_KG)
    ranges.whole("Grid.year", self.year, 1990, 2100)
    if not self.source.strip():
      raise errors.InputError("Grid.source is empty: say whose figure it is")


@dataclasses.dataclass(frozen=True)
class Emissions:
  """Tonnes of CO2, and what they were computed from."""

  low_tonnes: float
  high_tonnes: float | None  # None: the energy has no known limit
  low_kwh: float  # of the machines
  high_kwh: float | None
  pue: float
  grid: Grid

  def to_dict(self) -> dict[str, Any]:
    """Returns it as JSON values."""
    return dataclasses.asdict(self)


def of(low_kwh: float, high_kwh: float | None, pue: float, grid: Grid) -> Emissions:
  """Computes emissions.

  Args:
    low_kwh, high_kwh: what the machines took, at least and at most (None: not known).
    pue: power usage effectiveness: all that the data center takes, by what its machines take. 1: their figure has all.
    grid: where it stands.

  Raises:
    errors.InputError: for numbers that cannot be.
  """
  ranges.number("low_kwh", low_kwh, 0)
  ranges.number("pue", pue, 1, 10)
  if high_kwh is not None:
    ranges.number("high_kwh", high_kwh, low_kwh)

  def tonnes(kwh: float) -> float:
    return kwh * pue * grid.kg_co2_per_kwh / 1000

  high = None if high_kwh is None else tonnes(high_kwh)
  return Emissions(tonnes(low_kwh), high, low_kwh, high_kwh, pue, grid)
