"""Pairs of answers: records of both kinds, what a row holds, and mistakes that are told by their line."""

import json
import pathlib

import numpy as np
import pytest

from glmjax import errors
from glmjax import rounds
from glmjax import tokenizer as tokenizer_lib
from glmjax import tokens as tokens_lib
from glmjax.data import in_memory
from glmjax.data import mixtures
from glmjax.data import preferences
from glmjax.data import rows
from glmjax.data import token_cache

SETTINGS = dict(seq_length=64, positions="rotary_2d", samples_per_sequence=1, instruction_mask="gmask")


def user(text: str) -> dict:
  return {"role": "user", "content": text}


def assistant(text: str) -> dict:
  return {"role": "assistant", "content": text}


LAST = assistant("a")
WEIGHT = "the last message has weight 0"


def read(path: pathlib.Path, *records) -> list:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return [answers for _, answers in preferences.file_preferences(path, 0)]


def test_records(tmp_path):
  asked = rounds.prompt([("q", "a")], "r")
  assert read(
    tmp_path / "a.jsonl",
    {"prompt": "q", "chosen": "yes", "rejected": "no", "id": 3},
    {"question": "r", "chosen": "x", "rejected": "y", "history": [["q", "a"]]},
    {"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]},
    {"prompt": "q", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
    {"prompt": [user("q"), assistant("a"), user("r")], "chosen": [assistant("x")], "rejected": [assistant("y")]},
  ) == [("q", "yes", "no"), (asked, "x", "y"), ("q", "yes", "no"), ("q", "yes", "no"), (asked, "x", "y")]


def test_a_prompt_that_the_conversations_begin_with_is_asked_once(tmp_path):
  asked = rounds.prompt([("q", "a")], "r")
  system = {"role": "system", "content": "s"}
  whole = [user("q"), assistant("a"), user("r")]
  yes, no = [assistant("yes")], [assistant("no")]
  assert read(
    tmp_path / "a.jsonl",
    {"prompt": "r", "chosen": [user("r"), *yes], "rejected": [user("r"), *no]},
    {"prompt": [user("r")], "chosen": [user("r"), *yes], "rejected": [user("r\n"), *no]},
    {"prompt": [user("r")], "chosen": [user("r"), *yes], "rejected": no},
    {"prompt": whole, "chosen": [*whole, *yes], "rejected": [*whole, *no]},
    {"prompt": whole[:1], "chosen": [*whole, *yes], "rejected": [*whole, *no]},
    {"prompt": [system], "chosen": [system, user("r"), *yes], "rejected": [system, user("r"), *no]},
    {"prompt": [system], "chosen": [user("r"), *yes], "rejected": [user("r"), *no]},
    {"prompt": "q", "chosen": [*whole[1:], *yes], "rejected": [*whole[1:], *no]},
  ) == [("r", "yes", "no")] * 3 + [(asked, "yes", "no")] * 2 + [("s\nr", "yes", "no")] * 2 + [(asked, "yes", "no")]


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"prompt": "q", "chosen": "yes"}, "no fields prompt, chosen, rejected or"),
    ({"prompt": "q", "chosen": "yes", "rejected": "yes"}, "both answers are the same"),
    ({"prompt": "q", "chosen": "", "rejected": "no"}, "'chosen' is empty"),
    ({"prompt": "q", "chosen": "yes", "rejected": 5}, "rejected"),
    ({"prompt": "q", "chosen": "yes", "rejected": "no", "system": "s"}, "'system' is not read"),
    ({"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]}, "different questions"),
    ({"chosen": [user("q")], "rejected": [user("q"), assistant("b")]}, "no answer to learn"),
    ({"chosen": [], "rejected": [user("q"), assistant("b")]}, "not a list of messages"),
    ({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")], "x": 1}, "'x' is not read"),
    (
      {"prompt": "r", "chosen": [user("q"), assistant("a")], "rejected": [assistant("b")]},
      "chosen begins with a .*user",
    ),
    (
      {"prompt": "q", "chosen": [assistant("a")], "rejected": [{"role": "system", "content": "s"}, user("q"), LAST]},
      "rejected begins with a message of the system",
    ),
    ({"chosen": [user("q"), LAST, user("r"), LAST | {"weight": 0}], "rejected": [user("q"), assistant("c")]}, WEIGHT),
    ({"chosen": [user("q"), assistant("c")], "rejected": [user("q"), LAST, user("r"), LAST | {"weight": 0}]}, WEIGHT),
    ({"prompt": "q", "chosen": "yes", "rejected": " \n"}, "'rejected' is empty"),
    ({"prompt": 5, "chosen": [assistant("a")], "rejected": [assistant("b")]}, "prompt"),
  ],
)
def test_mistakes_are_told_by_their_line(tmp_path, record, message):
  good = {"prompt": "q", "chosen": "yes", "rejected": "no"}
  with pytest.raises(errors.InputError, match=f"a.jsonl:2.*{message}"):
    read(tmp_path / "a.jsonl", good, record)


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory) -> pathlib.Path:
  """A tokenizer and 120 pairs."""
  path = tmp_path_factory.mktemp("pairs")
  lines = [f"day {i}: {i * i} dogs sleep" for i in range(300)]
  tokenizer_lib.train(lines, path / "tokenizer", vocab_size=380)
  records = [{"prompt": f"day {i}: dogs", "chosen": f"{i * i}", "rejected": f"sleep {i}"} for i in range(120)]
  (path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def mixture(folder: pathlib.Path, **more) -> mixtures.Mixture:
  return mixtures.preference([str(folder / "pairs.jsonl")], folder / "tokenizer", **more)


def source(folder: pathlib.Path, split: str = "train", **more) -> in_memory.InMemoryMixture:
  made = mixture(folder)
  infilling = rows.BlankInfilling(specials=made.tokenizer.specials, **SETTINGS | more)
  return in_memory.InMemoryMixture(made, infilling, split=split)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_pair_is_a_row_of_an_epoch(folder, split):
  data = source(folder, split)
  count = {"train": 118, "validation": 2}[split]
  assert data.describe()["preference"] and data.sampler.describe()["rows_per_epoch"] == {"prefer_pairs": count}
  words, seen = tokenizer_lib.Tokenizer.load(folder / "tokenizer"), set()
  for index in range(count):
    row = data.sampler.row(index)
    answers = []
    for kind in (tokens_lib.OBJECTIVE_CHOSEN, tokens_lib.OBJECTIVE_REJECTED):
      own = (row["objective"] == kind) & (row["loss_weights"] > 0)
      assert row["targets"][own][-1] == words.specials.eop
      answers.append(words.decode(row["targets"][own][:-1].tolist()))
    samples = rows.places_of_samples(row)
    asked = {words.decode(row["tokens"][first : end - 1].tolist()) for first, end, _ in samples}
    assert len(asked) == 1 and len(samples) == 2
    number = int(asked.pop().split()[1].rstrip(":"))
    assert answers == [f"{number * number}", f"sleep {number}"]
    seen.add(number)
  assert len(seen) == count


def test_long_ones_are_cut_alike(folder, caplog):
  made = rows.BlankInfilling(specials=mixture(folder).tokenizer.specials, **SETTINGS | dict(instruction_cut="start"))
  asked, chosen, rejected = np.arange(20, 60), np.arange(100, 130), np.arange(200, 203)
  row = made.preference_row(asked, chosen, rejected)
  (first, first_end, middle), (second, second_end, end) = rows.places_of_samples(row)
  assert end <= 64 and row["tokens"][first : first_end - 1].tolist() == row["tokens"][second : second_end - 1].tolist()
  assert row["tokens"][first_end - 2] == 59 and middle <= 32
  assert not made.keeps_answers_whole(40, 30, 3) and made.keeps_answers_whole(5, 25, 3)
  source(folder, seq_length=16).check()
  assert "longer than a row of 16 places" in caplog.text


def test_answers_that_are_cut_to_the_same_are_in_no_row(folder, tmp_path, caplog):
  """And each of the others is a row as before."""
  long = "dogs sleep " * 40
  records = [{"prompt": f"day {i}:", "chosen": f"{long}{i}", "rejected": f"{long}no"} for i in range(20)]
  records += [{"prompt": f"day {i}:", "chosen": f"{i} {long}", "rejected": f"no {long}"} for i in range(20, 30)]
  records += [{"prompt": f"day {i}:", "chosen": long, "rejected": long[:8]} for i in range(30, 38)]
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  made = mixtures.preference([str(tmp_path / "pairs.jsonl")], folder / "tokenizer")
  infilling = rows.BlankInfilling(specials=made.tokenizer.specials, **SETTINGS)
  data = in_memory.InMemoryMixture(made, infilling)
  assert data.describe()["rows_per_epoch"] == {"prefer_pairs": 18}
  assert "prefer_pairs, train: 20 pairs of answers are left out" in caplog.text
  asked = set()
  for index in range(18):
    row = data.sampler.row(index)
    (first, end, middle), (_, second, last) = rows.places_of_samples(row)
    assert row["targets"][end:middle].tolist() != row["targets"][second:last].tolist()
    asked.add(made.tokenizer.decode(row["tokens"][first : end - 1].tolist()))
  assert asked == {record["prompt"] for record in records[20:]}
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:20]))
  none = in_memory.InMemoryMixture(
    mixtures.preference([str(tmp_path / "pairs.jsonl")], folder / "tokenizer"), infilling
  )
  with pytest.raises(errors.InputError, match="not enough for a single pair of answers that differ"):
    none.check()


def test_records_are_counted_once(folder, caplog):
  with caplog.at_level("INFO", "glmjax"):
    source(folder).check()
  assert ": 118 examples, " in caplog.text


def test_mistakes(folder, tmp_path):
  with pytest.raises(errors.InputError, match="are not cached"):
    token_cache.cache_mixture(mixture(folder), tmp_path / "cache")
  (tmp_path / "text.txt").write_text("dogs sleep\n\n" * 100)
  text = mixtures.pretraining({"en": str(tmp_path / "text.txt")}, folder / "tokenizer")
  with pytest.raises(errors.InputError, match="joins pairs of answers and others"):
    mixtures.joined([mixture(folder), text], [1, 1])
  with pytest.raises(errors.InputError, match="give 3 names each"):
    mixture(folder, fields=[("prompt", "chosen")])
  with pytest.raises(errors.InputError, match="history is 5"):
    mixture(folder, history=5)
