"""What devices and processors take while a run computes: by counters where they can be read, as a range elsewhere.

| part | meter | where it has none |
|---|---|---|
| NVIDIA's GPUs | NVML: the counter of energy, or samples of power | from idle to the maker's limit (plan/targets.py) |
| TPUs | none that a program may read | the same, where Google has published it |
| processors | RAPL: whole packages, and memory where it is told | as CPU devices: a range of each; else not counted |

Nothing here ends a run or holds it up: a counter that fails is named once, and the range stands for it from then on.
What else works there is not counted: power supplies, fans, disks, networks, cooling.
"""

import ctypes
import dataclasses
import functools
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from glmjax import errors
from glmjax.plan import targets

PROCESSORS = "processors"
JOULES_OF_KWH = 3.6e6
# Watts of one CPU that Linux shows, at work: what makers allow packages, a core. Least: Ampere Altra Q32-17, 45 W for
# 32 cores, halved, as two CPUs may be one core. Most: AMD EPYC 9015, 155 W for eight.
CPU_WATTS = (0.7, 20.0)

_WITH_MEMORY = "RAPL, packages and memory"
_POWERCAP = pathlib.Path("/sys/class/powercap")
_NVML, _CUDA = "libnvidia-ml.so.1", "libcuda.so.1"
# RAPL's counters have 32 bits of 15 to 61 microjoules: they come round in two minutes at 500 W.
_EVERY = 30.0  # seconds between looks at counters
_EVERY_SAMPLE = 1.0  # ... where power is sampled
_NEVER_COUNTED = ("other parts of the hosts (power supplies, fans, disks)", "networks", "cooling")

_log = logging.getLogger("glmjax")


class Counter(Protocol):
  """Something that tells energy."""

  meter: str
  samples: bool  # it tells power, and is to be asked often

  def joules(self) -> float:
    """Returns what was taken since it was made, or asked last; raises OSError where that cannot be known."""


@dataclasses.dataclass
class Part:
  """A device, or the processors of a host: what was taken of it by a counter, and the time that no counter saw."""

  name: str
  count: int
  watts: tuple[float, float] | None  # of all of it, when no counter tells; None: nothing is known
  counter: Counter | None = None
  problem: str | None = None  # why there is no counter, or none any more
  meter: str | None = None  # the counter's name, also when it has failed since
  joules: float = 0.0
  unseen: float = 0.0  # seconds

  def __post_init__(self) -> None:
    self.meter = None if self.counter is None else self.counter.meter

  def update(self, seconds: float) -> bool:
    """Takes the time since the last call into account; tells whether the counter has failed."""
    if self.counter is not None:
      try:
        self.joules += self.counter.joules()
        return False
      except Exception as error:  # of a driver or a file system, whatever it may be
        self.counter, self.problem = None, _reason(error)
        self.unseen += seconds
        return True
    self.unseen += seconds
    return False

  def describe(self) -> dict[str, Any]:
    """Returns what is known as JSON values; "high_kwh" is None where there is no limit to what was not seen."""
    low, high = (self.joules + self.unseen * watts for watts in self.watts or (0.0, 0.0))
    return {
      "part": self.name,
      "count": self.count,
      "meter": self.meter,
      "measured_kwh": self.joules / JOULES_OF_KWH,
      "low_kwh": low / JOULES_OF_KWH,
      "high_kwh": None if self.watts is None and self.unseen else high / JOULES_OF_KWH,
      "watts": None if self.watts is None else list(self.watts),
      "unmeasured_seconds": self.unseen,
      "problem": self.problem,
    }


class Meter:
  """Sums up what its parts take, in a thread of its own that looks at them now and then."""

  def __init__(self, parts: Sequence[Part], clock: Callable[[], float] = time.monotonic):
    """Begins; `clock`: seconds."""
    self._parts, self._clock = list(parts), clock
    self._last, self._failed = clock(), False
    self._lock, self._end = threading.Lock(), threading.Event()
    samples = any(part.counter is not None and part.counter.samples for part in self._parts)
    every = _EVERY_SAMPLE if samples else _EVERY
    self._thread = threading.Thread(target=self._look, args=(every,), name="reads energy", daemon=True)
    self._thread.start()

  def read(self) -> dict[str, Any]:
    """Returns what was taken until now, as JSON values: kWh from "low_kwh" to "high_kwh" (None: it has no known limit),
    each of the parts, devices of one kind as one, and what is not counted.
    """
    with self._lock:
      self._update()
      parts = _joined(part.describe() for part in self._parts)
    highs = [part["high_kwh"] for part in parts]
    return {
      "low_kwh": sum(part["low_kwh"] for part in parts),
      "high_kwh": None if None in highs else sum(highs),
      "parts": parts,
      "not_counted": [*self._left_out(), *_NEVER_COUNTED],
    }

  def close(self) -> None:
    """Ends the thread."""
    self._end.set()
    self._thread.join()

  def _left_out(self) -> Iterator[str]:
    """Yields what of the hosts' processors and memory no part stands for."""
    meters = [part.meter for part in self._parts if part.name == PROCESSORS]
    if not meters:
      yield PROCESSORS
    if _WITH_MEMORY not in meters:
      yield "memory"

  def _look(self, every: float) -> None:
    while not self._end.wait(every):
      with self._lock:
        self._update()

  def _update(self) -> None:
    now = self._clock()
    seconds, self._last = now - self._last, now
    for part in self._parts:
      if part.update(seconds) and not self._failed:
        self._failed = True
        _log.warning(
          "%s: %s cannot be read any more: %s; a range stands for it from now on", part.name, part.meter, part.problem
        )


def cpus() -> int:
  """Returns the number of CPUs that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def of_here(devices: Iterable[Any]) -> list[Part]:
  """Returns the parts that this process is to count: its own `devices`, as JAX has them, and the host's processors."""
  parts = [_of_device(device) for device in devices if device.platform != "cpu"]
  counter, problem = _tried("RAPL", lambda: _Rapl(_POWERCAP))
  if counter is not None or not parts:
    low, high = (watts * cpus() for watts in CPU_WATTS)
    parts.append(Part(PROCESSORS, cpus(), (low, high), counter, problem))
  return parts


def _of_device(device: Any) -> Part:
  chip = targets.of_kind(device.device_kind)
  known = chip is not None and chip.watts is not None and chip.idle_watts is not None
  counter, problem = None, "it has no counter"
  if device.platform == "gpu":
    make = functools.partial(gpu_counter, ordinal=device.local_hardware_id)
    counter, problem = _tried("NVML", lambda: make(ctypes.CDLL(_NVML), ctypes.CDLL(_CUDA)))
  return Part(device.device_kind, 1, (chip.idle_watts, chip.watts) if known else None, counter, problem)


def _tried(name: str, make: Callable[[], Counter]) -> tuple[Counter | None, str | None]:
  """Returns a counter, or why there is none."""
  try:
    return make(), None
  except Exception as error:  # of a driver or a file system, whatever it may be
    return None, f"{name}: {_reason(error)}"


def _joined(described: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """Joins the devices of one kind and meter."""
  found: dict[tuple[Any, ...], dict[str, Any]] = {}
  for part in described:
    into = found.setdefault((part["part"], part["meter"], part["problem"]), part)
    if into is part:
      continue
    for name in ("count", "measured_kwh", "low_kwh", "high_kwh", "unmeasured_seconds"):
      into[name] = None if into[name] is None or part[name] is None else into[name] + part[name]
    if part["watts"] is not None:
      into["watts"] = [a + b for a, b in zip(into["watts"], part["watts"])]
  return list(found.values())


def _reason(error: Exception) -> str:
  return errors.reason(error) if isinstance(error, OSError) else errors.one_line(error)


def gpu_counter(nvml: Any, cuda: Any, ordinal: int) -> Counter:
  """Returns a GPU's counter; CUDA tells its place on the bus, as NVML numbers GPUs in another order and sees all.

  Args:
    nvml, cuda: the two libraries.
    ordinal: the GPU's number in CUDA, among those that the process may use.

  Raises:
    OSError: when it has none, or is shared with others.
  """
  device, bus = ctypes.c_int(), ctypes.create_string_buffer(32)
  _call(cuda, "cuInit", ctypes.c_uint(0))
  _call(cuda, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
  _call(cuda, "cuDeviceGetPCIBusId", bus, ctypes.c_int(len(bus)), device)
  handle = ctypes.c_void_p()
  _call(nvml, "nvmlInit_v2")
  _call(nvml, "nvmlDeviceGetHandleByPciBusId_v2", bus, ctypes.byref(handle))
  if _is_parted(nvml, handle):
    raise OSError("a part of the GPU (MIG), and the counter is of the whole")
  try:
    return _GpuEnergy(nvml, handle)
  except OSError:  # older than Volta
    return _GpuPower(nvml, handle)


def _is_parted(nvml: Any, handle: ctypes.c_void_p) -> bool:
  current, pending = ctypes.c_uint(), ctypes.c_uint()
  try:
    _call(nvml, "nvmlDeviceGetMigMode", handle, ctypes.byref(current), ctypes.byref(pending))
  except OSError:  # a GPU or a driver that knows no parts
    return False
  return bool(current.value)


def _call(library: Any, name: str, *arguments: Any) -> None:
  """Calls a function that returns 0, and raises OSError where it does not, or where the library has none such."""
  try:
    code = getattr(library, name)(*arguments)
  except AttributeError:
    raise OSError(f"the driver has no {name}") from None
  if code:
    raise OSError(f"{name} returns {code}")


class _GpuEnergy:
  """The millijoules that a GPU has taken since its driver was loaded."""

  meter, samples = "NVML energy counter", False

  def __init__(self, nvml: Any, handle: ctypes.c_void_p):
    self._nvml, self._handle = nvml, handle
    self._last = self._read()

  def _read(self) -> int:
    found = ctypes.c_ulonglong()
    _call(self._nvml, "nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(found))
    return found.value

  def joules(self) -> float:
    """Returns what was taken since the last call."""
    now = self._read()
    if now < self._last:
      raise OSError("it has gone backwards: the driver was loaded anew")
    taken, self._last = now - self._last, now
    return taken / 1e3


class _GpuPower:
  """A GPU's power, summed over time: between two samples it counts as their mean."""

  meter, samples = "NVML power samples", True

  def __init__(self, nvml: Any, handle: ctypes.c_void_p, clock: Callable[[], float] = time.monotonic):
    self._nvml, self._handle, self._clock = nvml, handle, clock
    self._watts, self._at = self._read(), clock()

  def _read(self) -> float:
    found = ctypes.c_uint()
    _call(self._nvml, "nvmlDeviceGetPowerUsage", self._handle, ctypes.byref(found))
    return found.value / 1e3

  def joules(self) -> float:
    """Returns what was taken since the last call."""
    watts, now = self._read(), self._clock()
    taken = (watts + self._watts) / 2 * (now - self._at)
    self._watts, self._at = watts, now
    return taken


class _Rapl:
  """The counters of all processor packages, and of their memory where there are such, in Linux's powercap tree."""

  samples = False

  def __init__(self, root: pathlib.Path):
    """Finds them; `root`: /sys/class/powercap.

    Raises:
      OSError: when there is none, or one cannot be read: since 2020 Linux lets root alone read them.
      ValueError: when one holds no number.
    """
    # intel-rapl-mmio has the same packages once more; "core" and "uncore" are parts of a package, "psys" is around it.
    names = {zone: (zone / "name").read_text(encoding="ascii").strip() for zone in sorted(root.glob("intel-rapl:*"))}
    if not any(name.startswith("package") for name in names.values()):
      raise OSError(f"{root} has no counter of a processor")
    self.meter = _WITH_MEMORY if "dram" in names.values() else "RAPL, packages"
    self._zones = [_Zone(zone) for zone, name in names.items() if name.startswith("package") or name == "dram"]

  def joules(self) -> float:
    """Returns what was taken since the last call."""
    return sum(zone.joules() for zone in self._zones)


class _Zone:
  """One counter of microjoules, which comes round to 0."""

  def __init__(self, folder: pathlib.Path):
    self._path = folder / "energy_uj"
    self._range = int((folder / "max_energy_range_uj").read_text(encoding="ascii"))
    self._last = self._read()

  def _read(self) -> int:
    return int(self._path.read_text(encoding="ascii"))

  def joules(self) -> float:
    """Returns what was taken since the last call, if it has come round once at most."""
    now = self._read()
    taken, self._last = now - self._last, now
    return (taken + self._range if taken < 0 else taken) / 1e6
