"""Advice by arithmetic, from results of programs made up, and of a program offloaded here."""

import dataclasses
import math
import re

import pytest

from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import advice
from glmjax.plan import memory
from glmjax.plan import planner
from glmjax.plan import programs
from glmjax.plan import targets
from glmjax.train import pipeline

MESH = {"data": 4, "fsdp": 1, "stage": 1, "tensor": 2, "context": 1}
FIXED = pipeline.PipelineConfig(microbatches=4)


def changes(model, work, mesh, less, target="a100-40:32", **memory):
  """Of a program that takes `memory`, where there is room for all but `less` of it."""
  memory = {"parameters": 4_000, "optimizer": 8_000, "temporaries": 100_000, "other": 0} | memory
  peak = sum(memory.values())
  found = advice.changes(
    model,
    work,
    targets.parse(target),
    {"mesh": mesh, "memory": memory, "peak_bytes_per_device": peak, "usable_memory_bytes": peak - less},
  )["changes"]
  assert all(change["peak_bytes_per_device"] <= peak - less for change in found)
  return {change["change"]: peak - change["peak_bytes_per_device"] for change in found}


def test_1f1b_is_not_offered_fewer_rows(tiny):
  """Its micro_batch changes the ring alone."""
  mesh, work = MESH | {"stage": 4}, programs.Train(64, 32, strategy="zero1", pipeline=FIXED)
  assert not any("micro_batch" in change for change in changes(tiny, work, mesh, 100))
  gpipe = dataclasses.replace(work, pipeline=dataclasses.replace(FIXED, kind="gpipe"))
  assert any("micro_batch" in change for change in changes(tiny, gpipe, mesh, 100))


@pytest.mark.parametrize("schedule", [FIXED, pipeline.PipelineConfig()])
def test_more_devices_leave_what_zero1_gathers(tiny, schedule):
  """Data splits the state, and what waits for backward, not the gathered weights and their gradient."""
  mesh, work = MESH | {"stage": 4}, programs.Train(64, 32, strategy="zero1", pipeline=schedule)
  whole, waiting = memory.gathered(tiny, work, mesh), memory.activations(tiny, work, mesh)
  assert whole == 8 * params_lib.count(tiny) / (2 * 4)  # both float32
  tiny = dataclasses.replace(tiny, remat="full")
  for temporaries in (whole, whole + waiting):
    found = changes(tiny, work, mesh, 6_000, temporaries=round(temporaries))
    ((change, saved),) = found.items()
    assert change == "MeshConfig.data=8 on a100-40:64"
    fewer = memory.activations(tiny, work, mesh) - memory.activations(tiny, work, mesh | {"data": 8})
    spread = (temporaries - whole) / 2 if schedule == FIXED else min(fewer, temporaries - whole)
    assert saved == pytest.approx(6_000 + spread, abs=1)
  assert not changes(tiny, work, mesh, 12_001 + round(waiting), temporaries=round(whole + waiting))


def test_1f1b_keeps_few_inputs(tiny):
  """Its bytes are those of what train/pipeline/one_f_one_b.py keeps, whatever the number of micro-batches."""
  mesh = MESH | {"stage": 2, "tensor": 1}

  def of(count, remat):
    return memory.activations(
      dataclasses.replace(tiny, remat=remat), programs.Train(4 * count, 32, pipeline=pipeline.PipelineConfig()), mesh
    )

  row = 4 * 32 * tiny.embed_dim
  assert of(8, "full") == row * (3 + 2 + 4)  # inputs, a group's layers, slots
  assert of(16, "full") - of(8, "full") == of(16, "none") - of(8, "none") == row * 4


@pytest.mark.parametrize("strategy", ["fsdp", "sequence"])
def test_fsdp_is_offered_against_data(tiny, strategy):
  found = changes(tiny, programs.Train(64, 32, strategy=strategy), MESH, 5_000)
  assert "MeshConfig.fsdp=2, MeshConfig.data=2" in found


def test_sequence_splits_layer_inputs(tiny):
  assert memory.kept(tiny, "sequence", "full", 4) == tiny.embed_dim / 4
  assert memory.kept(tiny, "fsdp", "full", 4) == memory.kept(tiny, "zero1", "full", 4) == tiny.embed_dim
  assert 4 * memory.kept(tiny, "sequence", "dots", 4) == memory.kept(tiny, "sequence", "dots", 1)


def test_the_fewest_layers_are_offloaded(here, tiny, monkeypatch):
  """One layer less than advised would not do, by the bytes that the program leaves to the host."""
  mesh, work = mesh_lib.MeshConfig(tensor=2), programs.Decode(context=32)
  layer = planner.plan(tiny, dataclasses.replace(work, offload_layers=1), "a100-40:2", mesh)["host_bytes_per_device"]
  copy = 4 * tiny.mlp_branches * tiny.embed_dim * tiny.mlp_dim / 2
  limits = {"parameters": 500_000, "kv_cache": 1_000}
  at = MESH | {"data": 1}
  for layers in (1, 2, 4):
    for less, more in ((layers * layer - copy, 0), (layers * layer - copy + 1, 1)):
      found = changes(tiny, work, at, math.floor(less), "a100-40:2", **limits)
      numbers = [int(n) for change in found for n in re.findall(r"^programs.Decode.offload_layers=(\d+)$", change)]
      assert numbers == ([layers + more] if layers + more <= tiny.num_layers else [])
  more = changes(tiny, dataclasses.replace(work, offload_layers=2), at, round(layer), "a100-40:2", **limits)
  assert more["programs.Decode.offload_layers=3"] == layer  # the copy is there already
  assert not any("offload" in change for change in changes(tiny, work, at, 100, "v5e:1x2", **limits))
