"""Compiled programs on disk: whose folder, what is found again, what a disk may do to them."""

import os
import pathlib
import subprocess
import sys

import pytest

from glmjax import errors
from glmjax import programs

# Adds up and multiplies in two programs, and prints the bits of what comes out and what was counted.
CODE = """
import jax, jax.numpy as jnp
from glmjax.cli import process
process.begin()
process.keep_programs()
from glmjax import programs
x = jax.jit(lambda x: jnp.tanh(x @ x.T).sum(0) / 3)(jnp.linspace(-1, 1, 4096).reshape(64, 64))
print(jax.device_get(x).tobytes().hex())
print(programs.counts.needed, programs.counts.found)
"""


@pytest.fixture
def caches(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
  monkeypatch.delenv(programs.SWITCH)
  return tmp_path / "caches"


def start(**environment: str) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [sys.executable, "-c", CODE],
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def result(process: subprocess.Popen[str]) -> tuple[str, int, int]:
  """Returns the bits that CODE has printed, how many programs it needed, and how many it found."""
  out, said = process.communicate()
  assert process.returncode == 0 and not said, said
  bits, counts = out.split("\n")[:2]
  return bits, *map(int, counts.split())


def test_later_processes_find_them_and_compute_the_same_bits(caches):
  bits, needed, _ = result(start(GLMJAX_PROGRAMS="off"))
  assert needed == 0 and not caches.exists()
  both = [start(), start()]  # at once
  (one, needed, _), (other, _, _) = map(result, both)
  assert one == other == bits and needed > 0
  assert result(start()) == (bits, needed, needed)
  for folder in (programs.root(), programs.root().parent):
    assert folder.stat().st_mode & 0o777 == 0o700
  for number, (path, _) in enumerate(sorted(programs.files(programs.root()))):  # a disk's damages
    content = path.read_bytes()
    flipped = bytes([*content[:-9], content[-9] ^ 1, *content[-8:]])
    path.write_bytes((content[: len(content) // 2], b"", flipped)[number % 3])
  assert result(start()) == (bits, needed, 0)
  assert result(start()) == (bits, needed, needed)


def test_a_folder_that_is_no_model_is_refused_before_jax_is_loaded(tmp_path):
  code = (
    "import sys; from glmjax import cli; "
    f"print(cli.main(['generate', '--checkpoint={tmp_path}/none', '--prompt=x']), 'jax' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.split() == ["2", "False"] and "no such folder" in done.stderr


def test_another_kind_of_machine_has_its_own_folder(monkeypatch):
  names = set()
  for threads in ("1", "2"):
    monkeypatch.setenv("NPROC", threads)
    programs.machine.cache_clear()
    names.add(programs.machine())
  programs.machine.cache_clear()
  assert len(names) == 2


def test_what_jax_was_told_by_the_user_goes_first(caches, monkeypatch, caplog):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
  assert programs.keep() is None and not caches.exists() and not caplog.records
  assert "elsewhere" in programs.describe()["problem"]


def test_the_switch_is_off_or_nothing(monkeypatch):
  monkeypatch.setenv(programs.SWITCH, "on")
  with pytest.raises(errors.InputError, match="GLMJAX_PROGRAMS is 'on'"):
    programs.why_not()


@pytest.mark.usefixtures("caches")
def test_a_folder_that_others_may_write_into_is_refused_in_one_line(caplog):
  programs.root().mkdir(parents=True)
  programs.root().chmod(0o777)
  assert programs.keep() is None
  assert len(caplog.records) == 1 and "others may write into" in caplog.text
  assert not list(programs.root().iterdir())
  assert "others may write into" in programs.describe()["problem"]


@pytest.mark.usefixtures("caches")
def test_a_folder_of_another_user_is_refused(monkeypatch):
  monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
  with pytest.raises(errors.InputError, match="belongs to another user"):
    programs.open_root()


def test_where_no_folder_can_be_made_one_line_says_so(caches, caplog):
  caches.write_text("in the way")
  assert programs.keep() is None
  assert len(caplog.records) == 1 and "compiled programs are not kept" in caplog.text


def test_without_a_home_one_line_says_so(monkeypatch, caplog):
  """As in a container whose user has none."""
  monkeypatch.delenv(programs.SWITCH, raising=False)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

  def fail() -> pathlib.Path:
    raise RuntimeError("Could not determine home directory.")

  with monkeypatch.context() as context:
    context.setattr(pathlib.Path, "home", fail)
    assert programs.keep() is None
    assert programs.describe()["problem"] == "there is no home folder: set HOME or XDG_CACHE_HOME"
  assert len(caplog.records) == 1 and "there is no home folder" in caplog.text


@pytest.mark.usefixtures("caches")
def test_a_full_disk_is_told_once_and_leaves_nothing(monkeypatch, caplog):
  store = programs.Store(programs.open_root() / "here")

  def fail(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as context:
    context.setattr(os, "replace", fail)
    store.put("a", b"1")
    store.put("b", b"2")
  assert len(caplog.records) == 1 and "the disk is full" in caplog.text
  assert not list(programs.files(programs.root())) and store.get("a") is None


@pytest.mark.usefixtures("caches")
def test_what_was_not_used_goes_first():
  root = programs.open_root()
  older, newer = programs.Store(root / "one", 1000), programs.Store(root / "two", 1000)
  for number in range(3):
    older.put(f"old {number}", bytes(200))
  for path, found in programs.files(root):
    os.utime(path, (0, found.st_mtime - 100))
  assert older.get("old 1") == bytes(200)  # used: it is new again
  for number in range(3):
    newer.put(f"new {number}", bytes(200))
  assert sum(found.st_size for _, found in programs.files(root)) <= 1000
  assert older.get("old 1") and newer.get("new 2") and older.get("old 0") is None
  newer.put("too large", bytes(2000))
  assert newer.get("too large") is None and newer.get("new 2")
