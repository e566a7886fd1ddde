"""Files that are wrong are refused in one line before anything is written; pickles run nothing."""

import json
import os
import pathlib
import pickle
import shutil
import zipfile

import numpy as np
import pytest

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.thudm import inspection
from glmjax.thudm import load
from glmjax.thudm import pickle_values
from glmjax.thudm import pickles
from glmjax.thudm import shards
from glmjax.thudm import source
from glmjax.thudm import tensors
from glmjax.thudm import torch_files
from glmjax.thudm import write


def refused(family: str, folder: pathlib.Path, **kwargs) -> str:
  """The line; nothing may be there afterwards."""
  out = folder.parent / "refused"
  with pytest.raises(errors.InputError) as caught:
    load.import_model(family, folder, out, **kwargs)
  assert not out.exists() and not list(folder.parent.glob(".refused*"))
  assert "\n" not in str(caught.value)
  return str(caught.value)


def rewrite(folder: pathlib.Path, change) -> None:
  """Changes the state dict of a folder of the Hub: change(dict of arrays)."""
  opened = shards.open_hub(folder)
  found = {key: tensor.whole() for key, tensor in opened.ranks[0].items()}
  change(found)
  for path in folder.glob("*model*.*"):
    if path.name != "ice_text.model":
      path.unlink()
  write.write_safetensors(
    folder, [write.Item(key, x.dtype, x.shape, lambda x=x: iter([x])) for key, x in found.items()]
  )


def edit_json(path: pathlib.Path, **changes) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(name="hub")
def _hub(make, tmp_path):
  return make(tmp_path / "hub", "chatglm-6b", shard_bytes=300_000)


def test_missing_shard(hub):
  sorted(hub.glob("*-of-*"))[1].unlink()
  assert "shard model-00002-of-0000" in refused("chatglm-6b", hub)


def test_missing_index(hub):
  (hub / "model.safetensors.index.json").unlink()
  assert "has model-00001-of-" in refused("chatglm-6b", hub)


def test_no_weights_at_all(tmp_path, hub):
  assert "no such folder" in refused("chatglm-6b", tmp_path / "nope")
  for path in hub.glob("model*"):
    path.unlink()
  assert "holds no weights" in refused("chatglm-6b", hub)
  (hub / "config.json").unlink()
  assert "config.json: no such file" in refused("chatglm-6b", hub)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 5, 700, 0.5, 0.999])
def test_truncated(make, tmp_path, kind, keep):
  folder = make(tmp_path / "hub", "chatglm-6b", kind=kind)
  [path] = [*folder.glob("model.*"), *folder.glob("pytorch_model.*")]
  data = path.read_bytes()
  path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
  line = refused("chatglm-6b", folder)
  assert path.name in line and ("truncated" in line or "damaged" in line)
  assert line.count(path.name) == line.count("copy it again") == 1


def test_truncated_rank(make, tmp_path):
  folder = make(tmp_path / "sat", "glm-130b", 2)
  path = folder / "49300" / "mp_rank_01_model_states.pt"
  path.write_bytes(path.read_bytes()[:-1000])
  assert "mp_rank_01_model_states.pt is truncated" in refused("glm-130b", folder)


def test_ranks(make, tmp_path):
  folder = make(tmp_path / "sat", "glm-130b", 8)
  ranks = sorted((folder / "49300").iterdir())
  ranks[3].rename(tmp_path / "aside")
  assert "mp_rank_03_model_states.pt is missing" in refused("glm-130b", folder)
  (tmp_path / "aside").rename(ranks[3])
  for path in ranks[4:]:
    path.unlink()
  line = refused("glm-130b", folder)
  assert "has 4 mp_rank files, and their tensors are those of tensor-parallel degree 8" in line
  (folder / "latest").write_text("500")
  assert "latest says '500'" in refused("glm-130b", folder)


def test_files_of_two_checkpoints(make, tmp_path):
  folder = make(tmp_path / "a", "glm-130b", 2)
  other = make(tmp_path / "b", "glm-130b", 2, num_layers=2)
  name = "49300/mp_rank_01_model_states.pt"
  shutil.copy(other / name, folder / name)
  assert "the files are of different checkpoints" in refused("glm-130b", folder)
  third = make(tmp_path / "c", "glm-130b", 2, dtype="float32")
  shutil.copy(third / name, folder / name)
  assert "is float32 [256, 64] there and float16 [256, 64] in mp_rank_00" in refused("glm-130b", folder)


@pytest.mark.parametrize(
  "family, key, factor, goes",
  [
    ("glm-130b", "transformer.layers.1.input_layernorm.weight", 1.01, False),
    ("glm-130b", "transformer.layers.2.mlp.dense_4h_to_h.bias", -1.0, False),
    ("glm-10b", "transformer.block_position_embeddings.weight", 1.01, False),
    ("glm-130b", "transformer.final_layernorm.weight", 1 + 2**-10, True),  # a rounding
    ("glm-130b", "transformer.layers.0.attention.dense.weight", 2.0, True),  # each rank has its own
  ],
)
def test_what_ranks_hold_in_common(make, tmp_path, monkeypatch, family, key, factor, goes):
  """A file of another checkpoint is told by what all ranks hold; compared a block at a time."""
  monkeypatch.setattr(source, "_COMPARED", 50)
  folder = make(tmp_path / "theirs", family, 2)
  opened = shards.open_ranks(folder)
  tensor = opened.ranks[1][key]
  values = tensor.whole()
  values.reshape(-1)[-1] = (values.reshape(-1)[-1] or 1) * factor
  with open(tensor.path, "r+b") as file:
    file.seek(tensor.offset)
    file.write(values.tobytes())
  if goes:
    source.open_source(family, folder)
  else:
    assert refused(family, folder) == (
      f"{tensor.path}: {key} has other values there than in mp_rank_00_model_states.pt, and all ranks hold the same: "
      "the files are of different checkpoints, copy them again"
    )


def test_ranks_may_round_the_smallest_numbers_apart(make, tmp_path):
  """Below 2^-14 float16's neighbours differ by more than a share of what they are."""
  folder = make(tmp_path / "theirs", "glm-130b", 2)
  for rank, value in zip(shards.open_ranks(folder).ranks, (2**-24, 2**-23)):
    tensor = rank["transformer.final_layernorm.bias"]
    values = tensor.whole()
    values[-1] = value
    with open(tensor.path, "r+b") as file:
      file.seek(tensor.offset)
      file.write(values.tobytes())
  source.open_source("glm-130b", folder)


def test_heads_that_the_configuration_tells(hub):
  assert source.open_source("chatglm-6b", hub, num_heads=8).config.num_heads == 8
  assert "num_heads is 4, and " in (line := refused("chatglm-6b", hub, num_heads=4))
  assert line.endswith("config.json says 8: leave --num_heads out")


def test_keys(hub):
  rewrite(hub, lambda found: found.pop("transformer.layers.1.mlp.dense_4h_to_h.bias"))
  assert "transformer.layers.1.mlp.dense_4h_to_h.bias is missing" in refused("chatglm-6b", hub)
  rewrite(
    hub,
    lambda found: found.update(
      {"transformer.layers.1.mlp.dense_4h_to_h.bias": np.zeros(64, "f2"), "transformer.extra": np.zeros(3, "f2")}
    ),
  )
  assert "transformer.extra is unexpected" in refused("chatglm-6b", hub)


def test_shapes_and_dtypes(hub):
  key = "transformer.layers.2.attention.dense.weight"
  rewrite(hub, lambda found: found.update({key: found[key][:, :32]}))
  assert f"{key} has shape [64, 32], and the configuration asks for [64, 64]" in refused("chatglm-6b", hub)
  rewrite(hub, lambda found: found.update({key: np.zeros((64, 64), "i8")}))
  assert f"{key} is int64, expected a float" in refused("chatglm-6b", hub)
  rewrite(hub, lambda found: found.update({key: np.zeros((64, 64), "f4")}))
  assert f"{key} is float32 and transformer.layers.0.attention.dense.weight is float16" in refused("chatglm-6b", hub)
  rewrite(hub, lambda found: found.update({key: np.zeros((64, 64), "f2")}))
  edit_json(hub / "config.json", quantization_bit=4)
  assert "is missing" in refused("chatglm-6b", hub)
  edit_json(hub / "config.json", quantization_bit=3)
  assert "quantization_bit is 3" in refused("chatglm-6b", hub)


def test_config_of_another_model(hub):
  edit_json(hub / "config.json", num_layers=4)
  assert "transformer.layers.3.input_layernorm.weight and 11 more is missing" in refused("chatglm-6b", hub)
  edit_json(hub / "config.json", num_layers=3, inner_hidden_size=None)
  assert "is not ChatGLM-6B's" in refused("chatglm-6b", hub)


@pytest.mark.parametrize(
  "field, value, words",
  [
    ("quantization_bit", "4", "'4'; the numbers 4, 8 and 0 are known"),
    ("quantization_bit", True, "True; the numbers"),
    ("quantization_bit", 4.0, "4.0; the numbers"),
    ("quantization_bit", [4], "[4]; the numbers"),
    ("quantization_bit", float("nan"), "nan; the numbers"),
    ("num_layers", "3", "'3': give a whole number"),
    ("num_layers", 3.0, "3.0: give"),
    ("num_layers", True, "True: give"),
    ("num_layers", -1, "-1: give"),
    ("num_layers", 10**9, "1000000000, and the files hold 43 tensors"),
    ("num_layers", 10**400, "digits: give"),
    ("hidden_size", {"a": 64}, "{'a': 64}: give"),
    ("vocab_size", float("inf"), "inf: give"),
    ("num_attention_heads", 0, "0: give"),
    ("max_sequence_length", "2048", "'2048': give"),
    ("layernorm_epsilon", float("nan"), "nan: give a number"),
    ("layernorm_epsilon", float("inf"), "inf: give"),
    ("layernorm_epsilon", 0, "0: give"),
    ("layernorm_epsilon", "1e-5", "'1e-5': give"),
    ("layernorm_epsilon", -1e-5, "give"),
    ("layernorm_epsilon", None, "None: give"),
    ("layernorm_epsilon", 5, "give"),
    ("position_encoding_2d", "true", "'true': give True or False"),
    ("tie_word_embeddings", "false", "'false': give"),
    ("tie_word_embeddings", 0, "0: give"),
    ("tie_word_embeddings", None, "None: give"),
    ("bos_token_id", "88", "'88': give"),
    ("bos_token_id", [88], "[88]: give"),
    ("eos_token_id", -1, "-1: give"),
    ("pre_seq_len", "128", "'128': give"),
    ("pre_seq_len", -1, "-1: give"),
  ],
)
def test_values_of_a_configuration(hub, field, value, words):
  """Types are checked, and shown."""
  edit_json(hub / "config.json", **{field: value})
  line = refused("chatglm-6b", hub)
  assert f"config.json: {field} is " in line and words in line


def test_configurations_that_no_model_has(hub):
  edit_json(hub / "config.json", num_attention_heads=7)
  assert "config.json: GLMConfig: embed_dim 64 is not divisible by num_heads 7" in refused("chatglm-6b", hub)
  edit_json(hub / "tokenizer_config.json", num_image_tokens="0")
  edit_json(hub / "config.json", num_attention_heads=8)
  assert "tokenizer_config.json: num_image_tokens is '0': give a whole number" in refused("chatglm-6b", hub)
  for text in ("[" * 10**5, '{"a":' * 200 + "1" + "}" * 200, "", "[]", "null", "\xff", "{'a': 1}"):
    (hub / "config.json").write_text(text, encoding="latin-1")
    assert "config.json: " in refused("chatglm-6b", hub)


@pytest.mark.parametrize(
  "value",
  [
    None,
    1,
    True,
    ["x"],
    {},
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\0b",
    "\ud800",
    "x" * 300,
    "nowhere.safetensors",
    "\x1b[2J",
  ],
)
def test_files_of_an_index(hub, value):
  index = hub / "model.safetensors.index.json"
  content = json.loads(index.read_text())
  content["weight_map"]["lm_head.weight"] = value
  index.write_text(json.dumps(content))
  line = refused("chatglm-6b", hub)
  assert "model.safetensors.index.json" in line and line.isprintable() and len(line) < 500


@pytest.mark.parametrize("value", [None, [], {}, "x", 3, "[" * 1000])
def test_an_index_without_files(hub, value):
  index = hub / "model.safetensors.index.json"
  index.write_text(value if value == "[" * 1000 else json.dumps({"weight_map": value}))
  assert "model.safetensors.index.json" in refused("chatglm-6b", hub)


def test_a_key_in_two_shards(hub):
  """Which of the two is meant, nobody knows."""
  first, second = sorted(hub.glob("*-of-*"))[:2]
  shutil.copy(first, second)
  assert "which model.safetensors.index.json says is there" in refused("chatglm-6b", hub)
  index = hub / "model.safetensors.index.json"
  content = json.loads(index.read_text())
  keys = [key for key, name in content["weight_map"].items() if name == first.name]
  content["weight_map"] = dict.fromkeys(keys, first.name) | {keys[0]: second.name}
  index.write_text(json.dumps(content))
  assert f"{second.name} holds " in (line := refused("chatglm-6b", hub)) and f"and so does {first.name}" in line


@pytest.mark.parametrize("latest", ["", ".", "..", "../sat/49300", "/etc", "a\0b", "x" * 5000, "4\n9", "\x1b[2J"])
def test_latest_that_leads_elsewhere(make, tmp_path, latest):
  folder = make(tmp_path / "sat", "glm-130b", 1)
  (folder / "latest").write_text(latest)
  assert str(folder / "latest") in (line := refused("glm-130b", folder)) and line.isprintable()


def test_ranks_of_any_number(make, tmp_path):
  """A file's name is no reason to count to it."""
  folder = make(tmp_path / "sat", "glm-130b", 1)
  for rank in ("9" * 200, "1" * 12, "-1", "000"):
    shutil.copy(folder / "49300/mp_rank_00_model_states.pt", folder / f"49300/mp_rank_{rank}_model_states.pt")
  assert source.open_source("glm-130b", folder).config.num_layers == 3


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1815217640\n"
PAGE = b"\n<!DOCTYPE html>\n<html><title>404</title></html>\n"


@pytest.mark.parametrize(
  "data, words",
  [
    (POINTER, "Git LFS pointer to 1,815,217,640 bytes"),
    (PAGE, "is a web page"),
    (b"Entry not found", "holds a server's answer"),
  ],
)
def test_failed_downloads(make, tmp_path, data, words):
  """Wherever a file is opened: weights in each form, indexes, configurations, tokenizers, prefixes."""
  places = [
    ("chatglm-6b", {"shard_bytes": 300_000}, name)
    for name in (
      "config.json",
      "tokenizer_config.json",
      "ice_text.model",
      "model.safetensors.index.json",
      "model-00002-of-00002.safetensors",
    )
  ]
  places += [("chatglm-6b", {"kind": "bin"}, "pytorch_model.bin"), ("chatglm-6b", {}, "model.safetensors")]
  places += [
    ("glm-130b", {"degree": 2}, name)
    for name in ("49300/mp_rank_01_model_states.pt", "tokenizer/tokenizer.model", "tokenizer/tokenizer.json")
  ]
  for i, (family, options, name) in enumerate(places):
    folder = make(tmp_path / str(i), family, **options)
    assert (folder / name).is_file()
    (folder / name).write_bytes(data)
    line = refused(family, folder)
    assert f"{folder / name} " in line and words in line, line
  hub = make(tmp_path / "hub", "chatglm-6b")
  for name in ("x.bin", "x.safetensors"):
    (tmp_path / name).write_bytes(data)
    assert words in refused("chatglm-6b", hub, prefix=tmp_path / name)
    with pytest.raises(errors.InputError, match=words):
      inspection.inspect(tmp_path / name)
  assert words in refused("chatglm-6b", hub, tokenizer=tmp_path / "x.bin")


def test_what_is_no_file(hub, tmp_path):
  """Folders and FIFOs in a file's place, paths that are none."""
  for name in ("model-00001-of-00002.safetensors", "config.json", "ice_text.model"):
    for make in (os.mkfifo, os.mkdir):
      data = (hub / name).read_bytes()
      (hub / name).unlink()
      make(hub / name)
      assert name in refused("chatglm-6b", hub)
      (hub / name).rmdir() if make is os.mkdir else (hub / name).unlink()
      (hub / name).write_bytes(data)
  os.mkfifo(tmp_path / "fifo")
  for path, words in (
    (tmp_path / "fifo", "no regular file"),
    ("", "is empty"),
    ("gs://b/x", "a bucket is named as"),
    (tmp_path / "a\0b", "NUL"),
  ):
    with pytest.raises(errors.InputError, match=words):
      inspection.inspect(path)
  for path, words in (("", "is empty"), ("gs://b/x", "a bucket is named as")):
    for option in ({"prefix": path}, {"tokenizer": path}):
      assert words in refused("chatglm-6b", hub, **option)
    with pytest.raises(errors.InputError, match=words):
      load.import_model("chatglm-6b", path, tmp_path / "out")


def test_families(hub, make, tmp_path):
  assert "has no mp_rank_00_model_states.pt" in refused("glm-130b", hub)
  sat = make(tmp_path / "sat", "glm-130b", 2)
  assert "config.json: no such file" in refused("chatglm-6b", sat)
  assert "position_embeddings.weight is missing" in refused("glm-10b", sat)
  assert "no family gpt" in refused("gpt", sat)


def test_vocabularies_of_other_dates(make, tmp_path):
  """150528, 130528 and 150344: what users mixed up after 6 April 2023."""
  hub = make(tmp_path / "hub", "chatglm-6b", images=20_000, vocab_size=20_480)
  assert load.import_model("chatglm-6b", hub, tmp_path / "old")["parameters"]
  edit_json(hub / "config.json", vocab_size=480)
  assert "word_embeddings.weight has shape [20480, 64]" in (line := refused("chatglm-6b", hub))
  assert "the vocabulary is of another date" in line
  edit_json(hub / "config.json", vocab_size=20_480)
  edit_json(hub / "tokenizer_config.json", num_image_tokens=0)
  assert "ice_text.model is of another date than config.json: 0 image ids where <sop> 20" in refused("chatglm-6b", hub)
  edit_json(hub / "tokenizer_config.json", num_image_tokens=20_000)
  edit_json(hub / "config.json", gmask_token_id=93)
  assert "the tokenizer's gmask is 20" in refused("chatglm-6b", hub)
  tokenizer = tokenizer_lib.Tokenizer.load(hub / "ice_text.model")
  tokenizer.save(tmp_path / "new")
  assert "the tokenizer's sop is" in refused("chatglm-6b", hub, tokenizer=tmp_path / "new")
  (hub / "ice_text.model").unlink()
  assert "has no ice_text.model" in refused("chatglm-6b", hub)


def test_published_vocabularies(make, tmp_path, monkeypatch):
  """A table of 150,528 rows goes with 150,344 ids and no others."""
  folder = make(tmp_path / "sat", "glm-130b", 1, num_layers=1, vocab_size=150_528, embed_dim=8, num_heads=1, mlp_dim=16)
  assert "the tokenizer has 440 ids, and a table of 150528 rows goes with 150344" in refused("glm-130b", folder)


def test_a_vocabulary_smaller_than_the_tokenizer(make, tmp_path):
  folder = make(tmp_path / "sat", "glm-130b", 1, vocab_size=256)
  assert "the tokenizer has 440 ids" in refused("glm-130b", folder)


def test_codes_stay_codes(make, tmp_path):
  folder = make(tmp_path / "hub", "chatglm-6b", bits=8)
  assert "holds INT8 weights: they cannot become INT4 without loss" in refused("chatglm-6b", folder, bits=4)


def test_other_frequencies(hub):
  key = "transformer.layers.0.attention.rotary_emb.inv_freq"
  rewrite(hub, lambda found: found.update({key: found[key] / 2}))
  assert "are not the frequencies of base 10000 over 4 dimensions" in refused("chatglm-6b", hub)


def test_no_room(hub, monkeypatch):
  usage = shutil.disk_usage(hub)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
  assert "are needed: free some space" in refused("chatglm-6b", hub)


class Evil:
  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return exec, (f"open({str(self._path)!r}, 'w').write('ran')",)


def save_pickle(path: pathlib.Path, content: object) -> None:
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(hub, value):
  def break_one(found):
    key = next(key for key in found if key.endswith("mlp.dense_h_to_4h.weight"))
    found[key] = found[key].copy()
    found[key].flat[7] = value

  rewrite(hub, break_one)
  message = refused("chatglm-6b", hub)
  assert "layers/mlp/wi/kernel is not finite" in message and "download the files again" in message
  assert "layers/mlp/wi/kernel" in refused("chatglm-6b", hub, bits=8)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "0", "-1e-5"])
def test_an_epsilon_that_no_norm_has(hub, value):
  path = hub / "config.json"
  path.write_text(path.read_text().replace('"layernorm_epsilon": 1e-05', f'"layernorm_epsilon": {value}'))
  assert "epsilon is" in refused("chatglm-6b", hub)


def test_pickles_run_nothing(tmp_path, hub):
  ran = tmp_path / "ran"
  for content in (Evil(ran), {"module": Evil(ran)}, {"module": {"a": Evil(ran)}}, [Evil(ran)]):
    save_pickle(hub / "pytorch_model.bin", content)
    for path in hub.glob("model*"):
      path.unlink()
    assert "builtin__.exec, which no weights need: nothing of it was run" in refused("chatglm-6b", hub)
    assert not ran.exists()
  payload = b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR."
  for data in (payload, b"\x80\x02" + payload):
    with pytest.raises(errors.InputError, match="os.system, which no weights need"):
      pickles.Reader(data, "x").read()
  (tmp_path / "x.pt").write_bytes(torch_files._LEGACY + b"." + payload)
  with pytest.raises(errors.InputError, match="os.system, which no weights need"):
    torch_files.open_state_dict(tmp_path / "x.pt")
  assert not ran.exists()


def test_what_training_leaves_is_ignored():
  import argparse
  import random

  content = {
    "args": argparse.Namespace(lr=1),
    "rng": random.getstate(),
    "set": {1, 2},
    "np": np.arange(3),
    "scalar": np.float32(1),
    "large": 1 << 5000,
  }
  for protocol in range(6):
    data = pickle.dumps(content, protocol=protocol)
    reader = pickles.Reader(data, "x")
    found = reader.read()
    assert found.items.keys() == content.keys() and found.items["rng"][0] == 3 and reader.place == len(data)
    assert {name for name, value in found.items.items() if value is pickle_values.IGNORED} == content.keys() - {
      "rng"
    } - ({"large"} if protocol < 2 else set())


def test_pickles_mean_what_python_says():
  content = {
    "a": [1, -2, 1 << 40, -(1 << 90), 1.5, True, None, "x\n'\u4e2d\x1b", b"\x00\xff", (), (1,), (1, 2, 3, 4)],
    "b": [[], {}, "long " * 100],
  }
  content["c"] = content["a"]

  def plain(x):
    if isinstance(x, pickle_values.Dict):
      return {key: plain(value) for key, value in x.items.items()}
    return type(x)(map(plain, x)) if isinstance(x, list | tuple) else x

  for protocol in range(3, 6):
    assert plain(pickles.Reader(pickle.dumps(content, protocol), "x").read()) == content
  del content["a"][8]  # bytes are a call of codecs.encode there
  for protocol in range(3):
    assert plain(pickles.Reader(pickle.dumps(content, protocol), "x").read()) == content


def test_pickles_cannot_reach_outside_of_their_storage(tmp_path):
  """Shapes and strides are checked against the storage, and storages against the file."""
  entries = {"x": (np.dtype("f4"), (4, 4))}
  writer = torch_files.TorchWriter(tmp_path / "x.pt", entries)
  writer.write([bytes(16)])  # too short
  writer.close()
  with pytest.raises(errors.InputError, match="storage 0 is too short"):
    torch_files.open_state_dict(tmp_path / "x.pt")
  storage = pickle_values.Storage(np.dtype("f4"), "0", 4)
  assert pickle_values.tensor((storage, 0, (4,), (1,))).shape == (4,)
  for offset, shape, strides in (
    (0, (5,), (1,)),
    (1, (4,), (1,)),
    (0, (2,), (-1,)),
    (0, (2, 2), (1,)),
    (0, ("a",), (1,)),
    (0, (5,), (0,)),
    (0, (1 << 40, 1 << 40), (0, 0)),
    (True, (1,), (1,)),
    (0, (1,) * 40, (1,) * 40),
    (0, (1 << 70,), (1,)),
    (0, [4], [1]),
    (0.0, (4,), (1,)),
  ):
    with pytest.raises(tensors.Damaged):
      pickle_values.tensor((storage, offset, shape, strides))


@pytest.mark.parametrize(
  "header",
  [
    b"{",
    b"[]",
    b'{"x": 1}',
    b'{"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
  ],
)
def test_damaged_safetensors(tmp_path, header):
  (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
  with pytest.raises(errors.InputError, match="damaged or no safetensors file"):
    tensors.open_safetensors(tmp_path / "x.safetensors")
