"""Adapters in the training loop: the model beside them stays as it is, whatever it is stored as."""

import dataclasses
import json
import shutil
from typing import Any

import chex
import jax
import numpy as np
import pytest

from glmjax import errors
from glmjax.checkpoint import adapter as adapter_lib
from glmjax.checkpoint import arrays
from glmjax.checkpoint import export
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load
from glmjax.checkpoint import manager
from glmjax.infer import placement
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import loop
from glmjax.train import optimizer
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import trainable

MESH = mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2)
ADAPTERS = {
  "lora": trainable.LoRA(rank=2, dropout=0.1),
  "p_tuning": trainable.PTuning(length=3, dropout=0.0),
  "projection": trainable.PTuning(length=3, projection=True),
}


def train(workdir, config, source, adapter, weights, mesh=MESH, **changes) -> dict:
  constant = schedules.Constant(1e-1 if adapter == ADAPTERS["p_tuning"] else 1e-2)
  return loop.train(
    config,
    source,
    workdir,
    schedules.Batches(16),
    10**6,
    constant,
    mesh=mesh,
    trainable=adapter,
    weights=weights,
    intervals=loop.Intervals(log=1, save=2),
    **changes,
  )


@dataclasses.dataclass(frozen=True)
class Same:
  """The same rows of a source in each step."""

  source: Any
  seq_length: int = 16

  def describe(self) -> dict:
    return self.source.describe()

  def batches(self, plan, process_index=0, process_count=1):
    return self.source.batches(((0, size) for _, size in plan), process_index, process_count)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny, source):
  """A trained model, as a run and as exports of 8 and 4 bits."""
  folder = tmp_path_factory.mktemp("bases")
  constant = schedules.Constant(1e-2)
  loop.train(tiny, source, folder / "float", schedules.Batches(16), 10**6, constant, mesh=MESH, stop_at_step=4)
  for bits in (8, 4):
    export.export(folder / "float", folder / f"int{bits}", bits=bits)
  return folder


def losses(workdir) -> list[float]:
  return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved(workdir) -> dict[str, np.ndarray]:
  """What the newest checkpoint has of parameters."""
  step = manager.steps(workdir / "checkpoints")[-1]
  record = manager.read_record(workdir / "checkpoints" / str(step))
  return {name: each["sum"] for name, each in record["arrays"].items() if name.startswith("params/")}


@pytest.mark.parametrize("base", ["float", "int8", "int4"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_learns_beside_a_frozen_model(name, base, bases, tmp_path, tiny, source):
  adapter = ADAPTERS[name]
  before = load.fingerprint(bases / base)
  train(tmp_path / "run", tiny, Same(source), adapter, bases / base, stop_at_step=8)
  found = losses(tmp_path / "run")
  assert np.mean(found[-2:]) < np.mean(found[:2])
  table = params_lib.table(adapter.adapt(tiny))
  assert {*saved(tmp_path / "run")} == {
    f"params/{path}" for path, param in table.items() if adapter.is_trained(path, param)
  }
  assert load.fingerprint(bases / base) == before
  described = json.loads((tmp_path / "run" / "config.json").read_text())["base"]
  assert described["fingerprint"] == before and described["bits"] == {"float": None, "int8": 8, "int4": 4}[base]


@pytest.mark.parametrize("name", ADAPTERS)
def test_resumed_is_unbroken(name, bases, tmp_path, tiny, source):
  for workdir, stops in ((tmp_path / "whole", [6]), (tmp_path / "parts", [4, 6])):
    for stop in stops:
      train(workdir, tiny, source, ADAPTERS[name], bases / "int4", stop_at_step=stop)
  assert saved(tmp_path / "whole") == saved(tmp_path / "parts")


def test_first_loss_is_the_models_own(bases, tmp_path, tiny, source):
  """New factors add nothing: the first step sees the model that is adapted."""
  train(tmp_path / "lora", tiny, source, trainable.LoRA(rank=2), bases / "float", stop_at_step=1)
  constant = schedules.Constant(0.0)
  loop.train(
    tiny,
    source,
    tmp_path / "whole",
    schedules.Batches(16),
    10**6,
    constant,
    mesh=MESH,
    weights=bases / "float",
    stop_at_step=1,
  )
  assert losses(tmp_path / "lora")[0] == pytest.approx(losses(tmp_path / "whole")[0], abs=1e-6)


def test_one_device_is_the_mesh(bases, tmp_path, tiny, source):
  for name, mesh in (("mesh", MESH), ("one", mesh_lib.MeshConfig())):
    with jax.default_device(jax.devices()[0]):
      mesh = mesh if name == "mesh" else dataclasses.replace(mesh, data=8)
      train(tmp_path / name, tiny, source, ADAPTERS["lora"], bases / "int8", mesh=mesh, stop_at_step=4)
  chex.assert_trees_all_close(losses(tmp_path / "mesh"), losses(tmp_path / "one"), rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"fsdp": 2}])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_goes_on_on_other_devices(name, sizes, bases, tmp_path, tiny, source, monkeypatch):
  """Of one device on two, and of two on one: the losses are those of one, as those of runs without an adapter are."""
  make, one, two = mesh_lib.make_mesh, mesh_lib.MeshConfig(data=1), mesh_lib.MeshConfig(**{"data": 1} | sizes)
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda config: make(config, jax.devices()[: 1 if config == one else 2]))
  for folder, meshes in (("whole", [one]), ("grown", [one, two]), ("shrunk", [two, one])):
    for mesh, stop in zip(meshes, (3, 6) if len(meshes) == 2 else (6,)):
      train(tmp_path / folder, tiny, source, ADAPTERS[name], bases / "int4", mesh=mesh, stop_at_step=stop)
  for folder in ("grown", "shrunk"):
    chex.assert_trees_all_close(losses(tmp_path / folder), losses(tmp_path / "whole"), rtol=2e-5)


def test_a_base_that_saves_another_model_meanwhile_is_told(bases, tmp_path, tiny, source):
  """And nothing is trained beside a model that config.json does not name."""
  shutil.copytree(bases / "float", tmp_path / "base")
  shutil.copytree(bases / "float", tmp_path / "later")
  settings = dict(mesh=MESH, stop_at_step=5)
  loop.train(tiny, source, tmp_path / "later", schedules.Batches(16), 10**6, schedules.Constant(1e-2), **settings)

  def save(_) -> None:
    if not (step := tmp_path / "base" / "checkpoints" / "5").exists():
      shutil.copytree(tmp_path / "later" / "checkpoints" / "5", step)

  run = tmp_path / "run"
  with pytest.raises(errors.InputError, match="base holds another model than when this run was started.* export it"):
    train(run, tiny, source, ADAPTERS["lora"], tmp_path / "base", stop_at_step=1, on_start=save)
  assert not manager.steps(run / "checkpoints")
  train(run, tiny, source, ADAPTERS["lora"], tmp_path / "base", stop_at_step=1, on_start=save)
  assert json.loads((run / "config.json").read_text())["base"]["fingerprint"] == load.fingerprint(tmp_path / "base")


def test_mistakes(bases, tmp_path, tiny, source):
  lora = trainable.LoRA(rank=2)
  with pytest.raises(errors.InputError, match="adapts a model: give its folder as loop.train.weights"):
    train(tmp_path / "a", tiny, source, lora, None)
  with pytest.raises(errors.InputError, match="num_layers is 2 there and 3 here"):
    train(tmp_path / "a", dataclasses.replace(tiny, num_layers=3), source, lora, bases / "int8")
  assert not (tmp_path / "a").exists()
  train(tmp_path / "a", tiny, source, lora, bases / "int8", stop_at_step=2)
  with pytest.raises(errors.InputError, match="holds another run: base.fingerprint is"):
    train(tmp_path / "a", tiny, source, lora, bases / "int4")
  with pytest.raises(errors.InputError, match="holds an adapter of .*int8: give the model itself"):
    train(tmp_path / "b", tiny, source, lora, tmp_path / "a")
  with pytest.raises(errors.InputError, match="lora_rank is 2 there and 4 here"):
    train(tmp_path / "a", tiny, source, trainable.LoRA(rank=4), bases / "int8")
  alpha = schedules.Constant(0.1)
  with pytest.raises(errors.InputError, match="embedding_alpha shrinks the embedding's gradient, and beside"):
    train(tmp_path / "b", tiny, source, lora, bases / "int8", embedding_alpha=alpha)
  assert not (tmp_path / "b").exists()
  with pytest.raises(errors.InputError, match="has a prefix of 3 already"):
    trainable.PTuning(4).adapt(trainable.PTuning(3).adapt(tiny))
  for kernels, message in (
    (["qkv"], "LoRA.kernels is 'qkv'"),
    (None, "LoRA.kernels is None: give a list"),
    ([], "LoRA.kernels is empty"),
  ):
    with pytest.raises(errors.InputError, match=message):
      trainable.LoRA(kernels=kernels)
  for kernels in (["attention/qkv"], None, "attention/qkv,attention/qkv"):
    with pytest.raises(errors.InputError, match="lora_kernels is"):
      dataclasses.replace(tiny, lora_rank=1, lora_kernels=kernels)
  orders = (["mlp/wo", "attention/qkv"], ["attention/qkv", "mlp/wo"])
  assert len({trainable.LoRA(kernels=kernels).adapt(tiny) for kernels in orders}) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [None, 8])
def test_what_is_frozen_lies_as_in_inference(dtype, bits, tiny):
  config, lora = dataclasses.replace(tiny, dtype=dtype), trainable.LoRA(rank=2)
  one = placement.on_mesh(None)
  state = state_lib.abstract(
    lora.adapt(config), optimizer.AdamW().make(), one.mesh, is_trained=lora.is_trained, frozen_bits=bits
  )
  frozen = {name: x.dtype for name, x in arrays.named_leaves(state.frozen).items()}
  for name, x in arrays.named_leaves(one.params(config, bits)).items():
    if name.startswith("layers_0/") or not name.startswith("layers_"):
      assert frozen[name.replace("layers_0/", "layers/")] == x.dtype, name


def test_a_base_that_cannot_be_computed_with_is_told(bases, tmp_path, tiny, source):
  model = load.load(bases / "float")
  params = params_lib.flatten(model.params)
  params["layers/mlp/wo/kernel"] = params["layers/mlp/wo/kernel"].at[1, 2, 3].set(1e6)
  broken = tmp_path / "broken"
  broken.mkdir()
  folder_lib.write_config(broken, folder_lib.FolderConfig(tiny, {"name": "patterns"}))
  saver = manager.Manager(broken / "checkpoints")
  saver.save(1, {"params": params_lib.nest(params), "step": np.int32(1)}, {"samples_seen": 1})
  saver.close()
  half = dataclasses.replace(tiny, dtype="float16")
  with pytest.raises(errors.NotFiniteError, match="broken cannot be computed with in float16: .* layers/mlp/wo"):
    train(tmp_path / "run", half, source, trainable.LoRA(rank=2), broken)


def test_lengths_of_rotary_models_are_free_and_roundings_are_not(bases, tmp_path, tiny, source):
  longer = dataclasses.replace(tiny, max_length=64)
  train(tmp_path / "run", longer, source, trainable.LoRA(rank=2), bases / "float", stop_at_step=1)
  found = adapter_lib.Adapter.read(tmp_path / "run")
  found.settings(load.load(bases / "float").config, bases / "float", "a" * 64)
  rounded = dataclasses.replace(tiny, rotary_rounding="half_table")
  with pytest.raises(errors.InputError, match="rotary_rounding is none there and half_table here"):
    train(tmp_path / "other", rounded, source, trainable.LoRA(rank=2), bases / "float")
