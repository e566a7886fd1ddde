"""Files that grow, in a bucket as on a disk."""

import signal
import subprocess
import sys
import time

import bucket_server
import pytest

from glmjax import errors
from glmjax.io import bucket
from glmjax.io import growing
from glmjax.io import lease
from glmjax.io import lock
from glmjax.io import paths

SCHEMES = pytest.mark.parametrize("scheme", bucket.SCHEMES)
STEPS = """
import sys
from glmjax.io import growing, lease, lock, paths
lease.LEASE, lease._RENEW = 3.0, 0.2
with lock.held(paths.named(sys.argv[1]) / ".lock", "x is in use"):
  file = growing.File(paths.named(sys.argv[1]) / "x")
  for line in sys.stdin:
    with open(file.local, "a") as stream:
      stream.write(line)
    print(file.put(), flush=True)
  print(file.close())
"""


def add(file, text):
  with open(file.local, "a", encoding="utf-8") as stream:
    stream.write(text)


def until(condition):
  ends = time.monotonic() + 20
  while not condition() and time.monotonic() < ends:
    time.sleep(0.02)
  return condition()


def test_a_file_on_a_disk_is_itself(tmp_path):
  file = growing.File(tmp_path / "x.jsonl")
  assert file.local == tmp_path / "x.jsonl"
  add(file, "1\n")
  file.put()
  file.close()
  assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@SCHEMES
def test_it_is_put_when_asked_for_and_gone_on_with(server, scheme):
  path = paths.named(f"{scheme}://bucket/run/x.jsonl")
  file = growing.File(path)
  file.put()
  assert server.keys() == []  # there is none yet
  add(file, "1\n")
  file.put()
  puts = server.requests["put"]
  file.put()
  assert server.requests["put"] == puts  # it has not grown
  add(file, "2\n")
  file.close()
  assert server.data("run/x.jsonl") == b"1\n2\n" and not file.local.parent.exists()
  file = growing.File(path)
  add(file, "3\n")
  file.close()
  assert server.data("run/x.jsonl") == b"1\n2\n3\n"
  file = growing.File(path, fresh=True)
  add(file, "4\n")
  file.close()
  assert server.data("run/x.jsonl") == b"4\n"


def test_it_is_put_now_and_then(server, monkeypatch):
  file = growing.File(paths.named("gs://bucket/x"))
  add(file, "1\n")
  file.put_soon()
  assert until(lambda: server.keys() == ["x"])
  file.close()
  monkeypatch.setattr(growing, "_EVERY", 0.1)
  monkeypatch.setattr(growing, "_SHARE", 0)
  file = growing.File(paths.named("gs://bucket/x"))
  add(file, "2\n")
  assert until(lambda: server.data("x") == b"1\n2\n")
  puts = server.requests["put"]
  time.sleep(0.5)
  assert server.requests["put"] == puts
  file.close()


def test_what_fails_is_said_once_and_put_later(server, caplog):
  caplog.set_level("INFO", "glmjax")
  file = growing.File(paths.named("gs://bucket/x"))
  add(file, "1\n")
  file.put()
  server.fault = lambda method, path: bucket_server.Fault(status=403, code="AccessDenied")
  add(file, "2\n")
  file.put()
  file.put()
  server.fault = lambda method, path: None
  assert server.data("x") == b"1\n"
  file.put()
  assert server.data("x") == b"1\n2\n"
  said = [message for message in caplog.messages if message.startswith("gs://bucket/x: ")]
  assert len(said) == 2 and "permission denied" in said[0] and said[1].endswith("written again")
  file.close()


def test_what_cannot_be_fetched_is_not_overwritten(server):
  server.put("x", b"1\n")
  server.fault = lambda method, path: bucket_server.Fault(status=403, code="AccessDenied")
  with pytest.raises(errors.InputError, match="cannot read gs://bucket/x: .*permission denied"):
    growing.File(paths.named("gs://bucket/x"))
  assert server.data("x") == b"1\n"


def test_who_has_lost_the_lock_puts_nothing(server, caplog):
  with lock.held(paths.named("gs://bucket/run/.lock"), "in use"):
    file = growing.File(paths.named("gs://bucket/run/x"))
    (held,) = lease._held
    held._lost = "a test"
    add(file, "1\n")
    file.close()
  assert server.keys() == ["run/.lock"] and "has lost its lock" in caplog.text


@SCHEMES
@pytest.mark.parametrize("part", [bucket.PART, 4], ids=["one request", "parts"])
@pytest.mark.parametrize("before", [b"", b"1\n2\n"], ids=["fresh", "going on"])
def test_a_stale_copy_overwrites_nothing(server, scheme, part, before, caplog, monkeypatch):
  monkeypatch.setattr(bucket, "PART", part)
  if before:
    server.put("x", before)
  file = growing.File(paths.named(f"{scheme}://bucket/x"))
  add(file, "one\n")
  assert file.put() and server.data("x") == before + b"one\n"
  add(file, "two\n")
  assert file.put() and server.data("x") == before + b"one\ntwo\n"
  server.put("x", b"another's")
  add(file, "three\n")
  assert not file.put() and not file.put() and not file.close()
  assert server.data("x") == b"another's" and not server.uploads()
  assert caplog.messages == [
    f"{scheme}://bucket/x: another process has changed it meanwhile: what was added last is lost"
  ]


@pytest.mark.parametrize("part", [bucket.PART, 3], ids=["one request", "parts"])
def test_what_was_written_without_an_answer_is_gone_on_with(server, part, monkeypatch):
  """Every answer to a put, or to the end of an upload, is lost until that is given up: the object is there, and the
  next put replaces it.
  """
  monkeypatch.setattr(bucket, "PART", part)
  monkeypatch.setenv(bucket.PATIENCE, "1")
  file = growing.File(paths.named("gs://bucket/x"))
  for text in ("one\n", "two\n"):
    add(file, text)
    asked = []

    def fault(method, path, asked=asked):
      asked.append(method)
      ends = method == "PUT" if part > 3 else asked.count("POST") > 1  # the first begins the upload
      return bucket_server.Fault(lose_answer=True) if ends else None

    server.fault = fault
    assert not file.put() and server.data("x").endswith(text.encode())
    server.fault = lambda method, path: None
    add(file, "more\n")
    assert file.put()
  file.close()
  assert server.data("x") == b"one\nmore\ntwo\nmore\n"


@pytest.mark.parametrize("fault", [bucket_server.Fault(drop=True), bucket_server.Fault(hang=60)], ids=["down", "hangs"])
def test_all_that_ends_in_an_outage_waits_for_one_patience(server, caplog, fault):
  """Files and a lock: three seconds, and then one for each that is left."""
  with lock.held(paths.named("gs://bucket/run/.lock"), "in use"):
    files = [growing.File(paths.named(f"gs://bucket/run/{i}")) for i in range(5)]
    for file in files:
      add(file, "1\n")
      assert file.put()
      add(file, "2\n")
    server.fault = lambda method, path: fault
    begun = time.monotonic()
    assert [file.close() for file in files] == [False] * 5
  assert time.monotonic() - begun < 13  # each for itself: 18 and more
  assert len(caplog.messages) == 5 and all("what was added last is lost: " in said for said in caplog.messages)


def test_an_outage_that_is_over_shortens_no_end(server, monkeypatch):
  monkeypatch.setenv(bucket.PATIENCE, "4")
  file = growing.File(paths.named("gs://bucket/x"))
  add(file, "1\n")
  server.down(60)
  assert not file.put()
  server.fault = lambda method, path: None
  assert paths.named("gs://bucket/y").bucket.find("y") is None
  server.down(2)
  assert file.close() and server.data("x") == b"1\n"


@SCHEMES
def test_who_was_suspended_while_another_took_over_overwrites_nothing(server, scheme):
  """Stopped in the middle of a put, whose request the server has not got."""
  stopped = []

  def fault(method, path):
    if method == "PUT" and path == "bucket/run/x" and stopped == ["next"]:
      stopped[0] = process.send_signal(signal.SIGSTOP)
      return bucket_server.Fault(drop=True)
    return None

  server.fault = fault
  command = [sys.executable, "-c", STEPS, f"{scheme}://bucket/run"]
  pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  with subprocess.Popen(command, **pipes) as process:
    process.stdin.write("one\n")
    process.stdin.flush()
    assert process.stdout.readline() == "True\n" and server.data("run/x") == b"one\n"
    stopped.append("next")
    process.stdin.write("two\n")
    process.stdin.flush()
    assert until(lambda: stopped == [None])
    server.put("run/.lock", b'{"host": "elsewhere", "process": 7}')
    server.put("run/x", b"one\nanother's\n")
    process.send_signal(signal.SIGCONT)
    out, said = process.communicate(timeout=60)
  assert out == "False\nFalse\n" and process.returncode == 0, said
  assert server.data("run/x") == b"one\nanother's\n" and b"elsewhere" in server.data("run/.lock")
  assert said.count("is lost") <= 2 and "what was added last is lost" in said, said
