"""Progress is said now and then, and not where there is none to tell."""

import logging

from glmjax.io import progress


def test_says_how_far_it_is(caplog, monkeypatch):
  now = [0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  caplog.set_level(logging.INFO, "glmjax")
  told = progress.Progress(12_000, "texts scored", seconds=5_000)
  for done in range(1, 12_001):
    now[0] += 1
    told.at(done)
  assert caplog.messages == ["5,000 of 12,000 texts scored", "10,000 of 12,000 texts scored"]


def test_a_short_loop_says_nothing(caplog):
  caplog.set_level(logging.INFO, "glmjax")
  told = progress.Progress(3, "texts scored")
  for done in (1, 2, 3):
    told.at(done)
  assert not caplog.messages
