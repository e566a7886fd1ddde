"""Searches and advice, with the processors here as the devices that are elsewhere."""

import dataclasses
import math
import re

import pytest

from glmjax import errors
from glmjax.cli import plans
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import planner
from glmjax.plan import programs
from glmjax.plan import search
from glmjax.plan import targets
from glmjax.train import pipeline

WORK = programs.Train(16, 32)


@pytest.fixture
def memory(monkeypatch):
  """Sets the memory of an A100."""

  def limit(room: float) -> None:
    chip = dataclasses.replace(targets.CHIPS["a100-40"], memory_bytes=math.ceil(room / (1 - targets.RESERVED)))
    monkeypatch.setitem(targets.CHIPS, "a100-40", chip)

  return limit


@pytest.fixture
def compiled(monkeypatch):
  """Programs that hold 100 bytes for each row at a time on a device, four times as much unless remat is full."""
  seen = []

  def step(model, work, aim, mesh):
    rows = (work.micro_batch or work.batch_size) // (mesh.data * mesh.fsdp)
    peak = 100 * rows * (1 if model.remat == "full" else 4)
    seen.append((mesh, rows, model.remat))
    return {"fits": peak <= targets.room(aim.chip), "peak_bytes_per_device": peak, "step_seconds": 1 / len(seen)}

  monkeypatch.setattr(search.estimate, "step", step)
  monkeypatch.setattr(
    search,
    "_ruled_out",
    lambda candidate, aim, ask=search._ruled_out: None if "fit" in (reason := ask(candidate, aim) or "fit") else reason,
  )
  return seen


def test_candidates_are_ranked(here, compiled, tiny):
  found = planner.plan(tiny, WORK, "a100-40:8", search=True, tries=5)
  seconds = [c["step_seconds"] for c in found["candidates"]]
  assert len(compiled) == 5 and seconds == sorted(seconds)
  assert found["left_out"]["split num_heads 4 unevenly over tensor"]
  everything = planner.plan(tiny, WORK, "a100-40:8", search=True, tries=1000)
  assert len({c["name"] for c in everything["candidates"]}) == len(everything["candidates"]) > 20
  assert not any("slower" in reason for reason in everything["left_out"])


def test_one_that_does_not_fit_rules_out_those_that_hold_more(here, compiled, tiny, memory):
  memory(450)
  found = planner.plan(tiny, WORK, "a100-40:1", search=True, tries=1000)
  fits = [c["fits"] for c in found["candidates"]]
  assert fits == sorted(fits, reverse=True) and fits[0] and not fits[-1]
  assert {(rows, remat) for _, rows, remat in compiled} >= {(4, "full"), (1, "dots"), (1, "none")}
  assert any("hold more" in reason for reason in found["left_out"])
  assert len(compiled) + sum(found["left_out"].values()) == 5 * 3  # divisors of 16 rows, and remats


def test_a_candidate_that_does_not_compile_is_told(here, compiled, tiny, monkeypatch):
  def step(model, work, aim, mesh):
    raise ValueError("stages: 3 do not divide\nmore")

  monkeypatch.setattr(search.estimate, "step", step)
  found = planner.plan(tiny, WORK, "a100-40:1", search=True, tries=2)
  assert [c["error"] for c in found["candidates"]] == ["stages: 3 do not divide"] * 2
  plans.show(found)


def test_decoding_tries_tensor(here, compiled, tiny, monkeypatch):
  monkeypatch.setattr(
    search.estimate,
    "step",
    lambda model, work, aim, mesh: {"fits": True, "step_seconds": mesh.tensor, "mesh": {"tensor": mesh.tensor}},
  )
  found = planner.plan(tiny, programs.Decode(context=64), "a100-40:8", search=True)
  assert [c["mesh"]["tensor"] for c in found["candidates"]] == [1, 2, 4]
  assert found["left_out"] == {"split num_heads 4 unevenly over tensor": 1}


def test_what_cannot_be_searched_is_told(here, tiny):
  with pytest.raises(errors.InputError, match="tries"):
    planner.plan(tiny, WORK, "a100-40:4", search=True, tries=0)


def test_weights_that_do_not_fit_are_not_compiled(here, tiny, memory):
  memory(12 * params_lib.count(tiny) - 1)
  found = planner.plan(tiny, WORK, "a100-40:1", search=True)
  assert not found["candidates"] and found["left_out"] == {"hold weights and optimizer state that do not fit": 15}


@pytest.mark.parametrize("remat, compiled_gib", [("none", 33.7), ("dots", 32.4), ("full", 30.8)])
def test_the_original_130b_is_not_ruled_out(remat, compiled_gib):
  """4,224 rows, of which 1F1B keeps few at a time; docs/scaling.md has what the compiled programs take."""
  model = config_lib.GLMConfig(
    vocab_size=150_528,
    num_layers=70,
    embed_dim=12_288,
    num_heads=96,
    mlp_dim=32_768,
    max_length=2048,
    dtype="float16",
    remat=remat,
  )
  work = programs.Train(4224, 2048, strategy="zero1", pipeline=pipeline.PipelineConfig(microbatches=176))
  candidate = search._Candidate(model, work, mesh_lib.MeshConfig(24, stage=8, tensor=4))
  aim = targets.parse("a100-40:768")
  assert search._ruled_out(candidate, aim) is None
  assert 0.5 < sum(search._bytes(candidate)) / targets.GIB / compiled_gib <= 1
  candidate = dataclasses.replace(
    candidate, workload=dataclasses.replace(work, pipeline=pipeline.PipelineConfig(microbatches=176, kind="gpipe"))
  )
  assert search._ruled_out(candidate, aim) == "keep more for backward than fits"
  candidate = dataclasses.replace(candidate, workload=dataclasses.replace(work, micro_batch=96))
  assert "pipeline's micro-batches" in search._ruled_out(candidate, aim)


def changed(text, tiny, work, mesh, target):
  """The plan that an advice names."""
  sizes = {
    owner: {name: int(value) for name, value in re.findall(rf"{owner}\.(\w+)=(\d+)", text)}
    for owner in ("MeshConfig", "Train", "Decode")
  }
  device = re.search(r" on (\S+)", text)
  if "remat=full" in text:
    tiny = dataclasses.replace(tiny, remat="full")
  work = dataclasses.replace(work, **sizes[type(work).__name__])
  return planner.plan(
    tiny, work, device[1].rstrip(",") if device else target, dataclasses.replace(mesh, **sizes["MeshConfig"])
  )


@pytest.mark.parametrize(
  "work, mesh, share",
  [
    (dataclasses.replace(WORK, micro_batch=4), mesh_lib.MeshConfig(2), 0.8),
    (programs.Decode(batch=8, context=512), mesh_lib.MeshConfig(1), 0.7),
  ],
)
def test_what_is_advised_fits(here, tiny, memory, work, mesh, share):
  tiny = dataclasses.replace(tiny, num_layers=2, max_length=512)
  target = f"a100-40:{2 if mesh.data * mesh.fsdp * mesh.tensor == 2 else 1}"
  plan = planner.plan(tiny, work, target, mesh)
  assert plan["fits"] and "advice" not in plan
  memory(share * plan["peak_bytes_per_device"])
  plan = planner.plan(tiny, work, target, mesh)
  assert not plan["fits"] and plan["headroom_bytes"] < 0
  advice = plan["advice"]
  assert advice["largest_part"] in plan["memory"] and advice["changes"]
  for change in advice["changes"]:
    found = changed(change["change"], tiny, work, mesh, target)
    assert found["peak_bytes_per_device"] <= 1.25 * change["peak_bytes_per_device"], change
    assert found["peak_bytes_per_device"] < plan["peak_bytes_per_device"], change
