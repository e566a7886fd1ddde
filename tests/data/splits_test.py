"""What is held out where documents are too few: windows of them, the same for every reader."""

import itertools
import json
import random

import pytest

from glmjax import errors
from glmjax.data import splits
from glmjax.data import text


def words(count, seed=0, line=12):
  rng = random.Random(seed)
  made = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(count)]
  return "\n".join(" ".join(made[i : i + line]) for i in range(0, count, line))


def both(path, field="text"):
  return {split: list(text.documents(path, split, field)) for split in splits.SPLITS}


def share(found):
  sizes = {split: sum(map(len, pieces)) for split, pieces in found.items()}
  return sizes["validation"] / sum(sizes.values())


CORPORA = {
  "one text": ["one.txt", lambda: words(30_000)],
  "one short text": ["one.txt", lambda: words(300)],
  "CR only": ["one.txt", lambda: words(5_000).replace("\n", "\r")],
  "one line": ["one.txt", lambda: words(20_000).replace("\n", " ")],
  "one line without blanks": ["one.txt", lambda: "甲乙丙丁" * 9_000],
  "30 short documents": ["one.txt", lambda: "\n\n".join(words(20, seed, 5) for seed in range(30))],
  "30 books": ["one.jsonl", lambda: "".join(json.dumps({"text": words(4_000, seed)}) + "\n" for seed in range(30))],
  "49 documents": ["one.jsonl", lambda: "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(49))],
}


@pytest.mark.parametrize("name", CORPORA)
def test_few_documents_hold_out_windows(tmp_path, name):
  file, make = CORPORA[name]
  content = make()
  (tmp_path / file).write_bytes(content.encode())
  whole = list(text.documents(tmp_path / file))
  found = both(tmp_path / file)
  assert found == both(tmp_path / file)
  assert 0.01 < share(found) < 0.25 and not set(found["train"]) & set(found["validation"])
  # Each character of the documents is in one of the splits, in order, and no window in both.
  pieces = sorted(
    (place, piece, split)
    for split, all_pieces in found.items()
    for place, piece in located(all_pieces, "\n\n".join(whole))
  )
  assert "".join("".join(piece for _, piece, _ in pieces).split()) == "".join("".join(whole).split())
  if name in ("30 short documents", "49 documents"):  # they stay whole
    assert set(found["train"]) | set(found["validation"]) == set(whole)


def located(pieces, whole):
  at = 0
  for piece in pieces:
    at = whole.index(piece, at)
    yield at, piece
    at += len(piece)


def test_fifty_documents_are_split_as_ever(tmp_path):
  for count in (50, 51, 99, 100, 149):
    documents = [f"document {i}" for i in range(count)]
    (tmp_path / "all.txt").write_text("\n\n".join(documents))
    found = both(tmp_path / "all.txt")
    assert found["validation"] == documents[49::50]
    assert found["train"] == [document for i, document in enumerate(documents) if i % 50 != 49]
    assert text.reader(text.find_files(tmp_path / "all.txt")).func is text.file_documents


def test_many_files_of_few_documents(tmp_path):
  """With 30 files of 10 documents the 50th never comes; with 50 files it is the last one's first."""
  for count, cut in ((30, True), (41, False), (50, False)):
    folder = tmp_path / str(count)
    folder.mkdir()
    for i in range(count):
      (folder / f"{i:03}.txt").write_text("\n\n".join(words(30, 100 * i + k) for k in range(10)))
    files = text.find_files(folder)
    read = text.reader(files)
    assert (read.func is text.file_windows) == cut
    found = both(folder)
    assert 0 < share(found) < 0.1
    # File by file, as other readers take them
    for split in splits.SPLITS:
      pieces = [piece for number, path in enumerate(files) for piece in read(path, number)]
      assert found[split] == [piece for of_split, piece in pieces if of_split == split]
    assert sorted(found["train"] + found["validation"]) == sorted(text.documents(folder))


def test_long_texts_hold_out_a_fiftieth_in_several_places():
  document = words(400_000)
  windows = splits.windows([len(document)])
  assert windows.size == 16_000 and windows.every == 50
  pieces = list(windows.pieces([document.split("\n")], 0))
  assert [split for split, _ in pieces] == ["train", "validation"] * (len(pieces) // 2) + ["train"] * (len(pieces) % 2)
  held_out = [piece for split, piece in pieces if split == "validation"]
  assert 2 <= len(held_out) <= 4 and all(8_000 <= len(piece) <= 40_000 for piece in held_out)
  assert "\n".join(piece for _, piece in pieces) == document  # cut at line ends


@pytest.mark.parametrize("sizes", [[1_000, 1], [3] * 40, [50_000], [2], [1, 1], [9], [17, 0, 23], [400, 9, 9, 400]])
def test_each_split_gets_something(sizes):
  windows = splits.windows(sizes)
  found = list(
    itertools.chain.from_iterable(windows.pieces([["x" * size]], number) for number, size in enumerate(sizes) if size)
  )
  assert {split for split, _ in found} == {"train", "validation"}
  assert sum(len(piece) for _, piece in found) == sum(sizes)


def test_of_a_single_character_nothing_can_be_held_out(tmp_path):
  assert splits.windows([1]) is None and splits.windows([]) is None
  (tmp_path / "a.txt").write_text("x")
  assert both(tmp_path / "a.txt") == {"train": ["x"], "validation": []}


def test_an_empty_file_among_few_documents_is_named(tmp_path):
  (tmp_path / "a.txt").write_text("Some text, and more of it.")
  (tmp_path / "b.txt").write_text(" \n")
  with pytest.raises(errors.InputError, match="b.txt holds no text"):
    both(tmp_path)
