"""Commands killed at random moments, some of them again and again, then run to the end.

What a kill leaves is never half of anything; the same command goes on or begins anew, ends with the same bits as one
that was never broken, and nothing else is left beside its result.
"""

import collections
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import forked
import tiny_world
import xla_flags
from drill import ground

SIGNALS = {
  signal.SIGKILL: (-signal.SIGKILL,),
  signal.SIGTERM: (143, -signal.SIGTERM),
  signal.SIGINT: (130, -signal.SIGINT),
}
_AGAIN = 0.5  # how often a killed command is killed once more
_IMPORTS = 4  # seconds that a process started anew takes until it works
_COLD = 0.1  # how often it is a process started anew, killed while it imports


@dataclasses.dataclass(frozen=True)
class Command:
  """A command that can be killed; its result is called `out`, or begins with that."""

  argv: tuple[str, ...]
  share: int  # of 160 kills
  once: bool = False  # it refuses to do again what is done
  trains: bool = False  # its result is a run


COMMANDS = {
  "train": Command(("train", ground.GIN, "--workdir=out", "--gin.KEEP=100"), 64, trains=True),
  "adapter": Command(("train", "--gin_file=adapter.gin", "--workdir=out", "--gin.KEEP=100"), 16, trains=True),
  "cache": Command(("cache", ground.GIN, "--directory=out", "--num_workers=2"), 16),
  "export": Command(("export", "--checkpoint=run", "--out=out", "--bits=8"), 16, once=True),
  "mapped": Command(("export", "--checkpoint=run", "--out=out", *ground.MAPPED), 16, once=True),
  "import": Command(("import", "chatglm-6b", "hub", "out"), 16, once=True),
  "tokenizer": Command(("tokenizer", ground.GIN, "--folder=out"), 8),
  "generate": Command(("generate", "--checkpoint=export", "--file=prompts.txt", "--out=out.jsonl"), 8),
}
_TIMED = ("out/metrics.jsonl", "out/compute.jsonl")  # of training, with what it took in them
# Names of files that tell when they were written.
_DATED = ("_CHECKPOINT_METADATA", "commit_success.txt")


@dataclasses.dataclass
class Unbroken:
  """A command that was never killed."""

  seconds: float
  result: dict[str, bytes | None]  # what is there behind it
  losses: list  # of training, by step
  sums: dict[str, dict]  # of training: the record of every step, when each is saved


def unbroken(name: str, world: pathlib.Path, folder: pathlib.Path, server: forked.Server) -> Unbroken:
  """Runs a command without any kill: twice, as the first has to compile."""
  sums = {}
  for more in [["--gin.loop.Intervals.save=1"], []] if COMMANDS[name].trains else [[], []]:
    tiny_world.lay_out(world, folder)
    ended = server.start("forked:command", {"argv": [*COMMANDS[name].argv, *more]}, folder).end(ground.LIMIT)
    assert ended.status == 0, ended
    if more:
      sums = _sums(folder)
  return Unbroken(ended.seconds, _result(folder), ground.losses(folder / "out"), sums)


def kill(
  name: str, seed: int, number: int, world: pathlib.Path, folder: pathlib.Path, server: forked.Server, whole: Unbroken
) -> tuple[collections.Counter, list[str]]:
  """One chain of kills: counts of what became of them, and what was wrong."""
  r = random.Random(f"{seed}/{name}/{number}")
  argv, counts, wrong = COMMANDS[name].argv, collections.Counter(), []
  tiny_world.lay_out(world, folder)
  again = True
  while again:
    how, part, early = r.choice(list(SIGNALS)), r.random(), r.random() < _COLD
    moment = part * (_IMPORTS if early else whole.seconds)
    began = time.monotonic()
    status, err, landed = _cold(argv, folder, how, moment) if early else _warm(argv, folder, how, moment, server)
    said = f"{how.name} after {moment:.2f} of {whole.seconds:.2f} s: status {status}"
    counts["tries"] += 1
    if not landed or status == 0:
      counts["had ended"] += 1
      if not early:  # the machine is quicker than it was
        whole.seconds = min(whole.seconds, time.monotonic() - began)
      wrong += [f"{said}: {err[-500:]}"] * (status != 0)
      break
    counts[how.name] += 1
    if status not in SIGNALS[how]:
      wrong.append(f"{said}: {err[-500:]}")
    if "Traceback" in err and landed == "warm":
      wrong.append(f"{said}: a traceback: {err[-900:]}")
    wrong += [f"{said}: {problem}" for problem in _half_done(name, folder, whole)]
    again = r.random() < _AGAIN and not _is_done(name, folder)
  if not _is_done(name, folder):
    ended = server.start("forked:command", {"argv": argv}, folder).end(ground.LIMIT)
    if ended.status or ended.hung:
      wrong.append(f"the command then ends with {ended.status}: {ended.err[-500:]}")
  if problem := _difference(name, folder, whole):
    wrong.append(problem)
  return counts, wrong


def _is_done(name: str, folder: pathlib.Path) -> bool:
  """Whether the command was killed behind its end, and would refuse to do again what is done."""
  return COMMANDS[name].once and (folder / "out").exists()


def _warm(
  argv: tuple[str, ...], folder: pathlib.Path, how: signal.Signals, moment: float, server: forked.Server
) -> tuple[int, str, str]:
  running = server.start("forked:command", {"argv": argv}, folder)
  landed = "" if running.wait(moment) else "warm"
  if landed:
    running.signal(how, group=how is signal.SIGINT)  # a terminal sends it to all
  ended = running.end(ground.LIMIT)
  if not ground.group_ends(running.pid):
    return ended.status, f"processes are left behind; {ended.err}", landed
  return (99 if ended.hung else ended.status), ended.err, landed


def _cold(argv: tuple[str, ...], folder: pathlib.Path, how: signal.Signals, moment: float) -> tuple[int, str, str]:
  environment = {
    **os.environ,
    "PYTHONPATH": str(forked.TESTS.parent),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": xla_flags.CHEAP,
  }
  code = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
    "from glmjax import cli; sys.exit(cli.main())"
  )
  process = subprocess.Popen(
    [sys.executable, "-W", "ignore", "-c", code, *argv],
    cwd=folder,
    text=True,
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    start_new_session=True,
  )
  try:
    _, err = process.communicate(timeout=moment)
    return process.returncode, err, ""
  except subprocess.TimeoutExpired:
    process.send_signal(how)
  try:
    _, err = process.communicate(timeout=ground.LIMIT)
  except subprocess.TimeoutExpired:
    process.kill()
    process.communicate()
    return 99, "hangs", "cold"
  ground.group_ends(process.pid)
  return process.returncode, err, "cold"


def _half_done(name: str, folder: pathlib.Path, whole: Unbroken) -> list[str]:
  """What a kill published and should not have."""
  if COMMANDS[name].trains:
    return [
      f"step {step} is not what it is in an unbroken run"
      for step, record in _sums(folder).items()
      if record != whole.sums.get(step)
    ]
  if name == "generate":
    found = (folder / "out.jsonl").read_bytes() if (folder / "out.jsonl").exists() else b""
    return [] if whole.result["out.jsonl"].startswith(found) else ["answers that an unbroken run does not give"]
  if not (folder / "out").exists():
    return []
  found = {path: content for path, content in _result(folder).items() if path.split("/")[0] == "out"}
  lacking = [
    path
    for path, content in whole.result.items()
    if path.startswith("out/") and found.get(path, b"-") != content and not path.endswith(_DATED)
  ]
  return [f"out is there without {', '.join(lacking[:5])}"] if lacking else []


def _difference(name: str, folder: pathlib.Path, whole: Unbroken) -> str | None:
  """What is there, is lacking, or is other than an unbroken run leaves it."""
  result, expected = _result(folder), whole.result
  if COMMANDS[name].trains:  # steps are compared by their sums; one stopped by a signal has saved where it stopped, too
    if ground.losses(folder / "out") != whole.losses:
      return "other losses in metrics.jsonl"
    if lacking := {path.split("/")[2] for path in expected if _is_step(path)} - _sums(folder).keys():
      return f"without step {', '.join(lacking)}"
    result, expected = (
      {path: content for path, content in found.items() if not _is_step(path) and path not in _TIMED}
      for found in (result, expected)
    )
  other = [
    path for path in result.keys() & expected.keys() if result[path] != expected[path] and not path.endswith(_DATED)
  ]
  for what, paths in (
    ("more", result.keys() - expected.keys()),
    ("less", expected.keys() - result.keys()),
    ("other", other),
  ):
    if paths:
      return f"{what} than an unbroken run leaves: {', '.join(sorted(paths)[:6])}"
  return None


def _is_step(path: str) -> bool:
  return path.startswith("out/checkpoints/") and path.split("/")[2].isdecimal()


def _result(folder: pathlib.Path) -> dict[str, bytes | None]:
  """All that is in the folder and not the world's; TensorBoard's files without their dates and hosts."""
  found = {}
  for path in folder.iterdir():
    if not path.is_symlink():
      inside = ground.contents(path) if path.is_dir() else {}
      found |= {path.name: None if path.is_dir() else path.read_bytes()} | {
        f"{path.name}/{name}": content for name, content in inside.items() if "tensorboard/" not in name
      }
  return found


def _sums(folder: pathlib.Path) -> dict[str, dict]:
  """The recorded checksums of all arrays, by step, of the steps that seem complete."""
  from glmjax.checkpoint import manager

  steps = folder / "out" / "checkpoints"
  return {str(step): manager.read_record(steps / str(step))["arrays"] for step in manager.steps(steps)}


def run(
  name: str, count: int, seed: int, folder: pathlib.Path, scratch: pathlib.Path, first: int = 0
) -> tuple[str, list[str]]:
  """Kills a command `count` times, in as many chains as it takes."""
  world, total, wrong, number = folder / "world", collections.Counter(), [], first
  with ground.serve(folder, scratch) as server:
    whole = unbroken(name, world, scratch / "case", server)
    while total["tries"] - total["had ended"] < count and total["had ended"] < 2 * count + 10:
      counts, problems = kill(name, seed, number, world, scratch / "case", server, whole)
      total.update(counts)
      total.update({"chains": 1, "the same in the end": not problems, "wrong": bool(problems)})
      wrong += [f"{name}: {problem}\n    python tests/drill kill {name} {seed} {number}" for problem in problems]
      number += 1
  columns = ("tries", *(how.name for how in SIGNALS), "had ended", "chains", "the same in the end", "wrong")
  return ground.table("killed", {name: {column: str(total[column]) for column in columns}}), wrong
