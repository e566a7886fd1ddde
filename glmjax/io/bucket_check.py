"""Whether a bucket gives what glmjax needs of it, and how fast, tried with objects that are deleted again."""

from collections.abc import Callable, Iterator
import concurrent.futures
import contextlib
import os
import statistics
import time
import uuid

from glmjax import errors
from glmjax.io import bucket
from glmjax.io import bucket_path
from glmjax.io import paths

_TIMES = 5  # that an answer's time is taken
_OBJECTS, _THREADS = 16, 8  # of bucket.PART bytes each, for what goes through


def examine(folder: paths.Named) -> dict[str, str]:
  """Tries a folder in a bucket: returns what was found of each need, in words.

  Raises:
    errors.InputError: when it is none, or when it refuses, ignores or does not answer what glmjax needs.
  """
  path = paths.named(folder, "--bucket")
  if not isinstance(path, bucket_path.BucketPath):
    raise errors.InputError(f"--bucket is {path}: give gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
  try:
    with _scratch(path) as scratch:
      return dict(_found(scratch))
  except OSError as error:
    raise errors.InputError(f"{path}: {errors.reason(error)}") from error


@contextlib.contextmanager
def _scratch(path: bucket_path.BucketPath) -> Iterator[bucket_path.BucketPath]:
  scratch = path / f".glmjax-doctor-{uuid.uuid4().hex}"
  try:
    yield scratch
  finally:
    with contextlib.suppress(OSError):
      scratch.remove_tree()


def _found(scratch: bucket_path.BucketPath) -> Iterator[tuple[str, str]]:
  there, small = scratch.bucket, scratch / "small"
  yield "lists", _time(lambda: there.children(scratch.key))
  yield "writes 1 byte", _time(lambda: small.write_bytes(b"1"))
  yield "reads it", _time(small.read_bytes)
  _check_conditions(scratch)
  yield "conditions on writes", "hold"
  yield "copies", _time(lambda: there.copy(small.key, (scratch / "copy").key))
  yield "clock", f"{(small.stat().st_mtime_ns / 1e9 - time.time()):+.0f} s against this machine's"
  data = os.urandom(bucket.PART)
  yield "writes in parts", _in_parts(scratch / "parts", data)
  objects = [scratch / f"large{i}" for i in range(_OBJECTS)]
  yield "writes", _rate(lambda path: path.write_bytes(data), objects)
  yield "reads", _rate(bucket_path.BucketPath.read_bytes, objects)
  begun = time.monotonic()
  scratch.remove_tree()
  yield "deletes", f"{_OBJECTS + 4} objects in {time.monotonic() - begun:.2f} s"


class _GivenUp(Exception):
  """Ends the block of an upload."""


def _in_parts(path: bucket_path.BucketPath, data: bytes) -> str:
  """Uploads an object in parts, and gives up the upload of another, as what fails on the way does."""
  begun = time.monotonic()
  with path.open("wb") as stream:
    stream.write(data)
    stream.write(b"1")
  seconds = time.monotonic() - begun
  if path.stat().st_size != len(data) + 1:
    raise errors.InputError(f"{path}: what was uploaded in parts has {path.stat().st_size:,} bytes")
  with contextlib.suppress(_GivenUp), (given_up := path.with_name("given_up")).open("wb") as stream:
    stream.write(data)
    stream.write(b"1")
    raise _GivenUp
  if given_up.is_file():
    raise errors.InputError(f"{path}: an upload that was given up is there all the same")
  return f"{len(data) + 1:,} bytes in {seconds:.2f} s; gives up such an upload"


def _check_conditions(scratch: bucket_path.BucketPath) -> None:
  """Raises InputError unless of two who create an object the second is refused, and so one who saw an older one."""
  there, key = scratch.bucket, (scratch / "conditional").key
  first = there.create(key, b"first")
  second = there.create(key, b"second")
  replaced = first and there.replace(key, b"third", first)
  late = first and there.replace(key, b"fourth", first)
  if not first or second or not replaced or late:
    raise errors.InputError(
      f"{there.address} ignores conditions on writes (If-None-Match, If-Match): two writers could not be kept apart; "
      "update the service, or use another bucket"
    )


def _time(action: Callable[[], object]) -> str:
  seconds = []
  for _ in range(_TIMES):
    begun = time.monotonic()
    action()
    seconds.append(time.monotonic() - begun)
  return f"in {1000 * statistics.median(seconds):.0f} ms (median of {_TIMES})"


def _rate(action: Callable[[bucket_path.BucketPath], object], objects: list[bucket_path.BucketPath]) -> str:
  begun = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    list(threads.map(action, objects))
  megabytes = len(objects) * bucket.PART / 1e6
  return f"{megabytes / (time.monotonic() - begun):,.0f} MB/s ({len(objects)} objects, {_THREADS} at once)"
