"""Locks between processes."""

import os
import signal
import subprocess
import sys

import pytest

from glmjax import errors
from glmjax.io import lock

HOLD = (
  "import sys, time; from glmjax.io import lock\n"
  "with lock.held(sys.argv[1], 'x is in use'):\n  print('held', flush=True); time.sleep(60)"
)


def test_is_held_once_and_leaves_nothing(tmp_path):
  path = tmp_path / ".lock"
  with lock.held(path, "x is in use"):
    with pytest.raises(errors.InputError, match=rf"x is in use \(process {os.getpid()} on "):
      with lock.held(path, "x is in use"):
        pass
    assert path.exists()
  assert not path.exists()
  with lock.held(path, "x is in use"):
    pass


def test_a_killed_process_frees_it(tmp_path):
  path = tmp_path / ".lock"
  with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as process:
    process.stdout.readline()
    with pytest.raises(errors.InputError, match=f"process {process.pid} on"):
      with lock.held(path, "x is in use"):
        pass
    process.send_signal(signal.SIGKILL)
  with lock.held(path, "x is in use"):
    pass
  assert not path.exists()


def test_what_cannot_be_locked_is_said(tmp_path):
  for path in (tmp_path / "none" / ".lock", tmp_path):
    with pytest.raises(errors.InputError, match="cannot lock"):
      with lock.held(path, "x"):
        pass
