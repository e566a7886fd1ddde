"""Footprints: arithmetic to the byte, compiled figures at compiled points, lines between them, and nothing outside."""

import dataclasses
import itertools
import math

import pytest

from glmjax import errors
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import compiled
from glmjax.plan import footprint
from glmjax.plan import memory
from glmjax.plan import programs
from glmjax.plan import targets

MODEL = config_lib.GLMConfig(1024, 4, 256, 8, 512, dtype="float16", param_dtype="float16")
CARD, ARCHITECTURE = "rtx3090", "8.6"


def table(count=1, **points):
  """Points of batches 1 and 8 and contexts 512 and 2,048, but for what is given: decode, prompt and seconds of each."""
  found = [
    compiled.Point(b, c, 4, *points.get(f"b{b}_c{c}", (100 * b + c, 1000 * b + c)), {CARD: 0.01 * b})
    for b, c in itertools.product((1, 8), (512, 2048))
  ]
  return compiled.Table("1.2.3", {"model": MODEL}, {compiled.Cell("model", 4, ARCHITECTURE, count): found})


def taken(table, batch, context, card=CARD):
  return table.taken(compiled.Cell("model", 4, ARCHITECTURE, 1), card, batch, context)


@pytest.mark.parametrize("bits", footprint.BITS)
@pytest.mark.parametrize("batch", [1, 3])
def test_weights_and_cache_are_those_of_the_arithmetic(bits, batch):
  [row] = footprint.footprint(MODEL, bits=[bits], contexts=[700], batch=batch, table=table())
  work = programs.Decode(batch, 700, None if bits == 16 else bits)
  assert row.weights_bytes + row.cache_bytes == memory.decoding(MODEL, work).total
  assert row.cache_bytes == 2 * 4 * batch * 700 * 256 * 2
  for found in row.sets:
    mesh = mesh_lib.MeshConfig(data=1, tensor=found.count)
    assert found.weights_bytes + found.cache_bytes == memory.decoding(MODEL, work, mesh).total


def test_compiled_figures_are_shown_at_compiled_points():
  for batch, context in itertools.product((1, 8), (512, 2048)):
    found = taken(table(), batch, context)
    assert found == compiled.Taken(1000 * batch + context, 0.01 * batch, interpolated=False)
  [row] = footprint.footprint(MODEL, [4], [512], 8, [CARD], table())
  [found] = row.sets
  assert found.basis == footprint.COMPILED and found.temporaries_bytes == 8512 and found.tokens_per_second == 8 / 0.08


def test_between_points_figures_are_linear():
  """In the context, in the batch, and in both; of the larger of the two programs."""
  assert taken(table(), 1, 1280).temporaries == 1000 + 1280
  assert taken(table(), 3, 512).temporaries == 3000 + 512
  assert taken(table(), 3, 1280) == compiled.Taken(3000 + 1280, pytest.approx(0.03), interpolated=True)
  odd = table(b1_c512=(5000, 0), b1_c2048=(0, 4000))
  assert taken(odd, 1, 512).temporaries == 5000 and taken(odd, 1, 2048).temporaries == 4000
  assert taken(odd, 1, 1280).temporaries == 2500
  assert taken(odd, 1, 513).temporaries == math.ceil(5000 - 5000 / 1536)


def test_outside_of_the_points_nothing_is_said():
  for batch, context in ((9, 512), (1, 511), (1, 2049), (100, 100)):
    assert taken(table(), batch, context) is None
  assert taken(table(count=2), 1, 512) is None
  assert taken(table(), 1, 512, "a100-40").seconds is None  # a card whose seconds are not known
  whole = table()
  [(cell, points)] = whole.cells.items()
  without = dataclasses.replace(whole, cells={cell: points[:-1]})  # a corner is missing
  assert taken(without, 3, 1280) is None and taken(without, 3, 512) is not None
  [row] = footprint.footprint(MODEL, [4], [600], 9, [CARD], table())
  [found] = row.sets
  assert found.basis == footprint.ARITHMETIC and found.temporaries_bytes is found.tokens_per_second is None


def test_a_set_that_would_fit_but_for_temporaries_is_passed_over(monkeypatch):
  room = memory.decoding(MODEL, programs.Decode(1, 512, 4)).total + 1511
  chip = dataclasses.replace(targets.CHIPS[CARD], memory_bytes=math.ceil(room / (1 - targets.RESERVED)))
  monkeypatch.setitem(targets.CHIPS, CARD, chip)
  sets = [footprint.footprint(MODEL, [4], [512], 1, [CARD], table(b1_c512=(0, size)))[0].sets for size in (1511, 1512)]
  assert [found.count for [found] in sets] == [1, 2]
  assert [found.basis for [found] in sets] == [footprint.COMPILED, footprint.ARITHMETIC]


def test_models_are_known_by_what_programs_depend_on():
  known = table()
  for same in ({"dtype": "float32"}, {"max_length": 4096}, {"remat": "full"}, {"hidden_dropout": 0.1}):
    assert known.name_of(dataclasses.replace(MODEL, **same)) == "model"
  for other in ({"num_layers": 5}, {"tie_embeddings": False}, {"positions": "rotary_2d"}, {"prefix_length": 4}):
    assert known.name_of(dataclasses.replace(MODEL, **other)) is None
  learned = dataclasses.replace(MODEL, positions="learned_2d")
  known = dataclasses.replace(known, models={"model": learned})
  assert known.name_of(learned) == "model" and known.name_of(dataclasses.replace(learned, max_length=100)) is None


def test_rows_of_a_model_that_nobody_compiled():
  """All precisions; contexts as far as the model goes; float32 is counted in half precision."""
  model = dataclasses.replace(MODEL, max_length=1000, num_layers=3, dtype="float32")
  rows = footprint.footprint(model)
  assert [(row.bits, row.context) for row in rows] == [(16, 512), (8, 512), (4, 512)]
  assert footprint.footprint(dataclasses.replace(model, max_length=64))[0].context == 64
  for row in rows:
    assert [found.card for found in row.sets] == list(footprint.CARDS)
    assert {found.basis for found in row.sets} == {footprint.ARITHMETIC}
    assert row.recommended[0].card == "rtx2080ti" and row.recommended[-1].card == "h200"
  assert (
    rows[0].weights_bytes == memory.decoding(dataclasses.replace(model, dtype="bfloat16")).total - 2 * 3 * 2048 * 512
  )


def test_bad_input_gets_a_line():
  for wrong, line in (
    ({"bits": [5]}, "there are 16, 8, 4"),
    ({"contexts": [4096]}, "contexts is 4096"),
    ({"batch": 0}, "Decode.batch is 0"),
    ({"cards": ["b300"]}, "cards is 'b300'"),
  ):
    with pytest.raises(errors.InputError, match=line):
      footprint.footprint(MODEL, **wrong)
  with pytest.raises(errors.InputError, match="config is of type dict"):
    footprint.footprint({})


def test_a_table_is_read_as_it_was_written():
  whole = table()
  written = compiled.text(whole)
  assert compiled.text(compiled.read(written)) == written
  assert compiled.read(written).cells == {cell: tuple(points) for cell, points in whole.cells.items()}
  assert compiled.read(written).name_of(MODEL) == "model"
