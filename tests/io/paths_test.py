"""The door for paths that users name."""

import pathlib

import pytest

from glmjax import errors
from glmjax.io import paths


def test_takes_paths_and_expands_home(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert paths.local("~/runs") == tmp_path / "runs" and paths.local("a b/中文") == pathlib.Path("a b/中文")
  assert paths.local(tmp_path) == tmp_path and paths.local("x:y") == pathlib.Path("x:y")


@pytest.mark.parametrize(
  "path, words",
  [
    ("", "--workdir is empty"),
    ("  ", "is empty"),
    ("gs://b/run", "local paths only"),
    ("s3://b", "local paths only"),
    ("gs:/b/run", "local paths only"),
    ("file:///x", "local paths only"),
    ("a\0b", "NUL"),
    ("a\ud800", "surrogate"),
    ("x" * 256, "256 bytes"),
    ("中" * 86, "258 bytes"),
    ("~nobody-of-that-name/x", "there is no user"),
    (None, "give a path"),
    (3, "give a path"),
    (b"x", "as text"),
    (["x"], "give a path"),
  ],
)
def test_refuses_in_one_line(path, words):
  with pytest.raises(errors.InputError, match=words) as caught:
    paths.local(path, "--workdir")
  assert "\n" not in str(caught.value) and str(caught.value).startswith("--workdir")
