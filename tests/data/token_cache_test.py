"""Caching text files and seqio's tasks: any number of processes, and kill -9, give the same bytes; mistakes one line.

One process imports TensorFlow and forks the runs from it, as the command forks its workers.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from glmjax import tokenizer as tokenizer_lib
from glmjax.data import loader
from glmjax.data import mixtures
from glmjax.data import rows
from glmjax.data import shards
from glmjax.data import token_cache

DRIVER = """
import os, pathlib, signal, sys, time, traceback
from glmjax import errors, tokenizer as tokenizer_lib
from glmjax.data import mixtures, token_cache
from glmjax.tasks import pretrain
import seqio

here = pathlib.Path(sys.argv[1])
encode = tokenizer_lib.Tokenizer.encode_arrays

FILES = {"en": str(here / "en.jsonl"), "zh": str(here / "zh.txt")}, here / "tokenizer", None, str(here / "qa.jsonl")

def run(name, mixture=None, **kwargs):
  mixture = mixture or mixtures.pretraining(*FILES)
  print(token_cache.cache_mixture(mixture, here / name, num_shards=2, **kwargs))

def fork(function, *args, **kwargs):
  pid = os.fork()
  if pid:
    return pid
  try:
    function(*args, **kwargs)
  except errors.InputError as error:
    print("InputError:", error)
  except BaseException:
    traceback.print_exc()
    os._exit(1)
  sys.stdout.flush()
  os._exit(0)

def finish(pid):
  status = os.waitpid(pid, 0)[1]
  assert status == 0, status

def slow(text_tokenizer, texts):
  time.sleep(0.02 * len(texts))
  return encode(text_tokenizer, texts)

def run_slowly(name):
  tokenizer_lib.Tokenizer.encode_arrays = slow
  run(name, num_workers=2)

def mistakes():
  try:
    token_cache.cache_mixture("pretrain_bilingal", here / "x")
  except errors.InputError as error:
    print("unknown:", error)
  (here / "qa.jsonl").write_text('{"inputs": "a", "targets": "b"}\\n{"inputs": \\n')
  try:
    run("bad", num_workers=1)
  except errors.InputError as error:
    print("malformed:", error)
  try:
    run("two", num_workers=1)
  except errors.InputError as error:
    print("changed:", error)

killed = fork(run_slowly, "killed")
progress = here / "killed.partial" / "progress"
while not list(progress.glob("*--train-*.json")):
  time.sleep(0.01)
os.kill(killed, signal.SIGKILL)
os.waitpid(killed, 0)
stems = [path.stem.replace("--", "/") for path in progress.glob("*--train-*.json")]  # of the shards that are complete
kept = {stem: (here / "killed.partial" / f"{stem}.tokens").stat().st_mtime_ns for stem in stems}
assert not (here / "killed").exists()
time.sleep(0.7)  # its workers notice and end
finish(fork(run, "two", num_workers=2))
finish(fork(run, "none", num_workers=0))
finish(fork(run, "killed", num_workers=2))
after = {stem: (here / "killed" / f"{stem}.tokens").stat().st_mtime_ns for stem in stems}
assert kept and kept == after, (kept, after)
pretrain.register(*FILES)
finish(fork(run, "named", "pretrain_bilingual", num_workers=2))
for task in seqio.get_subtasks(seqio.MixtureRegistry.get("pretrain_bilingual")):  # no longer what the cache knows
  task.__dict__["preprocessors"] = [seqio.preprocessors.tokenize, *task.preprocessors[1:]]
finish(fork(run, "through-tensorflow", "pretrain_bilingual", num_workers=2))
finish(fork(mistakes))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
  """The folder in which the driver has made its caches, and what it printed."""
  here = tmp_path_factory.mktemp("cache")
  english = [f"On day {i} the quick brown fox jumps over {i * i} lazy dogs." for i in range(101)]
  chinese = [f"第{i}天，小河边的柳树发芽了，{i * i}个孩子在田野里放风筝。" for i in range(60)]
  pairs = [{"inputs": f"How many dogs on day {i}?", "targets": f"{i * i} dogs"} for i in range(51)]
  (here / "en.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in english))
  (here / "zh.txt").write_text("\n\n".join(chinese))
  (here / "qa.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  tokenizer_lib.train(english + chinese, here / "tokenizer", vocab_size=420)
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", DRIVER, str(here)], text=True, capture_output=True, timeout=300
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return here, done.stdout


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_bytes_for_any_number_of_processes_and_after_kill_9(made: tuple[pathlib.Path, str]) -> None:
  here, _ = made
  expected = contents(here / "two")
  for name in ("none", "killed", "named", "through-tensorflow"):
    assert contents(here / name) == expected
  shards.TokenCache.open(here / "two").verify()


def test_documents_are_those_of_the_files(made: tuple[pathlib.Path, str]) -> None:
  here, _ = made
  cache = shards.TokenCache.open(here / "two")
  tokenizer = tokenizer_lib.Tokenizer.load(cache.tokenizer_folder)
  assert cache.manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
  assert {name: task["kind"] for name, task in cache.tasks.items()} == {
    "instruct_qa": "instruction",
    "pretrain_en": "text",
    "pretrain_zh": "text",
  }
  texts = [json.loads(line)["text"] for line in (here / "en.jsonl").read_text().splitlines()]
  found = {split: list(cache.split("pretrain_en", split).documents()) for split in ("train", "validation")}
  assert {split: len(documents) for split, documents in found.items()} == {"train": 99, "validation": 2}
  documents = found["train"] + found["validation"]
  assert sorted(tokenizer.decode(document.tokens) for document in documents) == sorted(texts)
  utf8_bytes = sum(cache.split("pretrain_en", split).utf8_bytes for split in found)
  assert utf8_bytes == sum(len(text.encode()) for text in texts)
  pair = cache.split("instruct_qa", "train").document(0)
  assert tokenizer.decode(pair.tokens[: pair.input_length]) == "How many dogs on day 0?"
  assert tokenizer.decode(pair.tokens[pair.input_length :]) == "0 dogs"


def test_rows_come_out_of_it(made: tuple[pathlib.Path, str]) -> None:
  here, _ = made
  infilling = rows.BlankInfilling(64, shards.TokenCache.open(here / "two").specials, samples_per_sequence=2)
  (batch,) = loader.CachedMixture(here / "two", infilling, num_workers=0).batches([(0, 40)])
  assert np.unique(batch["objective"]).tolist() == [0, 1, 2]
  assert (batch["tokens"] < 420).all()


def test_mistakes_are_one_line(made: tuple[pathlib.Path, str]) -> None:
  here, output = made
  said = dict(line.split(": ", 1) for line in output.splitlines() if not line.startswith("{"))
  assert "pretrain_bilingal" in said["unknown"]
  assert said["malformed"].startswith(f"{here / 'qa.jsonl'}:2: not JSON")
  assert said["changed"].startswith(f"{here / 'two'}: already a cache of mixture pretrain_bilingual")


def test_its_configuration_is_there_when_it_gets_its_name(made: tuple[pathlib.Path, str], tmp_path) -> None:
  """What on_start writes is published with the shards, so that a kill cannot come between them."""
  here, _ = made
  mixture = mixtures.pretraining({"en": str(here / "en.jsonl")}, here / "tokenizer")
  seen = []

  def on_start(folder: pathlib.Path) -> None:
    seen.append((folder, (tmp_path / "cache").exists()))
    (folder / "config.gin").write_text("# all settings")

  for _ in range(2):  # the second finds it finished
    token_cache.cache_mixture(mixture, tmp_path / "cache", num_shards=2, num_workers=0, on_start=on_start)
    assert (tmp_path / "cache" / "config.gin").exists()
  assert seen == [(tmp_path / "cache.partial", False), (tmp_path / "cache", True)]
