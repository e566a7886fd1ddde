"""The original code's tiny models, written as its files, imported, and run: the logits are the original's."""

import dataclasses
import json
import pathlib

import golden_models
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import their_files

from glmjax.checkpoint import load as load_lib
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.thudm import layouts
from glmjax.thudm import load
from glmjax.thudm import torch_files
from glmjax.thudm import write

FAMILIES = {"glm130b_tiny": "glm-130b", "chatglm6b_tiny": "chatglm-6b", "glm10b_tiny": "glm-10b"}
TOLERANCE = 1e-4


def state_dict(group: str) -> dict[str, np.ndarray]:
  """As the original saves it, with the rotary frequencies that its float32 models have."""
  meta, arrays = golden_models.load(group)
  found = {name.removeprefix("param/"): x for name, x in arrays.items() if name.startswith("param/")}
  if group != "glm10b_tiny":
    config = golden_models.config(group)
    for i in range(config.num_layers):
      found[layouts.INV_FREQ.format(i)] = layouts.inv_freq(config).astype(np.float32)
  return found


def split(key: str, x: np.ndarray, count: int, gated: bool) -> list[np.ndarray]:
  """What the original's ranks hold, by its own rules (tools/convert_tp.py and change_mp.py), spelled out here."""
  if any(part in key for part in ("layernorm", "dense.bias", "4h_to_h.bias", "position_embeddings", "inv_freq")):
    return [x] * count
  if key.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
    return np.split(x, count, axis=1)
  if "dense_h_to_4h" in key and gated:
    first, second = np.split(x, 2)
    return [np.concatenate(pair) for pair in zip(np.split(first, count), np.split(second, count))]
  if "query_key_value" in key and not gated:  # GLM-10B: whole Q, K, V
    thirds = [np.split(part, count) for part in np.split(x, 3)]
    return [np.concatenate(parts) for parts in zip(*thirds)]
  return np.split(x, count)


def write_files(group: str, folder: pathlib.Path, count: int) -> None:
  arrays = state_dict(group)
  if group == "chatglm6b_tiny":
    items = [write.Item(key, x.dtype, x.shape, lambda x=x: iter([x])) for key, x in arrays.items()]
    (their_files.write_bin if count > 1 else write.write_safetensors)(folder, items, shard_bytes=200_000)
    config = golden_models.load(group)[0]["config"] | {"tie_word_embeddings": False}  # made without from_pretrained
    (folder / "config.json").write_text(json.dumps(config))
    return
  parts = {key: split(key, x, count, group == "glm130b_tiny") for key, x in arrays.items()}
  (folder / "7").mkdir(parents=True)
  (folder / "latest").write_text("7")
  for rank in range(count):
    entries = {key: (x[rank].dtype, x[rank].shape) for key, x in parts.items()}
    writer = torch_files.TorchWriter(folder / "7" / f"mp_rank_{rank:02d}_model_states.pt", entries, "module")
    for x in parts.values():
      writer.write([x[rank].tobytes()])
    writer.close()


def case_inputs(group: str, case: str) -> tuple[np.ndarray, ...]:
  arrays = golden_models.load(group)[1]

  def get(key):
    return arrays[f"case/{case}/{key}"]

  if group == "glm10b_tiny":
    tokens = get("text")
    end = np.maximum(np.arange(1, tokens.shape[1] + 1), get("attention_mask")[:, None])
    return tokens, get("position_id"), np.zeros_like(tokens), end
  return get("tokens"), get("position_ids"), *golden_models.intervals(get("attention_mask")[:, 0])


@pytest.mark.parametrize(
  "group, count",
  [
    ("glm130b_tiny", 1),
    ("glm130b_tiny", 2),
    ("glm10b_tiny", 1),
    ("glm10b_tiny", 4),
    ("chatglm6b_tiny", 1),
    ("chatglm6b_tiny", 2),
  ],
)
def test_logits_of_the_original(group: str, count: int, tmp_path: pathlib.Path):
  """`count` tensor-parallel ranks; for ChatGLM-6B safetensors (1) and shards of pytorch_model.bin (2)."""
  family, theirs = FAMILIES[group], golden_models.config(group)
  write_files(group, tmp_path / "source", count)
  heads = theirs.num_heads if group == "glm10b_tiny" else None
  load.import_model(
    family,
    tmp_path / "source",
    tmp_path / "out",
    tokenizer="none",
    num_heads=heads,
    rotary_rounding="half_frequencies" if heads is None else "none",
  )
  loaded = load_lib.load(tmp_path / "out")
  expected = golden_models.params(group)
  chex.assert_trees_all_equal(loaded.params, expected)
  suffix, ours = "", loaded.config
  if group == "chatglm6b_tiny":
    assert ours.residual_alpha == pytest.approx(56**0.5)  # at any depth, as in the original
    suffix = "_alpha28"
  elif group == "glm130b_tiny":
    ours = dataclasses.replace(ours, max_length=theirs.max_length)
  plain = {field.name: getattr(theirs, field.name) for field in dataclasses.fields(config_lib.GLMConfig)}
  assert dataclasses.replace(ours, residual_alpha=theirs.residual_alpha) == config_lib.GLMConfig(**plain)
  arrays = golden_models.load(group)[1]
  cases = [
    key.split("/")[1]
    for key in arrays
    if key.startswith("case/") and key.endswith(f"/logits{suffix}") and "/multi_choice/" not in key
  ][: 1 if count > 1 else 2]
  run = jax.jit(lambda params, *inputs: glm.GLM(ours).apply({"params": params}, *inputs))
  for case in cases:
    logits = np.asarray(run(loaded.params, *(jnp.array(x, jnp.int32) for x in case_inputs(group, case))))
    length = int(np.min(arrays.get(f"case/{case}/context_length", logits.shape[1])))
    np.testing.assert_allclose(logits[:, :length], arrays[f"case/{case}/logits{suffix}"][:, :length], atol=TOLERANCE)
  assert cases
