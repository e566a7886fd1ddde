"""The quickstart's way with text of one's own, where neither seqio nor TensorFlow can be imported."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import xla_flags

from glmjax import tokenizer as tokenizer_lib
from glmjax.data import shards

HEAVY = ("seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets")
# With None in its place, importing a module raises ModuleNotFoundError, and who looks for it finds nothing.
WITHOUT = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY}))
from glmjax import cli
"""
MINE = """
include "runs/quickstart.gin"
from __gin__ import dynamic_registration
from glmjax.data import mixtures
from glmjax.models import config

TEXT_FILES = {"en": "book.txt", "zh": ["zh.jsonl"]}
mixtures.pretraining.instructions = {"qa": "qa.jsonl"}
TOKENIZER = "tokenizer"
CACHE = "cache"
WORKDIR = "train"
VOCAB_SIZE = 512
SEQ_LENGTH = 64
BATCH_SIZE = 4
config.GLMConfig:
  num_layers = 1
  embed_dim = 16
  num_heads = 2
  mlp_dim = 24
"""


def run(folder: pathlib.Path, code: str) -> subprocess.CompletedProcess:
  """Runs Python code in a folder, in a process that has neither."""
  return subprocess.run(
    [sys.executable, "-W", "ignore", "-c", WITHOUT + code],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags.CHEAP},
  )


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  """A folder with a text that is cut into windows, documents, pairs, and the gin file."""
  lines = [f"On day {i} the quick brown fox jumps over {i * i} lazy dogs, then sleeps." for i in range(400)]
  (tmp_path / "book.txt").write_text("\n".join(lines), encoding="utf-8")
  documents = [{"text": f"第{i}天，小河边的柳树发芽了，{i * i}个孩子在田野里放风筝。"} for i in range(400)]
  pairs = [{"inputs": f"How many dogs on day {i}?", "targets": f"{i * i} dogs"} for i in range(60)]
  for name, records in (("zh", documents), ("qa", pairs)):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
  (tmp_path / "mine.gin").write_text(MINE, encoding="utf-8")
  return tmp_path


def test_text_to_training_without_seqio_and_tensorflow(folder: pathlib.Path) -> None:
  done = run(
    folder,
    f"""
for command in (["tokenizer"], ["cache", "--num_workers=2"], ["train", "--stop_at_step=2"]):
  assert cli.main([*command, "--gin_file=mine.gin"]) == 0, command
assert not [name for name in sys.modules if name.split(".")[0] in {HEAVY} and sys.modules[name] is not None]
""",
  )
  assert done.returncode == 0, done.stderr[-3000:]
  cache = shards.TokenCache.open(folder / "cache")
  cache.verify()
  assert set(cache.tasks) == {"pretrain_en", "pretrain_zh", "instruct_qa"}
  tokenizer = tokenizer_lib.Tokenizer.load(cache.tokenizer_folder)
  found = [tokenizer.decode(document.tokens) for document in cache.split("pretrain_zh", "train").documents()]
  assert sorted(found)[0] == "第0天，小河边的柳树发芽了，0个孩子在田野里放风筝。" and len(found) == 392
  steps = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text("utf-8").splitlines()]
  assert steps[-1]["step"] == 2


def test_pairs_to_training_without_a_cache(folder: pathlib.Path) -> None:
  done = run(
    folder,
    f"""
assert cli.main(["tokenizer", "--gin_file=mine.gin"]) == 0
settings = dict(
  DATA=["qa.jsonl"], TOKENIZER="tokenizer", REPLAY={{"en": "book.txt"}}, REPLAY_SHARES=[0.5, 0.5], VOCAB_SIZE=512,
  SEQ_LENGTH=64, BATCH_SIZE=4, TOTAL_SAMPLES=8, PEAK_LEARNING_RATE=1e-3, MIN_LEARNING_RATE=1e-4, WARMUP_SAMPLES=4,
)
files = ["runs/pretrain.gin", "models/quickstart.gin", "data/pairs.gin", "data/replay.gin"]
given = [f"--gin.{{name}}={{value!r}}" for name, value in settings.items()]
sizes = ["num_layers=1", "embed_dim=16", "num_heads=2", "mlp_dim=24"]
given += [f"--gin.config.GLMConfig.{{size}}" for size in sizes] + ["--gin.loop.Intervals.evaluate=1"]
assert cli.main(["train", "--workdir=pairs", *(f"--gin_file={{file}}" for file in files), *given]) == 0
assert not [name for name in sys.modules if name.split(".")[0] in {HEAVY} and sys.modules[name] is not None]
""",
  )
  assert done.returncode == 0, done.stderr[-3000:]
  steps = [json.loads(line) for line in (folder / "pairs" / "metrics.jsonl").read_text("utf-8").splitlines()]
  assert len(steps) == 2 and all(step["loss_instruction"] > 0 and step["eval_loss_instruction"] > 0 for step in steps)
  assert {name for step in steps for name in step} & {"loss_mask", "loss_gmask"}


def test_what_needs_seqio_says_so_in_one_line(folder: pathlib.Path) -> None:
  done = run(
    folder,
    """
cli.main(["cache", "--gin_file=mine.gin", "--mixture=my_mixture"])
cli.main(["train", "--gin_file=runs/uncached.gin"])
""",
  )
  named, uncached = done.stderr.splitlines()
  assert named == (
    "glmjax: the mixture 'my_mixture' is one of seqio's, and seqio is not installed: pip install 'glmjax[data]', or "
    "cache text files by cache_mixture.mixture = @mixtures.pretraining(), which does without (docs/data.md)"
  )
  assert uncached == "glmjax: this needs seqio: pip install 'glmjax[data]'"


def test_one_process_refuses_another_cache_in_one_line(folder: pathlib.Path) -> None:
  done = run(
    folder,
    """
for command in (["tokenizer"], ["cache", "--num_workers=0"], ["cache", "--num_workers=0", "--num_shards=3"]):
  status = cli.main([*command, "--gin_file=mine.gin"])
sys.exit(status)
""",
  )
  assert done.returncode == 2, done.stderr
  assert done.stderr.splitlines()[-1].startswith(f"glmjax: {folder / 'cache'}: already a cache of mixture pretrain_")
