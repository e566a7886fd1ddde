"""Versions of what computes, and the commit of a checkout."""

import pathlib
import re
import subprocess

import pytest

from glmjax import versions


@pytest.fixture(name="checkout")
def _checkout(tmp_path, monkeypatch):
  """A checkout with the package in it, and one commit."""
  (tmp_path / "glmjax").mkdir()
  (tmp_path / "glmjax" / "a.py").write_text("")
  monkeypatch.setattr(versions, "_PACKAGE", tmp_path / "glmjax")
  versions.commit.cache_clear()
  yield tmp_path
  versions.commit.cache_clear()


def git(folder: pathlib.Path, *words: str) -> str:
  who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
  return subprocess.run(["git", "-C", folder, *who, *words], capture_output=True, text=True, check=True).stdout.strip()


def test_a_commit_and_whether_files_of_it_are_changed(checkout):
  git(checkout, "init", "-q")
  git(checkout, "add", ".")
  git(checkout, "commit", "-q", "-m", "one")
  git(checkout, "tag", "v1")
  head = git(checkout, "rev-parse", "HEAD")
  assert versions.commit() == head and re.fullmatch("[0-9a-f]{40}", head)
  (checkout / "glmjax" / "a.py").write_text("changed = True\n")
  assert versions.commit() == head  # as it was when it was imported, or nearly
  versions.commit.cache_clear()
  assert versions.commit() == f"{head}-dirty"


def test_what_is_no_checkout_has_none(checkout, monkeypatch):
  """Also one without any commit, and where there is no git."""
  assert versions.commit() is None
  git(checkout, "init", "-q")
  versions.commit.cache_clear()
  assert versions.commit() is None
  monkeypatch.setenv("PATH", str(checkout))
  versions.commit.cache_clear()
  assert versions.commit() is None


def test_packages_that_are_not_installed_are_left_out():
  found = versions.of(["numpy", "no-such-package"])
  assert list(found) == ["python", "numpy"] and versions.installed("no-such-package") is None
