"""Round trips: their files to ours and back are the same bits, whatever the layout, degree and precision."""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import their_files

from glmjax import errors
from glmjax.checkpoint import export
from glmjax.checkpoint import load as load_lib
from glmjax.checkpoint import stored_weights
from glmjax.parallel import partitioning
from glmjax.quantize import qarray
from glmjax.thudm import layouts
from glmjax.thudm import load
from glmjax.thudm import merged
from glmjax.thudm import shards
from glmjax.thudm import source
from glmjax.thudm import write


def contents(opened: shards.Shards) -> list[dict[str, np.ndarray]]:
  return [{key: tensor.whole() for key, tensor in rank.items()} for rank in opened.ranks]


def assert_same(found: shards.Shards, expected: shards.Shards) -> None:
  for ours, theirs in zip(contents(found), contents(expected), strict=True):
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
      assert ours[key].dtype == x.dtype, key
      np.testing.assert_array_equal(ours[key], x, err_msg=key)


def to_format(checkpoint: pathlib.Path, out: pathlib.Path, name: str, degree: int | None = None, **kwargs) -> None:
  export.export(checkpoint, out, write_format=write.write_format(name, degree), **kwargs)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_glm_130b_is_resharded_without_loss(make, tmp_path, bits):
  """8 -> 4 -> 1 -> 8; codes have scales for each rank, so that they can only be divided further."""
  start = make(tmp_path / "8", "glm-130b", 8, bits)
  path = [start]
  for i, degree in enumerate((8, 8) if bits else (4, 1, 8)):
    load.import_model("glm-130b", path[-1], tmp_path / f"ours{i}")
    path.append(tmp_path / f"theirs{i}")
    to_format(tmp_path / f"ours{i}", path[-1], "glm130b-sat", degree)
    assert (path[-1] / "latest").read_text() == "49300"
    assert len(list((path[-1] / "49300").iterdir())) == degree
  assert_same(shards.open_ranks(path[-1]), shards.open_ranks(start))
  for degree in (1, 4) if bits else ():
    with pytest.raises(errors.InputError, match="has scales for 8 ranks: choose another degree"):
      to_format(tmp_path / "ours0", tmp_path / "no", "glm130b-sat", degree)
    assert not (tmp_path / "no").exists()
  for degree in (0, -1, 3):
    with pytest.raises(errors.InputError, match=f"tensor_parallel is {degree}: 1, 2, 4, 8 and 16 are known"):
      to_format(tmp_path / "ours0", tmp_path / "no", "glm130b-sat", degree)


def test_codes_are_divided_further(make, tmp_path):
  """INT4 at degree 2 as degree 4 is what quantizing with two scales a row and dividing would give."""
  load.import_model("glm-130b", make(tmp_path / "2", "glm-130b", 2, 4), tmp_path / "ours")
  to_format(tmp_path / "ours", tmp_path / "4", "glm130b-sat", 4)
  load.import_model("glm-130b", tmp_path / "4", tmp_path / "again")
  a, b = (load_lib.load(tmp_path / name).params["layers"]["mlp"]["wo"]["kernel"] for name in ("ours", "again"))
  assert a.scale.shape[1] == 2 and b.scale.shape[1] == 4
  np.testing.assert_array_equal(qarray.dequantize(a), qarray.dequantize(b))


@pytest.mark.parametrize("bits, kind", [(None, "bin"), (None, "safetensors"), (8, "bin"), (4, "safetensors")])
def test_chatglm_there_and_back(make, tmp_path, bits, kind):
  start = make(tmp_path / "hub", "chatglm-6b", bits=bits, kind=kind, shard_bytes=150_000)
  assert len(list(start.glob("*-of-*"))) >= 2
  load.import_model("chatglm-6b", start, tmp_path / "ours")
  to_format(tmp_path / "ours", tmp_path / "back", "chatglm-hf")
  assert_same(shards.open_hub(tmp_path / "back"), shards.open_hub(start))
  for name in ("config.json", "tokenizer_config.json", "ice_text.model"):
    assert (tmp_path / "back" / name).read_bytes() == (start / name).read_bytes()
  loaded = load_lib.load(tmp_path / "ours")
  assert loaded.bits == bits and loaded.config.param_dtype == "float16" and loaded.config.dtype == "bfloat16"


@pytest.mark.parametrize("degree", [1, 4])
def test_glm_10b(make, tmp_path, degree):
  """The layout of THUDM/GLM has whole Q, K and V in each rank; ranks of the same model make the same one."""
  load.import_model("glm-10b", make(tmp_path / "their", "glm-10b", degree), tmp_path / "ours", num_heads=8)
  reference = {item.key: item.whole() for item in their_files.random_items("glm-10b", load_config(tmp_path / "ours"))}
  layer = load_lib.load(tmp_path / "ours").params["layers"]["attention"]["qkv"]["kernel"][1]  # [D, 3, H, K]
  expected = reference["transformer.layers.1.attention.query_key_value.weight"]
  np.testing.assert_array_equal(np.asarray(layer).reshape(64, -1).T, expected)


def load_config(folder: pathlib.Path):
  return load_lib.load(folder).config


@pytest.mark.parametrize("bits", [None, 8])
def test_safetensors_of_our_own(make, tmp_path, bits):
  load.import_model("chatglm-6b", make(tmp_path / "hub", "chatglm-6b", bits=bits), tmp_path / "ours")
  to_format(tmp_path / "ours", tmp_path / "plain", "safetensors")
  found = contents(shards.open_hub(tmp_path / "plain"))[0]
  params = load_lib.load(tmp_path / "ours").params
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree_util.tree_leaves_with_path(params)
  }
  assert found.keys() == leaves.keys()
  for name, x in leaves.items():
    np.testing.assert_array_equal(found[name], np.asarray(x), err_msg=name)


@pytest.mark.parametrize("family, bits", [("glm-130b", 4), ("chatglm-6b", 8)])
def test_import_and_quantize_is_import_then_export(make, tmp_path, family, bits):
  start = make(tmp_path / "their", family)
  load.import_model(family, start, tmp_path / "at once", bits=bits)
  load.import_model(family, start, tmp_path / "float")
  export.export(tmp_path / "float", tmp_path / "then", bits)
  a, b = load_lib.load(tmp_path / "at once").params, load_lib.load(tmp_path / "then").params
  chex.assert_trees_all_equal(a, b)


def test_dtype(make, tmp_path):
  load.import_model("chatglm-6b", make(tmp_path / "hub", "chatglm-6b"), tmp_path / "ours", dtype="bfloat16")
  loaded = load_lib.load(tmp_path / "ours")
  assert {x.dtype.name for x in jax.tree.leaves(loaded.params)} == {"bfloat16"}
  assert loaded.config.param_dtype == "bfloat16"


@pytest.mark.parametrize("bits", [None, 8])
def test_head_that_repeats_the_table(make, tmp_path, bits):
  """It is stored once by us, and twice by the Hub's files."""
  make(tmp_path / "hub", "chatglm-6b", bits=bits, tie_embeddings=True)
  load.import_model("chatglm-6b", tmp_path / "hub", tmp_path / "ours")
  assert load_lib.load(tmp_path / "ours").config.tie_embeddings
  assert not (tmp_path / "ours" / "params" / "head.kernel").exists()
  to_format(tmp_path / "ours", tmp_path / "back", "chatglm-hf")
  assert_same(shards.open_hub(tmp_path / "back"), shards.open_hub(tmp_path / "hub"))


def test_formats_of_other_models_are_refused(make, tmp_path):
  load.import_model("glm-10b", make(tmp_path / "their", "glm-10b"), tmp_path / "ours", num_heads=8)
  for name in ("chatglm-hf", "glm130b-sat"):
    with pytest.raises(errors.InputError, match=f"{name} is for models with positions rotary"):
      to_format(tmp_path / "ours", tmp_path / "no", name)
  with pytest.raises(errors.InputError, match="no format onnx"):
    write.write_format("onnx")
  with pytest.raises(errors.InputError, match="tensor_parallel is for glm130b-sat"):
    write.write_format("chatglm-hf", 2)


def test_products_with_a_scale_for_each_rank():
  """Codes of two ranks, each with scales of its own: the sum of what the ranks would compute."""
  key = jax.random.key(0)
  for spec, shape, axes, bits in (("BLHK,HKD->BLD", (4, 6, 10), (-3, -2), 4), ("BLF,FD->BLD", (24, 10), (-2,), 8)):
    x, w = jax.random.normal(key, (2, 3, *shape[:-1])), jax.random.normal(key, shape)
    halves = [qarray.quantize(part, bits, axes) for part in jnp.split(w, 2)]
    both = qarray.QuantizedArray(
      jnp.concatenate([q.values for q in halves]), jnp.concatenate([q.scale for q in halves]), bits, axes[-1]
    )
    target = partitioning.target()
    expected = sum(q.product(target, spec, part) for part, q in zip(jnp.split(x, 2, 2), halves))
    np.testing.assert_allclose(both.product(target, spec, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(qarray.dequantize(both), jnp.concatenate([qarray.dequantize(q) for q in halves]))


@pytest.mark.parametrize("split, groups", [("none", 1), ("rows", 1), ("rows", 2), ("rows", 3), ("inputs", 1)])
def test_any_rows_of_merged_ranks(tmp_path, split, groups):
  whole = np.arange(24 * 4, dtype=np.float32).reshape(24, 4)
  parts = []
  for rank in range(4):
    write.write_safetensors(
      tmp_path / str(rank),
      [
        write.Item(
          "x",
          whole.dtype,
          merged.part(whole, split, groups, rank, 4).shape,
          lambda rank=rank: iter([merged.part(whole, split, groups, rank, 4)]),
        )
      ],
    )
    parts.append(shards.open_hub(tmp_path / str(rank)).ranks[0]["x"])
  joined = merged.Merged(tuple(parts), split, groups)
  assert joined.shape == whole.shape
  for start in range(24):
    for stop in range(start + 1, 25):
      np.testing.assert_array_equal(joined.rows(start, stop), whole[start:stop])


@pytest.mark.parametrize("family", layouts.FAMILIES)
@pytest.mark.parametrize("elements", [1000, 5000, 10**6])
def test_blocks_of_any_size(make, tmp_path, monkeypatch, family, elements):
  """Cut into how many blocks makes no difference."""
  opened = source.open_source(family, make(tmp_path / "their", family), num_heads=8)
  for weight in opened.weights(None, None):
    whole = opened.read(weight, tuple(slice(0, n) for n in weight.shape))[weight.name]
    assert whole.shape == weight.shape
    for region in weight.regions(elements):
      np.testing.assert_array_equal(opened.read(weight, region)[weight.name], whole[region])
    assert sum(np.prod([s.stop - s.start for s in r]) for r in weight.regions(elements)) == whole.size


def test_regions_are_no_larger_than_asked():
  for name, shape in (
    ("mlp/wi", (70, 12288, 2, 32768)),
    ("attention/qkv", (70, 12288, 3, 96, 128)),
    ("attention/out", (70, 96, 128, 12288)),
    ("mlp/wo", (70, 32768, 12288)),
  ):
    weight = stored_weights.StoredWeight(f"layers/{name}/kernel", shape, "float16")
    sizes = [[s.stop - s.start for s in region] for region in weight.regions()]
    assert max(np.prod(size) for size in sizes) <= stored_weights.ELEMENTS
    assert sum(np.prod(size) for size in sizes) == np.prod(shape)
