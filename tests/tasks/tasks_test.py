"""The seqio vocabulary, tasks and mixtures over small files."""

import copy
import functools
import json
import pathlib
import pickle

import numpy as np
import pytest
import seqio
import tensorflow as tf

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.data import splits
from glmjax.data import text
from glmjax.tasks import instruct
from glmjax.tasks import pretrain
from glmjax.tasks import sources
from glmjax.tasks import vocabulary as vocabulary_lib

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
FILES = {"en": str(FIXTURES / "en.txt"), "zh": [str(FIXTURES / "zh.jsonl")]}
PAIRS = {"small": str(FIXTURES / "instructions.jsonl")}
STRINGS = [
  "Hello  world\n\t",
  "",
  " ",
  "小城的河，１２",
  "\u2581 [MASK] <n> \x00\r",
  "[gMASK]</s>",
  "👩‍👩‍👧 é",
  "a" + " " * 99,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
  documents = [document for files in FILES.values() for document in text.documents(files)]
  tokenizer_lib.train(documents * 3, path, vocab_size=560)
  return path


@pytest.fixture(scope="module")
def vocabulary(folder):
  return vocabulary_lib.GLMVocabulary(folder)


def examples(name, split="train", **options):
  task = seqio.TaskRegistry.get(name)
  return list(task.get_dataset(split=split, shuffle=False, **options).as_numpy_iterator())


def test_vocabulary_gives_the_tokenizers_ids(folder, vocabulary):
  for image_ids in (None, 20_000):
    path = folder if image_ids is None else folder / "tokenizer.model"
    ours = vocabulary_lib.GLMVocabulary(path, image_ids)
    plain = tokenizer_lib.Tokenizer.load(path, image_ids)
    encoded = list(tf.data.Dataset.from_tensor_slices(STRINGS).map(ours.encode_tf).as_numpy_iterator())
    for string, ids in zip(STRINGS, encoded, strict=True):
      assert ids.dtype == np.int32
      assert ids.tolist() == ours.encode(string) == plain.encode(string)
      assert ours.decode(ids) == string
      assert ours.decode_tf(tf.constant(ids)).numpy().decode() == string
    batch = tf.ragged.constant([plain.encode(s) for s in STRINGS]).to_tensor(plain.specials.pad)
    assert [s.decode() for s in ours.decode_tf(batch).numpy()] == STRINGS
  assert vocabulary.vocab_size == 560 and vocabulary.eos_id == 2 and vocabulary.pad_id == 3
  assert vocabulary.unk_id == 0 and vocabulary.bos_id == vocabulary.text_tokenizer.specials.sop
  assert vocabulary.decode([*vocabulary.encode("one"), vocabulary.eos_id, 77]) == "one"


def test_vocabulary_is_a_value(folder, vocabulary):
  for other in (
    pickle.loads(pickle.dumps(vocabulary)),
    copy.deepcopy(vocabulary),
    vocabulary_lib.GLMVocabulary(folder),
  ):
    assert other == vocabulary and hash(other) == hash(vocabulary)
    assert other.encode("Anna keeps bees") == vocabulary.encode("Anna keeps bees")
  assert vocabulary != vocabulary_lib.GLMVocabulary(folder / "tokenizer.model", 20_000)
  assert vocabulary != seqio.ByteVocabulary()


def test_text_tasks_give_documents_and_windows(folder, vocabulary):
  assert pretrain.register(FILES, folder, {"en": 1, "zh": 3}) == "pretrain_bilingual"
  stream = []
  documents = list(text.documents(FILES["zh"], "train"))
  for example, document in zip(examples("pretrain_zh"), documents, strict=True):
    assert example["text"].tolist() == vocabulary.encode(document) + [vocabulary.eos_id]
    assert example["text_pretokenized"].decode() == document
    assert example["inputs"].size == example["targets"].size == 0
    stream.extend(example["text"])
  windows = examples("pretrain_zh", sequence_length={"text": 17})
  assert np.concatenate([w["text"] for w in windows]).tolist() == stream[: len(stream) // 17 * 17]
  mixture = seqio.MixtureRegistry.get("pretrain_bilingual")
  assert {t.name: mixture.get_rate(t) for t in mixture.tasks} == {"pretrain_en": 1, "pretrain_zh": 3}
  pretrain.register(FILES, folder)  # again, with other rates
  assert seqio.MixtureRegistry.get("pretrain_bilingual").total_rate == 1


def test_instructions_mix_with_text(folder, vocabulary):
  pretrain.register(FILES, folder, instructions=PAIRS)
  mixture = seqio.MixtureRegistry.get("pretrain_bilingual")
  rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
  assert rates == pytest.approx({"pretrain_en": 0.475, "pretrain_zh": 0.475, "instruct_small": 0.05})
  pairs = [json.loads(line) for line in (FIXTURES / "instructions.jsonl").read_text("utf-8").splitlines()]
  for example, pair in zip(examples("instruct_small"), pairs, strict=True):
    inputs, targets = pair.values()
    assert example["inputs"].tolist() == vocabulary.encode(inputs)
    assert example["targets"].tolist() == vocabulary.encode(targets)
    assert example["text"].size == 0
  ds = mixture.get_dataset({"text": 16, "inputs": 64, "targets": 64}, shuffle=False, num_epochs=None)
  kinds = {min(len(example["text"]), 1) for example in ds.take(100).as_numpy_iterator()}
  assert kinds == {0, 1}


def test_caps(folder, tmp_path):
  for name in ("a", "b"):
    (tmp_path / f"{name}.jsonl").write_text((FIXTURES / "instructions.jsonl").read_text("utf-8"), "utf-8")
  assert (
    instruct.register(
      {"x": str(tmp_path), "small": PAIRS["small"]}, folder, {"x": 2, "small": 1}, {"x": 4, "small": 100}
    )
    == "instruct"
  )
  assert len(examples("instruct_x")) == 4 and len(examples("instruct_small")) == 5


def write_pairs(path, count, name="x"):
  path.parent.mkdir(exist_ok=True, parents=True)
  lines = (json.dumps({"inputs": f"{name} {i}", "targets": str(i)}) for i in range(count))
  path.write_text("\n\n".join(lines) + "\n")


def taken(task, split="train"):
  return [example["inputs_pretokenized"].decode() for example in examples(task, split)]


def test_caps_take_at_even_distances_whatever_the_files(folder, tmp_path):
  for number, count in enumerate((3, 0, 260, 61)):
    write_pairs(tmp_path / "set" / f"{number}.jsonl", max(count, 1), f"f{number}")
  instruct.register({"all": str(tmp_path / "set")}, folder, max_examples=1000)
  every = {split: taken("instruct_all", split) for split in splits.SPLITS}
  assert len(every["train"]) + len(every["validation"]) == 325 and len(every["validation"]) == 6
  for cap in (1, 7, 100, 318, 319, 400):
    instruct.register({"cut": str(tmp_path / "set")}, folder, max_examples=cap)
    found = taken("instruct_cut")
    assert len(found) == min(cap, 319) == seqio.TaskRegistry.get("instruct_cut").num_input_examples("train")
    places = np.array([every["train"].index(pair) for pair in found])
    gaps = np.diff(np.concatenate([[-1], places]))
    assert gaps.min() >= 1 and gaps.max() <= 2 * 319 / min(cap, 319)
    assert len(taken("instruct_cut", "validation")) == min(cap, 6)
    sharded = [
      seqio.TaskRegistry.get("instruct_cut").source.get_dataset(
        "train", shuffle=False, shard_info=seqio.ShardInfo(i, 3)
      )
      for i in range(3)
    ]
    assert sorted(e["inputs"].decode() for ds in sharded for e in ds.as_numpy_iterator()) == sorted(found)


def test_many_sets_share_by_size_after_their_caps(folder, tmp_path):
  sizes = {f"t0_{i}": 20 + 3 * i for i in range(70)} | {"deepstruct_a": 110, "deepstruct_kelm": 120}
  for name, size in sizes.items():
    write_pairs(tmp_path / "mip" / f"{name.replace('_', '-')}.jsonl", size, name)
  write_pairs(tmp_path / "mip" / "in parts" / "1.jsonl", 5)
  write_pairs(tmp_path / "mip" / "in parts" / "2.jsonl", 6)
  caps = {"t0_*": 40, "*_kelm": 100, "deepstruct_*": 60, "in_parts": 99}
  mixture = seqio.MixtureRegistry.get(
    pretrain.register(FILES, folder, {"en": 3, "zh": 1}, str(tmp_path / "mip"), max_examples=caps, mixture="mip_test")
  )
  rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}

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
  listed = instruct.named_sets([str(tmp_path / "mip" / "t0-1*.jsonl"), str(tmp_path / "mip" / "in parts")])
  assert set(listed) == {"in_parts", "t0_1"} | {f"t0_1{i}" for i in range(10)}


def test_mistaken_sets(folder, tmp_path):
  write_pairs(tmp_path / "a" / "x.jsonl", 3)
  write_pairs(tmp_path / "b" / "x.jsonl", 3)
  (tmp_path / "empty").mkdir()
  (tmp_path / "blank.jsonl").write_text("\n \n")

  def fails(match, files, **options):
    with pytest.raises(errors.InputError, match=match) as caught:
      instruct.register(files, folder, **options)
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
  fails("give 1 or more", {"x": str(tmp_path / "a")}, max_examples=0)
  with pytest.raises(errors.InputError, match="instruction_share is 1.5"):
    pretrain.register(FILES, folder, instructions=PAIRS, instruction_share=1.5)


def test_splits_and_shards_partition_the_documents(folder, tmp_path):
  for i in range(3):
    lines = [json.dumps({"text": f"{i} {k}"}) + "\n" for k in range(60 + i)]
    (tmp_path / f"{i}.jsonl").write_text("".join(lines))
  documents = list(text.documents(str(tmp_path)))
  pretrain.register({"xx": str(tmp_path)}, folder)

  def texts(split="train", **options):
    return [e["text_pretokenized"].decode() for e in examples("pretrain_xx", split, **options)]

  found = {split: texts(split) for split in splits.SPLITS}
  assert found == {split: list(text.documents(str(tmp_path), split)) for split in splits.SPLITS}
  assert len(found["validation"]) == 3 and len(documents) == 183
  for num_shards in (1, 2, 3, 5):
    shards = [texts(shard_info=seqio.ShardInfo(i, num_shards)) for i in range(num_shards)]
    assert all(shards) and sorted(sum(shards, [])) == sorted(found["train"])
  assert len(seqio.TaskRegistry.get("pretrain_xx").source.list_shards("train")) == 3


def test_files_are_shuffled_by_seed(tmp_path):
  for i in range(9):
    (tmp_path / f"{i}.txt").write_text(str(i))
  source = sources.FileSource(str(tmp_path), ["text"], functools.partial(text.file_documents))

  def order(**options):
    return [e["text"] for e in source.get_dataset(**options).as_numpy_iterator()]

  assert order(shuffle=False) == [str(i).encode() for i in range(9)]
  assert order(seed=1) == order(seed=1) != order(seed=2)


def test_mistakes(folder, tmp_path):
  def fails(match, *arguments, **options):
    with pytest.raises(errors.InputError, match=match) as caught:
      pretrain.register(*arguments, **options)
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
  fails("local paths only", {"en": "gs://bucket/en.txt"}, folder)
  fails("no text files are named", {"en": []}, folder)
  for name in ("", "a/b", "..//x", "a b", "*", "a|b", "x" * 41, 5, None, "a\n"):
    fails("a language of the text files is", {name: FILES["en"]}, folder)
  for sets in (5, [5], {"a": 5}, {5: "a.jsonl"}, {"a b": "a.jsonl"}, {"": "a.jsonl"}):
    fails("instruction set", FILES, folder, instructions=sets)
  with pytest.raises(errors.InputError, match="max_examples are given for .'y'."):
    instruct.register(PAIRS, folder, max_examples={"y": 5})
