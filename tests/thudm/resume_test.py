"""A killed import goes on where it stopped, and the result is the same."""

import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import killed_imports
import pytest

from glmjax import errors
from glmjax.checkpoint import blocks
from glmjax.checkpoint import export
from glmjax.checkpoint import load as load_lib
from glmjax.checkpoint import stored_weights
from glmjax.io import publish
from glmjax.thudm import load
from glmjax.thudm import source as source_lib


@pytest.fixture(name="few")
def _few(monkeypatch):
  """Blocks small enough for a tiny model to have many, one at a time."""
  monkeypatch.setattr(stored_weights, "ELEMENTS", 4096)
  monkeypatch.setattr(blocks, "_WORKERS", 1)


@pytest.fixture(name="limit_files")
def _limit_files():
  """limit_files(bytes): files cannot grow beyond that; None: as before."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or limits[0], limits[1]))
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_takes_no_more(make, tmp_path, few, limit_files):
  """tensorstore's errors are told like Python's own."""
  folder = make(tmp_path / "source", "chatglm-6b")
  limit_files(7000)  # largest blocks have 8 kB
  with pytest.raises(errors.InputError, match=r"written \(the file may grow no further.*\): the same command goes on"):
    load.import_model("chatglm-6b", folder, tmp_path / "out")
  limit_files(None)
  load.import_model("chatglm-6b", folder, tmp_path / "out")
  load.import_model("chatglm-6b", folder, tmp_path / "whole")
  assert_equal(tmp_path / "out", tmp_path / "whole")


def assert_equal(a: pathlib.Path, b: pathlib.Path) -> None:
  chex.assert_trees_all_equal(load_lib.load(a).params, load_lib.load(b).params)


@pytest.mark.parametrize("family, bits", [("chatglm-6b", 4), ("glm-130b", None)])
def test_goes_on(make, tmp_path, monkeypatch, few, caplog, family, bits):
  caplog.set_level("INFO", "glmjax")
  folder = make(tmp_path / "source", family)
  load.import_model(family, folder, tmp_path / "whole", bits=bits)
  with monkeypatch.context() as patch:
    total = len(killed_imports.stop_after(patch, 10**9)) or None
    load.import_model(family, folder, tmp_path / "counted", bits=bits)
  done = 0
  for count in (5, 7):
    with monkeypatch.context() as patch:
      names = killed_imports.stop_after(patch, count)
      with pytest.raises(killed_imports.Killed):
        load.import_model(family, folder, tmp_path / "out", bits=bits)
      done += len(names)
    assert not (tmp_path / "out").exists()
    assert publish.begun(tmp_path / ".out.importing")[export.PLAN]
  with open(tmp_path / ".out.importing/params/journal.jsonl", "ab") as file:
    file.write(b'{"block": "layers/ml')  # cut off by the kill
  with monkeypatch.context() as patch:
    names = killed_imports.stop_after(patch, 10**9)
    load.import_model(family, folder, tmp_path / "out", bits=bits)
  assert "going on with the import that stopped" in caplog.text
  assert total is None and len(names) + done == sum(
    len(list(w.regions(4096))) for w in source_lib.open_source(family, folder).weights(bits, None)
  )
  assert_equal(tmp_path / "out", tmp_path / "whole")
  assert not list(tmp_path.glob(".out*"))


def test_what_is_there_is_verified(make, tmp_path, monkeypatch, few):
  folder = make(tmp_path / "source", "chatglm-6b")
  with monkeypatch.context() as patch:
    killed_imports.stop_after(patch, 6)
    with pytest.raises(killed_imports.Killed):
      load.import_model("chatglm-6b", folder, tmp_path / "out")
  params = tmp_path / ".out.importing/params"
  damaged = params / "embedding.table" / "0.0"
  damaged.write_bytes(bytes(damaged.stat().st_size))
  (params / "embedding.table" / "1.0").unlink()
  load.import_model("chatglm-6b", folder, tmp_path / "out")
  load.import_model("chatglm-6b", folder, tmp_path / "whole")
  assert_equal(tmp_path / "out", tmp_path / "whole")


def test_the_same_files_by_another_name(make, tmp_path, monkeypatch, few, caplog):
  """Relative, absolute or through a link: the import goes on."""
  caplog.set_level("INFO", "glmjax")
  make(tmp_path / "source", "chatglm-6b")
  (tmp_path / "link").symlink_to("source")
  monkeypatch.chdir(tmp_path)
  for source in (pathlib.Path("source"), tmp_path / "source", pathlib.Path("link")):
    with monkeypatch.context() as patch:
      killed_imports.stop_after(patch, 6)
      with pytest.raises(killed_imports.Killed):
        load.import_model("chatglm-6b", source, tmp_path / "out")
  assert caplog.text.count("going on with the import that stopped") == 2


def test_other_files_or_options_start_anew(make, tmp_path, monkeypatch, few, caplog):
  caplog.set_level("INFO", "glmjax")
  folder = make(tmp_path / "source", "chatglm-6b")
  with monkeypatch.context() as patch:
    killed_imports.stop_after(patch, 6)
    with pytest.raises(killed_imports.Killed):
      load.import_model("chatglm-6b", folder, tmp_path / "out")
  journal = tmp_path / ".out.importing/params/journal.jsonl"
  before = journal.read_bytes()
  with pytest.raises(errors.InputError, match="other files or options that stopped: give the same again"):
    load.import_model("chatglm-6b", folder, tmp_path / "out", bits=8)
  assert journal.read_bytes() == before
  load.import_model("chatglm-6b", folder, tmp_path / "out", bits=8, overwrite=True)
  assert "going on" not in caplog.text
  load.import_model("chatglm-6b", folder, tmp_path / "whole", bits=8)
  assert_equal(tmp_path / "out", tmp_path / "whole")


def test_killed_just_before_the_end(make, tmp_path, monkeypatch, few):
  """All arrays are there, the folder's checksums are not."""
  folder = make(tmp_path / "source", "chatglm-6b")
  with monkeypatch.context() as patch:
    patch.setattr(publish, "put_in_place", lambda *_: (_ for _ in ()).throw(killed_imports.Killed))
    with pytest.raises(killed_imports.Killed):
      load.import_model("chatglm-6b", folder, tmp_path / "out")
  load.import_model("chatglm-6b", folder, tmp_path / "out")
  assert load_lib.load(tmp_path / "out").params


def test_two_at_once(make, tmp_path):
  """An import and an export keep each other out as well."""
  folder = make(tmp_path / "source", "chatglm-6b")
  with export.claimed(tmp_path / "out", False, tmp_path / "other"):
    with pytest.raises(errors.InputError, match=f"is being written by another .*process {os.getpid()} on"):
      load.import_model("chatglm-6b", folder, tmp_path / "out")
  load.import_model("chatglm-6b", folder, tmp_path / "out")
  assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_kill_for_real(make, tmp_path, few):
  """SIGKILL at any moment: the folder is not there, or it is whole."""
  folder = make(tmp_path / "source", "chatglm-6b", num_layers=6)
  code = (
    "import sys; from glmjax.checkpoint import stored_weights; stored_weights.ELEMENTS = 4096; "
    "from glmjax.thudm import load; print('go', flush=True); load.import_model('chatglm-6b', *sys.argv[1:])"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code, str(folder), str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
  )
  process.stdout.readline()
  journal = tmp_path / ".out.importing/params/journal.jsonl"
  deadline = time.time() + 60
  while time.time() < deadline and not (journal.exists() and journal.stat().st_size > 2000):
    time.sleep(0.005)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  process.stdout.close()
  assert not (tmp_path / "out").exists()
  load.import_model("chatglm-6b", folder, tmp_path / "out")
  load.import_model("chatglm-6b", folder, tmp_path / "whole")
  assert_equal(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("bits", [None, 4])
def test_memory_limit(make, tmp_path, monkeypatch, bits):
  """Smaller blocks within a smaller limit, the same arrays; what cannot be kept is refused before any writing."""
  folder = make(tmp_path / "source", "chatglm-6b")
  monkeypatch.setattr(stored_weights, "_FIXED", 0)
  monkeypatch.setattr(stored_weights, "_LEAST", 1)
  weights = source_lib.open_source("chatglm-6b", folder).weights(bits, None)
  least = max(weight.smallest for weight in weights)

  def gib(elements):
    return elements * stored_weights._PER_ELEMENT / 2**30

  for elements in (least, 3 * least, 10**9):
    found = stored_weights.elements_within(gib(elements), weights)
    assert found == min(elements, stored_weights.ELEMENTS)
    assert max(np.prod([s.stop - s.start for s in r]) for w in weights for r in w.regions(found)) <= found
  load.import_model("chatglm-6b", folder, tmp_path / "small", bits=bits, memory_limit_gib=gib(least))
  load.import_model("chatglm-6b", folder, tmp_path / "whole", bits=bits)
  assert_equal(tmp_path / "small", tmp_path / "whole")

  def count(name):
    return len(list((tmp_path / name / "params").rglob("*")))

  assert count("small") > count("whole")
  for limit in (gib(least) * 0.9, 0, -1, float("nan")):
    with pytest.raises(errors.InputError, match="memory_limit_gib is .* GiB at least: give as much, or leave it out"):
      load.import_model("chatglm-6b", folder, tmp_path / "refused", bits=bits, memory_limit_gib=limit)
  assert not list(tmp_path.glob("*refused*"))


def test_no_limit_below_what_the_program_itself_takes(make, tmp_path):
  folder = make(tmp_path / "source", "chatglm-6b")
  with pytest.raises(errors.InputError, match="memory_limit_gib is 0.2, and these weights take 0.5"):
    load.import_model("chatglm-6b", folder, tmp_path / "refused", memory_limit_gib=0.2)
