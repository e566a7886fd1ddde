"""Compiled programs, kept on disk from one process to the next.

JAX's own compilation cache, with files of ours below it: each appears whole or not at all, holds its own checksum, and
goes when there are too many. JAX's key knows the program, its version and the compiler's options, but of a CPU neither
its features nor its threads: each kind of machine has a folder of its own, so that a home that several share never
gives one machine the code of another.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import platform
import tempfile
from collections.abc import Iterator

import jax

from glmjax import errors

SWITCH = "GLMJAX_PROGRAMS"  # environment variable; "off": nothing is kept
JAXS_OWN = "JAX_COMPILATION_CACHE_DIR"  # the same of JAX, which then keeps them as it always does
MOST_BYTES = 1 << 30
_LEFT = 0.75  # of MOST_BYTES, once they were exceeded
_LARGEST = 1 << 28  # bytes of one program that is kept
_SUM = hashlib.sha256().digest_size
_SUFFIX = ".program"
_CPU_FACTS = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features")
_REQUESTED, _FOUND = (f"/jax/compilation_cache/{name}" for name in ("compile_requests_use_cache", "cache_hits"))

_log = logging.getLogger("glmjax")


def root() -> pathlib.Path:
  """Returns the folder of all machines' programs: glmjax/programs in the user's folder of caches.

  Raises:
    errors.InputError: when the user has none.
  """
  caches = os.environ.get("XDG_CACHE_HOME") or ""
  try:
    folder = pathlib.Path(caches) if os.path.isabs(caches) else pathlib.Path.home() / ".cache"
  except RuntimeError as error:
    raise errors.InputError("there is no home folder: set HOME or XDG_CACHE_HOME") from error
  return folder / "glmjax" / "programs"


def why_not() -> str | None:
  """Says why programs are not kept in `root`, where the user has said so; None: they are."""
  if os.environ.get(JAXS_OWN):
    return f"JAX keeps them in {JAXS_OWN}={os.environ[JAXS_OWN]}"
  wanted = os.environ.get(SWITCH, "")
  if wanted == "off":
    return f"{SWITCH}=off"
  if wanted:
    raise errors.InputError(f"{SWITCH} is {wanted!r}: the only thing that it can be is off")
  return None


def open_root() -> pathlib.Path:
  """Returns `root`, made where it was missing, once it is sure that nobody else can write into it.

  Raises:
    errors.InputError: when it is not the user's own, others may write into it, or it cannot be made or written.
  """
  folder = root()
  try:
    for each in (folder.parent, folder):
      each.mkdir(mode=0o700, parents=True, exist_ok=True)
      found = each.stat()
      if found.st_uid != os.geteuid():
        raise errors.InputError(f"{each} belongs to another user")
      if found.st_mode & 0o022:
        raise errors.InputError(f"others may write into {each}: chmod go-w {each}")
    if not os.access(folder, os.W_OK | os.X_OK):
      raise errors.InputError(f"{folder} cannot be written")
  except OSError as error:
    raise errors.InputError(f"{folder} cannot be made: {errors.reason(error)}") from error
  return folder


@functools.cache
def machine() -> str:
  """Returns the name of the machine's folder: it stands for all that code depends on and JAX's key does not hold."""
  facts = [platform.system(), platform.machine(), os.environ.get("NPROC", str(os.cpu_count()))]
  with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
    for line in lines:
      if not line.strip():
        break  # of the first processor
      name, _, value = line.partition(":")
      if name.strip() in _CPU_FACTS:
        facts.append(f"{name.strip()}: {' '.join(sorted(value.split()))}")
  return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


@dataclasses.dataclass
class Counts:
  """Programs that this process has needed, and how many of them it found on disk."""

  needed: int = 0
  found: int = 0

  def __str__(self) -> str:
    return f"{self.needed} programs, {self.found} of them compiled before"


counts = Counts()


def _count(event: str, **_: str | int | float) -> None:
  counts.needed += event == _REQUESTED
  counts.found += event == _FOUND


@dataclasses.dataclass
class Store:
  """Programs in a folder, as JAX's compilation cache asks for them (jax._src.compilation_cache_interface).

  Nothing that a disk does ends a run: what cannot be read is compiled again, what cannot be written is not kept.
  """

  folder: pathlib.Path  # of this machine's
  most_bytes: int = MOST_BYTES  # of all machines'
  _bytes: int | None = None  # in all machines' folders, as this process knows; None: not looked yet
  _failed: bool = False  # nothing can be written

  def get(self, key: str) -> bytes | None:
    """Returns a program; None where there is none, or none that is whole, or processes must compile together."""
    if not key or jax.process_count() > 1:
      return None
    path = self._path(key)
    try:
      content = path.read_bytes()
      if hashlib.sha256(content[_SUM:]).digest() == content[:_SUM]:
        os.utime(path)  # it is in use: others go first
        return content[_SUM:]
      path.unlink()
    except OSError:
      pass
    return None

  def put(self, key: str, value: bytes) -> None:
    """Keeps a program, in place of those that were not used for the longest time where there are too many."""
    if self._failed or len(value) > min(_LARGEST, self.most_bytes) or jax.process_count() > 1:
      return
    try:
      self._make_room(len(value) + _SUM)
      self.folder.mkdir(mode=0o700, exist_ok=True)
      self._write(self._path(key), hashlib.sha256(value).digest() + value)
    except OSError as error:
      self._failed = True
      _log.warning("compiled programs are not kept: %s: %s", self.folder, errors.reason(error))

  def clear(self) -> None:
    """Forgets nothing: files are the user's to remove."""

  def _path(self, key: str) -> pathlib.Path:
    return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}{_SUFFIX}"

  def _write(self, path: pathlib.Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=_SUFFIX)
    try:
      with open(descriptor, "wb") as file:
        file.write(content)
      os.replace(temporary, path)
    except BaseException:
      with contextlib.suppress(OSError):
        os.unlink(temporary)
      raise

  def _make_room(self, size: int) -> None:
    """Removes programs that were used least lately, of whatever machine, until there is room for one of this size."""
    if self._bytes is None:
      self._bytes = sum(found.st_size for _, found in files(self.folder.parent))
    self._bytes += size
    if self._bytes <= self.most_bytes:
      return
    there = sorted(files(self.folder.parent), key=lambda item: item[1].st_mtime)
    self._bytes = sum(found.st_size for _, found in there) + size
    for path, found in there:
      if self._bytes <= max(size, self.most_bytes * _LEFT):
        break
      path.unlink(missing_ok=True)
      self._bytes -= found.st_size


def files(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, os.stat_result]]:
  """Yields every program in a folder as `root`, and what was half written when a process died."""
  for path in folder.glob(f"*/*{_SUFFIX}"):
    with contextlib.suppress(OSError):
      yield path, path.stat()


def keep() -> Store | None:
  """Has JAX keep what this process compiles, and look there first; None, with a warning unless the user wants it so,
  where that cannot be. Once a process, before the first program.
  """
  from jax._src import compilation_cache  # pylint: disable=g-import-not-at-top

  if isinstance(compilation_cache._cache, Store):
    return compilation_cache._cache
  if why_not():
    return None
  try:
    store = Store(open_root() / machine())
  except errors.InputError as error:
    _log.warning("compiled programs are not kept: %s (%s=off says no more of it)", error, SWITCH)
    return None
  jax.monitoring.register_event_listener(_count)
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  compilation_cache._cache, compilation_cache._cache_initialized = store, True
  return store


def describe() -> dict[str, str | int | None]:
  """Returns the folder, the programs of this machine in it, the bytes of all, and why nothing is kept (None: it is)."""
  problem, folder, there = why_not(), None, []
  try:
    folder = root()
    there = list(files(folder))
    if problem is None:
      open_root()
  except errors.InputError as error:
    problem = problem or str(error)
  mine = sum(path.parent.name == machine() for path, _ in there)
  size = sum(found.st_size for _, found in there)
  return {"folder": folder and str(folder), "programs": mine, "bytes": size, "problem": problem}
