"""The door for paths that users name."""

import pathlib
import subprocess
import sys

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
    ("gs://bucket/run", "must be a path on this machine"),
    ("s3://bucket", "must be a path on this machine"),
    ("gs:/bucket/run", "must be a path on this machine"),
    ("file:///x", "knows local paths"),
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


def test_paths_into_buckets():
  path = paths.named("gs://my-bucket/runs/a b/中文/", "--workdir")
  assert str(path) == "gs://my-bucket/runs/a b/中文" and path.key == "runs/a b/中文" and path.name == "中文"
  assert path.parent / "x" == paths.named("gs://my-bucket/runs/a b/x") and path.parents[-1].key == ""
  assert path.relative_to(path.parents[1]).as_posix() == "a b/中文" and not path.is_relative_to(path / "x")
  assert path.with_name("y.json").suffix == ".json" and paths.named(path) is path
  assert paths.named("s3://my-bucket") != paths.named("gs://my-bucket") and isinstance(paths.named("x"), pathlib.Path)
  with pytest.raises(TypeError):  # of all that would take it for a local folder called "gs:"
    open(path)  # noqa: SIM115


@pytest.mark.parametrize(
  "path, words",
  [
    ("gs://b/run", "a bucket is named as gs://BUCKET/FOLDER"),
    ("gs:///run", "a bucket is named as"),
    ("gs:/bucket/run", "a bucket is named as"),
    ("s3://Bucket/run", "a bucket is named as"),
    ("gs://bucket/a/../b", "no empty parts"),
    ("gs://bucket/a//b", "no empty parts"),
    ("gs://bucket/a\nb", "no control characters"),
    ("gs://bucket/" + "x" * 2000, "1024 bytes"),
    ("hf://org/model", "glmjax knows local paths, gs://"),
    ("az://bucket/x", "glmjax knows local paths, gs://"),
  ],
)
def test_refuses_what_is_no_path_into_a_bucket(path, words):
  with pytest.raises(errors.InputError, match=words) as caught:
    paths.named(path, "--workdir")
  assert "\n" not in str(caught.value) and str(caught.value).startswith("--workdir")


@pytest.mark.parametrize("path", ["gs://bucket/tokenizer", paths.named("gs://bucket/tokenizer")])
def test_what_must_be_on_this_machine_says_what_to_do(path):
  """As seqio's vocabulary, which TensorFlow opens itself."""
  with pytest.raises(errors.InputError, match="^x is gs://bucket/tokenizer: .* on this machine.* first copy there"):
    paths.local(path, "x")


def test_nothing_is_asked_of_a_path_that_a_bucket_lacks():
  """The stricter rule is for paths only: it knows too little of JAX's and Flax's types."""
  command = [sys.executable, "-m", "pyrefly", "check", "--error=missing-attribute", "--output-format=min-text"]
  done = subprocess.run(
    [*command, f"--python-interpreter-path={sys.executable}"],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  lines = done.stdout.splitlines()
  assert any("missing-attribute" in line for line in lines), done.stdout + done.stderr
  assert not [line for line in lines if "`BucketPath`" in line]
