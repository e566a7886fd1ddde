"""Progress is said now and then, and not where there is none to tell."""

import importlib.util
import logging
import sys
import types

import pytest

from glmjax.io import progress


def test_says_how_far_it_is(caplog, monkeypatch):
  now = [0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  caplog.set_level(logging.INFO, "glmjax")
  told = progress.Progress(12_000, "texts scored", seconds=5_000)
  for done in range(1, 12_001):
    now[0] += 1
    told.at(done)
  assert caplog.messages == ["5,000 of 12,000 texts scored, ETA 1:56:40", "10,000 of 12,000 texts scored, ETA 33:20"]


def test_says_how_long_it_takes_where_some_take_longer(caplog, monkeypatch):
  now = [0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  caplog.set_level(logging.INFO, "glmjax")
  told = progress.Progress(10, "texts scored")
  now[0] = 60
  told.at(2, share=0.75)
  assert caplog.messages == ["2 of 10 texts scored, ETA 0:20"]


def test_a_short_loop_says_nothing(caplog):
  caplog.set_level(logging.INFO, "glmjax")
  told = progress.Progress(3, "texts scored")
  for done in (1, 2, 3):
    told.at(done)
  assert not caplog.messages


@pytest.fixture
def notebook(monkeypatch):
  """Makes this program a notebook's, in which ipywidgets is not installed."""
  shell = types.SimpleNamespace(kernel=None)
  monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("disable, shown", [(None, True), (False, True), (True, False)])
def test_a_notebooks_bar_lies_below_its_cell(notebook, capsys, disable, shown):
  assert progress.is_notebook() and progress.stream() is sys.stdout
  assert list(progress.bar(range(3), desc="some", disable=disable)) == [0, 1, 2]
  out, err = capsys.readouterr()
  assert ("some: 100%" in out) is shown and not err


@pytest.mark.parametrize("disable, shown", [(None, False), (False, True), (True, False)])
def test_other_programs_bars_are_on_standard_error(capsys, disable, shown):
  assert not progress.is_notebook() and progress.stream() is sys.stderr
  assert list(progress.bar(range(3), desc="some", disable=disable)) == [0, 1, 2]
  out, err = capsys.readouterr()
  assert ("some: 100%" in err) is shown and not out


def test_a_file_is_no_place_for_a_bar(capsys):
  assert list(progress.bar(range(3), desc="some")) == [0, 1, 2]
  assert capsys.readouterr() == ("", "")


def test_a_notebook_is(notebook, capsys):
  assert list(progress.bar(range(3), desc="some")) == [0, 1, 2]
  assert "some: 100%" in capsys.readouterr().out


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch):
  monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: object()))
  assert not progress.is_notebook()
