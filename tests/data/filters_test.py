"""Filters of a mixture: what each leaves, in which order, what the manifest says of it, and that without any a cache is
what it was.
"""

import json
import pathlib
import pickle

import pytest

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.data import filtering, filters, in_memory, mixtures, shards, splits, text, token_cache

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
  tokenizer_lib.train(list(text.documents(FIXTURES / "en.txt")) * 3, path, vocab_size=500)
  return path


def write(path, documents):
  path.write_text("".join(json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in documents), "utf-8")
  return path


def left(path, *steps):
  """The documents of a file that filters leave, and the manifest's records."""
  found = filtering.outcome(steps, [text.file_documents(path, 0)])
  return [each for _, each in found.passed(0, "x", text.file_documents(path, 0), steps)], found.records


def test_each_filter(tmp_path):
  (tmp_path / "words.txt").write_text("bad\n坏人\n")
  mail = "Write to me@mail.org."
  path = write(
    tmp_path / "a.jsonl", ["Short", "A long document.", "中国人民很好", "A bad one", "他是坏人", mail, "SHORT!"]
  )
  every = list(text.documents(path))
  for step, kept in (
    (filters.Length(6), [*every[1:2], *every[2:4], *every[5:]]),
    (filters.Length(1, 6), [every[0], every[2], every[4], every[6]]),
    (filters.Language(("zh",)), [every[2], every[4]]),
    (filters.Words(tmp_path / "words.txt"), [*every[:3], *every[5:]]),
    (filters.PersonalData(), [*every[:5], "Write to <email>.", every[6]]),
    (filters.PersonalData(("ip",)), every),
    (filters.ExactDuplicates(), every[:6]),
    (filters.NearDuplicates(), every[:6]),
  ):
    found, (record,) = left(path, step)
    assert found == kept, step
    assert record["name"] == type(step).__name__ and record["documents_in"] == 7
    assert record["documents_out"] == len(kept)
    assert record["bytes_in"] == sum(len(each.encode()) for each in every)
    assert record["bytes_out"] == sum(len(each.encode()) for each in kept)
    json.dumps(record)


def test_filters_work_in_their_order(tmp_path):
  """What one leaves out is no first document for the next; what one changes is what the next sees."""
  path = write(tmp_path / "a.jsonl", ["a b c", "A b c.", "mail a@b.cc now", "mail x@y.zz now", "x" * 50])
  assert left(path, filters.ExactDuplicates(), filters.Length(6))[0] == ["mail a@b.cc now", "mail x@y.zz now", "x" * 50]
  found, records = left(path, filters.Length(6, 20), filters.PersonalData(), filters.ExactDuplicates())
  assert found == ["A b c.", "mail <email> now"]
  assert [(each["documents_in"], each["documents_out"]) for each in records] == [(5, 3), (3, 3), (3, 2)]
  assert [records[1]["bytes_out"], records[2]["bytes_out"]] == [6 + 2 * 16, 6 + 16]
  assert records[0]["settings"] == {"least": 6, "most": 20}


@pytest.mark.parametrize("step", [filters.ExactDuplicates(), filters.NearDuplicates()])
def test_what_is_held_out_is_not_trained_on(tmp_path, step, folder):
  """Of a document and its duplicate the held-out one stays, wherever it is, and over all files."""
  documents = [f"The document {i} says this and that and {i * 7} more of {i}" for i in range(120)]
  documents[3] = documents[108].upper()  # of the second file's documents the 49th is held out
  documents[80] = documents[5]
  write(tmp_path / "a.jsonl", documents[:60])
  write(tmp_path / "b.jsonl", documents[60:])
  task = mixtures.pretraining({"en": str(tmp_path)}, folder, filters=[step]).tasks[0]
  held_out = [each for (each,) in task.examples("validation")]
  trained = [each for (each,) in task.examples("train")]
  whole = mixtures.pretraining({"en": str(tmp_path)}, folder).tasks[0]
  assert held_out == [each for (each,) in whole.examples("validation")]
  assert documents[108] in held_out and documents[5] in trained and len(trained) == 120 - len(held_out) - 2
  assert [each for (each,) in whole.examples("train") if each not in trained] == [documents[3]]
  shared = [example for i in range(3) for example in task.examples("train", i, 3)]
  assert sorted(shared) == sorted((each,) for each in trained)


def test_the_manifest_says_what_was_filtered_and_stated(tmp_path, folder):
  path = write(tmp_path / "en.jsonl", [f"Document {i} of those, with {i} words." for i in range(60)] + ["short"] * 40)
  stated = {"en": {"license": "CC0-1.0", "source": "made here"}}
  steps = [filters.ExactDuplicates(), filters.Length(10)]

  def cache(name, *, workers=0, overwrite=False, **settings):
    made = mixtures.pretraining({"en": str(path)}, folder, **settings)
    token_cache.cache_mixture(
      pickle.loads(pickle.dumps(made)), tmp_path / name, num_shards=2, num_workers=workers, overwrite=overwrite
    )
    return shards.TokenCache.open(tmp_path / name).tasks["pretrain_en"]

  plain = cache("plain")
  assert set(plain) == {"kind", "rate", "splits"}
  filtered = cache("filtered", filters=steps, stated=stated)
  assert filtered["license"] == "CC0-1.0" and filtered["source"] == "made here"
  assert [each["name"] for each in filtered["filters"]] == ["ExactDuplicates", "Length"]
  assert [each["documents_out"] for each in filtered["filters"]] == [61, 60]
  assert sum(split["documents"] for split in filtered["splits"].values()) == 60
  assert sum(split["utf8_bytes"] for split in filtered["splits"].values()) == filtered["filters"][1]["bytes_out"]
  assert cache("forked", workers=2, filters=steps)["splits"] == filtered["splits"]
  before = (tmp_path / "filtered" / "manifest.json").stat().st_mtime_ns
  cache("filtered", filters=steps, stated=stated)  # is there already
  assert (tmp_path / "filtered" / "manifest.json").stat().st_mtime_ns == before
  assert cache("filtered", filters=steps)["splits"] == filtered["splits"]  # what is stated is changed in place
  assert "license" not in cache("filtered", filters=steps)
  assert cache("plain", stated=stated) == plain | stated["en"]
  with pytest.raises(errors.InputError, match="already a cache of"):
    cache("filtered", filters=steps[:1])
  assert (
    len(
      in_memory.Tokens(mixtures.pretraining({"en": str(path)}, folder, filters=steps), "train")
      .split("pretrain_en", "train")
      .table
    )
    == filtered["splits"]["train"]["documents"]
  )


def test_without_filters_a_cache_is_known_as_before(folder):
  """The fingerprint of caches that were made before there were filters."""
  task = mixtures.pretraining({"en": str(FIXTURES / "en.txt")}, folder, stated={"en": {"license": "x"}}).tasks[0]
  assert "_filters" not in task.settings() and task.fingerprint("train", {task.files()[0]: "0"}) == (
    "fff73d6552f8355a1d27b0ac347d8bb4517ac5fbe8c4823bd37e244100041f78"
  )
  other = mixtures.pretraining({"en": str(FIXTURES / "en.txt")}, folder, filters=[filters.Length(3)]).tasks[0]
  more = mixtures.pretraining({"en": str(FIXTURES / "en.txt")}, folder, filters=[filters.Length(4)]).tasks[0]
  assert len({each.fingerprint("train", {}) for each in (task, other, more)}) == 3


def test_windows_are_filtered_as_documents(tmp_path, folder):
  """Of a text that is cut, pieces are what filters see."""
  (tmp_path / "book.txt").write_text("\n".join(f"Sentence {i} of a long book." for i in range(2000)))
  task = mixtures.pretraining({"en": str(tmp_path)}, folder, filters=[filters.Length(1000)]).tasks[0]
  assert task.windows is not None
  assert all(len(each) >= 1000 for split in splits.SPLITS for (each,) in task.examples(split))


def test_mistakes(tmp_path, folder):
  path = write(tmp_path / "en.jsonl", [f"number {i}" for i in range(60)])

  def fails(match, *steps, **settings):
    with pytest.raises(errors.InputError, match=match) as caught:
      task = mixtures.pretraining({"en": str(path)}, folder, filters=list(steps), **settings).tasks[0]
      list(task.examples("train"))
    assert "\n" not in str(caught.value)

  fails("filters: Length is none: give a list", "Length")
  fails("leave nothing of its 60 documents: Length 50, Length 0", filters.Length(9), filters.Length(10))
  fails("stated is something of 'fr'", stated={"fr": {}})
  fails("stated of en is .*: give", stated={"en": {"licence": "x"}})
  fails("stated of en is .*: give", stated={"en": "CC0"})
  for make in (
    lambda: filters.Length(0),
    lambda: filters.Length(5, 4),
    lambda: filters.Language(("de",)),
    lambda: filters.PersonalData("email"),
    lambda: filters.NearDuplicates(0.2),
  ):
    with pytest.raises(errors.InputError):
      make()
  task = mixtures.pretraining({"en": str(path)}, folder, filters=[filters.Length(1)]).tasks[0]
  assert task.outcome is not None
  write(path, [f"number {i}" for i in range(61)])
  with pytest.raises(errors.InputError, match="had 60 documents when it was filtered, and has 61"):
    list(task.examples("train"))
