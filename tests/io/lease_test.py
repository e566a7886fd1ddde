"""Locks in buckets."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import bucket_server
import pytest

from glmjax import errors
from glmjax.io import bucket
from glmjax.io import lease
from glmjax.io import lock
from glmjax.io import paths

SCHEMES = pytest.mark.parametrize("scheme", bucket.SCHEMES)
HOLD = (
  "import sys, time; from glmjax.io import lease, lock, owner, paths\n"
  "lease._RENEW = 0.2\n"
  "if len(sys.argv) > 2: owner.host = lambda: sys.argv[2]\n"
  "with lock.held(paths.named(sys.argv[1]), 'x is in use'):\n  print('held', flush=True); time.sleep(60)"
)
PUTS = """
import sys
from glmjax import errors
from glmjax.io import bucket, lease, lock, paths
lease.LEASE, lease._RENEW = 3.0, 0.2
bucket.PART = int(sys.argv[2])
root = paths.named(sys.argv[1])
with lock.held(root / ".lock", "x is in use"):
  try:
    getattr(root / "x", sys.argv[3])(*map(eval, sys.argv[4:]))
  except errors.InputError as error:
    print(error)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(lease, "LEASE", 3.0)
  monkeypatch.setattr(lease, "_RENEW", 0.2)
  monkeypatch.setattr(lease, "_POLL", 0.1)


def holder(path, *host):
  process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), *host], stdout=subprocess.PIPE)
  assert process.stdout.readline() == b"held\n"
  return process


@SCHEMES
def test_is_held_once(server, scheme):
  path = paths.named(f"{scheme}://bucket/run/.lock")
  for _ in range(2):
    with lock.held(path, "x is in use"):
      with pytest.raises(errors.InputError, match=rf"x is in use \(process {os.getpid()} on "):
        with lock.held(path, "x is in use"):
          pass
  assert server.keys() == ["run/.lock"]


@SCHEMES
def test_a_holder_that_renews_is_told_at_once(server, scheme):
  path = paths.named(f"{scheme}://bucket/run/.lock")
  with holder(path, "elsewhere") as process:
    begun = time.monotonic()
    with pytest.raises(errors.InputError, match=rf"x is in use \(process {process.pid} on elsewhere\)"):
      with lock.held(path, "x is in use"):
        pass
    assert time.monotonic() - begun < lease.LEASE
    process.kill()


@SCHEMES
def test_a_killed_holder_elsewhere_is_waited_for(server, scheme):
  """Until its lease is over, then another has it; one whose lease is over long ago is not waited for."""
  path = paths.named(f"{scheme}://bucket/run/.lock")
  with holder(path, "elsewhere") as process:
    process.send_signal(signal.SIGKILL)
  begun = time.monotonic()
  with lock.held(path, "x is in use"):
    assert 1 < time.monotonic() - begun < 10
  with holder(path, "elsewhere") as process:
    process.send_signal(signal.SIGKILL)
  time.sleep(lease.LEASE + 1)
  begun = time.monotonic()
  with lock.held(path, "x is in use"):
    assert time.monotonic() - begun < 2


def test_a_killed_holder_of_this_machine_is_not_waited_for(server):
  path = paths.named("gs://bucket/run/.lock")
  with holder(path) as process:
    process.send_signal(signal.SIGKILL)
  begun = time.monotonic()
  with lock.held(path, "x is in use"):
    assert time.monotonic() - begun < 2


def test_of_many_one_gets_a_lock_that_was_left(server):
  path = paths.named("gs://bucket/run/.lock")
  with holder(path) as process:
    process.send_signal(signal.SIGKILL)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lease, "_held", type("", (), {"__iter__": lambda _: iter(()), "add": id, "discard": id})())
    got, done = [], threading.Event()

    def take():
      try:
        with lock.held(path, "x is in use"):
          got.append(1)
          done.wait(10)
      except errors.InputError:
        pass

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
      thread.start()
    time.sleep(2 * lease.LEASE)
    done.set()
    for thread in threads:
      thread.join()
  assert len(got) == 1


@SCHEMES
def test_a_holder_that_is_cut_off_writes_no_more_until_it_knows(server, scheme, monkeypatch):
  """An outage longer than the lease: nothing is written meanwhile, and the lock is held on where nobody took it."""
  monkeypatch.setenv(bucket.PATIENCE, "1")
  with lock.held(paths.named(f"{scheme}://bucket/run/.lock"), "x is in use"):
    server.down(60)
    time.sleep(lease.LEASE + 1)
    with pytest.raises(OSError, match="no answer"):
      lease.check()
    server.fault = lambda method, path: None
    lease.check()


def test_one_request_that_hangs_costs_no_lease(server, monkeypatch):
  """With the proportions of real use: a renewal is given up long before the lease is over."""
  monkeypatch.setenv(bucket.PATIENCE, "120")
  monkeypatch.setattr(lease, "_RENEW", 1.0)
  with lock.held(paths.named("gs://bucket/run/.lock"), "x is in use"):
    hung = iter([bucket_server.Fault(hang=30)])
    server.fault = lambda method, path: next(hung, None)
    time.sleep(lease.LEASE + 1)
    begun = time.monotonic()
    lease.check()
    assert time.monotonic() - begun < 1


def test_a_holder_whose_place_was_taken_writes_no_more(server):
  path = paths.named("gs://bucket/run/.lock")
  with lock.held(path, "x is in use"):
    server.put("run/.lock", b'{"host": "elsewhere", "process": 7}')
    time.sleep(1)
    with pytest.raises(errors.InputError, match="process 7 on elsewhere has taken it"):
      lease.check()
  assert b"elsewhere" in server.data("run/.lock")  # which stays theirs


@SCHEMES
@pytest.mark.parametrize(
  "part, request_",
  [(1000, ("write_bytes", "b'old'")), (1000, ("write_bytes", "b'old' * 1000")), (1000, ("unlink",))],
  ids=["one request", "parts", "deletion"],
)
def test_who_is_suspended_until_another_has_the_lock_changes_nothing(server, scheme, part, request_):
  """Stopped at a request that the server has not got: it is not made again."""
  stopped = []

  def fault(method, path):
    is_it = path == "bucket/run/x" and method in ("PUT", "POST", "DELETE") or (path, method) == ("bucket", "POST")
    if is_it and not stopped:
      stopped.append(process.send_signal(signal.SIGSTOP))
    return bucket_server.Fault(drop=True) if is_it and len(stopped) == 1 else None

  server.put("run/x", b"there")
  server.fault = fault
  command = [sys.executable, "-c", PUTS, f"{scheme}://bucket/run", str(part), *request_]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, env=os.environ | {bucket.PATIENCE: "30"}
  ) as process:
    ends = time.monotonic() + 20
    while not stopped and time.monotonic() < ends:
      time.sleep(0.05)
    time.sleep(lease.LEASE)
    server.put("run/.lock", b'{"host": "elsewhere", "process": 7}')
    server.put("run/x", b"another's")
    stopped.append("another has it")
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=60)
  assert "has lost its lock (process 7 on elsewhere has taken it)" in said
  assert server.data("run/x") == b"another's"


def test_a_short_outage_loses_nothing(server):
  with lock.held(paths.named("gs://bucket/run/.lock"), "x is in use"):
    server.down(1)
    time.sleep(lease.LEASE + 1)
    lease.check()


def test_an_outage_longer_than_the_lease_loses_nothing_where_nobody_took_the_lock(server, monkeypatch):
  """What is written meanwhile waits until the lock was renewed."""
  monkeypatch.setenv(bucket.PATIENCE, "30")
  root = paths.named("gs://bucket/run")
  with lock.held(root / ".lock", "x is in use"):
    server.down(lease.LEASE + 2)
    (root / "x").write_bytes(b"1")
    assert server.data("run/x") == b"1"
    lease.check()


@SCHEMES
@pytest.mark.parametrize("honored", [set(), {"create"}, {"replace"}], ids=["none", "create", "replace"])
def test_a_service_without_conditions_is_refused(server, scheme, honored):
  server.honors_conditions = honored
  with pytest.raises(errors.InputError, match=f"{scheme}://bucket ignores conditions on writes"):
    with lock.held(paths.named(f"{scheme}://bucket/run/.lock"), "x is in use"):
      pass


def test_who_works_for_a_holder_hears_that_the_lock_is_lost(server, monkeypatch):
  """At a check at once, and without one soon: nothing is written any more."""
  path = paths.named("gs://bucket/run/.lock")
  with holder(path) as process:
    locks = ((path, json.loads(server.data("run/.lock"))["token"]),)
    with lease.borrowed(locks):
      lease.check()
      path.with_name("x").write_bytes(b"1")
      server.put("run/.lock", b'{"host": "elsewhere", "process": 7}')
      time.sleep(1)
      with pytest.raises(errors.InputError, match="process 7 on elsewhere has taken it"):
        path.with_name("x").write_bytes(b"2")
      with pytest.raises(errors.InputError, match="process 7 on elsewhere has taken it"):
        lease.check()
    process.kill()
  with pytest.raises(errors.InputError, match="process 7 on elsewhere has taken it"), lease.borrowed(locks):
    pass
  assert server.data("run/x") == b"1" and not lease._held and not bucket.permits


def test_who_works_for_this_process_itself_borrows_nothing(server):
  with lock.held(paths.named("gs://bucket/run/.lock"), "x is in use"):
    requests = len(server.log)
    with lease.borrowed(lease.lent()):
      assert len(lease._held) == 1
    assert len(lease._held) == 1 and len(server.log) <= requests + 1
