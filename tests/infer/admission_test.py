"""Memory for caches: what never fits is refused in words, what fits later waits, and no text changes."""

import numpy as np
import pytest
from infer import scheduler_test

from glmjax import errors
from glmjax.infer import lanes
from glmjax.infer import scheduler
from glmjax.io import memory

LANES = scheduler_test.LANES


def bounded(slots: int, drafts: int = 0, most: int = 4 * LANES) -> tuple[scheduler.Scheduler, int]:
  """A scheduler of caches that have so many slots in all, and its bytes."""
  model = scheduler_test.model(drafts)
  size = lanes.slot_bytes(model.runner, LANES) * slots
  return model.scheduler(LANES, most=most, cache_bytes=size, context_bytes=0), size


@pytest.mark.parametrize("slots, drafts", [(64, 0), (128, 0), (192, 0), (128, 3), (256, 3)])
def test_caches_keep_within_their_bytes(slots: int, drafts: int):
  requests, texts = scheduler_test.expected()
  rows, most = bounded(slots, drafts)
  one = lanes.slot_bytes(rows._runner, LANES)
  answers = [rows.submit(request) for request in requests]
  together = 0
  while rows.busy:
    rows.advance(2, fill=True)
    assert sum(each.slots for each in rows._sets) * one <= most
    together = max(together, len(rows._held))
  assert [answer.tokens for answer in answers] == texts
  assert together > LANES or slots < 192


def test_what_never_fits_is_refused():
  rows, _ = bounded(32)
  requests = scheduler_test.expected()[0]
  long = next(each for each in requests if len(each.prompt.tokens) > 33)
  with pytest.raises(errors.InputError, match=r"a prompt of \d+ tokens and \d+ more take .* MiB of cache"):
    rows.submit(long)
  assert not rows.busy
  rows, _ = bounded(64)
  rows.submit(long)


def test_a_set_that_holds_nobody_makes_room():
  """Short requests' caches do not keep out a long one once they are gone."""
  requests, texts = scheduler_test.expected()
  size = {i: len(each.prompt.tokens) + each.limit for i, each in enumerate(requests)}
  short = [i for i in size if size[i] <= 32][: 2 * LANES]
  long = max(size, key=size.get)
  rows, _ = bounded(64)
  for i in short:
    rows.submit(requests[i])
  answer = rows.submit(requests[long])
  while rows.busy:
    rows.advance()
  assert answer.tokens == texts[long]


def test_the_longest_prompt_of_a_filling_is_known_before():
  ask, r = scheduler_test.model(), np.random.default_rng(0)
  for _ in range(200):
    blanks, most = int(r.integers(1, 4)), int(r.integers(1, 30))
    row = ask.encode("[MASK]".join("abcdef"[: r.integers(0, 6)] for _ in range(blanks + 1)))
    filling = ask.filling(row, most)
    longest, limit = filling.longest()
    while (blank := filling.blank()) is not None:
      prompt, allowed = blank
      assert len(prompt.tokens) <= longest
      assert len(prompt.tokens) + allowed <= longest + limit
      filling.take([12] * int(r.integers(1, allowed + 1)))


def test_memory_of_the_host_and_of_a_container(monkeypatch, tmp_path):
  found = memory.of_host()
  assert 0 < found["available"] < found["total"]
  assert isinstance(scheduler_test.model().runner.free_bytes(), int)
  monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
  for name, text in (
    ("memory.max", "1000\n"),
    ("memory.current", "700\n"),
    ("memory.stat", "anon 5\ninactive_file 100\n"),
  ):
    (tmp_path / name).write_text(text)
  assert memory.available() == 400
  assert memory.available(30) == 370 and memory.available(500) == 300  # of files no more than counted as free
  (tmp_path / "memory.max").write_text("max\n")
  assert memory.available() > 1 << 20
  monkeypatch.setattr(memory, "_HOST", tmp_path / "none")
  assert memory.available() is None and memory.of_host() == {}


def test_as_many_lanes_as_hold_the_longest_text():
  runner = scheduler_test.model().runner
  whole = 64 * lanes.slot_bytes(runner, 1)
  assert [scheduler.lanes_that_fit(runner, 8, n * whole, 0) for n in (100, 8, 7, 2, 1, 0)] == [8, 8, 4, 2, 1, 1]
