"""Tiny models in THUDM's layouts, and a tokenizer like theirs."""

import dataclasses
import pathlib
import shutil
from typing import Any

import pytest
import their_files

from glmjax import tokenizer as tokenizer_lib
from glmjax.models import config as config_lib
from glmjax.thudm import write

_TEXTS = [
  f"On day {i} the quick brown fox jumps over {i * i} lazy dogs; 第{i}天，小河边的柳树发芽了。" for i in range(60)
]
_SIZES = dict(num_layers=3, embed_dim=64, num_heads=8, max_length=64)
CONFIGS = {
  "glm-130b": config_lib.GLMConfig(vocab_size=512, mlp_dim=176, **_SIZES),
  "glm-10b": config_lib.GLMConfig(
    vocab_size=512, mlp_dim=256, positions="learned_2d", norm="pre", mlp="gelu_tanh", **_SIZES
  ),
  "chatglm-6b": config_lib.GLMConfig(
    vocab_size=480,
    mlp_dim=256,
    positions="rotary_2d",
    mlp="gelu_tanh",
    tie_embeddings=False,
    residual_alpha=56**0.5,
    **_SIZES,
  ),
}


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
  tokenizer_lib.train(_TEXTS, folder, vocab_size=440)
  return folder


@pytest.fixture(scope="session")
def make(tokenizer_dir: pathlib.Path):
  """make(folder, family, degree=1, bits=None, ...): the family's files with random weights; returns the folder."""

  def make_files(
    folder: pathlib.Path,
    family: str,
    degree: int = 1,
    bits: int | None = None,
    kind: str = "safetensors",
    dtype: str = "float16",
    shard_bytes: int = 10**9,
    images: int = 0,
    **sizes: Any,
  ) -> pathlib.Path:
    config = dataclasses.replace(CONFIGS[family], param_dtype=dtype, **sizes)
    items = their_files.random_items(family, config, bits, dtype, degree)
    folder.mkdir(parents=True)
    if family == "chatglm-6b":
      (their_files.write_bin if kind == "bin" else write.write_safetensors)(folder, items, shard_bytes)
      tokenizer = tokenizer_lib.Tokenizer.load(tokenizer_dir / tokenizer_lib.MODEL_FILE, images)
      write.write_hub_configs(folder, config, bits, tokenizer)
    else:
      write.write_ranks(folder, items, degree, "49300")
      shutil.copytree(tokenizer_dir, folder / "tokenizer")
    return folder

  return make_files
