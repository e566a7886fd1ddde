"""Mixtures of text files: names, rates, caps, and what is wrong with what users give. None of it needs TensorFlow."""

import json
import pathlib

import numpy as np
import pytest

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.data import file_tasks
from glmjax.data import instruction_sets
from glmjax.data import mixtures
from glmjax.data import splits
from glmjax.data import text
from glmjax.data import token_cache

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
FILES = {"en": str(FIXTURES / "en.txt"), "zh": [str(FIXTURES / "zh.jsonl")]}
PAIRS = {"small": str(FIXTURES / "instructions.jsonl")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
  documents = [document for files in FILES.values() for document in text.documents(files)]
  tokenizer_lib.train(documents * 3, path, vocab_size=560)
  return path


def test_names_and_rates(folder):
  mixture = mixtures.pretraining(FILES, folder, {"en": 1, "zh": 3})
  assert mixture.name == "pretrain_bilingual" and mixture.rates == {"pretrain_en": 1, "pretrain_zh": 3}
  assert mixture.tokenizer == tokenizer_lib.Tokenizer.load(folder)
  assert mixtures.pretraining(FILES, folder).rates == {"pretrain_en": 0.5, "pretrain_zh": 0.5}
  assert [task.name for task in mixtures.pretraining(FILES, folder, {"en": 0, "zh": 3}).tasks] == ["pretrain_zh"]
  with_pairs = mixtures.pretraining(FILES, folder, instructions=PAIRS)
  assert {task.name: task.kind for task in with_pairs.tasks} == {
    "pretrain_en": "text",
    "pretrain_zh": "text",
    "instruct_small": "instruction",
  }
  assert with_pairs.rates == pytest.approx({"pretrain_en": 0.475, "pretrain_zh": 0.475, "instruct_small": 0.05})
  of_pairs = mixtures.instruction(PAIRS, folder)
  assert of_pairs.name == "instruct" and of_pairs.rates == {"instruct_small": of_pairs.tasks[0].sizes["train"]}


def test_rates_follow_the_files(folder, caplog):
  rates = mixtures.pretraining({"en": FILES["en"], "fr": FILES["zh"]}, folder, {"en": 0.4, "zh": 0.6}).rates
  assert rates == {"pretrain_en": 0.4, "pretrain_fr": 0.4}
  assert "the rates are for en, zh and the text is en, fr; used are en 0.4, fr 0.4" in caplog.text


def write_pairs(path, count, name="x"):
  path.parent.mkdir(exist_ok=True, parents=True)
  lines = (json.dumps({"inputs": f"{name} {i}", "targets": str(i)}) for i in range(count))
  path.write_text("\n\n".join(lines) + "\n")


def of_sets(folder, tmp_path, cap):
  [task] = mixtures.instruction({"all": str(tmp_path / "set")}, folder, max_examples=cap).tasks
  return task


def taken(folder, tmp_path, cap, split):
  return [inputs for inputs, _ in of_sets(folder, tmp_path, cap).examples(split)]


def test_caps_take_at_even_distances_whatever_the_files(folder, tmp_path):
  for number, count in enumerate((3, 0, 260, 61)):
    write_pairs(tmp_path / "set" / f"{number}.jsonl", max(count, 1), f"f{number}")
  every = {split: taken(folder, tmp_path, 1000, split) for split in splits.SPLITS}
  assert len(every["train"]) + len(every["validation"]) == 325 and len(every["validation"]) == 6
  for cap in (1, 7, 100, 318, 319, 400):
    found = taken(folder, tmp_path, cap, "train")
    assert len(found) == min(cap, 319) == of_sets(folder, tmp_path, cap).sizes["train"]
    places = np.array([every["train"].index(pair) for pair in found])
    gaps = np.diff(np.concatenate([[-1], places]))
    assert gaps.min() >= 1 and gaps.max() <= 2 * 319 / min(cap, 319)
    assert len(taken(folder, tmp_path, cap, "validation")) == min(cap, 6)
    shards = [of_sets(folder, tmp_path, cap).examples("train", i, 3) for i in range(3)]
    assert sorted(inputs for shard in shards for inputs, _ in shard) == sorted(found)


def test_of_conversations_a_cap_takes_the_same_part_of_the_answers(folder, tmp_path):
  messages = [{"role": role, "content": "x"} for role in ("user", "assistant")] * 5
  (tmp_path / "set").mkdir()
  (tmp_path / "set" / "a.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 100)
  assert of_sets(folder, tmp_path, 98).sizes == {"train": 98, "validation": 2}
  for cap, count in ((49, 245), (98, 490), (1000, 490)):
    assert len(taken(folder, tmp_path, cap, "train")) == count
  assert len(taken(folder, tmp_path, 1, "validation")) == 5


def test_many_sets_share_by_size_after_their_caps(folder, tmp_path):
  sizes = {f"t0_{i}": 20 + 3 * i for i in range(70)} | {"deepstruct_a": 110, "deepstruct_kelm": 120}
  for name, size in sizes.items():
    write_pairs(tmp_path / "mip" / f"{name.replace('_', '-')}.jsonl", size, name)
  write_pairs(tmp_path / "mip" / "in parts" / "1.jsonl", 5)
  write_pairs(tmp_path / "mip" / "in parts" / "2.jsonl", 6)
  caps = {"t0_*": 40, "*_kelm": 100, "deepstruct_*": 60, "in_parts": 99}
  rates = mixtures.pretraining(FILES, folder, {"en": 3, "zh": 1}, str(tmp_path / "mip"), max_examples=caps).rates

  def held_out(n):
    return n // 50

  wanted = {f"instruct_{name}": min(size - held_out(size), 40) for name, size in sizes.items()}
  wanted |= {"instruct_deepstruct_a": 60, "instruct_deepstruct_kelm": 100, "instruct_in_parts": 11}
  total = sum(wanted.values())
  assert len(rates) == 75
  assert rates == pytest.approx(
    {name: 0.05 * size / total for name, size in wanted.items()}
    | {"pretrain_en": 0.95 * 0.75, "pretrain_zh": 0.95 * 0.25}
  )
  listed = instruction_sets.named_sets([str(tmp_path / "mip" / "t0-1*.jsonl"), str(tmp_path / "mip" / "in parts")])
  assert set(listed) == {"in_parts", "t0_1"} | {f"t0_1{i}" for i in range(10)}


def test_mistaken_sets(folder, tmp_path):
  write_pairs(tmp_path / "a" / "x.jsonl", 3)
  write_pairs(tmp_path / "b" / "x.jsonl", 3)
  (tmp_path / "empty").mkdir()
  (tmp_path / "blank.jsonl").write_text("\n \n")

  def fails(match, files, **options):
    with pytest.raises(errors.InputError, match=match) as caught:
      mixtures.instruction(files, folder, **options)
    assert "\n" not in str(caught.value)

  twice = [f"{tmp_path}/a/*", f"{tmp_path}/b/*"]
  fails("two instruction sets have the name x: .*a/x.jsonl and .*b/x.jsonl", twice)
  fails("no instruction set among .*empty", str(tmp_path / "empty"))
  for name, wrong in (("gone.jsonl", "does not exist"), ("gone", "does not exist"), ("x.json", "is neither")):
    (tmp_path / "x.json").write_text("{}")
    fails(f"instruction set .*/{name} {wrong}: give .jsonl files", [str(tmp_path / "a"), str(tmp_path / name)])
    fails(f"instruction set .*/{name} {wrong}: give .jsonl files", str(tmp_path / name))
  fails("blank.jsonl. holds no pair", [str(tmp_path / "blank.jsonl")])
  fails("use up to 100 letters, digits", {"a b": str(tmp_path / "a")})
  fails("there is no set 'xx'; the sets are .'x'.", {"x": str(tmp_path / "a")}, max_examples={"xx": 3, "*": 2})
  fails("none fits 'x'", {"x": str(tmp_path / "a")}, max_examples={"t0_*": 3})
  fails("max_examples is 0: give a whole number, 1 or more", {"x": str(tmp_path / "a")}, max_examples=0)
  with pytest.raises(errors.InputError, match="instruction_share is 1.5"):
    mixtures.pretraining(FILES, folder, instructions=PAIRS, instruction_share=1.5)


def test_shards_partition_the_documents(tmp_path):
  for i in range(3):
    lines = [json.dumps({"text": f"{i} {k}"}) + "\n" for k in range(60 + i)]
    (tmp_path / f"{i}.jsonl").write_text("".join(lines))
  task = file_tasks.FileTask("x", "text", str(tmp_path), text.file_documents)
  together = {split: [found for of, (found,) in task.all_examples() if of == split] for split in splits.SPLITS}
  for split in splits.SPLITS:
    documents = list(text.documents(str(tmp_path), split))
    assert [found for (found,) in task.examples(split)] == documents == together[split]
    for num_shards in (1, 2, 3, 5):
      found = [[text for (text,) in task.examples(split, i, num_shards)] for i in range(num_shards)]
      assert sorted(sum(found, [])) == sorted(documents)
      if task.deals_out(num_shards):
        assert found == [documents[i::num_shards] for i in range(num_shards)]


def test_mistakes(folder, tmp_path):
  def fails(match, *arguments, **options):
    with pytest.raises(errors.InputError, match=match) as caught:
      mixtures.pretraining(*arguments, **options)
    assert "\n" not in str(caught.value)

  fails("nowhere.txt does not exist", {"en": str(tmp_path / "nowhere.txt")}, folder)
  fails("cannot read the tokenizer", FILES, tmp_path / "nowhere")
  for rates in ({"en": 1, "zh": -2}, {"en": float("nan")}, {"en": "1"}, "en", [1, 2]):
    fails("0 or more", FILES, folder, rates)
  fails("one must be above 0", FILES, folder, {"en": 0, "zh": 0})
  for files in ({}, "en.txt", ["en.txt"], None, 5, FILES["zh"]):
    fails("give the files by language", files, folder)
  for value in (5, None, {}, [5], [None], {"a": "b"}, b"en.txt"):
    fails("the text files of en are", {"en": value}, folder)
  fails("the path of a text file is empty", {"en": ""}, folder)
  fails("glmjax knows local paths, gs://", {"en": "hdfs://bucket/en.txt"}, folder)
  fails("no text files are named", {"en": []}, folder)
  for name in ("", "a/b", "..//x", "a b", "*", "a|b", "x" * 41, 5, None, "a\n"):
    fails("a language of the text files is", {name: FILES["en"]}, folder)
  for sets in (5, [5], {"a": 5}, {5: "a.jsonl"}, {"a b": "a.jsonl"}, {"": "a.jsonl"}):
    fails("instruction set", FILES, folder, instructions=sets)
  for value in ("x", None, [1], 0, 1):
    fails("instruction_share is", FILES, folder, instructions=PAIRS, instruction_share=value)
  for value in (5, None, ""):
    fails("mixture's name is", FILES, folder, name=value)
  fails("field is 5", FILES, folder, field=5)
  fails("rates are .5: 1.: give a number", FILES, folder, {5: 1})


def test_mistakes_of_instruction_sets(folder):
  def fails(match, **options):
    with pytest.raises(errors.InputError, match=match) as caught:
      mixtures.instruction(PAIRS, folder, **options)
    assert "\n" not in str(caught.value)

  fails("max_examples are given for .'y'.", max_examples={"y": 5})
  for value in ("5", None, 2.5, True, [5], {"small": "x"}, {"small": None}):
    fails("give a whole number, 1 or more", max_examples=value)
  fails("give names of sets", max_examples={5: 5})
  for rate in (-1, float("nan"), "x", None, 10**400):
    fails("mixtures.instruction: the rate of small is", rates={"small": rate})
  for rates in (5, "x", [1], {5: 1}):
    fails("mixtures.instruction: rates are", rates=rates)
  fails("one must be above 0", rates={"small": 0})
  for fields in (5, "x", [], ["a"], [["a"]], [[5, 6]]):
    fails("give 2 names each", fields=fields)
  two = {**PAIRS, "other": PAIRS["small"]}
  assert mixtures.instruction(two, folder, {"small": 2, "other": 0}).rates == {"instruct_small": 2}


def test_mistakes_of_a_caches_settings(folder, tmp_path):
  mixture = mixtures.pretraining(FILES, folder)

  def fails(match, mixture=mixture, **options):
    with pytest.raises(errors.InputError, match=match) as caught:
      token_cache.cache_mixture(mixture, tmp_path / "cache", **options)
    assert "\n" not in str(caught.value)

  for value in (5, None, tmp_path, mixtures.pretraining, [mixture]):
    fails("cache_mixture.mixture is .*: give what mixtures.pretraining", value)
  for value in ("2", 2.5, None, 0, True):
    fails("num_shards is .*: give a whole number from 1", num_shards=value)
  for value in ("2", 2.5, -1, True):
    fails("num_workers is .*: give a whole number from 0", num_workers=value)
  fails("overwrite is 'no'", overwrite="no")
  assert not list(tmp_path.iterdir())


def test_joined_mixtures_share_as_they_are_told(folder, tmp_path):
  write_pairs(tmp_path / "a.jsonl", 30)
  pairs, texts = (
    mixtures.instruction([tmp_path / "a.jsonl"], folder),
    mixtures.pretraining(FILES, folder, {"en": 3, "zh": 1}),
  )
  both = mixtures.joined([pairs, texts], [8, 2], "mine")
  assert both.name == "mine" and both.rates == {"instruct_a": 8, "pretrain_en": 1.5, "pretrain_zh": 0.5}
  assert [task.name for task in both.tasks] == list(both.rates) and both.tokenizer == pairs.tokenizer
  assert mixtures.joined([pairs, texts], [1, 0]).rates == {"instruct_a": 1}
  assert mixtures.joined([both, mixtures.instruction(PAIRS, folder)], [0.5, 0.5]).rates == pytest.approx(
    {"instruct_a": 0.4, "pretrain_en": 0.075, "pretrain_zh": 0.025, "instruct_small": 0.5}
  )
  other = tmp_path / "other"
  tokenizer_lib.train(["a b c d e f"] * 50, other, vocab_size=360)
  for parts, shares, match in (
    ([], [], "parts are"),
    ("instruct", [1], "parts are"),
    ([pairs, "pretrain"], [1, 1], "parts are"),
    ([pairs, texts], [1], "a number for each of 2 parts"),
    ([pairs, texts], 0.5, "a number for each of 2 parts"),
    ([pairs, texts], [1, -1], "the share of pretrain_bilingual"),
    ([pairs, texts], [0, 0], "one must be above 0"),
    ([pairs, pairs], [1, 1], "two tasks are named instruct_a"),
    ([pairs, mixtures.instruction(PAIRS, other)], [1, 1], "different tokenizers"),
  ):
    with pytest.raises(errors.InputError, match=match):
      mixtures.joined(parts, shares)
