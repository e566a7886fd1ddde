"""The C++ library of products on CPUs: finding it, whether this JAX can call it, registering it.

It is a plain shared library without Python's interface, built when glmjax is installed where there is a C++ compiler
(setup.py), and serves every Python, and every JAX from the one on that it was built for while the major version of
XLA's interface stays the same. Nothing of it runs before the first product; where it is missing or does not fit,
everything else works, and `status()` says why.
"""

import concurrent.futures
import ctypes
import dataclasses
import functools
import os
import pathlib
import re
import statistics
import time

import jax
import jaxlib
import numpy as np

from glmjax import errors

PRODUCT, ATTENTION = "glmjax_cpu_product", "glmjax_cpu_attention"  # XLA's and the library's names of its handlers
ISA = "GLMJAX_CPU_ISA"  # names the instruction set to use in place of the machine's best; "none": not the library
FILE = pathlib.Path(__file__).parent / "libglmjax_cpu.so"
_INTERFACE = 3  # what the handler takes (src/handler.cc): a library of other sources has another number
_NEEDS = "a C++ compiler that builds it (GCC 10 or later), with jaxlib's headers, on Linux"  # setup.py
# All that the library has, of every machine, the best first (src/choose.cc).
_SETS = ("avx512_bf16", "avx512_vnni", "avx512", "avx2", "neon", "generic")


@dataclasses.dataclass(frozen=True)
class Status:
  """What there is of the library on this machine."""

  available: bool
  isa: str  # the instruction set in use, one of `sets`; "" without the library
  sets: tuple[str, ...]  # the instruction sets that the machine has, the best first
  words: str  # the above for people, or why the library is not there


@dataclasses.dataclass(frozen=True)
class _Loaded:
  sets: tuple[str, ...]
  lacks: str  # in words, what keeps it from being used; "" where nothing does
  library: ctypes.CDLL | None = None


def status() -> Status:
  """Returns whether products can use the library, and with which instruction set.

  Raises:
    errors.InputError: where GLMJAX_CPU_ISA names a set that nobody has, or not this machine.
  """
  name = forced()
  if name == "none":
    return Status(False, "", (), f"switched off by {ISA}=none")
  found = _load()
  if found.lacks:
    return Status(False, "", (), found.lacks)
  if name and name not in found.sets:
    raise errors.InputError(f"{ISA}={name}: this machine has {', '.join(found.sets)}")
  isa = name or found.sets[0]
  return Status(True, isa, found.sets, f"{isa}, of {', '.join(found.sets)}")


def forced() -> str:
  """Returns the instruction set that GLMJAX_CPU_ISA names, "none", or "" where the machine's best is to be used.

  Raises:
    errors.InputError: where it names none that the library knows.
  """
  name = os.environ.get(ISA, "")
  if name and name not in (*_SETS, "none"):
    raise errors.InputError(f"{ISA}={name}: it is one of {', '.join(_SETS)}, or none to do without the library")
  return name


def read_bandwidth(num_bytes: int = 2**30, turns: int = 5) -> float:
  """Returns the bytes per second at which this process's processors read memory together: the median of some turns.

  Args:
    num_bytes: what is read in a turn; many times the size of the caches.
    turns: how often.

  Raises:
    errors.InputError: where the library is not there.
  """
  now = status()
  if not now.available:
    raise errors.InputError(f"the library of products on CPUs is not there: {now.words}")
  add = _load().library.glmjax_cpu_sum_words
  add.restype, add.argtypes = ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_int64)
  parts = len(os.sched_getaffinity(0))
  words = np.ones(num_bytes // 8 // parts * parts, np.uint64)  # ones: pages that were never written share one
  size, start = words.size // parts, words.ctypes.data
  times = []
  with concurrent.futures.ThreadPoolExecutor(parts) as pool:
    for _ in range(turns):
      began = time.perf_counter()
      sums = list(pool.map(lambda part: add(start + part * size * 8, size), range(parts)))
      times.append(time.perf_counter() - began)
      assert sum(sums) == words.size
  return words.nbytes / statistics.median(times)


@functools.cache
def _load() -> _Loaded:
  """Loads the library and registers its handler, once in a process."""
  if not FILE.exists():
    return _Loaded((), f"not built: where glmjax was installed there was not {_NEEDS}")
  try:
    library = ctypes.CDLL(str(FILE))
  except OSError as error:
    return _Loaded((), f"built for another machine: {error}")
  if not hasattr(library, "glmjax_cpu_interface") or library.glmjax_cpu_interface() != _INTERFACE:
    return _Loaded((), "built of other sources than this glmjax: build it again (make install)")
  lacks = _mismatch((library.glmjax_cpu_ffi_major(), library.glmjax_cpu_ffi_minor()), runtime_version())
  if not lacks:
    try:
      for name in (PRODUCT, ATTENTION):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except Exception as error:  # whatever a later JAX says: products without the library are slow, not wrong
      lacks = f"refused by jax {jax.__version__}: {error}"
  library.glmjax_cpu_sets.restype = ctypes.POINTER(ctypes.c_char_p)
  return _Loaded(tuple(_strings(library.glmjax_cpu_sets())), lacks, library)


def _strings(names: "ctypes._Pointer[ctypes.c_char_p]") -> list[str]:
  """Returns the strings of a C array that ends with a null pointer."""
  found: list[str] = []
  while (name := names[len(found)]) is not None:
    found.append(name.decode())
  return found


def runtime_version() -> tuple[int, int] | None:
  """Returns the version of XLA's interface that this jaxlib has, as its headers say; None where it comes without."""
  header = pathlib.Path(jaxlib.__file__).parent / "include" / "xla" / "ffi" / "api" / "c_api.h"
  try:
    text = header.read_text(encoding="utf-8")
  except OSError:
    return None
  numbers = [re.search(rf"#define XLA_FFI_API_{name} (\d+)", text) for name in ("MAJOR", "MINOR")]
  return (int(numbers[0][1]), int(numbers[1][1])) if all(numbers) else None


def _mismatch(built: tuple[int, int], runtime: tuple[int, int] | None) -> str:
  """Says why a library built for this version of XLA's interface must not be registered; "" where it may.

  XLA takes handlers of its own version and older ones; a newer one, registered before the CPU's backend starts, keeps
  the backend from starting.
  """
  if runtime is None:
    return f"this jaxlib ({jaxlib.__version__}) does not say which version of XLA's interface it has"
  if built[0] == runtime[0] and built[1] <= runtime[1]:
    return ""
  return (
    f"built for XLA's interface {built[0]}.{built[1]}, and jaxlib {jaxlib.__version__} has {runtime[0]}.{runtime[1]}: "
    "reinstall glmjax with this jaxlib (pip install --no-build-isolation .)"
  )
