"""The table of smallest sets: its arithmetic, what it compiles, and what it keeps."""

import dataclasses
import json
import math
import pathlib

import jax
import pytest

from glmjax import errors
from glmjax.cli import plans
from glmjax.plan import compiled as compiled_lib
from glmjax.plan import compiler
from glmjax.plan import estimate
from glmjax.plan import fits
from glmjax.plan import programs
from glmjax.plan import targets


@pytest.fixture
def model(tiny):
  compiler.mesh.cache_clear()
  # A head of its own: on the processors here a tied one would get a table, which it does not on a GPU.
  return dataclasses.replace(tiny, num_layers=12, dtype="float16", param_dtype="float16", tie_embeddings=False)


@pytest.fixture
def card(monkeypatch):
  """Sets what a card may take."""

  def limit(name, room):
    chip = dataclasses.replace(targets.CHIPS[name], memory_bytes=math.ceil(room / (1 - targets.RESERVED)))
    monkeypatch.setitem(targets.CHIPS, name, chip)

  return limit


def takes(config, work, count, besides):
  moved = {"moved_bytes_per_device": 1e8 + 1e9 * config.num_layers}
  costs = {"flops_per_device": 1.0, "waited_exchange_seconds": 0.001 * config.num_layers} | moved
  return {"peak_bytes_per_device": compiler.held(config, work, count) + besides} | costs


@pytest.fixture
def compiled(monkeypatch):
  """Programs that take 1,000 bytes besides weights and cache, a prompt's 2,000; each layer takes time."""
  seen = []

  def compile_(self, config, work, gpu, count):
    seen.append((config.num_layers, work.bits, work.context, work.prompt, gpu, count))
    return takes(config, work, count, 1000 if work.prompt == 1 else 2000)

  monkeypatch.setattr(compiler.Compiler, "_compile", compile_)
  return seen


def table(model, **kwargs):
  rows = fits.smallest({"tiny": model}, **{"contexts": (16, 32), "gpus": ("a100-40",), "bits": (16,)} | kwargs)
  return {(row["bits"], row["gpu"], row["context"]): row for row in rows}


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_held_is_what_the_program_is_given(here, model, bits):
  model, work = dataclasses.replace(model, num_layers=3), programs.Decode(context=32, bits=bits)
  parts = work.program(model, compiler.mesh("a100-40", 4)).parts
  assert compiler.held(model, work, 4) == sum(map(estimate.shard_bytes, jax.tree.leaves(parts)))


def test_the_smallest_set_is_found(here, model, compiled, card):
  work = programs.Decode(context=32)
  card("a100-40", compiler.held(model, work, 2) + 2000)  # prompts of two cards fit to the byte
  found = table(model)
  assert found[16, "a100-40", 32]["count"] == found[16, "a100-40", 16]["count"] == 2
  assert {layers for layers, *_ in compiled} == {4, 8, 12}  # near the limit, all layers
  card("a100-40", compiler.held(model, work, 2) + 1999)
  assert table(model)[16, "a100-40", 32]["count"] == 4


def test_a_table_tells_which_sets_programs_do_not_fit(here, model, compiled, card, tmp_path):
  """So that nobody takes their weights and cache, which fit, for an answer."""
  path, work = tmp_path / "table.json", programs.Decode(context=32)
  card("a100-40", compiler.held(model, work, 2) + 1999)
  for given in ({}, {"bits": (8, 4)}):
    found = table(model, contexts=(32,), table=path, **given).values()
    rows = fits.rows_of(compiled_lib.read(path.read_text()))
    ours = {(row["bits"], row["context"], row["count"]) for row in rows if row["gpu"] == "a100-40"}
    assert {(row["bits"], row["context"], row["count"]) for row in found} <= ours
  assert (16, 32, 4) in ours


def test_arithmetic_decides_where_it_can(here, model, compiled, card):
  """What does not hold weights and cache is not compiled."""
  card("a100-40", compiler.held(model, programs.Decode(context=16), 1) - 1)
  found = table(model)
  assert found[16, "a100-40", 16]["count"] == found[16, "a100-40", 32]["count"] == 2
  assert {count for *_, count in compiled} == {2}


def test_seconds_are_of_all_layers(here, model, compiled):
  """By half of the layers and all that were compiled: each takes the same."""
  found = table(model, contexts=(32,))[16, "a100-40", 32]
  moved = 1e8 + 12 * 1e9
  seconds = moved / targets.CHIPS["a100-40"].memory_bandwidth + 12 * 0.001
  assert found["tokens_per_second"] == pytest.approx(1 / seconds, rel=1e-5)


def test_a_table_gets_every_point_of_the_sets_that_are_found(here, model, compiled, card, tmp_path):
  """And keeps those of other runs; of two cards that share programs, those of more layers."""
  path, work = tmp_path / "table.json", programs.Decode(8, 32)
  card("a100-40", compiler.held(model, work, 1) + 1000)
  card("a100-80", 10 * compiler.held(model, work, 1))
  for gpus in (("a100-40", "a100-80"), ("a100-80", "a100-40")):
    fits.smallest({"tiny": model}, [16], (16, 32), (1, 8), gpus, table=path)
    found = compiled_lib.read(path.read_text())
    assert [cell.count for cell in found.cells] == [1, 2] and found.name_of(model) == "tiny"
    for points in found.cells.values():
      assert [(point.batch, point.context) for point in points] == [(1, 16), (1, 32), (8, 16), (8, 32)]
      assert {(point.decode, point.prompt) for point in points} == {(1000, 2000)}
    [largest] = [point for cell, points in found.cells.items() if cell.count == 1 for point in points[-1:]]
    assert largest.layers == 12  # near the limit of one
    path.unlink()
  fits.smallest({"tiny": model}, [8], (16,), gpus=("h100",), table=path)
  fits.smallest({"tiny": model}, [4], (16,), gpus=("h100",), table=path)
  assert [cell.bits for cell in compiled_lib.read(path.read_text()).cells] == [4, 8]
  rows = fits.rows_of(compiled_lib.read(path.read_text()))
  assert {(row["bits"], row["gpu"], row["count"]) for row in rows} == {
    (b, g, 1) for b in (8, 4) for g in ("h100", "h200")
  }
  fits.smallest({"tiny": dataclasses.replace(model, num_layers=4)}, [16], (16,), gpus=("h100",), table=path)
  assert [cell.bits for cell in compiled_lib.read(path.read_text()).cells] == [16]  # another model of that name
  for text, line in (("[]", "is not a table"), ('{"jax": "0.1", "models": {}, "cells": []}', "by jax 0.1")):
    path.write_text(text)
    with pytest.raises(errors.InputError, match=line):
      fits.smallest({"tiny": model}, [8], (16,), gpus=("h100",), table=path)


def test_cards_of_an_architecture_share_programs(here, model, compiled):
  table(model, gpus=("a100-40", "a100-80", "h100", "h200"))
  assert {gpu for *_, gpu, _ in compiled} == {"a100-40", "h100"}


@pytest.mark.parametrize("order", [("a100-40", "a100-80"), ("a100-80", "a100-40")])
def test_a_card_near_its_limit_is_told_apart_in_any_order(here, model, monkeypatch, card, order):
  """Though cards share programs: of all layers they take more than of some, and one card alone is near its limit."""
  work = programs.Decode(context=32)

  def compile_(self, config, work, gpu, count):
    return takes(config, work, count, 1000 if config.num_layers == 12 else 900)

  monkeypatch.setattr(compiler.Compiler, "_compile", compile_)
  card("a100-40", compiler.held(model, work, 2) + 950)
  card("a100-80", 10 * compiler.held(model, work, 1))
  found = table(model, contexts=(32,), gpus=order)
  assert found[16, "a100-40", 32]["count"] == 4
  assert found[16, "a100-80", 32]["peak_bytes_per_device"] == compiler.held(model, work, 1) + 900


def test_what_no_set_holds_and_no_model_reads_is_told(here, model, compiled, card):
  card("a100-40", 1000)
  found = table(model, contexts=(32, 128))
  assert found[16, "a100-40", 32]["count"] is None and "4 do not hold it" in found[16, "a100-40", 32]["why"]
  assert "ends at 64" in found[16, "a100-40", 128]["why"] and not compiled
  with pytest.raises(errors.InputError, match="b300.*a100-40"):
    table(model, gpus=("b300",))


def test_a_stopped_run_goes_on(here, model, tmp_path, monkeypatch):
  """Programs in the file are not compiled again; a torn line is left aside, and what is written behind it is read."""
  model, out = dataclasses.replace(model, num_layers=2), tmp_path / "fits.jsonl"
  found = table(model, contexts=(16,), out=str(out))
  lines = out.read_text().splitlines()
  assert len(lines) == 3 and all(json.loads(line)["peak_bytes_per_device"] > 0 for line in lines)
  whole = out.read_text()
  for torn in (lines[2][:20], lines[2][:-1], lines[2]):  # the last is whole, but for its end
    out.write_text(f"{lines[0]}\n{lines[1]}\n{torn}")
    assert table(model, contexts=(16,), out=str(out)) == found
    with monkeypatch.context() as patch:
      patch.setattr(estimate, "peak_memory", None)
      assert table(model, contexts=(16,), out=str(out)) == found
  assert out.read_text() == whole.removesuffix("\n")  # nothing was missing, so nothing was written
  out.write_text("prose\n")
  with pytest.raises(errors.InputError, match="fits.jsonl"):
    table(model, out=str(out))


def test_the_table_of_the_page_is_the_compiled_one(capsys):
  """`glmjax plan --fits --html` prints it."""
  plans.show_fits(fits.rows_of(compiled_lib.shipped()))
  text = (pathlib.Path(__file__).parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8")
  assert capsys.readouterr().out in text
