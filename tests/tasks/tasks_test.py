"""The seqio vocabulary, tasks and mixtures over small files."""

import copy
import json
import pathlib
import pickle

import numpy as np
import pytest
import seqio
import tensorflow as tf

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.data import file_tasks
from glmjax.data import filters
from glmjax.data import splits
from glmjax.data import text
from glmjax.data import token_cache
from glmjax.tasks import instruct
from glmjax.tasks import preprocessors
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
  source = seqio.TaskRegistry.get("instruct_x").source
  assert source.num_input_examples("train") == 4
  sharded = [source.get_dataset("train", shuffle=False, shard_info=seqio.ShardInfo(i, 3)) for i in range(3)]
  found = [example["inputs"] for dataset in sharded for example in dataset.as_numpy_iterator()]
  assert sorted(found) == sorted(example["inputs_pretokenized"] for example in examples("instruct_x"))


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
  source = sources.FileSource(file_tasks.FileTask("x", "text", str(tmp_path), text.file_documents))

  def order(**options):
    return [e["text"] for e in source.get_dataset(**options).as_numpy_iterator()]

  assert order(shuffle=False) == [str(i).encode() for i in range(9)]
  assert order(seed=1) == order(seed=1) != order(seed=2)


def test_text_and_caches_in_buckets(folder, server, tmp_path, monkeypatch):
  """Tasks that go through TensorFlow have the text read for them, and one process writes."""
  for language, files in FILES.items():
    path = pathlib.Path(files if isinstance(files, str) else files[0])
    server.put(f"text/{language}{path.suffix}", path.read_bytes())
  there = {"en": "gs://bucket/text/en.*", "zh": "gs://bucket/text/zh.*"}
  name = pretrain.register(there, folder, mixture="from_a_bucket")
  token_cache.cache_mixture(name, "gs://bucket/ours", num_shards=2, num_workers=0)
  for task in seqio.get_subtasks(seqio.MixtureRegistry.get(name)):  # no longer what the cache knows
    monkeypatch.setitem(task.__dict__, "preprocessors", [seqio.preprocessors.tokenize, *task.preprocessors[1:]])
  for out in ("gs://bucket/theirs", tmp_path / "theirs"):
    with pytest.raises(errors.InputError, match="one process alone caches seqio's own tasks"):
      token_cache.cache_mixture(name, out, num_workers=1)
    token_cache.cache_mixture(name, out, num_shards=2)
  ours, theirs = (
    {key.partition("/")[2]: server.data(key) for key in server.keys(prefix=at)} for at in ("ours/", "theirs/")
  )
  assert (
    ours
    == theirs
    == {
      path.relative_to(tmp_path / "theirs").as_posix(): path.read_bytes()
      for path in (tmp_path / "theirs").rglob("*")
      if path.is_file()
    }
  )


def test_filters_in_seqio(folder, tmp_path):
  """Those of a mixture are known to its tasks; those of single documents are a step for tasks of one's own."""
  documents = [
    "Short",
    "Ask me@mail.org, please.",
    "A longer document.",
    "A LONGER document!",
    "中文的文本，也很长很长。",
  ]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in documents * 12))
  name = pretrain.register(
    {"en": str(tmp_path / "a.jsonl")},
    folder,
    mixture="filtered",
    filters=[filters.Length(6), filters.PersonalData(), filters.ExactDuplicates()],
    stated={"en": {"license": "CC0-1.0"}},
  )
  both = [each["text_pretokenized"].decode() for split in splits.SPLITS for each in examples("pretrain_en", split)]
  assert len(both) == 3 and {"Ask <email>, please.", documents[4]} < {*both}
  token_cache.cache_mixture(name, tmp_path / "cache", num_shards=1, num_workers=0)
  about = json.loads((tmp_path / "cache" / "manifest.json").read_text())["tasks"]["pretrain_en"]
  assert [each["documents_out"] for each in about["filters"]] == [48, 48, 3] and about["license"] == "CC0-1.0"
  dataset = tf.data.Dataset.from_tensor_slices({"text": documents, "number": list(range(5))})
  step = preprocessors.filter_documents(dataset, [filters.Length(6), filters.PersonalData()])
  found = [(each["number"], each["text"].decode()) for each in step.as_numpy_iterator()]
  assert found == [(i, each.replace("me@mail.org", "<email>")) for i, each in enumerate(documents) if i]
  with pytest.raises(errors.InputError, match="ExactDuplicates must see all documents first"):
    preprocessors.filter_documents(dataset, [filters.ExactDuplicates()])
