"""CO2 of energy."""

import json

import pytest

from glmjax import errors
from glmjax.cards import emissions

CHINA = emissions.Grid(0.5810, "the factor of GLM-130B's paper", 2022)


def test_what_glm_130b_emitted():
  """Its paper's figures: 442.4 MWh at 0.5810 kg/kWh are 257.01 t."""
  found = emissions.of(442_400, 442_400, 1.0, CHINA)
  assert found.low_tonnes == found.high_tonnes == pytest.approx(257.0, abs=0.05)
  assert json.loads(json.dumps(found.to_dict()))["grid"]["year"] == 2022


def test_a_range_stays_a_range():
  found = emissions.of(100, 400, 1.2, emissions.Grid(0.5, "a national average", 2024))
  assert (found.low_tonnes, found.high_tonnes) == (pytest.approx(0.06), pytest.approx(0.24))
  assert emissions.of(100, None, 1.2, CHINA).high_tonnes is None


@pytest.mark.parametrize(
  "arguments, named",
  [
    ((-1, 1, 1.0), "low_kwh"),
    ((2, 1, 1.0), "high_kwh"),
    ((1, float("inf"), 1.0), "high_kwh"),
    ((1, 1, 0.9), "pue"),
    ((1, 1, float("nan")), "pue"),
  ],
)
def test_numbers_that_cannot_be(arguments, named):
  with pytest.raises(errors.InputError, match=named):
    emissions.of(*arguments, CHINA)


@pytest.mark.parametrize(
  "factor, source, year, named",
  [(581, "grams", 2022, "kg_co2_per_kwh"), (0.5, " ", 2022, "source"), (0.5, "somebody", 20, "year")],
)
def test_a_factor_needs_its_source_and_year(factor, source, year, named):
  with pytest.raises(errors.InputError, match=named):
    emissions.Grid(factor, source, year)
