"""Helper processes: a signal to the whole job, however early, is the parent's to answer."""

import functools
import operator
import os
import signal

import pytest

from glmjax.data import workers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_right_at_the_start_ends_no_worker(number: int) -> None:
  before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
  worker = workers.Worker("adder", functools.partial, operator.add, 1)
  os.kill(worker.pid, number)  # before its interpreter can have come to `serve`
  try:
    worker.request(2)
    assert worker.result() == 3
  finally:
    worker.close()
  assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
