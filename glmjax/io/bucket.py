"""Requests to buckets, gs:// (Google Cloud Storage) and s3:// (Amazon S3 and what speaks like it), by obstore.

A request is tried again for a bounded time. What then fails is an OSError as a disk's would be, or, where only the
user can mend it (no such bucket, nobody logged in), an InputError. No credential is ever in a message.

A process that has locks (io/lease.py) writes while it surely has them: before every try of a request that changes
something it is looked whether they were renewed. What goes on when a lease ends is a request that is on its way just
then, or the end of an upload whose last parts are.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import errno
import functools
import os
import threading
import time
from typing import Any, NamedTuple, TypeVar

from glmjax import errors
from glmjax.io import bucket_errors
from glmjax.io import bucket_stores

SCHEMES = ("gs", "s3")
PART = 1 << 24  # bytes of one request's body, either way
PATIENCE = "GLMJAX_BUCKET_PATIENCE"  # the variable: seconds for which a request is tried again
_SECONDS = 120.0  # of patience: an outage of a minute is no end of a run
_UNANSWERED = 60.0  # seconds until a request without its whole answer is given up
_BULK = 1 << 20  # bytes of a body from which on it may take longer:
_UNANSWERED_BULK = 600.0  # 64 of PART at once over a line of 2 MB a second
_LAST = 1.0  # seconds that the end of a program gives a request where others had no answer for all of the patience
_PAUSE, _LONGEST_PAUSE = 0.1, 8.0  # seconds before a request is made again that got no answer: doubled each time
_PAGE = 1000  # objects that one request lists

T = TypeVar("T")
Version = dict[str, str]  # what tells an object from those that had its name before

permits: set["Permit"] = set()  # of the locks that this process has

_forked = False
_silent_since: float | None = None  # the begin of the first request without an answer, since the last that had one
_here = threading.local()  # .ending: what this thread does is the end of a program


@dataclasses.dataclass(eq=False)
class Permit:
  """What a lock lets this process do: write, until a time by time.monotonic(), and unless it is lost."""

  until: float
  lost: str = ""  # says so to the user


class Found(NamedTuple):
  """One object, as a listing or a HEAD tells of it."""

  key: str
  size: int
  modified: float  # seconds since 1970, by the server's clock
  version: Version


class Bucket:
  """One bucket. Keys are those of objects, without a slash before them.

  Every method raises FileNotFoundError for an object that is not there, PermissionError, InputError for what is no
  bucket or has no credentials, and OSError for what the bucket does not answer in time.
  """

  def __init__(self, scheme: str, name: str, most: float | None = None):
    """Opens a bucket; `most`: seconds for which a request is made, where that is less than `patience`: of locks
    themselves, which need no permit.
    """
    self.address, self._most = f"{scheme}://{name}", most
    self._answered = False  # whether any request was, so that somebody is logged in
    os.register_at_fork(after_in_child=_note_fork)  # obstore's threads are not there, and every request would hang
    self._open = functools.partial(bucket_stores.opened, scheme, name)
    self._small = self._open(0.0, max(1.0, min(_UNANSWERED, self.patience)))

  @functools.cached_property
  def _bulk(self) -> Any:
    """The store for large bodies."""
    return self._open(0.0, _UNANSWERED_BULK)

  @functools.cached_property
  def _streams(self) -> Any:
    """The store for bodies in parts, each of which obstore repeats: they are no object before their end."""
    return self._open(self.patience, _UNANSWERED_BULK)

  def _store(self, size: int) -> Any:
    """Returns the store for a request with so many bytes."""
    return self._small if size <= _BULK else self._bulk

  @property
  def patience(self) -> float:
    """Seconds for which a request is made again."""
    return patience() if self._most is None else min(self._most, patience())

  def get(self, key: str, start: int = 0, stop: int | None = None, version: Version | None = None) -> bytes:
    """Returns an object's bytes [start, stop), as many as there are; None: to its end.

    Those of the `version` that is read by ranges, if given: InputError, where another has taken its place.
    """
    if stop is None:
      stop, version, data = self._ask(key, functools.partial(self._whole, key))
      if data is not None:
        return data[start:]
    parts = []
    for first in range(start, stop, PART):
      last = min(first + PART, stop)
      parts.append(self._ask(key, functools.partial(self._range, key, first, last, version)))
      if len(parts[-1]) < last - first:
        break
    return parts[0] if len(parts) == 1 else b"".join(parts)

  def _whole(self, key: str) -> tuple[int, Version, bytes | None]:
    """Returns an object's size and version, and its bytes where these are few."""
    found = bucket_stores.obstore().get(self._small, key)
    size = found.meta["size"]
    return size, _version(found.meta), bytes(found.bytes()) if size <= _BULK else None

  def _range(self, key: str, start: int, stop: int, version: Version | None) -> bytes:
    changed = f"{self.address}/{key} was replaced while it was being read: try again once nobody writes it"
    try:
      found = bucket_stores.obstore().get(self._store(stop - start), key, options={"range": (start, stop)})
      data = bytes(found.bytes())
    except bucket_errors.base() as error:
      if bucket_errors.status(error) != 416:  # nothing is that far
        raise
      if version is not None:
        raise errors.InputError(changed) from None
      return b""
    if version is not None and _version(found.meta).get("e_tag") != version.get("e_tag"):
      raise errors.InputError(changed)
    return data

  def put(self, key: str, data: Any) -> None:
    """Writes an object whole, in place of what had its key."""
    if (size := memoryview(data).nbytes) > PART:
      begun = time.monotonic()
      try:
        return self._put_parts(key, data)
      except bucket_errors.NoAnswer:
        if time.monotonic() - begun < self.patience + _UNANSWERED:
          raise
        return self._put_parts(key, data)  # one hung, which is no outage
    self._ask(key, lambda: bucket_stores.obstore().put(self._store(size), key, data, use_multipart=False), writes=True)

  def _put_parts(self, key: str, data: Any) -> None:
    with Upload(self, key, at_once=4) as stream:
      stream.write(data)

  def create(self, key: str, data: bytes) -> Version | None:
    """Writes an object where there is none; returns None where there is one, of other bytes than these."""
    return self._conditional(key, data, "create")

  def replace(self, key: str, data: bytes, version: Version) -> Version | None:
    """Writes an object in place of the one that `version` tells; returns None where it is there no more."""
    return self._conditional(key, data, version)

  def _conditional(self, key: str, data: bytes, mode: Any) -> Version | None:
    store = self._store(len(data))
    request = functools.partial(bucket_stores.obstore().put, store, key, data, mode=mode, use_multipart=False)
    try:
      return _version(self._ask(key, request, writes=True))
    except FileExistsError:  # ours, where an answer was lost and the request was made again
      found = self.find(key)
      return found.version if found is not None and found.size == len(data) and self.get(key) == data else None
    except FileNotFoundError:
      return None

  def find(self, key: str) -> Found | None:
    """Says what is at a key; None: nothing."""
    try:
      return _found(self._ask(key, lambda: bucket_stores.obstore().head(self._small, key)))
    except FileNotFoundError:
      return None

  def children(self, folder: str) -> tuple[list[str], list[Found]]:
    """Lists what lies directly in a folder ("": all of the bucket): the folders in it by their keys, and the objects.

    A listing is held in memory: 1,000 objects take some 400 kB.
    """
    listed = self._ask(folder, lambda: bucket_stores.obstore().list_with_delimiter(self._small, folder or None))
    return sorted(listed["common_prefixes"]), [_found(each) for each in listed["objects"] if each["path"] != folder]

  def below(self, folder: str) -> Iterator[Found]:
    """Yields all objects below a folder, in the order of their keys, a page at a time."""
    after = None
    while True:
      page = self._ask(folder, functools.partial(self._page, folder, after))
      yield from (_found(each) for each in page)
      if len(page) < _PAGE:
        return
      after = page[-1]["path"]

  def _page(self, folder: str, after: str | None) -> Sequence[Any]:
    listed = bucket_stores.obstore().list(self._small, folder or None, offset=after, chunk_size=_PAGE)
    return next(iter(listed), ())

  def delete(self, keys: Sequence[str]) -> None:
    """Deletes objects; those that are gone already are no error."""
    for first in range(0, len(keys), 1000):
      some = list(keys[first : first + 1000])
      try:
        self._ask(some[0], functools.partial(bucket_stores.obstore().delete, self._small, some), writes=True)
      except FileNotFoundError:  # Google says so of one; the others may or may not be gone
        for key in some:
          self._delete_one(key)

  def _delete_one(self, key: str) -> None:
    try:
      self._ask(key, lambda: bucket_stores.obstore().delete(self._small, key), writes=True)
    except FileNotFoundError:
      pass

  def copy(self, key: str, to: str) -> None:
    """Copies an object within the bucket, without its bytes coming here."""
    self._ask(key, lambda: bucket_stores.obstore().copy(self._small, key, to), writes=True)

  def upload(self, key: str) -> "Upload":
    """Returns a stream whose bytes become an object when it is closed, and nothing when its block fails."""
    return Upload(self, key)

  def _ask(self, key: str, request: Callable[[], T], again: bool = True, writes: bool = False) -> T:
    """Makes a request; one that may be made `again` as long as there is patience where it gets no answer, and once
    where it hangs for longer than that.

    One that `writes` waits until all locks are surely this process's.
    """
    if _forked:
      raise RuntimeError(f"{self.address}: this process was forked from one that uses buckets: start it afresh")
    begun, pause, last = time.monotonic(), _PAUSE, _is_ending()
    while True:
      seconds = min(self.patience, left()) if _is_ending() else self.patience
      if writes and self._most is None:
        self._wait_for_permits(key, begun, seconds)
      try:
        answer = _interruptible(request, begun + seconds - time.monotonic() if _is_ending() else None)
      except (bucket_errors.base(), OSError) as error:  # a stream's are plain OSErrors, whose text is not for people
        explained = bucket_errors.explained(error, self.address, key, round(seconds, 1), self._answered)
        is_answer = not isinstance(explained, bucket_errors.NoAnswer)
        _note(None if is_answer else begun)
        ends_in = begun + seconds - time.monotonic()
        if is_answer or not again or (ends_in < 0 and last):
          raise explained from None
        last = True
        time.sleep(max(0.0, min(pause, ends_in + 0.01)))  # the last time at the end
        pause = min(2 * pause, _LONGEST_PAUSE)
      else:
        self._answered = True
        _note(None)
        return answer

  def _wait_for_permits(self, key: str, begun: float, seconds: float) -> None:
    """Returns once all locks are surely this process's; raises InputError when one is lost."""
    while missing := [permit for permit in list(permits) if permit.lost or time.monotonic() > permit.until]:
      if lost := next((permit.lost for permit in missing if permit.lost), ""):
        raise errors.InputError(lost)
      if time.monotonic() > begun + seconds:
        raise bucket_errors.NoAnswer(
          errno.EREMOTEIO, f"no answer for {seconds:g} s to whether the lock is still held", f"{self.address}/{key}"
        )
      time.sleep(_PAUSE)


class Upload:
  """A stream into an object. What is written in a block that fails never becomes one."""

  def __init__(self, bucket: Bucket, key: str, at_once: int = 1):
    """Takes the bucket, the key, and how many parts may be on their way at once."""
    self._bucket, self._key, self._at_once, self._stream = bucket, key, at_once, None
    self._buffer, self._written = bytearray(), 0
    self._before: Found | None = None

  def write(self, data: Any) -> int:
    """Takes more bytes; returns how many."""
    view = memoryview(data).cast("B")
    for first in range(0, view.nbytes, PART):
      part = view[first : first + PART]
      if not self._buffer and part.nbytes == PART and (self._stream is not None or first + PART < view.nbytes):
        self._send(part)
        continue
      self._buffer += part
      if len(self._buffer) > PART:
        self._send_buffered()
    self._written += view.nbytes
    return view.nbytes

  def _send_buffered(self) -> None:
    data, self._buffer = bytes(self._buffer), bytearray()
    self._send(data)

  def _send(self, data: Any) -> None:
    """Sends some bytes: the first time, again with a stream of its own where that got no answer."""
    if self._stream is None:
      self._before = self._bucket.find(self._key)
      self._stream = self._bucket._ask(self._key, lambda: self._opened(data))
    else:
      self._bucket._ask(self._key, lambda: self._stream.write(data), again=False)  # which goes on from its place

  def _opened(self, data: Any) -> Any:
    options = {"buffer_size": PART, "max_concurrency": self._at_once}
    stream = bucket_stores.obstore().open_writer(self._bucket._streams, self._key, **options)
    stream.write(data)
    return stream

  def _close(self, *error: Any) -> None:
    try:
      end, becomes_object = functools.partial(self._stream.__exit__, *error), error[0] is None
      self._bucket._ask(self._key, end, again=False, writes=becomes_object)
    except bucket_errors.NoAnswer:  # it may have been done all the same
      found = None if error[0] else self._bucket.find(self._key)
      if found is None or found.size != self._written or found == self._before:
        raise

  def tell(self) -> int:
    """Returns how many bytes were written."""
    return self._written

  def seekable(self) -> bool:
    """Says no: bytes go out in their order."""
    return False

  def flush(self) -> None:
    """Does nothing: an object is there whole or not at all."""

  def __enter__(self) -> "Upload":
    return self

  def __exit__(self, *error: Any) -> None:
    if error[0] is None and self._stream is None:
      self._bucket.put(self._key, self._buffer)
    elif error[0] is None and self._buffer:
      self._send_buffered()
    if self._stream is not None:
      self._close(*error)


@functools.cache
def named(scheme: str, name: str, most: float | None = None) -> Bucket:
  """Returns a bucket, opened once in a process; `most` as Bucket has it."""
  return Bucket(scheme, name, most)


def patience() -> float:
  """Returns for how many seconds a request is tried again."""
  text = os.environ.get(PATIENCE, str(_SECONDS))
  try:
    seconds = float(text)
  except ValueError:
    seconds = -1.0
  if not 0 <= seconds < 1e6:
    raise errors.InputError(f"{PATIENCE} is {text!r}: give seconds, as {_SECONDS:g}")
  return seconds


@contextlib.contextmanager
def ending() -> Iterator[None]:
  """Makes this thread's requests the end of a program: all of those without an answer share one `patience`."""
  before, _here.ending = _is_ending(), True
  try:
    yield
  finally:
    _here.ending = before


def left() -> float:
  """Returns for how many seconds the end of a program waits for an answer."""
  since = _silent_since
  return patience() if since is None else max(_LAST, since + patience() - time.monotonic())


def _is_ending() -> bool:
  return getattr(_here, "ending", False)


def _note(silent: float | None) -> None:
  """Notes of a request when it was begun, where it has no answer; None: it has one."""
  global _silent_since
  _silent_since = None if silent is None else min(silent, _silent_since or silent)


def _note_fork() -> None:
  global _forked
  _forked = True


def _interruptible(request: Callable[[], T], most: float | None) -> T:
  """Makes a request so that Ctrl-C and signals come through: native code would hold them up to its end.

  Raises TimeoutError after `most` seconds, whatever the request does further.
  """
  if threading.current_thread() is not threading.main_thread() and most is None:
    return request()
  result: list[Any] = []

  def make() -> None:
    try:
      result.append((request(), None))
    except BaseException as error:  # of any kind: it is raised by who waits
      result.append((None, error))

  thread = threading.Thread(target=make, daemon=True)
  thread.start()
  thread.join(None if most is None else max(_LAST, most))
  if not result:
    raise TimeoutError
  value, error = result[0]
  if error is not None:
    raise error
  return value


def _version(answer: Any) -> Version:
  return {name: answer[name] for name in ("e_tag", "version") if answer.get(name)}


def _found(meta: Any) -> Found:
  return Found(meta["path"], meta["size"], meta["last_modified"].timestamp(), _version(meta))
