"""P-Tuning v2 prefixes in the original's files: read, evaluated, given back bit for bit, refused when wrong."""

import json
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_adapters
import their_files

from glmjax import errors
from glmjax.checkpoint import adapter as adapter_lib
from glmjax.checkpoint import export
from glmjax.checkpoint import load as load_lib
from glmjax.models import glm
from glmjax.thudm import inspection
from glmjax.thudm import load
from glmjax.thudm import prefix as prefix_lib
from glmjax.thudm import shards
from glmjax.thudm import write

P, N, D, H = 6, 3, 64, 8  # as in conftest


def save(folder: pathlib.Path, arrays: dict[str, np.ndarray], kind: str = "bin", **config: object) -> pathlib.Path:
  """A folder of P-Tuning's: the encoder's tensors alone."""
  items = [write.Item(prefix_lib.ENCODER + key, x.dtype, x.shape, lambda x=x: iter([x])) for key, x in arrays.items()]
  (their_files.write_bin if kind == "bin" else write.write_safetensors)(folder, items)
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def random(*shape: int, dtype: str = "f4", seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def refused(tmp_path: pathlib.Path, hub: pathlib.Path, **kwargs) -> str:
  with pytest.raises(errors.InputError) as caught:
    load.import_model(kwargs.pop("family", "chatglm-6b"), hub, tmp_path / "refused", **kwargs)
  assert not list(tmp_path.glob("*refused*")) and "\n" not in str(caught.value)
  return str(caught.value)


def as_the_original_splits(table: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
  """get_prompt of modeling_chatglm.py for one row: view, permute, split into the layers' (key, value) [P, H, K]."""
  parts = table.reshape(P, N * 2, H, D // H).transpose(1, 0, 2, 3)
  return [(parts[i], parts[i + 1]) for i in range(0, 2 * N, 2)]


@pytest.mark.parametrize("kind, dtype", [("bin", "f4"), ("safetensors", "f2")])
def test_prefix_beside_its_model(make, tmp_path, kind, dtype):
  hub, table = make(tmp_path / "hub", "chatglm-6b"), random(P, 2 * N * D, dtype=dtype)
  tuned = save(tmp_path / "tuned", {"embedding.weight": table}, kind, pre_seq_len=P, prefix_projection=False)
  load.import_model("chatglm-6b", hub, tmp_path / "ours", prefix=tuned)
  loaded = load_lib.load(tmp_path / "ours")
  assert loaded.config.prefix_length == P
  for name, which in (("prefix_key", 0), ("prefix_value", 1)):
    found = loaded.params["layers"]["attention"][name]
    assert found.dtype == dtype
    for layer, pair in enumerate(as_the_original_splits(table)):
      np.testing.assert_array_equal(found[layer], pair[which].transpose(1, 0, 2))
  export.export(tmp_path / "ours", tmp_path / "back", write_format=write.write_format("chatglm-hf"))
  back = shards.open_hub(tmp_path / "back").ranks[0]
  assert back[prefix_lib.TABLE].dtype == dtype
  np.testing.assert_array_equal(back[prefix_lib.TABLE].whole(), table)
  said = json.loads((tmp_path / "back" / "config.json").read_text())
  assert said["pre_seq_len"] == P and said["prefix_projection"] is False
  [file] = tuned.glob("*model*")  # one file will do, and a model that has its prefix in it, too
  for source, given in ((hub, file), (tmp_path / "back", None)):
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    load.import_model("chatglm-6b", source, tmp_path / "again", prefix=given)
    chex.assert_trees_all_equal(load_lib.load(tmp_path / "again").params, loaded.params)


def test_projection_is_evaluated(make, tmp_path):
  hub = make(tmp_path / "hub", "chatglm-6b")
  hidden = 48
  arrays = {
    "embedding.weight": random(P, D),
    "trans.0.weight": random(hidden, D),
    "trans.0.bias": random(hidden),
    "trans.2.weight": random(2 * N * D, hidden),
    "trans.2.bias": random(2 * N * D),
  }
  first, first_bias, second, second_bias = (
    arrays[f"trans.{i}.{part}"].astype("f8") for i in (0, 2) for part in ("weight", "bias")
  )
  table = np.tanh(arrays["embedding.weight"] @ first.T + first_bias) @ second.T + second_bias
  load.import_model(
    "chatglm-6b",
    hub,
    tmp_path / "ours",
    bits=8,
    prefix=save(tmp_path / "tuned", arrays, pre_seq_len=P, prefix_projection=True),
  )
  params = load_lib.load(tmp_path / "ours").params["layers"]["attention"]
  assert params["prefix_key"].dtype == jnp.float32
  for layer, (key, value) in enumerate(as_the_original_splits(table)):
    np.testing.assert_allclose(params["prefix_key"][layer], key.transpose(1, 0, 2), atol=1e-4)
    np.testing.assert_allclose(params["prefix_value"][layer], value.transpose(1, 0, 2), atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_leaves_it_in_float(make, tmp_path, bits):
  make(tmp_path / "hub", "chatglm-6b", prefix_length=P)
  load.import_model("chatglm-6b", tmp_path / "hub", tmp_path / "ours")
  export.export(tmp_path / "ours", tmp_path / "small", bits)
  found = load_lib.load(tmp_path / "small").params["layers"]["attention"]
  expected = load_lib.load(tmp_path / "ours").params["layers"]["attention"]
  for name in ("prefix_key", "prefix_value"):
    np.testing.assert_array_equal(found[name], expected[name].astype(jnp.float16))
  export.export(tmp_path / "small", tmp_path / "back", write_format=write.write_format("chatglm-hf"))
  assert shards.open_hub(tmp_path / "back").ranks[0][prefix_lib.TABLE].shape == (P, 2 * N * D)


def test_model_runs_with_it(make, tmp_path):
  """The prefix of the files changes what the model says; without it the model is the one that was tuned."""
  make(tmp_path / "hub", "chatglm-6b", dtype="float32")
  tuned = save(tmp_path / "prefix", {"embedding.weight": random(P, 2 * N * D)})
  line = jnp.arange(5)[None]
  arrays = (line, jnp.stack([line, 0 * line], 1), 0 * line, line + 1)
  logits = {}
  for name, given in (("plain", None), ("tuned", tuned)):
    load.import_model("chatglm-6b", tmp_path / "hub", tmp_path / name, prefix=given)
    loaded = load_lib.load(tmp_path / name)
    logits[name] = jax.jit(glm.GLM(loaded.config).apply)({"params": loaded.params}, *arrays)
  assert float(jnp.abs(logits["plain"] - logits["tuned"]).max()) > 1e-3


def test_wrong_ones(make, tmp_path):
  hub, table = make(tmp_path / "hub", "chatglm-6b"), random(P, 2 * N * D)

  def line(name, arrays, **said):
    return refused(tmp_path, hub, prefix=save(tmp_path / name, arrays, **said))

  assert "embedding.weight has shape [6, 320], and 3 layers of width 64 ask for [6, 384]" in line(
    "a", {"embedding.weight": table[:, :320]}
  )
  assert "pre_seq_len is 7, and transformer.prefix_encoder.embedding.weight has 6 rows" in line(
    "b", {"embedding.weight": table}, pre_seq_len=7
  )
  assert "trans.0.bias is missing" in line("c", {"embedding.weight": table, "trans.0.weight": random(D, D)})
  assert "ask for [0, 384]: it is the prefix of another model" in line("d", {"embedding.weight": table[:0]})
  assert "embedding.weight is int64, expected a float" in line("e", {"embedding.weight": table.astype("i8")})
  arrays = {
    "embedding.weight": random(P, D),
    "trans.0.weight": random(D, D),
    "trans.0.bias": random(D),
    "trans.2.weight": random(2 * N * D, D),
    "trans.2.bias": random(2 * N * D - 1),
  }
  assert "trans.2.bias has shape [383]" in line("f", arrays)
  assert "has shape [384], and 3 layers" in line("g", {"embedding.weight": table[0]})
  assert "no such file or folder; give the one that P-Tuning wrote" in refused(tmp_path, hub, prefix=tmp_path / "no")
  assert f"{hub} holds no transformer.prefix_encoder" in refused(tmp_path, hub, prefix=hub)
  sat = make(tmp_path / "sat", "glm-130b", 2)
  assert "--prefix is for chatglm-6b" in refused(tmp_path, sat, family="glm-130b", prefix=tmp_path / "a")


def test_prefix_without_its_model(make, tmp_path):
  hub = make(tmp_path / "hub", "chatglm-6b")
  said = json.loads((hub / "config.json").read_text())
  tuned = save(tmp_path / "tuned", {"embedding.weight": random(P, 2 * N * D)}, **said | {"pre_seq_len": P})
  assert f"holds a P-Tuning v2 prefix and no model: import the model that was tuned, with --prefix={tuned}" in (
    refused(tmp_path, tuned)
  )
  (tuned / "config.json").write_text(json.dumps({"pre_seq_len": P}))
  assert "prefix and no model" in inspection.inspect(tuned)["problem"]
  (hub / "config.json").write_text(json.dumps(said | {"pre_seq_len": P}))
  assert "has pre_seq_len 6, and no file holds the prefix" in refused(tmp_path, hub)
  load.import_model("chatglm-6b", hub, tmp_path / "ours", prefix=tuned)
  both = make(tmp_path / "both", "chatglm-6b", prefix_length=P)
  assert "has a P-Tuning v2 prefix of its own" in refused(tmp_path, both, prefix=tuned)


def test_is_shown(make, tmp_path, capsys):
  make(tmp_path / "hub", "chatglm-6b", prefix_length=P)
  load.import_model("chatglm-6b", tmp_path / "hub", tmp_path / "ours")
  for folder in ("hub", "ours"):
    report = inspection.inspect(tmp_path / folder)
    assert report["problem"] is None and report["model"]["prefix_length"] == P
    inspection.show(report)
    assert "prefix of 6" in capsys.readouterr().out


def test_other_formats(make, tmp_path):
  make(tmp_path / "hub", "chatglm-6b", prefix_length=P)
  load.import_model("chatglm-6b", tmp_path / "hub", tmp_path / "ours")
  export.export(tmp_path / "ours", tmp_path / "plain", write_format=write.write_format("safetensors"))
  found = shards.open_hub(tmp_path / "plain").ranks[0]["layers.attention.prefix_key"]
  expected = load_lib.load(tmp_path / "ours").params["layers"]["attention"]["prefix_key"]
  np.testing.assert_array_equal(found.whole(), expected)


@pytest.mark.parametrize("name", ["p_tuning", "projection"])
def test_a_trained_prefix_goes_there_and_back(name, tmp_path):
  """As ptuning/ saves it: the table, or the small one and its perceptron; read as an adapter, or into its model."""
  made = trained_adapters.make(tmp_path / "made")
  ours = adapter_lib.Adapter.read(made.run(name, "float"))
  export.export(made.run(name, "float"), tmp_path / "theirs", write_format=write.write_format("chatglm-hf"))
  assert {path.name for path in (tmp_path / "theirs").iterdir()} == {"pytorch_model.bin", "config.json"}
  said = json.loads((tmp_path / "theirs" / "config.json").read_text())
  assert said == {"pre_seq_len": 3, "prefix_projection": name == "projection"}
  load.import_adapter(tmp_path / "theirs", made.base("float"), tmp_path / "back")
  back = adapter_lib.Adapter.read(tmp_path / "back")
  assert back.base["fingerprint"] == ours.base["fingerprint"] and back.config.prefix_length == 3
  assert {*back.params} == {*ours.params} == {*prefix_lib.NAMES}
  for path, x in ours.params.items():
    np.testing.assert_allclose(back.params[path], x, rtol=1e-5, atol=0 if name == "p_tuning" else 1e-6)
  with pytest.raises(errors.InputError, match="holds an adapter of"):
    load.import_adapter(tmp_path / "theirs", tmp_path / "back", tmp_path / "no")
  (tmp_path / "empty").mkdir()
  with pytest.raises(errors.InputError, match="adapter_model.safetensors: it does not exist"):
    load.import_adapter(tmp_path / "empty", made.base("float"), tmp_path / "no")
  assert not (tmp_path / "no").exists()
