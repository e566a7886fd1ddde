"""A small world for cards: a token cache, a run on it, and its export."""

import dataclasses
import json
import pathlib

import pytest
import untrained_run

from glmjax.checkpoint import export
from glmjax.checkpoint import folder as folder_lib
from glmjax.data import builder
from glmjax.data import shards
from glmjax import tokenizer as tokenizer_lib

STEPS = 40


@dataclasses.dataclass(frozen=True)
class World:
  """Folders of one model."""

  run: pathlib.Path
  export: pathlib.Path
  cache: pathlib.Path


def write_cache(folder: pathlib.Path, tokenizer_dir: pathlib.Path, texts: list[str]) -> shards.TokenCache:
  """Writes a cache of one task."""
  tokenizer = tokenizer_lib.Tokenizer.load(tokenizer_dir)
  about = {
    "fingerprint": tokenizer.fingerprint,
    "vocab_size": tokenizer.vocab_size,
    "specials": dataclasses.asdict(tokenizer.specials),
  }
  splits = {split: {"source": "test"} for split in ("train", "validation")}
  plan = builder.make_plan("test", 1, about, {"pretrain_en": {"kind": "text", "rate": 1.0, "splits": splits}})
  with builder.CacheBuilder(folder, plan) as making:
    for shard in making.missing():
      documents = [shards.Document(tokenizer.encode(text), len(text.encode())) for text in texts]
      builder.write_shard(making.partial, shard, documents, tokenizer.vocab_size)
    return making.finish(tokenizer_dir)


def metrics(steps: int) -> str:
  """Returns the lines of a run's metrics."""
  lines = [
    {
      "step": step,
      "samples_seen": 4 * step,
      "tokens_seen": 256 * step,
      "loss": 6 - step / steps,
      "loss_mask": 6.0,
      "tokens_per_second": 100.0,
      "model_flops_per_second": 1e6,
      "learning_rate": 1e-3,
    }
    for step in range(1, steps + 1)
  ]
  return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
  folder = tmp_path_factory.mktemp("cards")
  run = untrained_run.write(folder / "run")
  cache = write_cache(folder / "cache", run / "tokenizer", ["The quick brown fox.", "小河边的柳树。"])
  config = folder_lib.read_config(run)
  data = {"cache": cache.fingerprint, "tokenizer": config.tokenizer["fingerprint"], "weights": {"pretrain_en": 1}}
  folder_lib.write_config(run, dataclasses.replace(config, data=data))
  (run / "metrics.jsonl").write_text(metrics(STEPS), encoding="utf-8")
  untrained_run.write_session(run)
  export.export(run, folder / "export")
  return World(run, folder / "export", folder / "cache")
