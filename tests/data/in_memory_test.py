"""Mixtures in memory: the cache's rows, whatever the hosts; each pair once an epoch; replay by its share; mistakes."""

import collections
import functools
import json
import pathlib
import random

import numpy as np
import pytest

from glmjax import errors
from glmjax import rounds
from glmjax import tokenizer as tokenizer_lib
from glmjax import tokens as tokens_lib
from glmjax.data import in_memory
from glmjax.data import loader
from glmjax.data import mixtures
from glmjax.data import rows
from glmjax.data import text
from glmjax.data import token_cache

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
INFILLING = functools.partial(
  rows.BlankInfilling,
  seq_length=96,
  positions="rotary_2d",
  samples_per_sequence=1,
  packing="greedy",
  instruction_mask="gmask",
)


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory) -> pathlib.Path:
  """A tokenizer, 130 pairs, 70 conversations and a text."""
  path = tmp_path_factory.mktemp("pairs")
  lines = [f"day {i}: {i * i} dogs sleep; 第{i}天，{i}个孩子" for i in range(300)]
  tokenizer_lib.train([*text.documents(str(FIXTURES / "en.txt")), *lines], path / "tokenizer", vocab_size=560)
  (path / "text.txt").write_text("\n\n".join(lines), "utf-8")
  r = random.Random(0)
  pairs = [
    {"content": f"How many on day {i}?", "summary": f"{i * i}", "past": [["hi", f"ho {i}"]] * r.randrange(3)}
    for i in range(130)
  ]
  (path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  with (path / "chats.jsonl").open("w") as file:
    for i in range(70):
      turns = [("user", f"q{i}"), ("assistant", f"a{i}")] * r.randrange(1, 4)
      messages = [{"role": role, "content": said} for role, said in turns]
      file.write(json.dumps({"messages": messages}) + "\n")
  return path


def pairs_of(folder: pathlib.Path, **more) -> mixtures.Mixture:
  files = {"pairs": str(folder / "pairs.jsonl"), "chats": str(folder / "chats.jsonl")}
  return mixtures.instruction(files, folder / "tokenizer", fields=[("content", "summary")], history="past", **more)


def text_of(folder: pathlib.Path) -> mixtures.Mixture:
  return mixtures.pretraining({"en": str(folder / "text.txt")}, folder / "tokenizer")


def both_of(folder: pathlib.Path, shares=(0.75, 0.25)) -> mixtures.Mixture:
  return mixtures.joined([pairs_of(folder), text_of(folder)], shares)


def assert_same(a: loader.Batch, b: loader.Batch) -> None:
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("make", [pairs_of, text_of, both_of])
def test_rows_are_those_of_a_cache(folder, tmp_path, make):
  token_cache.cache_mixture(make(folder), tmp_path / "cache", num_shards=1, num_workers=0)
  for split in ("train", "validation"):
    cached = loader.CachedMixture(tmp_path / "cache", INFILLING, seed=3, split=split, num_workers=0)
    source = in_memory.InMemoryMixture(make(folder), INFILLING, seed=3, split=split)
    assert source.seq_length == 96
    assert source.sampler.describe() == cached.sampler.describe()
    for ours, theirs in zip(source.batches([(0, 30), (10**9, 4)]), cached.batches([(0, 30), (10**9, 4)]), strict=True):
      assert_same(ours, theirs)


def test_hosts_change_nothing(folder):
  plan = [(0, 8), (8, 8), (10**12, 12)]
  source = in_memory.InMemoryMixture(both_of(folder), INFILLING)
  hosts = [list(source.batches(plan, i, 4)) for i in range(4)]
  for whole, *parts in zip(source.batches(plan), *hosts, strict=True):
    assert_same(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})
  with pytest.raises(errors.InputError, match="8 rows does not divide over 3 hosts"):
    next(source.batches(plan, 0, 3))


def test_each_answer_is_learned_once_an_epoch_behind_its_own_question_alone(folder):
  mixture = pairs_of(folder)
  wanted = [pair for task in mixture.tasks for pair in task.examples("train")]
  source = in_memory.InMemoryMixture(mixture, functools.partial(INFILLING, seq_length=256))
  decode = functools.partial(mixture.tokenizer.decode, show_special=True)
  found = collections.Counter()
  for row in _epoch(source):
    places = np.arange(len(row["tokens"]))
    for first, context_end, end in rows.places_of_samples(row):
      assert (row["attend_start"][first:end] == first).all()
      assert (row["attend_end"][first:end] == np.maximum(places[first:end] + 1, context_end)).all()
      assert row["positions"][0, first:context_end].tolist() == list(range(context_end - first))
      assert (row["positions"][0, context_end:end] == context_end - first - 1).all()
      assert row["positions"][1, context_end:end].tolist() == list(range(1, end - context_end + 1))
      assert (row["loss_weights"][first:end] == (places[first:end] >= context_end)).all()
      asked = decode(row["tokens"][first:context_end].tolist())
      answered = decode(row["targets"][context_end:end].tolist())
      assert asked.endswith("[gMASK]") and answered.endswith("<eop>")
      found[asked.removesuffix("[gMASK]"), answered.removesuffix("<eop>")] += 1
  assert found == collections.Counter(wanted)
  assert (rounds.prompt([("q0", "a0")], "q0"), "a0") in found


def _epoch(source: in_memory.InMemoryMixture) -> list[rows.Row]:
  """Every row of every task, once."""
  sizes = source.sampler.describe()["rows_per_epoch"]
  return [source.sampler._sources[name].row(0, i, 0) for name, size in sizes.items() for i in range(size)]


@pytest.mark.parametrize("shares", [(0.9, 0.1), (0.5, 0.5), (3, 1), (1, 0)])
def test_replay_has_its_share_from_the_first_sample_on(folder, shares):
  source = in_memory.InMemoryMixture(both_of(folder, shares), INFILLING)
  objectives = np.array([source.sampler.row(i)["objective"][0] for i in range(400)])
  replayed = np.cumsum(objectives != tokens_lib.OBJECTIVE_INSTRUCTION)
  np.testing.assert_allclose(replayed, shares[1] / sum(shares) * np.arange(1, 401), atol=2)


def test_what_a_run_records(folder, tmp_path, caplog):
  source = in_memory.InMemoryMixture(both_of(folder), INFILLING)
  with caplog.at_level("INFO", "glmjax"):
    described = source.describe()
    source.check()
  assert "joined, train: " in caplog.text and caplog.text.count("rows of an epoch: instruct_chats") == 1
  assert json.loads(json.dumps(described)) == described
  assert described == in_memory.InMemoryMixture(both_of(folder), INFILLING).describe()
  assert described["tokenizer"] == source.mixture.tokenizer.fingerprint
  other = in_memory.InMemoryMixture(both_of(folder), INFILLING, split="validation").describe()
  assert described["text"] != other["text"]
  source.save_tokenizer(tmp_path / "saved")
  assert tokenizer_lib.Tokenizer.load(tmp_path / "saved") == source.mixture.tokenizer


def test_another_text_is_another_run(folder, tmp_path):
  texts = []
  for moved in (("ab", "c"), ("a", "bc"), ("a", "c")):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(dict(zip(("inputs", "targets"), moved))))
    mixture = mixtures.instruction([path], folder / "tokenizer")
    texts.append(in_memory.InMemoryMixture(mixture, INFILLING).describe()["text"])
  assert len(set(texts)) == 3


def test_a_long_pair_keeps_its_question_and_a_row_its_length(folder, tmp_path):
  path = tmp_path / "long.jsonl"
  path.write_text(json.dumps({"inputs": "dogs sleep " * 900_000 + "How many?", "targets": "nine dogs " * 900_000}))
  mixture = mixtures.instruction([path], folder / "tokenizer")
  source = in_memory.InMemoryMixture(mixture, functools.partial(INFILLING, instruction_cut="start"))
  ((first, context_end, end),) = rows.places_of_samples(row := source.sampler.row(0))
  assert (first, end) == (0, 96) and row["loss_weights"].sum() == end - context_end
  assert mixture.tokenizer.decode(row["tokens"][: context_end - 1].tolist()).endswith("How many?")


def test_pairs_that_lose_tokens_are_told(folder, caplog):
  source = in_memory.InMemoryMixture(pairs_of(folder), functools.partial(INFILLING, instruction_cut="start"))
  lengths = {name: source._tokens.split(name, "train").document_lengths() for name in source._tokens.tasks}
  longer = {name: int((pairs.sum(1) + 2 > 96).sum()) for name, pairs in lengths.items()}
  source.check()
  told = [message for message in caplog.messages if "their questions are cut at the start" in message]
  wanted = [(name, count) for name, count in longer.items() if count]
  assert wanted and len(told) == len(wanted)
  for message, (name, count) in zip(told, wanted):
    assert message.startswith(
      f"task {name}, train: {count:,} of {len(lengths[name])} pairs are longer than a row of 96"
    )


def test_mistakes(folder, tmp_path, monkeypatch):
  path = tmp_path / "few.jsonl"
  path.write_text('{"inputs": "a", "targets": "b"}\n' * 49)
  few = mixtures.instruction([path], folder / "tokenizer")
  assert in_memory.InMemoryMixture(few, INFILLING).sampler.row(0)["loss_weights"].sum()
  with pytest.raises(errors.InputError, match="nothing in the split 'validation'.*every 50th.*validation = None"):
    in_memory.InMemoryMixture(few, INFILLING, split="validation").check()
  with pytest.raises(errors.InputError, match="InMemoryMixture.mixture is instruct: give what mixtures.instruction"):
    in_memory.InMemoryMixture("instruct", INFILLING)
  with pytest.raises(errors.InputError, match="other special tokens"):
    in_memory.InMemoryMixture(few, rows.BlankInfilling(96, tokens_lib.icetk(0, 500))).check()
  path.write_text('{"inputs": "a", "targets": "b"}\n{"inputs": "a"}')
  with pytest.raises(errors.InputError, match=f"^{path}:2: no fields"):
    in_memory.InMemoryMixture(few, INFILLING).check()
  monkeypatch.setattr(in_memory, "MOST_TOKENS", 1000)
  with pytest.raises(
    errors.InputError, match="with task instruct_chats there are more than 1,000 tokens.*glmjax cache"
  ):
    in_memory.InMemoryMixture(pairs_of(folder), INFILLING).check()


def test_a_model_folder_names_its_tokenizer(folder):
  assert tokenizer_lib.Tokenizer.load(folder) == tokenizer_lib.Tokenizer.load(folder / "tokenizer")
