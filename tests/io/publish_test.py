"""Files that appear whole or not at all."""

import json
import os
import subprocess
import sys

import bucket_server
import pytest

from glmjax import errors
from glmjax.io import paths
from glmjax.io import publish


def test_replaces_and_leaves_nothing_else(tmp_path):
  path = tmp_path / "x.json"
  for content in ({"a": 1}, {"text": "你好", "list": [1, None]}):
    publish.write_json(path, content)
    assert json.loads(path.read_bytes()) == content and "\\u" not in path.read_text(encoding="utf-8")
  assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("where", ["block", "fsync", "replace"])
def test_what_fails_changes_nothing(tmp_path, monkeypatch, where):
  path = tmp_path / "x"
  publish.write_text(path, "old")

  def fail(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    if where != "block":
      patch.setattr(os, where, fail)
    with pytest.raises(OSError, match="No space"):
      with publish.file(path) as file:
        file.write(b"new")
        if where == "block":
          fail()
  assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_interrupted_block(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    with publish.file(tmp_path / "x"):
      raise KeyboardInterrupt
  assert not os.listdir(tmp_path)


def test_what_killed_writers_left_is_removed(tmp_path):
  """At the next write to that name; those that live, or write other files or elsewhere, are left alone."""
  code = (
    "import os, signal, sys; from glmjax.io import publish\n"
    "with publish.file(sys.argv[1]) as file:\n"
    "  file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
  )
  for name in ("x", "y"):
    subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
  [of_x, of_y] = sorted(os.listdir(tmp_path))
  assert of_x.startswith(".x.") and of_y.startswith(".y.")
  dead = of_x.split(".")[-2]
  kept = {of_y, of_x.replace(f".{dead}.", f".{os.getppid()}."), f".x.elsewhere.{dead}.tmp", f"{of_x}2", f".x.{dead}"}
  for name in kept:
    (tmp_path / name).write_text("")
  with publish.file(tmp_path / "x") as file:
    file.write(b"whole")
    assert len(set(os.listdir(tmp_path)) - kept) == 1
  assert set(os.listdir(tmp_path)) == kept | {"x"} and (tmp_path / "x").read_text() == "whole"


def test_folder_appears_whole(tmp_path):
  out = tmp_path / "out"
  with publish.folder(out) as temporary:
    (temporary / "a").mkdir()
    (temporary / "a" / "b").write_text("1")
    assert not out.exists() and publish.is_unfinished(temporary.name)
  assert (out / "a" / "b").read_text() == "1" and os.listdir(tmp_path) == ["out"]
  with pytest.raises(errors.InputError, match="come to be there"):
    with publish.folder(out) as temporary:
      (temporary / "c").write_text("2")
  with pytest.raises(ZeroDivisionError):
    with publish.folder(out, overwrite=True) as temporary:
      raise ZeroDivisionError
  assert (out / "a" / "b").read_text() == "1" and os.listdir(tmp_path) == ["out"]
  with publish.folder(out, overwrite=True) as temporary:
    (temporary / "c").write_text("2")
  assert os.listdir(out) == ["c"] and os.listdir(tmp_path) == ["out"]


def test_folder_killed_between_two_renames(tmp_path):
  """A reader is told where the old one is; the next writer puts it back first."""
  out = tmp_path / "out"
  code = (
    "import os, pathlib, signal, sys; from glmjax.io import publish\n"
    "os.rename, rename = None, os.rename\n"
    "def once(self, target):\n"
    "  rename(self, target); os.kill(os.getpid(), signal.SIGKILL)\n"
    "pathlib.Path.rename = once\n"
    "with publish.folder(sys.argv[1], overwrite=True) as folder:\n"
    "  (folder / 'new').write_text('')"
  )
  with publish.folder(out) as temporary:
    (temporary / "old").write_text("")
  subprocess.run([sys.executable, "-c", code, str(out)], check=False)
  assert not out.exists() and list(publish.interrupted(out).iterdir())[0].name == "old"
  with pytest.raises(ZeroDivisionError):
    with publish.folder(out, overwrite=True):
      raise ZeroDivisionError
  assert os.listdir(out) == ["old"] and os.listdir(tmp_path) == ["out"] and publish.interrupted(out) is None


def test_a_folder_in_a_bucket_appears_with_its_last_file(server):
  out = paths.named("gs://bucket/out")
  with publish.folder(out, "last.json") as folder:
    (folder / "a" / "b").write_text("1")
    assert publish.in_work(out)
    publish.finish(folder / "last.json", {})
  assert server.keys() == ["out/a/b", "out/last.json"] and not publish.in_work(out)
  with pytest.raises(errors.InputError, match="come to be there"):
    with publish.folder(out, "last.json"):
      pass
  with pytest.raises(ZeroDivisionError):
    with publish.folder(out, "last.json", overwrite=True) as folder:
      (folder / "c").write_text("2")
      raise ZeroDivisionError
  assert server.keys() == []


def test_who_comes_late_in_a_bucket_leaves_the_other_s_folder(server):
  out = paths.named("gs://bucket/out")
  with pytest.raises(errors.InputError, match="was written by another process"):
    with publish.folder(out, "last.json") as folder:
      (folder / "mine").write_text("1")
      server.put("out/last.json", b"{}")
      publish.finish(folder / "last.json", {})
  assert "out/last.json" in server.keys()


@pytest.mark.parametrize("killed_after", range(5))
def test_a_kill_while_a_folder_in_a_bucket_is_emptied(server, killed_after):
  """Whatever was deleted: the note stays to the last, and the next writer goes on."""
  for name in ("a", "b", "last.json"):
    server.put(f"out/{name}", b"{}")
  left = iter(range(killed_after))

  def fault(method, path):
    refused = method in ("DELETE", "PUT") and next(left, None) is None
    return bucket_server.Fault(status=403) if refused else None

  server.fault = fault
  with pytest.raises((OSError, errors.InputError)):
    with publish.folder(paths.named("gs://bucket/out"), "last.json", overwrite=True):
      raise OSError("nothing more comes through")
  server.fault = lambda method, path: None
  whole = "out/last.json" in server.keys()
  assert whole or "out/.unfinished" in server.keys() or server.keys() == []
  publish.sweep(paths.named("gs://bucket/out"))
  assert whole == (server.keys() != [])
