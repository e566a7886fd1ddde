"""Locks in buckets: an object that names its holder, and that the holder renews.

Every change of it is made under a condition on its version, so that of two who try one succeeds. A holder that is
killed or cut off renews no more, and after `LEASE` seconds another may take its place; a holder that finds it so stops
writing (`check`). Its requests are under a permit besides (bucket.Permit), which ends a quarter of a lease before. A
lock that nobody holds stays as an object of a few bytes: to delete one could not be conditional.
"""

from collections.abc import Iterator
import contextlib
import json
import logging
import threading
import time
from typing import Any
import uuid

from glmjax import errors
from glmjax.io import bucket
from glmjax.io import bucket_path
from glmjax.io import owner

LEASE = 40.0  # seconds without a renewal after which a holder counts as gone
_RENEW = 10.0  # seconds between renewals
_POLL = 1.0

Locks = tuple[tuple[bucket_path.BucketPath, str], ...]  # and what tells their holder from others

_log = logging.getLogger("glmjax")
_held: set["_Lease | _Borrowed"] = set()


@contextlib.contextmanager
def held(path: bucket_path.BucketPath, taken: str) -> Iterator[None]:
  """Holds the lock object at `path`.

  Args:
    path: of the lock.
    taken: begins the error of who comes second, as in lock.held.

  Raises:
    errors.InputError: when another process holds it.
  """
  lease = _Lease(path, taken)
  lease.acquire()
  _held.add(lease)
  bucket.permits.add(lease.permit)
  try:
    yield
  finally:
    _held.discard(lease)
    bucket.permits.discard(lease.permit)
    lease.release()


def check() -> None:
  """Raises InputError when this process has lost a lock that it took: what it writes may meet another's."""
  for lease in list(_held):
    lease.check()


def lent() -> Locks:
  """Returns what tells processes that work for this one of its locks; for `borrowed`."""
  return tuple((lease._path, lease.token) for lease in _held)


@contextlib.contextmanager
def borrowed(locks: Locks) -> Iterator[None]:
  """Writes for the process that has these locks: within it they are read again now and then, and by `check`."""
  ours = {lease.token for lease in _held}
  added = [_Borrowed(path, token) for path, token in locks if token not in ours]
  _held.update(added)
  bucket.permits.update(each.permit for each in added)
  try:
    yield
  finally:
    _held.difference_update(added)
    bucket.permits.difference_update(each.permit for each in added)
    for each in added:
      each.end.set()


class _Borrowed:
  """A lock of the process that this one works for."""

  def __init__(self, path: bucket_path.BucketPath, token: str):
    self._path, self.token = path, token
    self._bucket = bucket.named(*path.root, most=_RENEW)
    self.permit = bucket.Permit(0.0)
    self.check()
    self.end = threading.Event()
    threading.Thread(target=self._keep, name=f"reads {path}", daemon=True).start()

  def _keep(self) -> None:
    while not self.permit.lost and not self.end.wait(_RENEW):
      with contextlib.suppress(OSError, errors.InputError):
        self.check()

  def check(self) -> None:
    """Raises InputError where the lock is another's by now, OSError where that cannot be known."""
    begun = time.monotonic()
    holder = _holder(self._bucket, self._path)
    if holder.get("token") != self.token or holder.get("free"):
      self.permit.lost = _lost(self._path, f"{_named(holder)} has taken it")
    if self.permit.lost:
      raise errors.InputError(self.permit.lost)
    self.permit.until = begun + LEASE / 2


class _Lease:
  """One lock, held or tried for.

  Its requests are given up sooner than others, so that one that hangs does not cost the lease.
  """

  def __init__(self, path: bucket_path.BucketPath, taken: str):
    self._path, self._taken = path, taken
    self._bucket = bucket.named(*path.root, most=_RENEW)
    self.token = uuid.uuid4().hex
    self._me = owner.here() | {"token": self.token}
    self._version: bucket.Version = {}
    self._renewed = 0.0  # when the last renewal that succeeded was begun
    self.permit = bucket.Permit(0.0)  # to write, as long as nobody else can have taken the lock
    self._renewals = 0
    self._lost = ""
    self._end, self._one = threading.Event(), threading.Lock()  # one renewal at a time

  def acquire(self) -> None:
    """Takes the lock, at once where it is free, or once its holder's lease is over."""
    if any(lease._path == self._path for lease in _held):
      raise errors.InputError(f"{self._taken} ({_named(self._me)}): wait for it, or choose another")
    until = time.monotonic() + bucket.patience()
    attempt = self._create
    while not self._version:
      try:
        self._version = attempt() or {}
      except PermissionError:
        raise
      except OSError:
        if time.monotonic() > until:
          raise
        continue
      attempt = self._take_over
    self._check_conditions()
    self._thread = threading.Thread(target=self._keep, name=f"lease of {self._path}", daemon=True)
    self._thread.start()

  def _create(self) -> bucket.Version | None:
    self._renewed = time.monotonic()
    return self._bucket.create(self._path.key, self._content())

  def _check_conditions(self) -> None:
    """Raises InputError where the service changes an object that is not as the condition has it: some that speak S3
    ignore conditions.
    """
    key, stale = self._path.key, self._version
    tried = self._content(tries="whether conditions hold")
    made = self._bucket.create(key, tried)
    self._renew()
    if made is not None or self._bucket.replace(key, tried, stale) is not None:
      raise errors.InputError(
        f"{self._bucket.address} ignores conditions on writes (If-None-Match, If-Match), so that two writers could not "
        "be kept apart: update the service, or use another bucket"
      )

  def _content(self, **more: Any) -> bytes:
    return json.dumps(self._me | {"renewals": self._renewals} | more).encode()

  def _take_over(self) -> bucket.Version | None:
    """Waits until the lock is free or its holder gone, and takes it; None: another was faster."""
    if (found := self._bucket.find(self._path.key)) is None:
      return self._create()
    holder = self._holder()
    if not holder.get("free") and not self._is_mine(holder) and not owner.is_gone(holder):
      self._wait(found, holder)
    self._renewed = time.monotonic()
    return self._bucket.replace(self._path.key, self._content(), found.version)

  def _is_mine(self, holder: dict[str, Any]) -> bool:
    return holder.get("token") == self._me["token"]  # of a request whose answer was lost

  def _wait(self, found: bucket.Found, holder: dict[str, Any]) -> None:
    """Returns when the lease that was found is over; raises InputError when its holder renews it."""
    left = LEASE - (self._server_time() - found.modified)
    if left > 0:
      _log.info("%s was held by %s: waits up to %.0f s to see whether it still is", self._path, _named(holder), left)
    until = time.monotonic() + left
    while time.monotonic() < until:
      time.sleep(_POLL)
      now = self._bucket.find(self._path.key)
      if now is None or now.version != found.version:
        if not self._holder().get("free"):
          raise errors.InputError(f"{self._taken} ({_named(self._holder())}): wait for it, or choose another")
        return

  def _server_time(self) -> float:
    """Returns the server's time: ours may be another, and the lock's is told by the server's."""
    probe = f"{self._path.key}.{self._me['token']}"
    self._bucket.put(probe, b"")
    try:
      found = self._bucket.find(probe)
      return found.modified if found else time.time()
    finally:
      self._bucket.delete([probe])

  def _holder(self) -> dict[str, Any]:
    return _holder(self._bucket, self._path)

  def _keep(self) -> None:
    """Renews the lease until it is released or lost; what is not answered is tried again."""
    while not self._lost and not self._end.wait(_RENEW):
      with contextlib.suppress(OSError, errors.InputError):
        self._renew()

  def _renew(self) -> None:
    """Renews the lease, or finds that another has taken the lock: only then it is lost."""
    with self._one:
      begun = time.monotonic()
      self._renewals += 1
      version = self._bucket.replace(self._path.key, self._content(), self._version)
      if version is None and self._is_mine(self._holder()) and (found := self._bucket.find(self._path.key)):
        version = self._bucket.replace(self._path.key, self._content(), found.version)
      if version is not None:
        self._version, self._renewed = version, begun
        self.permit.until = begun + LEASE - LEASE / 4
      elif not self._lost:
        self._lost = f"{_named(self._holder())} has taken it"
        self.permit.lost = _lost(self._path, self._lost)
        _log.warning("%s: the lock is lost: %s", self._path, self._lost)

  def check(self) -> None:
    """Raises InputError where another has taken the lock, OSError as long as it cannot be known whether."""
    if not self._lost and time.monotonic() - self._renewed > LEASE:
      self._renew()
    if self._lost:
      raise errors.InputError(_lost(self._path, self._lost))

  def release(self) -> None:
    """Frees the lock, if it is still ours; an unanswered request leaves that to the lease's end."""
    self._end.set()
    self._thread.join(min(_RENEW, bucket.left()))  # a renewal that is under way would change the version
    with bucket.ending(), contextlib.suppress(OSError, errors.InputError):
      self._bucket.replace(self._path.key, self._content(free=True), self._version)


def _holder(there: bucket.Bucket, path: bucket_path.BucketPath) -> dict[str, Any]:
  try:
    content = json.loads(there.get(path.key))
  except (FileNotFoundError, ValueError):
    return {"free": True}
  return content if isinstance(content, dict) else {}


def _lost(path: bucket_path.BucketPath, why: str) -> str:
  return f"{path}: this process has lost its lock ({why}) and writes no more: start it again"


def _named(holder: dict[str, Any]) -> str:
  return f"process {holder.get('process', '?')} on {holder.get('host', '?')}"
