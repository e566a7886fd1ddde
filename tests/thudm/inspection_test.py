"""What inspect says of each kind of folder and file, and the commands as users type them."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import hostile_files
import chex
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest
import trained_adapters

from glmjax import cli
from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import export
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load as load_lib
from glmjax.checkpoint import manager
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.thudm import inspection
from glmjax.thudm import load
from glmjax.thudm import source
from glmjax.thudm import write


def test_their_folders(make, tmp_path):
  hub = make(tmp_path / "hub", "chatglm-6b", kind="bin", shard_bytes=200_000)
  found = inspection.inspect(hub, hashes=True)
  assert found["kind"] == "Hub" and found["family"] == "chatglm-6b" and found["problem"] is None
  assert found["parameters"] == 211_520 and found["bits"] is None
  row = next(row for row in found["tensors"] if row["name"] == "transformer.layers.*.mlp.dense_h_to_4h.weight")
  assert row == {"name": row["name"], "shape": [256, 64], "dtype": "float16", "count": 3, "bytes": 3 * 256 * 64 * 2}
  for entry in found["files"]:
    assert entry["sha256"] == hashlib.sha256((hub / entry["name"]).read_bytes()).hexdigest()
  path = hub / found["files"][0]["name"]
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  assert "is not what its CRC says" in inspection.inspect(hub, hashes=True)["problem"]
  ranks = make(tmp_path / "sat", "glm-130b", 4, 8)
  found = inspection.inspect(ranks)
  assert (found["kind"], found["family"], found["iteration"]) == ("4 tensor-parallel ranks", "glm-130b", "49300")
  assert found["bits"] == 8 and found["parameters"] == 186_208
  assert inspection.inspect(make(tmp_path / "glm", "glm-10b"))["family"] == "glm-10b"


def test_problems_are_told(make, tmp_path):
  ranks = make(tmp_path / "sat", "glm-130b", 4)
  for rank in (2, 3):
    (ranks / "49300" / f"mp_rank_{rank:02d}_model_states.pt").unlink()
  assert "degree 4: copy all 4 files" in inspection.inspect(ranks)["problem"]
  with pytest.raises(errors.InputError, match="no such file or folder"):
    inspection.inspect(tmp_path / "nope")
  with pytest.raises(errors.InputError, match="holds no weights"):
    inspection.inspect(tmp_path)


def test_ours(make, tmp_path):
  load.import_model("chatglm-6b", make(tmp_path / "hub", "chatglm-6b"), tmp_path / "ours", bits=4)
  found = inspection.inspect(tmp_path / "ours", hashes=True)
  assert found["kind"] == "export" and found["bits"] == 4 and found["verified"] and found["problem"] is None
  assert found["parameters"] == 211_520
  assert found["array_bytes"] == sum(x.nbytes for x in jax.tree.leaves(load_lib.load(tmp_path / "ours").params))
  assert found["file_bytes"] == sum(path.stat().st_size for path in (tmp_path / "ours").rglob("*") if path.is_file())
  damaged = tmp_path / "ours/params/layers.mlp.wi.kernel.values/0.0.0.0"
  data = bytearray(damaged.read_bytes())
  data[7] ^= 16
  damaged.write_bytes(data)
  assert inspection.inspect(tmp_path / "ours")["problem"] is None  # looks, does not read
  assert "layers/mlp/wi/kernel/values" in inspection.inspect(tmp_path / "ours", hashes=True)["problem"]


def make_run(folder, steps=(1, 2)):
  folder.mkdir()
  config = config_lib.GLMConfig(vocab_size=96, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=88, max_length=16)
  folder_lib.write_config(folder, folder_lib.FolderConfig(config))
  params = glm.init_params(config, jax.random.key(0))
  saver = manager.Manager(folder / "checkpoints")
  for step in steps:
    saver.save(step, {"params": params, "step": np.int32(step)}, {"n": step})
  saver.close()
  (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n')
  return folder


def test_a_run_that_goes_on(tmp_path, monkeypatch):
  """Steps that it deletes, and files that it renames, while they are looked at."""
  run = make_run(tmp_path / "run", (1, 2))
  found = inspection.inspect(run)
  assert (found["kind"], found["step"], found["steps"], found["problem"]) == ("run", 2, [1, 2], None)
  deleted, check = [], arrays.check_files

  def and_deletes(folder, names):
    if not deleted:
      deleted.append(shutil.move(run / "checkpoints/2", run / "checkpoints/4"))
    return check(folder, names)

  walk = os.walk

  def with_more(path):
    for parent, folders, files in walk(path):
      yield parent, folders, [*files, "vanished"]

  with monkeypatch.context() as patch:
    patch.setattr(arrays, "check_files", and_deletes)
    patch.setattr(os, "walk", with_more)
    found = inspection.inspect(run, hashes=True)
  assert deleted and found["step"] == 4 and found["problem"] is None and found["verified"]
  assert {entry["name"] for entry in found["files"]} == {"checkpoints/", "config.json", "metrics.jsonl"}


def test_problems_of_a_run(tmp_path, capsys):
  run = make_run(tmp_path / "run")
  (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')  # being written
  assert cli.main(["inspect", str(run)]) == 0
  (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": \0\n{"step": 3}\n')
  assert "metrics.jsonl" in inspection.inspect(run)["problem"]
  (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": \n{"step": 3}\n')
  assert cli.main(["inspect", str(run)]) == 2
  assert "problem: " in (shown := capsys.readouterr().out) and "metrics.jsonl, line 2: not JSON" in shown
  (run / "metrics.jsonl").unlink()
  record = run / "checkpoints/2/metadata/checksums.json"
  record.write_bytes(record.read_bytes()[:-20])
  assert inspection.inspect(run)["problem"] == "step 2 is damaged: step 1 is used instead"


def test_exit_status(make, tmp_path, capsys):
  """2 where there is a problem, as JSON, too."""
  hub = make(tmp_path / "hub", "chatglm-6b")
  assert cli.main(["inspect", str(hub), "--json"]) == 0
  (hub / "config.json").write_text("{}")
  assert cli.main(["inspect", str(hub)]) == cli.main(["inspect", str(hub), "--json"]) == 2
  assert json.loads(capsys.readouterr().out.splitlines()[-1])["problem"].endswith("are other models)")


def test_overlapping_tensors_are_not_complete(tmp_path, capsys):
  path = tmp_path / "x.safetensors"
  path.write_bytes(hostile_files.safetensors_bombs()["half of one in the other"])
  assert cli.main(["inspect", str(path)]) == 2
  assert "'w' overlaps another tensor" in capsys.readouterr().err


def test_names_that_a_terminal_would_obey(make, tmp_path, capsys):
  """Of files, folders, tensors and configurations."""
  evil = "\x1b]0;owned\x07\x1b[31m"
  items = [write.Item(evil + "w", np.dtype("f2"), (2,), lambda: iter([np.zeros(2, "f2")]))]
  write.write_safetensors(tmp_path / evil, items)
  (tmp_path / evil / "config.json").write_text(json.dumps({"model_type": evil}))
  run = make_run(tmp_path / "run")
  (run / f"{evil}.txt").write_text("x")
  for path in (tmp_path / evil / "model.safetensors", tmp_path / evil, run):
    inspection.show(inspection.inspect(path))
    shown = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07" in shown and shown.replace("\n", "").isprintable()
  (tmp_path / "x.pt").write_bytes(hostile_files.stored({"a/data.pkl": hostile_files.bombs()["a name that obeys"]}))
  with pytest.raises(errors.InputError, match=r"asks for \\x1b\]0;owned") as caught:
    inspection.inspect(tmp_path / "x.pt")
  assert str(caught.value).isprintable()


def test_our_own_safetensors(make, tmp_path, capsys):
  """What `export --format=safetensors` writes is no ChatGLM-6B, and nothing is wrong with it."""
  load.import_model("chatglm-6b", make(tmp_path / "hub", "chatglm-6b"), tmp_path / "ours")
  export.export(tmp_path / "ours", tmp_path / "plain", write_format=write.write_format("safetensors"))
  found = inspection.inspect(tmp_path / "plain")
  assert (found["kind"], found["problem"], found["parameters"]) == ("safetensors export", None, 211_520)
  inspection.show(found)
  assert "a head of its own" in capsys.readouterr().out


def test_one_file(make, tmp_path, capsys):
  ranks = make(tmp_path / "sat", "glm-130b", 2)
  found = inspection.inspect(ranks / "49300" / "mp_rank_01_model_states.pt")
  inspection.show(found)
  shown = capsys.readouterr().out
  assert "transformer.layers.*.mlp.dense_4h_to_h.weight" in shown and " x 3" in shown and "GiB" in shown


def test_commands(make, tmp_path, capsys):
  """import, export and inspect as they are typed."""
  hub = make(tmp_path / "hub", "chatglm-6b")
  assert cli.main(["import", "chatglm-6b", str(hub), str(tmp_path / "ours"), "--bits=8", "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["bits"] == 8
  assert cli.main(["import", "chatglm-6b", str(hub), str(tmp_path / "ours")]) == 2
  assert "is there already" in capsys.readouterr().err
  assert cli.main(["import", "chatglm-6b", str(hub), str(tmp_path / "ours"), "--overwrite", "--dtype=float32"]) == 0
  back = [f"--checkpoint={tmp_path / 'ours'}", f"--out={tmp_path / 'back'}"]
  assert cli.main(["export", *back, "--tensor_parallel=2"]) == 2
  assert cli.main(["export", *back, "--format=glm130b-sat"]) == 2
  assert "glm130b-sat is for models with positions rotary" in capsys.readouterr().err
  assert cli.main(["export", *back, "--format=chatglm-hf", "--bits=8", "--dtype=float16"]) == 0
  capsys.readouterr()
  assert cli.main(["inspect", str(tmp_path / "back")]) == 0
  assert "INT8 kernels" in capsys.readouterr().out
  assert cli.main(["import", "chatglm-6b"]) == 2
  assert "source, out" in capsys.readouterr().err


def test_neither_torch_nor_safetensors_is_needed(make, tmp_path):
  hub = make(tmp_path / "hub", "chatglm-6b", kind="bin")
  code = (
    "import sys; sys.modules['torch'] = sys.modules['safetensors'] = None; from glmjax.thudm import load; "
    "load.import_model('chatglm-6b', *sys.argv[1:])"
  )
  subprocess.run([sys.executable, "-W", "error", "-c", code, str(hub), str(tmp_path / "out")], check=True)


def test_scales_of_ranks_on_a_mesh(make, tmp_path):
  """Codes are split over devices like floats; the few scales of an input axis are not."""
  load.import_model("glm-130b", make(tmp_path / "sat", "glm-130b", 2, 4), tmp_path / "ours")
  mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  plain = load_lib.load(tmp_path / "ours")
  specs = {
    "layers/mlp/wo/kernel": P(None, "tensor"),
    "layers/attention/out/kernel": P(None, "tensor"),
    "layers/mlp/wi/kernel": P(None, None, None, "tensor"),
    "layers/attention/qkv/kernel": P(None, None, None, "tensor"),
  }
  weights = source.open_source("glm-130b", tmp_path / "sat").weights(None, None)
  shardings = params_lib.nest({weight.name: NamedSharding(mesh, specs.get(weight.name, P())) for weight in weights})
  split = load_lib.load(tmp_path / "ours", shardings=shardings)
  chex.assert_trees_all_equal(plain.params, split.params)
  kernel = split.params["layers"]["mlp"]["wo"]["kernel"]
  assert kernel.values.sharding.spec == P(None, "tensor") and kernel.scale.sharding.is_fully_replicated
  assert split.params["layers"]["mlp"]["wi"]["kernel"].scale.sharding.spec == P(None, None, None, "tensor")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> trained_adapters.Made:
  return trained_adapters.make(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize(
  "name, said",
  [
    ("lora", "adapter     LoRA of rank 2, scale 8, beside attention/qkv, attention/out, mlp/wi, mlp/wo, of "),
    ("p_tuning", "adapter     a prefix of 3, of "),
    ("projection", "adapter     a prefix of 3 by projection, of "),
  ],
)
def test_adapters_name_what_they_adapt(name, said, made, capsys):
  run = made.run(name, "int4")
  cli.main(["inspect", str(run)])  # which misses a tokenizer
  base = json.loads((run / "config.json").read_text())["base"]
  assert f"{said}{made.base('int4')} ({base['fingerprint'][:8]}, INT4)\n" in capsys.readouterr().out
