"""The curve of a run under way: drawn in notebooks alone, of what is written meanwhile."""

import json
import sys
import time
import types

import pytest

from glmjax.evaluate import live
from glmjax.io import progress


def line(step):
  record = {"step": step, "samples_seen": step, "tokens_seen": step, "loss": 2.0 / step, "loss_mask": 2.0 / step}
  return json.dumps(record | {"tokens_per_second": 1.0, "model_flops_per_second": 1.0}) + "\n"


@pytest.fixture
def shown(monkeypatch):
  """What a notebook would show: makes this program one."""
  shown = []
  handle = types.SimpleNamespace(update=shown.append)
  ipython = types.SimpleNamespace(display=types.SimpleNamespace(display=lambda *values, **named: handle))
  monkeypatch.setitem(sys.modules, "IPython", ipython)
  monkeypatch.setattr(progress, "is_notebook", lambda: True)
  return shown


def test_draws_while_the_run_writes_and_when_it_ends(tmp_path, monkeypatch, shown):
  monkeypatch.setattr(live, "SECONDS", 0.01)
  path = tmp_path / "metrics.jsonl"
  with live.curve(path):
    path.write_text(line(1) + line(2), encoding="utf-8")
    deadline = time.monotonic() + 60
    while not shown and time.monotonic() < deadline:
      time.sleep(0.01)
    assert shown
    path.write_text(line(1) + line(2) + line(3), encoding="utf-8")
  assert shown[-1]._repr_png_() != shown[0]._repr_png_()


def test_draws_what_was_written_before_an_interrupt(tmp_path, shown):
  with pytest.raises(KeyboardInterrupt), live.curve(tmp_path / "metrics.jsonl"):
    (tmp_path / "metrics.jsonl").write_text(line(1) + line(2), encoding="utf-8")
    raise KeyboardInterrupt
  assert len(shown) == 1


def test_the_run_before_is_not_drawn(tmp_path, shown):
  (tmp_path / "metrics.jsonl").write_text(line(1) + line(2), encoding="utf-8")
  with live.curve(tmp_path / "metrics.jsonl"):
    pass
  assert not shown


def test_elsewhere_nothing_is_shown(tmp_path, capsys):
  with live.curve(tmp_path / "metrics.jsonl"):
    (tmp_path / "metrics.jsonl").write_text(line(1), encoding="utf-8")
  assert capsys.readouterr() == ("", "")
