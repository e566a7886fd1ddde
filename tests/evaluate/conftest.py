"""A tokenizer, a token cache and an untrained model, all tiny."""

import dataclasses
import pathlib

import jax
import pytest

from glmjax import tokenizer as tokenizer_lib
from glmjax.checkpoint import load
from glmjax.data import builder
from glmjax.data import shards
from glmjax.models import config as config_lib
from glmjax.models import glm

TEXTS = {
  "en": [
    " ".join(f"On day {i * k} the quick brown fox jumps over {k} lazy dogs, then sleeps." for k in range(1, 3 + i % 5))
    for i in range(30)
  ],
  "zh": [
    "".join(f"第{i * k}天，小河边的柳树发芽了，{k}个孩子在田野里放风筝。" for k in range(1, 3 + i % 6))
    for i in range(30)
  ],
}


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
  tokenizer_lib.train([text for texts in TEXTS.values() for text in texts], folder, vocab_size=440)
  return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: pathlib.Path) -> tokenizer_lib.Tokenizer:
  return tokenizer_lib.Tokenizer.load(tokenizer_dir)


@pytest.fixture(scope="session")
def make_cache(tokenizer: tokenizer_lib.Tokenizer, tokenizer_dir: pathlib.Path):
  """Caches texts: make_cache(folder, {"en": {"train": [...], "validation": [...]}}, fingerprint=...)."""

  def make(
    folder: pathlib.Path, texts: dict[str, dict[str, list[str]]], fingerprint: str | None = None, kind: str = "text"
  ) -> shards.TokenCache:
    about = {
      "fingerprint": fingerprint or tokenizer.fingerprint,
      "vocab_size": tokenizer.vocab_size,
      "specials": dataclasses.asdict(tokenizer.specials),
    }
    tasks = {}
    for language, splits in texts.items():
      sources = {split: {"source": "test"} for split in splits}
      tasks[f"pretrain_{language}"] = {"kind": kind, "rate": 1.0, "splits": sources}
    plan = builder.make_plan("test", 1, about, tasks)
    with builder.CacheBuilder(folder, plan) as making:
      for shard in making.missing():
        documents = [
          shards.Document([*tokenizer.encode(text), tokenizer.specials.eos], len(text.encode()))
          for text in texts[shard.task.removeprefix("pretrain_")][shard.split]
        ]
        builder.write_shard(making.partial, shard, documents, tokenizer.vocab_size)
      return making.finish(tokenizer_dir)

  return make


@pytest.fixture(scope="session")
def cache(tmp_path_factory, make_cache) -> shards.TokenCache:
  texts = {language: {"train": texts[5:], "validation": texts[:5]} for language, texts in TEXTS.items()}
  return make_cache(tmp_path_factory.mktemp("cache") / "cache", texts)


@pytest.fixture(scope="session")
def model(tokenizer_dir: pathlib.Path) -> load.LoadedModel:
  config = config_lib.GLMConfig(vocab_size=640, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=48, max_length=64)
  params = glm.init_params(config, jax.random.key(0))
  return load.LoadedModel(config, params, tokenizer_dir, bits=None, metadata={})
