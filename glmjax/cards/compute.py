"""What a run cost, from what it recorded (train/compute.py): sums over its sessions.

Work is told twice: what is kept, each step of the run's state once, and what was done, steps that came again included.
Hours and energy are of all that was done.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from glmjax.cards import records
from glmjax.checkpoint import manager as manager_lib
from glmjax.io import paths
from glmjax.train import energy as energy_lib
from glmjax.train import workdir as workdir_lib

_WHOLE = ("steps", "samples", "tokens")
_COUNTS = (*_WHOLE, "model_flops", "step_seconds")
_OF_PART = ("count", "measured_kwh", "low_kwh", "unmeasured_seconds")
_MOST = 1e100  # of a number: products and sums of such are finite
_Line = dict[str, Any]

_log = logging.getLogger("glmjax")


@dataclasses.dataclass(frozen=True)
class Work:
  """Training that was done; tokens were read, padding included, and FLOPs are the model's, without recompute."""

  steps: int
  samples: int
  tokens: int
  model_flops: float


@dataclasses.dataclass(frozen=True)
class Energy:
  """What machines took, at least and at most, and how that is known."""

  low_kwh: float
  high_kwh: float | None  # None: something has no known limit
  measured_kwh: float  # part of both
  meters: Mapping[str, float]  # kWh that each has measured
  ranges: Mapping[str, tuple[float, float | None]]  # of what no meter saw: kWh from, to
  not_counted: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Change:
  """A version that was another one from a session on."""

  session: int  # from 1
  first_step: int  # from which that went on
  name: str
  before: str | None
  after: str | None


@dataclasses.dataclass(frozen=True)
class Compute:
  """What a run cost, as far as it was recorded."""

  sessions: int  # that did something, or were killed
  killed: int  # of them, which have not told their end
  first_step: int  # from which the record begins; above 0: steps before were done without one
  step: int  # of the run's state
  unrecorded_steps: int  # done, and told by no line, for a kill came first; at least so many
  kept: Work | None  # None: metrics.jsonl is lacking
  done: Work
  step_hours: float  # in steps
  wall_hours: float
  device_hours: Mapping[str, float]  # by kind
  processors: Sequence[str]
  mfu: tuple[float, float] | None  # least and most of a session; None: no peak is known
  peak_bytes: Mapping[str, int | None]  # of a process: in its "host"'s memory, in a "device"'s
  energy: Energy
  versions: Mapping[str, str | None]  # of the last session
  changes: Sequence[Change]

  @property
  def restarts(self) -> int:
    """How often it was gone on with."""
    return max(self.sessions - 1, 0)

  def to_dict(self) -> dict[str, Any]:
    """Returns it as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(self) | {"restarts": self.restarts}))


def total(workdir: paths.Named) -> Compute | None:
  """Sums up what a run's folder has of its costs; None: nothing is recorded, as of runs before there were records.

  Lines that are damaged are told of, and left out.

  Raises:
    errors.InputError: when a file is there and cannot be read.
  """
  folder = workdir_lib.Workdir(paths.named(workdir))
  sessions = _sessions(folder)
  if not sessions:
    return None
  firsts = [lines[0] for lines in sessions]
  worked = [line for line in firsts if line["done"]["steps"] or not line["ended"]]
  steps = manager_lib.steps(folder.checkpoints)
  step = steps[-1] if steps else firsts[-1]["step"]
  untold = [max(b["first_step"] - a["step"], 0) for a, b in zip(firsts, firsts[1:])]
  untold += [max(step - firsts[-1]["step"], 0)]  # the last session may have been killed too
  done = {name: sum(line["done"][name] for line in firsts) for name in _COUNTS}
  seconds = done.pop("step_seconds")
  shares = [line["mfu"] for line in firsts if line["mfu"] is not None]
  peaks = [line["peak_bytes"] for lines in sessions for line in lines]
  return Compute(
    sessions=len(worked),
    killed=sum(not line["ended"] for line in firsts),
    first_step=firsts[0]["first_step"],
    step=step,
    unrecorded_steps=sum(untold),
    kept=_kept(folder, step, done),
    done=Work(**done),
    step_hours=seconds / 3600,
    wall_hours=sum(line["seconds"] for line in firsts) / 3600,
    device_hours=_device_hours(firsts),
    processors=[*dict.fromkeys(line["host"]["processor"] for lines in sessions for line in lines)],
    mfu=(min(shares), max(shares)) if shares else None,
    peak_bytes={where: max((n for each in peaks if (n := each[where])), default=None) for where in ("host", "device")},
    energy=_energy(sessions),
    versions=firsts[-1]["versions"],
    changes=_changes(firsts),
  )


def _sessions(folder: workdir_lib.Workdir) -> list[list[_Line]]:
  """Returns the last line that each process has of each session, in order; the first process's comes first."""
  found: dict[str, dict[int, _Line]] = {}
  for path in folder.computes:
    damaged = 0
    for line in records.read(path):
      if line is not None and _is_whole(line):
        found.setdefault(line["session"], {})[line["process"]] = line
      else:
        damaged += 1
    if damaged:
      _log.warning("%s: %d damaged lines are left out of what the run cost", path, damaged)
  return [[lines[process] for process in sorted(lines)] for lines in found.values()]


def _is_whole(line: _Line) -> bool:
  """Tells whether a line has all that is read of it."""
  try:
    energy = line["energy"]
    cpus = [line["host"][name] for name in ("cpus", "cpus_of_host")]
    whole = [line[name] for name in ("first_step", "step", "process")] + [line["done"][name] for name in _WHOLE]
    whole += [each["count"] for each in line["devices"]] + cpus
    numbers = [line["seconds"], *whole, *(line["done"][name] for name in _COUNTS)]
    numbers += [part[name] for part in energy["parts"] for name in _OF_PART]
    maybe = [line["mfu"], energy["high_kwh"], *(part["high_kwh"] for part in energy["parts"])]
    maybe += [line["peak_bytes"][where] for where in ("host", "device")]
    texts = [line["session"], line["host"]["id"], line["host"]["processor"], *energy["not_counted"]]
    texts += [each["kind"] for each in line["devices"]] + [part["part"] for part in energy["parts"]]
    texts += [text for text in [*line["versions"].values(), *(part["meter"] for part in energy["parts"])] if text]
    return (
      all(map(_is_number, [*numbers, *(number for number in maybe if number is not None)]))
      and all(isinstance(number, int) for number in whole)
      and min(cpus) >= 1
      and all(isinstance(text, str) for text in texts)
      and isinstance(line["ended"], bool)
    )
  except (KeyError, TypeError, AttributeError):
    return False


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _MOST


def _kept(folder: workdir_lib.Workdir, step: int, done: Mapping[str, float]) -> Work | None:
  """Returns the work that the state of a step has behind it, which is what metrics.jsonl has lines of."""
  steps = samples = tokens = 0
  if not folder.metrics.exists():
    return None
  for line in filter(None, records.read(folder.metrics)):
    numbers = [line.get(name) for name in ("step", "tokens", "samples_seen", "tokens_seen")]
    if all(map(_is_number, numbers)) and line["tokens_seen"] and line["step"] <= step:
      steps += 1
      tokens += line["tokens"]
      samples += line["tokens"] * line["samples_seen"] // line["tokens_seen"]
  of_token = done["model_flops"] / done["tokens"] if done["tokens"] else 0.0  # the same in all sessions
  return Work(steps, samples, tokens, of_token * tokens)


def _device_hours(lines: Iterable[_Line]) -> dict[str, float]:
  hours: dict[str, float] = {}
  for line in lines:
    for each in line["devices"]:
      hours[each["kind"]] = hours.get(each["kind"], 0.0) + each["count"] * line["seconds"] / 3600
  return hours


def _energy(sessions: Iterable[Sequence[_Line]]) -> Energy:
  """Sums up energy over sessions, processes and parts."""
  meters: dict[str, float] = {}
  ranges: dict[str, tuple[float, float | None]] = {}
  not_counted: dict[str, None] = {}
  for lines in sessions:
    for part in _parts(lines):
      measured, low, high = part["measured_kwh"], part["low_kwh"], part["high_kwh"]
      if part["meter"]:
        meters[part["meter"]] = meters.get(part["meter"], 0.0) + measured
      if part["unmeasured_seconds"]:
        before = ranges.get(part["part"], (0.0, 0.0))
        has_limit = high is not None and before[1] is not None
        ranges[part["part"]] = before[0] + low - measured, before[1] + high - measured if has_limit else None
    not_counted |= dict.fromkeys(name for line in lines for name in line["energy"]["not_counted"])
  measured, highs = math.fsum(meters.values()), [high for _, high in ranges.values()]
  low = measured + math.fsum(low for low, _ in ranges.values())
  high = None if None in highs else measured + math.fsum(highs)
  return Energy(low, high, measured, meters, ranges, [*not_counted])


def _parts(lines: Sequence[_Line]) -> Iterator[_Line]:
  """Yields the parts of a session: devices of each process, and of each host the processors once.

  Counters see a whole host's processors: of several processes on it one counts. Where there are none, their CPUs add up
  to those that the host has: processes have either CPUs of their own, or share them all.
  """
  hosts: dict[str, list[tuple[_Line, _Line]]] = {}
  for line in lines:
    for part in line["energy"]["parts"]:
      if part["part"] == energy_lib.PROCESSORS:
        hosts.setdefault(line["host"]["id"], []).append((part, line["host"]))
      else:
        yield part
  for found in hosts.values():
    counted = [part for part, _ in found if part["meter"]]
    if counted:
      yield max(counted, key=lambda part: part["measured_kwh"])
      continue
    share = min(1.0, max(host["cpus_of_host"] for _, host in found) / sum(host["cpus"] for _, host in found))
    for part, _ in found:
      yield part | {name: part[name] and share * part[name] for name in ("low_kwh", "high_kwh")}


def _changes(lines: Sequence[_Line]) -> list[Change]:
  """Returns where a version is another one than in the session before."""
  return [
    Change(number, after["first_step"], name, before["versions"].get(name), after["versions"].get(name))
    for number, (before, after) in enumerate(zip(lines, lines[1:]), 2)
    for name in dict.fromkeys([*before["versions"], *after["versions"]])
    if before["versions"].get(name) != after["versions"].get(name)
  ]
