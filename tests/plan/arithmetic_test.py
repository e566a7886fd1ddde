"""Memory by arithmetic: weights and cache to the byte, sets of cards and training steps against compiled plans."""

import dataclasses
import math
import re

import jax
import pytest

from glmjax import display
from glmjax import errors
from glmjax.infer import placement
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.plan import compiled
from glmjax.plan import estimate
from glmjax.plan import fits
from glmjax.plan import memory
from glmjax.plan import programs
from glmjax.plan import targets
from glmjax.train import optimizer
from glmjax.train import pipeline
from glmjax.train import trainable
from glmjax.train.pipeline import stage_layout

MODELS = {
  "6b": config_lib.GLMConfig(130_528, 28, 4096, 32, 16_384, positions="rotary_2d", mlp="gelu_tanh", dtype="float16"),
  "10b": config_lib.GLMConfig(
    50_304, 48, 4096, 64, 16_384, 1024, positions="learned_2d", norm="pre", mlp="gelu_tanh", dtype="float16"
  ),
  "130b": config_lib.GLMConfig(150_528, 70, 12_288, 96, 32_768, dtype="float16"),
}
VARIANTS = [
  {},
  {"mlp": "gelu_tanh", "positions": "rotary_2d", "prefix_length": 4},
  {"positions": "learned_2d", "norm": "sandwich", "embedding_norm": True, "tie_embeddings": False},
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("mesh", [{}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2}])
def test_weights_and_cache_are_exact(tiny, variant, bits, mesh):
  """Of what inference is given on a mesh, without its head's copy, which the processors here alone have."""
  model = dataclasses.replace(tiny, dtype="float16", param_dtype="float16", **variant)
  mesh, work = mesh_lib.MeshConfig(**{"data": 1} | mesh), programs.Decode(4, 32, bits)
  found = memory.decoding(model, work, mesh)
  count = mesh.data * mesh.fsdp * mesh.tensor
  place = placement.Placement(mesh_lib.make_mesh(mesh, jax.devices()[:count]))
  weights = sum(map(estimate.shard_bytes, jax.tree.leaves(place.params(model, bits))))
  cache = sum(map(estimate.shard_bytes, jax.tree.leaves(place.state(model, 4, 32, 32).cache)))
  assert found.parts["KV cache"] == cache and found.total == weights + cache


def test_offloaded_layers_are_left_out(tiny):
  every, fewer = (
    memory.decoding(tiny, programs.Decode(context=32, offload_layers=n)).parts for n in (0, tiny.num_layers)
  )
  assert every["embedding"] == fewer["embedding"] and fewer["mlp"] < 0.05 * every["mlp"]


def test_sets_of_cards_are_those_that_were_compiled():
  """But for the one that fits by a hair; behind the longest context a program takes up to 1.4 GiB more, or a tenth."""
  found, other = fits.rows_of(compiled.shipped()), []
  assert {row["model"] for row in found} <= {*MODELS} and len(found) > 50
  for row in found:
    model, card, context = MODELS[row["model"]], row["gpu"], row["context"]
    work = programs.Decode(context=context, bits=None if row["bits"] == 16 else row["bits"])
    if memory.smallest(model, work, card) != row["count"]:
      other.append((row["model"], row["bits"], context, card))
    if context == model.max_length:
      held = memory.decoding(model, work, mesh_lib.MeshConfig(data=1, tensor=row["count"])).total
      assert held < row["peak_bytes_per_device"] < held + max(1.4 * targets.GIB, 0.1 * held), row
  assert set(other) <= {("10b", 8, 1024, "rtx2080ti")}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_training_step_takes_at_least_this(here, tiny, remat):
  """The state is the compiled program's to a hundredth; search_test.py has a bound of the rest for GLM-130B's steps."""
  model = dataclasses.replace(tiny, vocab_size=1024, embed_dim=128, mlp_dim=512, max_length=256, remat=remat)
  mesh, work = mesh_lib.MeshConfig(data=2, fsdp=2), programs.Train(16, 256)
  found, plan = memory.training(model, work, mesh), estimate.step(model, work, targets.parse("a100-40:4"), mesh)
  assert found.parts["weights"] == pytest.approx(plan["memory"]["parameters"], rel=0.01)
  assert found.parts["optimizer"] == pytest.approx(plan["memory"]["optimizer"], rel=0.01)
  assert found.total < plan["peak_bytes_per_device"]


@pytest.mark.parametrize("layers", [4, 7])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
  "mesh, workload",
  [
    ("data=1", programs.Train(8, 32)),
    ("stage=4", programs.Train(8, 32)),
    ("stage=4,tensor=2", programs.Train(8, 32, optimizer=optimizer.Muon())),
    ("stage=2", programs.Train(8, 32, pipeline=pipeline.PipelineConfig(rounds=2, kind="gpipe"))),
    ("data=2,fsdp=2,stage=2", programs.Train(8, 32, strategy="zero1")),
    ("fsdp=2,tensor=4", programs.Train(8, 32, strategy="sequence", optimizer=optimizer.Muon())),
    ("fsdp=2,tensor=4", programs.Train(8, 32, trainable=trainable.LoRA(rank=4), base_bits=4)),
    ("fsdp=4,tensor=2", programs.Train(8, 32, trainable=trainable.PTuning(4, projection=True), base_bits=8)),
    ("data=2,tensor=2", programs.Train(8, 32, trainable=trainable.PTuning(4))),
  ],
)
def test_a_training_state_is_exact(tiny, layers, variant, mesh, workload):
  """Of what a run holds, its layers in stages, but for Adam's counter; embeddings lie on every stage."""
  model = dataclasses.replace(tiny, num_layers=layers, **variant)
  if isinstance(workload.trainable, trainable.PTuning):  # which adds a prefix of its own
    model = dataclasses.replace(model, prefix_length=0)
  found, config = memory.training(model, workload, mesh).parts, mesh_lib.parse(mesh)
  devices = jax.devices()[: math.prod(dataclasses.astuple(config))]
  device_mesh = mesh_lib.make_mesh(config, devices)
  rules = partitioning.strategy(workload.strategy)
  schedule = pipeline.make(workload.pipeline, model, device_mesh, workload.batch_size)
  adapted, tx = workload.model(model), workload.optimizer.make()
  layout = stage_layout.make(adapted, tx, device_mesh, rules, schedule, workload.is_trained, workload.base_bits)
  state = layout.in_stages
  held = [
    sum(map(estimate.shard_bytes, jax.tree.leaves(part))) for part in (state.params, state.opt_state, state.frozen)
  ]
  assert [found["weights"], found["optimizer"] + 4, found.get("frozen", 0)] == held


@pytest.mark.parametrize(
  "mesh, said",
  [
    ("tensor=5", "num_heads 4 does not divide over tensor=5"),
    ("fsdp=7", "embed_dim 32 does not divide over fsdp=7"),
    ({"fsdp": 0}, "MeshConfig.fsdp is 0"),
    ({"tensor": -7}, "MeshConfig.tensor is -7"),
    (3, "mesh is 3: give text, as 'tensor=4', or a MeshConfig"),
    ("tensors=4", "mesh tensors=4: give sizes of data, fsdp"),
  ],
)
def test_meshes_that_cannot_be_are_refused_alike(tiny, mesh, said):
  mesh = mesh_lib.MeshConfig(**{"data": 1} | mesh) if isinstance(mesh, dict) else mesh
  for ask, workload in ((memory.training, programs.Train(8, 32)), (memory.decoding, programs.Decode(context=32))):
    with pytest.raises(errors.InputError, match=re.escape(said)):
      ask(tiny, workload, mesh)


def test_what_trainer_or_inference_refuses_is_refused(tiny):
  for mesh, workload, said in (
    ("data=16", programs.Train(8, 32), "batch size 8 does not divide"),
    ("context=8", programs.Train(8, 36), "rows of 36 tokens do not divide"),
    ("stage=3", programs.Train(8, 32), "pipeline micro-batches"),
    ("stage=8", programs.Train(8, 32), "without a layer"),
    (None, programs.Decode(), "workload is of type Decode: give a glmjax.plan.programs.Train"),
  ):
    with pytest.raises(errors.InputError, match=said):
      memory.training(tiny, workload, mesh)
  for axis in ("stage", "context"):
    with pytest.raises(errors.InputError, match=f"{axis}=2 is for training"):
      memory.decoding(tiny, mesh=f"{axis}=2")
  with pytest.raises(errors.InputError, match="give a glmjax.plan.programs.Decode"):
    memory.smallest(tiny, programs.Train(8, 32), "rtx3090")
  with pytest.raises(errors.InputError, match="model is of type str"):
    memory.decoding("tiny")
  for card in (["rtx3090"], None):
    with pytest.raises(errors.InputError, match="card is .*choose one of"):
      memory.smallest(tiny, programs.Decode(), card)
  assert (
    memory.decoding(tiny, mesh="tensor=4").parts == memory.decoding(tiny, mesh=mesh_lib.MeshConfig(1, tensor=4)).parts
  )
  assert memory.decoding(tiny, mesh=None).parts == memory.decoding(tiny, mesh=mesh_lib.MeshConfig()).parts


def test_it_is_drawn_and_told(tiny, monkeypatch):
  """Each part and all of it in GiB, and what is usable of a card."""
  figures, encode = [], display.grey_picture
  monkeypatch.setattr(display, "grey_picture", lambda figure: figures.append(figure) or encode(figure))
  found = memory.decoding(tiny, programs.Decode(context=32))
  assert found.plot()._repr_png_() and found.plot("rtx3090")._repr_png_()
  alone, with_card = (figure.axes[0] for figure in figures)
  sizes = [size / targets.GIB for size in (*found.parts.values(), found.total)]
  assert [bar.get_width() for bar in alone.patches] == pytest.approx(sizes)
  assert [label.get_text() for label in alone.get_yticklabels()] == [*found.parts, "all of it"]
  assert "usable: 22.3" in [text.get_text() for text in with_card.texts] and len(alone.texts) == len(sizes)
  assert "KV cache" in found._repr_html_()
  with pytest.raises(errors.InputError, match="rtx3090"):
    found.plot("rtx30")
  with pytest.raises(errors.InputError, match="num_heads 4 does not divide over tensor=3"):
    memory.decoding(tiny, mesh=mesh_lib.MeshConfig(tensor=3))
