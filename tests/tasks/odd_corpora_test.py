"""Small and odd corpora go through every step: one text, thirty documents, CR line ends, one to four languages."""

import json
import pathlib
import random
import subprocess
import sys

import pytest

from glmjax import tokenizer as tokenizer_lib
from glmjax.cli import corpus
from glmjax.data import token_cache
from glmjax.data import loader
from glmjax.data import rows
from glmjax.data import shards
from glmjax.evaluate import heldout
from glmjax.tasks import pretrain


def prose(count: int, seed: int) -> str:
  """Lines of nine made-up words."""
  rng = random.Random(seed)
  words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 7))) for _ in range(count)]
  return "\n".join(" ".join(words[i : i + 9]) for i in range(0, count, 9))


CONTENTS = {
  "fr": lambda: prose(9_000, 1).encode(),  # one document
  "de_AT": lambda: prose(9_000, 2).replace("\n", "\r").encode(),
  "中文": lambda: "\n\n".join(prose(100, seed) for seed in range(30)).encode(),
  "en": lambda: "\n\n".join(prose(90, seed) for seed in range(100, 200)).encode(),  # a hundred, two held out
}
MIXTURES = {"three": ("fr", "de_AT", "中文"), "one": ("fr",), "four": tuple(CONTENTS)}


def write(folder: pathlib.Path, languages: tuple[str, ...]) -> dict[str, str]:
  for language in languages:
    (folder / f"{language}.txt").write_bytes(CONTENTS[language]())
  return {language: str(folder / f"{language}.txt") for language in languages}


@pytest.fixture(scope="module", params=["three", "one"])
def made(request, tmp_path_factory):
  """Files, tokenizer and cache."""
  folder = tmp_path_factory.mktemp("corpus")
  files = write(folder, MIXTURES[request.param])
  tokenizer = tokenizer_lib.train(corpus.training_documents(files), folder / "tokenizer", 400)
  # The quickstart's rates, whatever the languages
  mixture = pretrain.register(files, folder / "tokenizer", rates={"en": 0.4, "zh": 0.6}, mixture=request.param)
  counts = token_cache.cache_mixture(mixture, folder / "cache", num_shards=3, num_workers=0)
  return files, tokenizer, shards.TokenCache.open(folder / "cache"), counts


def test_every_step_holds_out_the_same_text(made):
  files, tokenizer, opened, _ = made
  for language in files:
    tasks = {split: opened.split(f"pretrain_{language}", split) for split in ("train", "validation")}
    found = {
      split: [tokenizer.decode(document.tokens) for document in reader.documents()] for split, reader in tasks.items()
    }
    trained = list(corpus.training_documents({language: files[language]}))
    assert sorted(found["train"]) == sorted(trained)
    size = {split: sum(map(len, texts)) for split, texts in found.items()}
    assert 0.01 < size["validation"] / (size["train"] + size["validation"]) < 0.15
    whole = pathlib.Path(files[language]).read_bytes().decode().replace("\r", "\n")
    assert all(text in whole and text not in "\n\n".join(trained) for text in found["validation"])


def test_both_splits_give_rows_and_questions(made):
  files, _, opened, counts = made
  assert set(counts) == {f"pretrain_{language}" for language in files}
  assert set(heldout.text_tasks(opened)) == set(files)
  for split in ("train", "validation"):
    source = loader.CachedMixture(
      opened.directory, lambda specials: rows.BlankInfilling(64, specials), split=split, num_workers=0
    )
    source.check()
    assert set(source.sampler.schedule.names) == set(counts)
    assert next(source.batches(iter([(0, 8)])))["tokens"].shape == (8, 64)


GIN = """
from __gin__ import dynamic_registration
from glmjax.data import loader
from glmjax.data import rows
from glmjax.models import config
from glmjax.train import loop
from glmjax.train import schedules
include "runs/quickstart.gin"
TEXT_FILES = {files}
TOKENIZER = "run/tokenizer"
CACHE = "run/cache"
WORKDIR = "run/train"
VOCAB_SIZE = 400
SEQ_LENGTH = 64
BATCH_SIZE = 8
TOTAL_SAMPLES = 48
config.GLMConfig:
  num_layers = 1
  embed_dim = 16
  num_heads = 2
  mlp_dim = 16
  dtype = "float32"
schedules.LearningRate.warmup_samples = 4
validation/loader.CachedMixture:
  directory = %CACHE
  infilling = @rows.BlankInfilling
  split = "validation"
  num_workers = 0
loop.train.validation = @validation/loader.CachedMixture()
loop.Intervals:
  evaluate = 3
  eval_samples = 16
"""
COMMANDS = (
  ["tokenizer", "--gin_file=mine.gin"],
  ["cache", "--gin_file=mine.gin", "--num_workers=0"],
  ["train", "--gin_file=mine.gin"],
  ["export", "--checkpoint=run/train", "--out=run/float"],
  ["evaluate", "--gin_file=mine.gin", "--checkpoint=run/float", "--out=run/heldout.json"],
  [
    "report",
    "--workdir=run",
    "--gin.glmjax.evaluate.report.write.evaluations={'float': 'heldout.json'}",
    "--gin.glmjax.evaluate.report.write.exports={'float': 'float'}",
    "--gin.glmjax.evaluate.report.write.samples=None",
  ],
)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_the_commands_one_after_the_other(tmp_path, name):
  files = write(tmp_path, MIXTURES[name])
  (tmp_path / "mine.gin").write_text(GIN.format(files=files).lstrip(), encoding="utf-8")
  for arguments in COMMANDS:
    done = subprocess.run(
      [sys.executable, "-m", "glmjax", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (arguments, done.stderr[-2000:])
    if arguments[0] == "cache":
      for language in files:
        cut = f"task pretrain_{language}: too few documents to hold out every 50th; about one in "
        assert (cut in done.stderr) == (language != "en")
  report = json.loads((tmp_path / "run/report.json").read_text("utf-8"))
  assert set(report["heldout"]) == set(files)
  steps = [json.loads(line) for line in (tmp_path / "run/train/metrics.jsonl").read_text("utf-8").splitlines()]
  assert [step["step"] for step in steps if "eval_loss" in step] == [3, 6]
  assert all(language in (tmp_path / "run/report.md").read_text("utf-8") for language in files if language != "en")
