"""What a run costs while it happens: lines of WORKDIR/compute.jsonl, of process N > 0 of several compute-N.jsonl.

A session is a run's process, or processes, from the start or resume to their end. Its lines are cumulative: the last
one counts, and tells nearly all when the session was killed. cards/compute.py sums them up.
"""

import logging
import math
import os
import pathlib
import platform
import resource
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import jax

from glmjax import errors
from glmjax import versions
from glmjax.io import paths
from glmjax.parallel import processes
from glmjax.plan import targets
from glmjax.train import energy
from glmjax.train import metrics as metrics_lib

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "glmjax")
# From line to line a session lasts so much longer at least: saved every step, one of a year has two thousand lines.
_LONGER = 1.01

_log = logging.getLogger("glmjax")


class Session:
  """One start or resume of a run, with all its ways back; every process has its own, and a file of its own."""

  def __init__(self, path: paths.Path, mesh: jax.sharding.Mesh, clock: Callable[[], float] = time.monotonic):
    """Begins to count.

    Args:
      path: of this process's file.
      mesh: the run's.
      clock: seconds.
    """
    devices = [*mesh.devices.flat]
    own = [device for device in devices if device.process_index == jax.process_index()]
    self._clock, self._began, self._written = clock, clock(), 0.0
    self._devices, self._own = _kinds(devices), own
    self._first: int | None = None  # step from which it goes on; None: it has not come that far
    self._done = {"steps": 0, "samples": 0, "tokens": 0, "model_flops": 0.0, "step_seconds": 0.0}
    self._step = 0
    self._facts = {
      "session": processes.from_first(lambda: uuid.uuid4().hex),
      "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
      "process": jax.process_index(),
      "processes": jax.process_count(),
      "devices": self._devices,
      "host": _host(),
      "versions": versions.of(PACKAGES) | {"commit": versions.commit()},
    }
    self._lines = _open(path)
    self._meter = energy.Meter(energy.of_here(own), clock)

  def begin(self, step: int) -> None:
    """Notes the step from which it goes on, and writes the first line: a session that is killed early has been one."""
    self._first = self._step = step
    self._write()

  def add(self, record: metrics_lib.Record, samples: int) -> None:
    """Counts a step.

    Args:
      record: its figures, a line of metrics.jsonl.
      samples: of its batch.
    """
    done, self._step = self._done, record["step"]
    done["steps"] += 1
    done["samples"] += samples
    done["tokens"] += record["tokens"]
    done["model_flops"] += record["model_flops_per_second"] * record["seconds"]
    done["step_seconds"] += record["seconds"]

  def save(self) -> None:
    """Writes a line, when the run is saved, unless the last one tells nearly as much."""
    if self._clock() - self._began >= _LONGER * self._written:
      self._write()

  def close(self) -> None:
    """Writes the last line, and ends the meter."""
    if self._first is not None:
      self._write(ended=True)
    self._meter.close()
    if self._lines is not None:
      self._lines.close()

  def _write(self, ended: bool = False) -> None:
    self._written = self._clock() - self._began
    if self._lines is None:
      return
    line = self._facts | {
      "seconds": self._written,
      "first_step": self._first,
      "step": self._step,
      "done": self._done,
      "mfu": mfu(self._done["model_flops"], self._done["step_seconds"], self._devices),
      "peak_bytes": _peak(self._own),
      "energy": self._meter.read(),
      "ended": ended,
    }
    self._lines.write(
      line, is_saved=not ended
    )  # the last one is put as the file is closed, in the patience of all ends


def mfu(flops: float, seconds: float, devices: Sequence[dict[str, Any]]) -> float | None:
  """Returns the share of the devices' half-precision peak that a model's FLOPs were; None: no peak is known of one.

  Args:
    flops: as the model has them, without recompute (params.train_flops_per_token).
    seconds: of the steps, saving and evaluating aside.
    devices: "count" and "kind" of each kind.
  """
  peaks = [(each["count"], targets.of_kind(each["kind"])) for each in devices]
  if not seconds or any(chip is None for _, chip in peaks):
    return None
  return flops / (seconds * math.fsum(count * chip.peak_flops for count, chip in peaks if chip is not None))


def _kinds(devices: Sequence[Any]) -> list[dict[str, Any]]:
  """Counts the devices of each kind."""
  found: dict[tuple[str, str], int] = {}
  for device in devices:
    key = device.platform, device.device_kind
    found[key] = found.get(key, 0) + 1
  return [{"count": count, "platform": where, "kind": kind} for (where, kind), count in found.items()]


def _host() -> dict[str, Any]:
  """Describes this process's host; "id" is the same for all processes on it, in containers too, until it restarts."""
  return {
    "id": _read("/proc/sys/kernel/random/boot_id").strip() or socket.gethostname(),
    "processor": _processor(),
    "cpus": energy.cpus(),
    "cpus_of_host": max(energy.cpus(), os.cpu_count() or 1),
  }


def _processor() -> str:
  """Returns the processor's name, as far as Linux knows it."""
  for line in _read("/proc/cpuinfo").splitlines():
    name, _, value = line.partition(":")
    if name.strip() == "model name":
      return " ".join(value.split())
  return platform.processor() or platform.machine()


def _read(path: str) -> str:
  try:
    return pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
  except OSError:  # another system
    return ""


def _peak(devices: Sequence[Any]) -> dict[str, int | None]:
  """Returns the most bytes that this process has had in the host's memory, and in that of one of its devices; None:
  the devices do not tell.
  """
  stats = [_stats(device) for device in devices]
  known = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
  unit = 1 if sys.platform == "darwin" else 1 << 10
  host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return {"host": host, "device": max(known, default=None)}


def _stats(device: Any) -> dict[str, Any]:
  try:
    return device.memory_stats() or {}
  except jax.errors.JaxRuntimeError:  # of a plug-in that has none
    return {}


def _open(path: paths.Path) -> metrics_lib.Lines | None:
  """Opens the file behind what earlier sessions wrote; None, with a word, where a bucket's cannot be read."""
  try:
    return metrics_lib.Lines(path, sys.maxsize, of_each_step=False)  # no step's line goes: what was done has its cost
  except errors.InputError as error:
    _log.warning("%s; training goes on, and what this session costs is not recorded", error)
    return None
