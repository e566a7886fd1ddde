"""The curve of a run under way: drawn in notebooks alone, of what is written meanwhile."""

import json
import sys
import time
import types

import pytest

from glmjax import errors
from glmjax.evaluate import live
from glmjax.io import progress

CLEARED = {"text/plain": ""}


def line(step, loss=2.0):
  record = {"step": step, "samples_seen": step, "tokens_seen": step, "loss": loss / step, "loss_mask": loss / step}
  return json.dumps(record | {"tokens_per_second": 1.0, "model_flops_per_second": 1.0}) + "\n"


@pytest.fixture
def shown(monkeypatch):
  """What a notebook would show in place of "training ...": makes this program one."""
  shown = []
  handle = types.SimpleNamespace(update=lambda value, raw=False: shown.append(value))
  ipython = types.SimpleNamespace(
    version_info=(9, 0), display=types.SimpleNamespace(display=lambda *values, **named: handle)
  )
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
  assert shown == [CLEARED]


def test_a_mistake_clears_what_stands_below_the_cell(tmp_path, shown):
  with pytest.raises(errors.InputError, match="no such file"), live.curve(tmp_path / "metrics.jsonl"):
    raise errors.InputError("no such file")
  assert shown == [CLEARED]


def test_a_picture_that_fails_replaces_neither_result_nor_error(tmp_path, shown, monkeypatch, caplog):
  def fail(lines):
    raise ZeroDivisionError("in the picture")

  monkeypatch.setattr(live.report, "loss_picture", fail)
  monkeypatch.setattr(live, "SECONDS", 0.01)
  path = tmp_path / "metrics.jsonl"
  with pytest.raises(errors.Diverged, match="at step 3"), live.curve(path):
    path.write_text(line(1) + line(2), encoding="utf-8")
    deadline = time.monotonic() + 60
    while not caplog.messages and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.1)
    assert len(caplog.messages) == 1  # the thread has ended
    raise errors.Diverged("at step 3", 3, (1, 2), "loss")
  assert caplog.messages == ["the curve cannot be drawn: ZeroDivisionError: in the picture"] * 2


def test_damaged_lines_are_told_of_once(tmp_path, shown, monkeypatch, caplog):
  monkeypatch.setattr(live, "SECONDS", 0.01)
  path = tmp_path / "metrics.jsonl"
  with live.curve(path):
    path.write_text(line(1) + "damaged\n" + line(2), encoding="utf-8")
    deadline = time.monotonic() + 60
    while len(shown) < 2 and time.monotonic() < deadline:
      time.sleep(0.01)
  assert len(shown) > 2 and len(caplog.messages) == 1 and "line 2: damaged" in caplog.text


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_a_loss_without_a_place_on_the_scale_is_drawn_at_its_foot(tmp_path, shown, loss):
  with live.curve(tmp_path / "metrics.jsonl"):
    (tmp_path / "metrics.jsonl").write_text(line(1) + line(2, loss) + line(3, loss), encoding="utf-8")
  assert len(shown) == 1 and shown[0].png


def test_elsewhere_nothing_is_shown(tmp_path, capsys):
  with live.curve(tmp_path / "metrics.jsonl"):
    (tmp_path / "metrics.jsonl").write_text(line(1), encoding="utf-8")
  assert capsys.readouterr() == ("", "")
