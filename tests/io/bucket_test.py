"""Requests to buckets, against a server that misbehaves on demand."""

from collections.abc import Callable
import concurrent.futures
import itertools
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
from glmjax.io import globs
from glmjax.io import paths
from glmjax.io import user_text

SCHEMES = pytest.mark.parametrize("scheme", bucket.SCHEMES)
_BIG = bytes(range(256)) * (bucket.PART // 128)  # two parts


def first(count, fault):
  """A server's fault in its first `count` requests."""
  left = iter(range(count))
  return lambda method, path: fault if next(left, None) is not None else None


def at_once(*calls: Callable) -> list:
  """Makes calls in threads of their own, as most of what they do is to wait; returns what each returns."""
  with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
    return [future.result() for future in [pool.submit(call) for call in calls]]


@SCHEMES
def test_objects_are_what_was_written(server, scheme):
  there = bucket.named(scheme, "bucket")
  there.put("a/small", b"hello")
  there.put("a/big", _BIG)
  assert there.get("a/small") == b"hello" and there.get("a/big") == _BIG == server.data("a/big")
  assert there.get("a/small", 1, 3) == b"el" and there.get("a/small", 3, 99) == b"lo"
  assert there.get("a/small", 9, 12) == b""
  assert there.get("a/big", 5, bucket.PART + 7) == _BIG[5 : bucket.PART + 7] and there.get("a/big", 7) == _BIG[7:]
  assert there.find("a/big").size == len(_BIG) and there.find("b") is None
  with pytest.raises(FileNotFoundError):
    there.get("b")
  there.copy("a/small", "c")
  there.delete(["a/small", "a/small", "gone"])
  assert server.keys() == ["a/big", "c"] and not server.uploads()


@SCHEMES
def test_lists_more_than_a_page(server, scheme):
  there = bucket.named(scheme, "bucket")
  names = [f"many/{i:05}" for i in range(2 * bucket_server.PAGE + 500)]
  for name in [*names, "many/folder/x", "manyother/x", "z"]:
    server.put(name, b"")
  assert [found.key for found in there.below("many")] == [*names, "many/folder/x"]
  folders, objects = there.children("many")
  assert folders == ["many/folder"] and [found.key for found in objects] == names
  assert there.children("")[0] == ["many", "manyother"] and not there.children("none")[1]
  there.delete(names)
  assert server.keys() == ["many/folder/x", "manyother/x", "z"]


@SCHEMES
def test_conditions(server, scheme):
  there = bucket.named(scheme, "bucket")
  version = there.create("x", b"one")
  assert version and there.create("x", b"two") is None and server.data("x") == b"one"
  newer = there.replace("x", b"three", version)
  assert newer and there.replace("x", b"four", version) is None and server.data("x") == b"three"
  there.delete(["x"])
  assert there.replace("x", b"five", newer) is None and server.keys() == []


@SCHEMES
def test_of_many_who_create_one_does(server, scheme):
  there = bucket.named(scheme, "bucket")
  made = []
  threads = [threading.Thread(target=lambda i=i: made.append(there.create("x", b"%d" % i))) for i in range(16)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len([version for version in made if version]) == 1


@SCHEMES
def test_an_answer_that_is_lost_is_no_refusal(server, scheme):
  there = bucket.named(scheme, "bucket")
  server.fault = first(1, bucket_server.Fault(lose_answer=True))
  version = there.create("x", b"mine")
  assert version
  server.fault = first(1, bucket_server.Fault(lose_answer=True))
  assert there.replace("x", b"still mine", version)
  assert server.data("x") == b"still mine"


@SCHEMES
@pytest.mark.parametrize(
  "fault",
  [
    bucket_server.Fault(status=429, code="SlowDown"),
    bucket_server.Fault(status=503),
    bucket_server.Fault(drop=True),
    bucket_server.Fault(cut=100),
    bucket_server.Fault(lose_answer=True),
  ],
  ids=lambda fault: next(f"{name}={value}" for name, value in vars(fault).items() if value),
)
def test_what_passes_is_waited_for(server, scheme, fault):
  there = bucket.named(scheme, "bucket")
  server.put("x", _BIG)
  server.fault = first(3, fault)
  assert there.get("x", 0, 5000) == _BIG[:5000]
  server.fault = first(3, fault)
  there.put("y", _BIG)
  server.fault = first(3, fault)
  with there.upload("z") as stream:
    stream.write(_BIG)
    stream.write(b"end")
  server.fault = first(3, fault)
  assert [found.key for found in there.below("")] == ["x", "y", "z"]
  assert server.data("y") == _BIG and server.data("z") == _BIG + b"end"


@SCHEMES
@pytest.mark.parametrize(
  "fault, kind, words",
  [
    (bucket_server.Fault(status=429, code="SlowDown"), OSError, "too many requests"),
    (bucket_server.Fault(status=503), OSError, "the service reports an error"),
    (bucket_server.Fault(drop=True), OSError, "no answer"),
    (bucket_server.Fault(hang=4), OSError, "no answer"),
    (bucket_server.Fault(status=403, code="AccessDenied"), PermissionError, "permission denied"),
    (bucket_server.Fault(status=401, code="Unauthorized"), errors.InputError, "nobody is logged in"),
    (bucket_server.Fault(status=404, code="NoSuchBucket"), errors.InputError, "there is no bucket"),
    (bucket_server.Fault(status=400, code="AuthorizationHeaderMalformed"), OSError, "400, Authorization.*region"),
  ],
  ids=["quota", "error", "network", "hang", "permission", "login", "bucket", "region"],
)
def test_what_lasts_is_said_in_one_line_after_a_bounded_time(server, scheme, fault, kind, words, monkeypatch):
  monkeypatch.setenv(bucket.PATIENCE, "1")
  there = bucket.named(scheme, "bucket")
  server.put("x", b"1")
  server.fault = lambda method, path: fault

  def fails(request: Callable, *arguments) -> None:
    begun = time.monotonic()
    with pytest.raises(kind, match=words) as caught:
      request(*arguments)
    assert time.monotonic() - begun < 12 and "\n" not in str(caught.value) and "secret" not in str(caught.value)

  at_once(
    lambda: fails(there.get, "x"),
    lambda: fails(there.put, "y", b"2"),
    lambda: fails(there.create, "y", b"2"),
    lambda: fails(there.children, ""),
    lambda: fails(there.delete, ["x"]),
  )
  server.fault = lambda method, path: None
  assert "x" in server.keys() and (fault.hang or server.keys() == ["x"])


@SCHEMES
def test_large_bodies_have_a_time_of_their_own(server, scheme, monkeypatch):
  """On a line that takes longer for a body than there is patience, and than small requests may take."""
  monkeypatch.setenv(bucket.PATIENCE, "1")
  monkeypatch.setattr(bucket, "_BULK", 1000)
  monkeypatch.setattr(bucket, "PART", 100_000)
  there = bucket.named(scheme, "bucket")
  server.put("x", _BIG[:5000])
  server.fault = lambda method, path: bucket_server.Fault(hang=2.5) if method in ("PUT", "GET") else None

  def small() -> None:
    with pytest.raises(OSError, match="no answer for 1 s"):
      there.put("small", b"1")

  read, _, _, created, _ = at_once(
    lambda: there.get("x", 0, 5000),
    lambda: there.put("y", _BIG[:5000]),
    lambda: there.put("z", _BIG[:250_000]),
    lambda: there.create("c", _BIG[:5000]),
    small,
  )
  assert read == _BIG[:5000] and created and server.data("c") == server.data("y") == _BIG[:5000]
  assert server.data("z") == _BIG[:250_000] and not server.uploads()


@SCHEMES
@pytest.mark.parametrize("size", [5000, 25_000], ids=["one request", "parts"])
def test_a_large_body_that_hangs_once_is_sent_again(server, scheme, size, monkeypatch):
  """For longer than there is patience for what has no answer."""
  monkeypatch.setenv(bucket.PATIENCE, "1")
  for name, value in {"_BULK": 1000, "PART": 10_000, "_UNANSWERED": 0.0, "_UNANSWERED_BULK": 1.5}.items():
    monkeypatch.setattr(bucket, name, value)
  hung = iter([bucket_server.Fault(hang=4)])
  server.fault = lambda method, path: next(hung, None) if method == "PUT" else None
  bucket.named(scheme, "bucket").put("x", _BIG[:size])
  assert server.data("x") == _BIG[:size]


@SCHEMES
def test_a_stream_whose_block_fails_leaves_nothing(server, scheme):
  there = bucket.named(scheme, "bucket")
  there.put("x", b"old")
  for data in (b"new", _BIG):
    with pytest.raises(ZeroDivisionError), there.upload("x") as stream:
      stream.write(data)
      raise ZeroDivisionError
  assert server.data("x") == b"old" and not server.uploads()


def test_ctrl_c_comes_through(server):
  """A request that hangs does not hold up the main thread."""
  server.fault = lambda method, path: bucket_server.Fault(hang=30)
  code = (
    "import signal; from glmjax.io import bucket\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background lacks\n"
    "b = bucket.named('gs', 'bucket')\nprint('asks', flush=True)\nb.get('x')"
  )
  environment = os.environ | {bucket.PATIENCE: "60"}
  with subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
  ) as process:
    process.stdout.readline()
    time.sleep(0.5)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=20)[1] and time.monotonic() - begun < 10


def test_a_forked_process_says_so_at_once(server):
  code = (
    "import os; from glmjax.io import bucket\n"
    "b = bucket.named('gs', 'bucket'); b.put('x', b'1')\n"
    "if not os.fork():\n"
    "  try: b.get('x')\n"
    "  except RuntimeError as error: os._exit(0 if 'was forked' in str(error) else 1)\n"
    "  os._exit(2)\n"
    "raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))"
  )
  assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_without_the_library(monkeypatch):
  monkeypatch.setitem(sys.modules, "obstore.store", None)
  bucket.named.cache_clear()
  for scheme, extra in (("gs", "gcs"), ("s3", "s3")):
    with pytest.raises(errors.InputError, match=rf"pip install 'glmjax\[{extra}\]'"):
      paths.named(f"{scheme}://bucket/x").is_file()


def test_patience_is_a_number(monkeypatch):
  monkeypatch.setenv(bucket.PATIENCE, "long")
  with pytest.raises(errors.InputError, match="GLMJAX_BUCKET_PATIENCE is 'long'"):
    bucket.patience()


@SCHEMES
def test_paths_do_as_on_a_disk(server, scheme, tmp_path):
  """The same calls of pathlib give the same in a bucket and on a disk."""
  there = paths.named(f"{scheme}://bucket/top")
  for root in (tmp_path, there):
    for name in ("a.gin", "b/c.gin", "b/d/e.txt", ".hidden"):
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).write_text(f"我 {name}", encoding="utf-8")
  for root in (tmp_path, there):
    names = lambda found, root=root: sorted(path.relative_to(root).as_posix() for path in found)  # noqa: E731
    assert names(root.iterdir()) == [".hidden", "a.gin", "b"]
    assert names(globs.inside(root, "*.gin")) == ["a.gin"] and names(globs.inside(root, "*/*.gin")) == ["b/c.gin"]
    assert [name for name in names(root.rglob("*")) if "." in name] == [".hidden", "a.gin", "b/c.gin", "b/d/e.txt"]
    assert (root / "b").is_dir() and not (root / "b").is_file() and (root / "b").exists() and not (root / "x").exists()
    assert (root / "a.gin").is_file() and (root / "a.gin").stat().st_size == len("我 a.gin".encode())
    with (root / "b" / "c.gin").open("rb") as stream:
      stream.seek(-3, 2)
      assert stream.read() == b"gin" and stream.seek(1) == 1 and stream.read(2) == "我".encode()[1:]
    for missing in (root / "x").read_bytes, (root / "x").stat, lambda root=root: list((root / "x").iterdir()):
      with pytest.raises(FileNotFoundError):
        missing()
  there.remove_tree()
  assert server.keys() == []


@SCHEMES
def test_a_refusal_is_never_taken_for_the_end_of_an_object(server, scheme, monkeypatch):
  """Not even where a key, or how long a request took, holds the number of that answer."""
  monkeypatch.setenv(bucket.PATIENCE, "1")
  there = bucket.named(scheme, "bucket")
  server.put("part-00416.txt", b"text")
  assert there.get("part-00416.txt", 4, 9) == b""
  for fault, kind in ((bucket_server.Fault(status=403), PermissionError), (bucket_server.Fault(status=503), OSError)):
    server.fault = lambda method, path, fault=fault: fault
    with pytest.raises(kind):
      there.get("part-00416.txt", 0, 9)


@SCHEMES
def test_an_upload_whose_last_answer_is_lost_is_there(server, scheme):
  there = bucket.named(scheme, "bucket")
  for write in (lambda: there.put("x", _BIG), lambda: _stream(there, "y")):
    ends = iter([bucket_server.Fault(lose_answer=True)])
    server.fault = lambda method, path, ends=ends: (
      next(ends, None) if method == "POST" and server.log[-1][0] == "complete" else None
    )
    write()
  assert server.data("x") == server.data("y") == _BIG


def _stream(there, key):
  with there.upload(key) as stream:
    stream.write(_BIG)


@SCHEMES
def test_a_refused_part_is_told_in_one_line_without_what_was_signed(server, scheme):
  there = bucket.named(scheme, "bucket")
  server.fault = lambda method, path: (
    bucket_server.Fault(status=403, code="SignatureDoesNotMatch-someone-secret") if method == "PUT" else None
  )
  for write in (lambda: there.put("x", _BIG), lambda: _stream(there, "y")):
    with pytest.raises(PermissionError, match="permission denied") as caught:
      write()
    assert "\n" not in str(caught.value) and "someone" not in str(caught.value)


def test_a_profile_that_is_not_there_is_told_in_one_line(server, monkeypatch):
  monkeypatch.delenv("AWS_ACCESS_KEY_ID")
  monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
  bucket.named.cache_clear()
  with pytest.raises(errors.InputError, match=r"^s3://bucket: .*no-such-profile"):
    bucket.named("s3", "bucket")


def test_a_machine_that_gives_no_log_in_for_a_moment_is_no_mistake(server, monkeypatch, tmp_path):
  """Its metadata server fails, or does not answer who was logged in before; where nobody ever was, that is said."""
  monkeypatch.delenv("STORAGE_EMULATOR_HOST")
  monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv(bucket.PATIENCE, "0.3")
  server.fault = lambda method, path: bucket_server.Fault(status=503)

  def opened(host: str) -> bucket.Bucket:
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP", "GCE_METADATA_ROOT"):
      monkeypatch.setenv(name, host)
    return bucket.Bucket("gs", "bucket")

  with pytest.raises(OSError, match="the service reports an error"):
    opened(server.address.removeprefix("http://")).get("x")
  nobody = opened("127.0.0.1:9")
  with pytest.raises(errors.InputError, match="nobody is logged in"):
    nobody.get("x")
  nobody._answered = True
  with pytest.raises(OSError, match="what gives the log-in does not answer") as caught:
    nobody.get("x")
  assert errors.may_pass(caught.value)


@SCHEMES
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("start", [None, b"", b"0\n"])
def test_what_is_added_is_there_once(server, scheme, start, others):
  """Whichever answer is lost, and where another writer adds a line before the request is made again."""
  path = paths.named(f"{scheme}://bucket/x")
  for lost in range(8):
    requests, added = [], []

    def loses(method, _, lost=lost, requests=requests, added=added):
      requests.append(method)
      if others and len(requests) == lost + 2 and "x" in server.keys():
        server.put("x", server.data("x") + b"other\n")
        added.append(b"other")
      return bucket_server.Fault(lose_answer=True) if len(requests) == lost + 1 else None

    server.objects["bucket"].clear()
    if start is not None:
      server.put("x", start)
    server.fault = loses
    path.append(b"one\n")
    path.append(b"two\n")
    assert sorted(server.data("x").split()) == sorted([*(start or b"").split(), *added, b"one", b"two"])
    if lost >= len(requests):
      break
  assert lost > 3


def test_two_who_add_while_answers_are_lost(server):
  path, numbers = paths.named("gs://bucket/x"), itertools.count()
  server.fault = lambda method, _: bucket_server.Fault(lose_answer=True) if next(numbers) % 5 == 4 else None
  threads = [
    threading.Thread(target=lambda i=i: [path.append(b"%d-%d\n" % (i, each)) for each in range(12)]) for i in range(2)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(server.data("x").split()) == sorted(b"%d-%d" % (i, each) for i in range(2) for each in range(12))


@SCHEMES
@pytest.mark.parametrize("newer", [b"shorter", b"new\n" * 3_000_000], ids=["shorter", "as_long"])
def test_an_object_replaced_while_it_is_read_is_noticed(server, scheme, newer):
  path = paths.named(f"{scheme}://bucket/text.txt")
  server.put("text.txt", b"old\n" * 3_000_000)
  with pytest.raises(errors.InputError, match="text.txt was replaced while it was being read") as caught:
    for number, _ in user_text.lines(path):
      if number == 10:
        server.put("text.txt", newer)
  assert "\n" not in str(caught.value) and not errors.may_pass(caught.value)
  server.put("text.txt", b"old\n" * 3_000_000)
  assert sum(1 for _ in user_text.lines(path)) == 3_000_000
  with path.open("rb") as stream:
    del server.objects["bucket"]["text.txt"]
    with pytest.raises(FileNotFoundError):
      stream.read(1)
