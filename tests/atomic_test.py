"""Files that appear whole or not at all."""

import json
import os

import pytest

from glmjax import atomic


def test_replaces_and_leaves_nothing_else(tmp_path):
  path = tmp_path / "x.json"
  for content in ({"a": 1}, {"text": "你好", "list": [1, None]}):
    atomic.write_json(path, content)
    assert json.loads(path.read_bytes()) == content and "\\u" not in path.read_text(encoding="utf-8")
  assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("where", ["block", "fsync", "replace"])
def test_what_fails_changes_nothing(tmp_path, monkeypatch, where):
  path = tmp_path / "x"
  atomic.write_text(path, "old")

  def fail(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    if where != "block":
      patch.setattr(os, where, fail)
    with pytest.raises(OSError, match="No space"):
      with atomic.writing(path) as file:
        file.write(b"new")
        if where == "block":
          fail()
  assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_interrupted_block(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    with atomic.writing(tmp_path / "x"):
      raise KeyboardInterrupt
  assert not os.listdir(tmp_path)
