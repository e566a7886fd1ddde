"""Everything that commands read and write, tiny, made by the commands themselves: for the fuzz test and the drill.

FOLDER/  text/{en.txt,zh.jsonl,qa.jsonl}   world.gin   tokenizer/   cache/   run/   export/
         hub/ (ChatGLM-6B's safetensors)   bin/ (its pickles)   ranks/ (GLM-130B, two ranks)
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

import forked
import pytest

GIN = """
include "runs/pretrain.gin"
include "models/tiny.gin"
include "meshes/cpu.gin"
from __gin__ import dynamic_registration
from glmjax import tokenizer
from glmjax.checkpoint import export
from glmjax.cli import corpus
from glmjax.cli import inference
from glmjax.data import mixtures
from glmjax.data import token_cache
from glmjax.evaluate import heldout
from glmjax.evaluate import report
from glmjax.models import config
from glmjax.train import loop

TEXT_FILES = {"en": "text/en.txt", "zh": "text/zh.jsonl"}
INSTRUCTIONS = {"qa": "text/qa.jsonl"}
TOKENIZER = "tokenizer"
CACHE = "cache"
WORKDIR = "run"
VOCAB_SIZE = 440
SEQ_LENGTH = 64
BATCH_SIZE = 4
TOTAL_SAMPLES = 32
PEAK_LEARNING_RATE = 1e-2
MIN_LEARNING_RATE = 1e-3
WARMUP_SAMPLES = 8
KEEP = 3

corpus.training_documents.files = %TEXT_FILES
tokenizer.train:
  documents = @corpus.training_documents()
  folder = %TOKENIZER
  vocab_size = %VOCAB_SIZE
mixtures.pretraining:
  files = %TEXT_FILES
  tokenizer = %TOKENIZER
  instructions = %INSTRUCTIONS
token_cache.cache_mixture:
  mixture = @mixtures.pretraining()
  directory = %CACHE
  num_shards = 2
config.GLMConfig:
  vocab_size = %VOCAB_SIZE
  embed_dim = 16
  num_heads = 2
  mlp_dim = 24
loop.Intervals:
  log = 1
  save = 2
  evaluate = 4
  keep = %KEEP
  eval_samples = 4
loop.train.workdir = %WORKDIR
export.export.checkpoint = %WORKDIR
heldout.evaluate:
  cache = %CACHE
  max_fills = 8
inference.Decoding.max_tokens = 4
report.write.workdir = %WORKDIR
"""


def write_text(folder: pathlib.Path) -> None:
  """The texts and the gin file."""
  english = [f"On day {i} the quick brown fox jumps over {i * i} lazy dogs, then sleeps." for i in range(400)]
  chinese = [f"第{i}天，小河边的柳树发芽了，{i * i}个孩子在田野里放风筝。" for i in range(400)]
  pairs = [{"inputs": f"How many dogs on day {i}?", "targets": f"{i * i} dogs"} for i in range(60)]
  (folder / "text").mkdir(parents=True)
  (folder / "text" / "en.txt").write_text("\n\n".join(english) + "\n", encoding="utf-8")
  for name, records in (("zh", [{"text": text} for text in chinese]), ("qa", pairs)):
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / "text" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
  (folder / "world.gin").write_text(GIN, encoding="utf-8")


def write_theirs(folder: str) -> int:
  """THUDM's files, with the world's tokenizer; to be called in a process of its own."""
  from glmjax import tokenizer as tokenizer_lib
  from glmjax.models import config as config_lib
  from glmjax.thudm import write

  import their_files  # here, as it imports JAX

  here = pathlib.Path(folder)
  sizes = dict(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=64, max_length=32, vocab_size=480)
  chatglm = config_lib.GLMConfig(
    positions="rotary_2d", mlp="gelu_tanh", tie_embeddings=False, residual_alpha=56**0.5, **sizes
  )
  tokenizer = tokenizer_lib.Tokenizer.load(here / "tokenizer", 0)
  for name, put in (("hub", write.write_safetensors), ("bin", their_files.write_bin)):
    (here / name).mkdir()
    put(here / name, their_files.random_items("chatglm-6b", chatglm, None, "float16", 1), 20_000)
    write.write_hub_configs(here / name, chatglm, None, tokenizer)
  ranks = dataclasses.replace(
    chatglm, positions="rotary", mlp="geglu", tie_embeddings=True, residual_alpha=None, vocab_size=512
  )
  (here / "ranks").mkdir()
  write.write_ranks(here / "ranks", their_files.random_items("glm-130b", ranks, None, "float16", 2), 2, "49300")
  shutil.copytree(here / "tokenizer", here / "ranks" / "tokenizer")
  return 0


def make(folder: pathlib.Path, server: forked.Server, *overrides: str) -> None:
  """Makes all of it."""
  write_text(folder)
  gin = ("--gin_file=world.gin", *overrides)
  for argv in (
    ("tokenizer", *gin),
    ("cache", *gin, "--num_workers=0"),
    ("train", *gin),
    ("export", *gin, "--out=export"),
  ):
    ended = server.command(*argv, cwd=folder)
    assert ended.status == 0, f"{argv}: {ended}"
  ended = server.start("tiny_world:write_theirs", {"folder": str(folder)}, folder).end(100)
  assert ended.status == 0, ended


def lay_out(world: pathlib.Path, folder: pathlib.Path, *copies: str) -> None:
  """An emptied folder with the world's files: by links, but for copies."""
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  for path in world.iterdir():
    if path.name in copies:
      shutil.copytree(path, folder / path.name)
    else:
      (folder / path.name).symlink_to(path)


@contextlib.contextmanager
def shared(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[pathlib.Path]:
  """A folder of one name for all processes of a test run, within it only this one's to fill."""
  base = tmp_path_factory.getbasetemp()
  folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
  with open(folder / f"{name}.lock", "w", encoding="utf-8") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield folder / name
