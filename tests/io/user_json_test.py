"""The door for JSON that users wrote."""

import json
import os

import pytest

from glmjax import errors
from glmjax.io import user_json


@pytest.mark.parametrize("content", [{}, {"a": [1, None, {"中": 1.5}]}, {"x": "[" * 500}])
def test_takes_json(tmp_path, content):
  path = tmp_path / "x.json"
  path.write_text("\ufeff" + json.dumps(content, ensure_ascii=False), encoding="utf-8")
  assert user_json.read(path) == content == user_json.parse(json.dumps(content), "x")


def test_long_numbers_are_numbers():
  """Also where Python would not read them as integers."""
  found = user_json.parse('{"unused": ' + "9" * 5000 + ', "text": "a"}', "x")
  assert found["text"] == "a" and found["unused"] > 1e300


@pytest.mark.parametrize(
  "text, words",
  [
    ("[" * 101 + "]" * 101, "nested deeper than 100"),
    ("[" * 10**5, "nested deeper|not JSON"),
    ('{"a":' * 200 + "1" + "}" * 200, "nested deeper"),
    ("[1]", "a list, not an object"),
    ("3", "a number, not"),
    ("null", "null, not"),
    ('"x"', "a string, not"),
    ("", "not JSON"),
    (b"\xff", "not UTF-8 at byte 0"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
    (b"\n <!DOCTYPE html><html>", "a web page"),
    (b"<HTML>", "a web page"),
  ],
)
def test_refuses_in_one_line(text, words):
  with pytest.raises(errors.InputError, match=words) as caught:
    user_json.parse(text, "f.json:3", expected="expected {}")
  assert str(caught.value).startswith("f.json:3") and "\n" not in str(caught.value)


def test_100_levels_are_read():
  assert user_json.parse("[" * 100 + "]" * 100, "x", list)


def test_files_that_are_none(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  for name, words in (("missing", "no such file"), ("fifo", "no regular file"), (".", "no regular file")):
    with pytest.raises(errors.InputError, match=words):
      user_json.read(tmp_path / name)
  with open(tmp_path / "large", "wb") as file:
    file.truncate(user_json.LARGEST + 1)
  with pytest.raises(errors.InputError, match="at most"):
    user_json.read(tmp_path / "large")


def test_string_fields():
  assert user_json.string({"text": "x"}, "text", "f:1") == "x"
  for record, words in (({}, "no field"), ({"text": 3}, "not a string"), ({"text": "\ud800"}, "surrogate")):
    with pytest.raises(errors.InputError, match=words):
      user_json.string(record, "text", "f:1")
