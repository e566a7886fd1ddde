"""LoRA adapters in PEFT's files: those that PEFT wrote, ours given back bit for bit, wrong ones refused."""

import json
import math
import os
import pathlib
import shutil
import subprocess

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_adapters

from glmjax import errors
from glmjax.checkpoint import adapter as adapter_lib
from glmjax.checkpoint import export
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import stored_weights
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.thudm import layouts
from glmjax.thudm import load as load_lib
from glmjax.thudm import tensors
from glmjax.thudm import torch_files
from glmjax.thudm import write as write_lib

PEFT = golden_models.folder() / "lora_peft"


def exported(folder: pathlib.Path) -> pathlib.Path:
  """The golden model as an export of ours."""
  config = golden_models.config("chatglm6b_tiny", residual_alpha=math.sqrt(56))
  flat = params_lib.flatten(golden_models.params("chatglm6b_tiny"))
  weights = [stored_weights.StoredWeight(name, x.shape, "float32") for name, x in flat.items()]
  described = folder_lib.FolderConfig(config, export={"bits": None, "dtype": "float32", "step": None})
  content = export.ExportSource(
    described, None, weights, lambda weight, region: {weight.name: flat[weight.name][region]}, lambda: None
  )
  folder.mkdir()
  export.write_folder(content, folder)
  return folder


def imported(source: pathlib.Path, base: pathlib.Path, out: pathlib.Path) -> adapter_lib.Adapter:
  load_lib.import_adapter(source, base, out)
  return adapter_lib.Adapter.read(out)


def test_what_peft_saved_is_what_it_trained(tmp_path):
  arrays = golden_models.load("lora")[1]
  adapter = imported(PEFT, exported(tmp_path / "base"), tmp_path / "adapter")
  for entry in layouts.adapters("chatglm-6b", adapter.config):
    for key, ours in zip(entry.keys(adapter.config.num_layers), adapter.params[entry.name], strict=True):
      np.testing.assert_array_equal(entry.to_theirs(np.asarray(ours)), arrays[f"final/{key}"])
  described = json.loads((PEFT / "adapter_config.json").read_text())
  assert adapter.config.lora_rank == described["r"]
  assert adapter.config.lora_scale == described["lora_alpha"] / described["r"]
  params = params_lib.merge(golden_models.params("chatglm6b_tiny"), params_lib.nest(dict(adapter.params)))
  tokens = jnp.asarray(arrays["input_ids"][0, :2])
  positions = jnp.zeros((2, 2, tokens.shape[1]), jnp.int32)
  logits = jax.jit(glm.GLM(adapter.config).apply)(
    {"params": params}, tokens, positions, jnp.zeros_like(tokens), jnp.full_like(tokens, 5)
  )
  assert np.isfinite(logits).all()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> trained_adapters.Made:
  return trained_adapters.make(tmp_path_factory.mktemp("adapters"))


def test_ours_come_back(made, tmp_path):
  export.export(made.run("lora", "int4"), tmp_path / "peft", write_format=write_lib.write_format("peft"))
  assert {path.name for path in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
  keys = tensors.open_safetensors(tmp_path / "peft" / "adapter_model.safetensors")
  assert "base_model.model.transformer.layers.1.mlp.dense_4h_to_h.lora_B.weight" in keys and len(keys) == 16
  ours = adapter_lib.Adapter.read(made.run("lora", "int4"))
  theirs = imported(tmp_path / "peft", made.base("int4"), tmp_path / "back")
  assert theirs.base["fingerprint"] == ours.base["fingerprint"]
  assert theirs.config.lora_scale == ours.config.lora_scale and theirs.config.adapted == ours.config.adapted
  assert {*theirs.params} == {*ours.params}
  for name, x in ours.params.items():
    np.testing.assert_array_equal(theirs.params[name], x)


def test_small_folders_of_our_own(made, tmp_path):
  for name in trained_adapters.ADAPTERS:
    run = made.run(name, "float")
    export.export(run, tmp_path / name)
    ours, theirs = adapter_lib.Adapter.read(run), adapter_lib.Adapter.read(tmp_path / name)
    assert ours.base == theirs.base and {*ours.params} == {*theirs.params}
    for path, x in ours.params.items():
      np.testing.assert_array_equal(theirs.params[path], x)
  with pytest.raises(errors.InputError, match="holds an adapter, which stays float32"):
    export.export(made.run("lora", "float"), tmp_path / "no", bits=4)
  with pytest.raises(errors.InputError, match="is for LoRA adapters"):
    export.export(made.run("p_tuning", "float"), tmp_path / "no", write_format=write_lib.write_format("peft"))
  assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"bias": "all"}, 'bias is "all", which LoRA here does not know'),
    ({"use_dora": True}, "use_dora is true"),
    ({"peft_type": "IA3"}, 'peft_type is "IA3"'),
    ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa"'),
    ({"layer_replication": [[0, 2]]}, r"layer_replication is \[\[0, 2\]\]"),
    ({"something_new": "yes"}, 'something_new is "yes"'),
    ({"r": 0}, "adapter_config.json: r is 0"),
    ({"r": 10**400}, "adapter_config.json: r is"),
    ({"lora_alpha": "x"}, "adapter_config.json: lora_alpha is 'x'"),
    ({"lora_alpha": True}, "adapter_config.json: lora_alpha is True"),
    ({"use_rslora": "no"}, "adapter_config.json: use_rslora is 'no'"),
    ({"r": 3}, r"has \[4, 64\], and .* takes \[3, 64\]: another model's"),
  ],
)
def test_other_adapters_are_refused(change, message, tmp_path):
  base = exported(tmp_path / "base")
  shutil.copytree(PEFT, tmp_path / "peft")
  path = tmp_path / "peft" / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(errors.InputError, match=message) as caught:
    load_lib.import_adapter(tmp_path / "peft", base, tmp_path / "out")
  assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def pickled(source: pathlib.Path, folder: pathlib.Path, **changes: np.ndarray | None) -> pathlib.Path:
  """The adapter as PEFT wrote it before 0.7, without some tensors (None), or with other ones."""
  found = {key: x.whole() for key, x in tensors.open_safetensors(source / "adapter_model.safetensors").items()}
  found = {key: x for key, x in (found | changes).items() if x is not None}
  folder.mkdir()
  shutil.copy(source / "adapter_config.json", folder)
  entries = {key: (x.dtype, x.shape) for key, x in found.items()}
  with torch_files.TorchWriter(folder / "adapter_model.bin", entries) as writer:
    for x in found.values():
      writer.write([np.ascontiguousarray(x).tobytes()])
  return folder


def test_an_old_adapter_is_named_by_its_own_file(tmp_path):
  base = exported(tmp_path / "base")
  ours, old = (
    imported(source, base, tmp_path / f"{number}")
    for number, source in enumerate((PEFT, pickled(PEFT, tmp_path / "good")))
  )
  assert {*old.params} == {*ours.params}
  for name, x in ours.params.items():
    np.testing.assert_array_equal(old.params[name], x)
  keys = tensors.open_safetensors(PEFT / "adapter_model.safetensors")
  key = next(iter(keys))
  for number, (changes, message) in enumerate(
    (
      ({key: None}, "is missing"),
      ({key: np.zeros((7, 3), np.float32)}, r"has \[7, 3\]"),
      ({key: np.full(keys[key].shape, np.nan, np.float32)}, "is not finite"),
      ({key.replace("layers.0", "layers.9"): np.zeros((7, 3), np.float32)}, "is of no kernel"),
    )
  ):
    with pytest.raises(errors.InputError, match=f"adapter_model.bin: .*{message}") as caught:
      load_lib.import_adapter(pickled(PEFT, tmp_path / f"bad{number}", **changes), base, tmp_path / "out")
    assert "safetensors" not in str(caught.value)


def test_modules_are_those_of_the_tensors(tmp_path):
  """However PEFT was told of them: a pattern, or all."""
  base = exported(tmp_path / "base")
  shutil.copytree(PEFT, tmp_path / "peft")
  path = tmp_path / "peft" / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": "all-linear"}))
  assert len(imported(tmp_path / "peft", base, tmp_path / "adapter").config.adapted) == 4
  with pytest.raises(errors.InputError, match="holds an adapter of .*base: give the model itself"):
    load_lib.import_adapter(PEFT, tmp_path / "adapter", tmp_path / "other")
  with pytest.raises(errors.InputError, match="glm130b-sat is for models, and this is an adapter of"):
    export.export(tmp_path / "adapter", tmp_path / "sat", write_format=write_lib.write_format("glm130b-sat"))
  with pytest.raises(errors.InputError):
    load_lib.import_adapter(PEFT, base, base, overwrite=True)
  assert (base / "checksums.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("GLMJAX_PEFT_PYTHON"), reason="GLMJAX_PEFT_PYTHON is not set (make test-all)")
def test_peft_itself_loads_ours_and_makes_what_we_load(made, tmp_path):
  ours = adapter_lib.Adapter.read(made.run("lora", "float"))
  export.export(made.run("lora", "float"), tmp_path / "ours", write_format=write_lib.write_format("peft"))
  assert_same_products(ours, peft("load", tmp_path / "ours", ours, tmp_path))
  found = peft("make", tmp_path / "theirs", ours, tmp_path)
  assert_same_products(imported(tmp_path / "theirs", made.base("float"), tmp_path / "imported"), found)


def peft(mode: str, folder: pathlib.Path, like: adapter_lib.Adapter, scratch: pathlib.Path) -> dict[str, np.ndarray]:
  """What PEFT says that an adapter adds to the weight of each module, [outputs, inputs]."""
  modules = {}
  for key, (down, up) in factors(like).items():
    modules[".".join(key.split(".")[-2:])] = [down.shape[1], up.shape[0]]
  sizes = json.dumps({"layers": like.config.num_layers, "modules": modules})
  script = pathlib.Path(__file__).parents[1] / "peft_side.py"
  command = [os.environ["GLMJAX_PEFT_PYTHON"], script, mode, folder, sizes, scratch / mode]
  subprocess.run(command, check=True, cwd=scratch)
  return dict(np.load(scratch / f"{mode}.npz"))


def factors(adapter: adapter_lib.Adapter) -> dict[str, list[np.ndarray]]:
  """Both factors of each module in PEFT's layout, [rank, inputs] and [outputs, rank]."""
  found: dict[str, list[np.ndarray]] = {}
  for entry in layouts.adapters("chatglm-6b", adapter.config):
    for key, x in zip(entry.keys(adapter.config.num_layers), adapter.params[entry.name], strict=True):
      module, which, _ = key.rsplit(".", 2)
      found.setdefault(module, []).append(entry.to_theirs(np.asarray(x, np.float32)))
      assert which == ("lora_A", "lora_B")[len(found[module]) - 1]
  return found


def assert_same_products(adapter: adapter_lib.Adapter, theirs: dict[str, np.ndarray]) -> None:
  ours = factors(adapter)
  assert {key.removeprefix("base_model.model.") for key in theirs} == {*ours}
  for key, (down, up) in ours.items():
    want = theirs[f"base_model.model.{key}"]
    np.testing.assert_allclose(adapter.config.lora_scale * up @ down, want, rtol=1e-4, atol=1e-5)
