"""Files that grow while a program runs, wherever they belong: objects cannot be added to.

On a disk such a file is itself. One in a bucket is kept on the local disk and put whole, in a thread, at most every 30
seconds and when it is asked for. A put that fails is said once and tried again later: it ends nothing, and what was put
before stays.

What another process has written since is never overwritten: a put has the condition that what is there is what was seen
last. What takes several requests (bucket.PART) has no such condition: there it is looked at before the end is sent, so
that only what another writes within the last parts' way would be lost.
"""

import contextlib
import hashlib
import logging
import pathlib
import shutil
import tempfile
import threading
import time

from glmjax import errors
from glmjax.io import bucket
from glmjax.io import bucket_path
from glmjax.io import lease
from glmjax.io import paths

_EVERY = 30.0  # seconds between puts that nobody asked for
_SHARE = 20  # of one that takes long there are fewer: it may take this part of the time
_PIECE = 1 << 22  # bytes

_log = logging.getLogger("glmjax")


class File:
  """A file that grows. Whoever writes it opens `local`, adds to it, and closes this object at the end.

  Args:
    path: where it belongs.
    fresh: what is there is not to be gone on with.

  Raises:
    errors.InputError: when what is there cannot be fetched.
  """

  def __init__(self, path: paths.Path, fresh: bool = False):
    self._path = path
    self.local = (
      path if isinstance(path, pathlib.Path) else pathlib.Path(tempfile.mkdtemp(prefix="glmjax-")) / path.name
    )
    if not isinstance(path, bucket_path.BucketPath):
      return
    self._lock = threading.Lock()  # of putting
    self._put_state: tuple[int, int] | None = None  # of the local file when it was put last
    self._version: bucket.Version | None = None  # of the object that was read or put last; None: there was none
    self._unseen = fresh  # what is there now is to be replaced, whatever it is
    self._tried: bytes | None = None  # the SHA-256 of what was sent without an answer
    self.put_bytes = 0  # by this object, when it did so last
    self.failure: OSError | errors.InputError | None = None  # of the last put
    self._taken = False
    self._wake, self._ended = threading.Event(), False
    if not fresh:
      self._fetch(path)
    self._thread = threading.Thread(target=self._put_now_and_then, name=f"puts {path}", daemon=True)
    self._thread.start()

  def _fetch(self, path: bucket_path.BucketPath) -> None:
    try:
      if (found := path.bucket.find(path.key)) is None:
        return
      with path.open("rb") as source, open(self.local, "wb") as target:
        shutil.copyfileobj(source, target, _PIECE)
      self._version, self._put_state = found.version, self._state()
    except (OSError, errors.InputError) as error:
      shutil.rmtree(self.local.parent, ignore_errors=True)
      reason = errors.reason(error) if isinstance(error, OSError) else errors.one_line(error)
      raise errors.InputError(f"cannot read {path}: {reason}") from error

  def put_soon(self) -> None:
    """Has the thread put what has been added, without waiting."""
    if isinstance(self._path, bucket_path.BucketPath):
      self._wake.set()

  def put(self) -> bool:
    """Puts what has been added; returns when that is done, or has failed: whether all of it is where it belongs."""
    return self._put("not written: %s; it is tried again")

  def _put(self, said: str) -> bool:
    """As `put`; says of the first failure what `said` has."""
    if not isinstance(self._path, bucket_path.BucketPath):
      return True
    with self._lock:
      state = self._state()
      if self._taken or state is None or state == self._put_state:
        return not self._taken
      try:
        lease.check()
        self._look(self._path)
        version = self._send(self._path, state[0])
      except (OSError, errors.InputError) as error:
        if self.failure is None:
          _log.warning(f"%s: {said}", self._path, errors.one_line(error))
        self.failure = error
        return False
      if version is None:
        self._taken = True
        _log.warning("%s: another process has changed it meanwhile: what was added last is lost", self._path)
        return False
      self._version, self._tried, self._put_state, self.put_bytes = version, None, state, state[0]
      if self.failure is not None:
        self.failure = None
        _log.info("%s: written again", self._path)
      return True

  def close(self) -> bool:
    """Puts what has been added since, and removes the local copy; tells whether all of it is where it belongs.

    All that ends in an outage waits together for one patience (bucket.ending).
    """
    if not isinstance(self._path, bucket_path.BucketPath) or self._ended:
      return True
    self._ended = True
    self._wake.set()
    self._thread.join(bucket.left())
    is_putting, was_said = self._thread.is_alive(), self.failure is not None
    with bucket.ending():
      whole = not is_putting and self._put("what was added last is lost: %s")
    if not whole and not self._taken and (is_putting or was_said):
      _log.warning("%s: what was added last is lost", self._path)
    shutil.rmtree(self.local.parent, ignore_errors=True)
    return whole

  def _put_now_and_then(self) -> None:
    pause = _EVERY
    while not self._ended:
      self._wake.wait(pause)
      self._wake.clear()
      if self._ended:
        return
      begun = time.monotonic()
      self.put()
      pause = max(_EVERY, _SHARE * (time.monotonic() - begun))

  def _state(self) -> tuple[int, int] | None:
    """Describes the local file: its bytes and when it was changed; None while there is none."""
    with contextlib.suppress(FileNotFoundError):
      found = self.local.stat()
      return found.st_size, found.st_mtime_ns
    return None

  def _look(self, path: bucket_path.BucketPath) -> None:
    """Learns the version that is to be replaced, where what is there may be what we have sent without an answer."""
    if self._tried is None and not self._unseen:
      return
    found = path.bucket.find(path.key)
    if self._unseen:
      self._version, self._unseen = found and found.version, False
    elif found is not None and _sum(path) == self._tried:
      self._version = found.version

  def _send(self, path: bucket_path.BucketPath, size: int) -> bucket.Version | None:
    """Puts the first `size` bytes: what is being added just now goes with the next put.

    Returns:
      What tells the object from others; None where the one that is there is another's.
    """
    if size > bucket.PART:
      return self._stream(path, size)
    with open(self.local, "rb") as source:
      data = source.read(size)
    self._tried = hashlib.sha256(data).digest()
    if self._version is None:
      return path.bucket.create(path.key, data)
    return path.bucket.replace(path.key, data, self._version)

  def _stream(self, path: bucket_path.BucketPath, size: int) -> bucket.Version | None:
    """As _send, for what takes several requests."""
    sent, left = hashlib.sha256(), size
    try:
      with open(self.local, "rb") as source, path.open("wb") as target:
        while left and (data := source.read(min(left, _PIECE))):
          target.write(data)
          sent.update(data)
          left -= len(data)
        if _tag(path.bucket.find(path.key)) != (self._version or {}).get("e_tag"):
          raise _Taken
        self._tried = sent.digest()
        lease.check()
    except _Taken:
      return None
    found = path.bucket.find(path.key)
    return found.version if found is not None and found.size == size - left else None


class _Taken(Exception):
  """The object is another's."""


def _tag(found: bucket.Found | None) -> str | None:
  """Returns what tells an object from those before it, in answers of all kinds."""
  return None if found is None else found.version["e_tag"]


def _sum(path: bucket_path.BucketPath) -> bytes:
  """Returns an object's SHA-256."""
  found = hashlib.sha256()
  with path.open("rb") as source:
    while data := source.read(_PIECE):
      found.update(data)
  return found.digest()
