"""Runs inputs one after another in one forked process, and judges each: the table of what is expected of a refusal.

Training is cut where its first checkpoint would be looked for, and the model of generate and score is loaded once:
what comes before and between is all that an input can reach.
"""

import faulthandler
import json
import os
import pathlib
import re
import resource
import signal
import sys
import time
from typing import Any

import tiny_world
from fuzz import case as case_lib
from fuzz import cases
from fuzz import odd

SECONDS = 15  # of the processor, for an input
MEMORY = 700 << 20  # bytes, for an input
ADDRESSES = 6 << 30  # bytes of addresses, for all of a batch
HANGS = 120  # seconds by the clock until the process is ended
_LONGEST = 1_200  # characters of a line
_TROUBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def run(kind: str, seed: int, numbers: list[int], world: str, folder: str, results: str) -> int:
  """Adds a line of JSON to the file `results` before and after each input."""
  _cut(pathlib.Path(world))
  with open(results, "a", encoding="utf-8") as out, open(f"{results}.hang", "w", encoding="utf-8") as hang:
    faulthandler.register(signal.SIGXCPU, file=hang, chain=True)  # says where, and ends the process
    for number in numbers:
      print(json.dumps({"number": number}), file=out, flush=True)
      faulthandler.dump_traceback_later(HANGS, exit=True, file=hang)
      used = resource.getrusage(resource.RUSAGE_SELF)
      resource.setrlimit(
        resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + SECONDS + 1, resource.RLIM_INFINITY)
      )
      problem = run_case(
        cases.number_of(kind, seed, number, pathlib.Path(world)), pathlib.Path(world), pathlib.Path(folder)
      )
      faulthandler.cancel_dump_traceback_later()
      print(json.dumps({"number": number, **problem}), file=out, flush=True)
  os._exit(0)


def run_case(case: case_lib.Case, world: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
  """Runs one input in an emptied folder: {"problem": what is wrong, or None, "status", "seconds", "memory", "err"}."""
  lay_out(case, world, folder)
  os.chdir(folder)
  streams = [open(folder.parent / name, "w+b") for name in ("stdin", "stdout", "stderr")]
  streams[0].write(case.stdin or b"")
  streams[0].seek(0)
  for number, stream in enumerate(streams):
    os.dup2(stream.fileno(), number)
  sys.stdin = open(0, encoding="utf-8", closefd=False)
  before, began = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
  status = _status(case.argv)
  seconds = time.process_time() - began
  memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss) << 10
  sys.stdout.flush()
  sys.stderr.flush()
  for stream in streams:
    stream.seek(0)
  _, out, err = (stream.read().decode("utf-8", "backslashreplace") for stream in streams)
  for stream in streams:
    stream.close()
  left = (
    []
    if case.out is None
    else [path.name for path in folder.iterdir() if path.name == case.out or path.name.startswith(f".{case.out}.")]
  )
  problem = judge(case, status, out, err, seconds, memory, left)
  return {
    "problem": problem,
    "status": status,
    "seconds": round(seconds, 2),
    "memory": memory >> 20,
    "about": case.about,
    "err": err[-1_500:] if problem else "",
  }


def judge(
  case: case_lib.Case, status: int, out: str, err: str, seconds: float, memory: int, left: list[str]
) -> str | None:
  """What is wrong with what became of an input; None when all is as it should be."""
  lines = [line for line in err.split("\n") if line.startswith("glmjax: ")]
  if case.argv[0] == "inspect" and status == 2 and not lines:  # its report ends with what is wrong
    lines, err = [line for line in out.split("\n") if line.startswith("problem: ")], out
  wanted = {odd.GOOD: (0,), odd.BAD: (2,), odd.EITHER: (0, 2)}[case.verdict]
  if status not in wanted:
    return f"status {status}, where {' or '.join(map(str, wanted))} is right"
  if seconds > SECONDS:
    return f"took {seconds:.0f} s"
  if memory > MEMORY:
    return f"took {memory >> 20} MiB"
  if "Traceback" in err:
    return "a traceback"
  if status == 0:
    return _judge_output(case, out)
  if len(lines) != 1 or err.rstrip("\n").split("\n")[-1] != lines[0]:
    return f"{len(lines)} lines of glmjax, where the last should be the only one"
  if _TROUBLE.search(lines[0]):
    return "control characters in the line"
  if len(lines[0]) > _LONGEST:
    return f"a line of {len(lines[0])} characters"
  if not any(place in lines[0] for place in case.places):
    return f"the line names none of {', '.join(case.places)}"
  if left:
    return f"refused, and left {', '.join(left)}"
  return None


def _judge_output(case: case_lib.Case, out: str) -> str | None:
  if "--json" not in case.argv:
    return None
  try:
    json.loads(out, parse_constant=lambda name: json.loads(""))
  except ValueError:
    return "standard output is not JSON"
  return None


def lay_out(case: case_lib.Case, world: pathlib.Path, folder: pathlib.Path) -> None:
  """Makes the folder anew: the world's files by links, what the case changes as its own."""
  tiny_world.lay_out(world, folder, *case.copies)
  for name, content in case.files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def _status(argv: tuple[str, ...]) -> int:
  if argv[0].startswith("@"):
    return _read(argv[0], pathlib.Path(argv[1]))
  from glmjax import cli

  try:
    return cli.main(list(argv))
  except SystemExit as error:
    return error.code if isinstance(error.code, int) else 0 if error.code is None else 1


def _read(reader: str, path: pathlib.Path) -> int:
  """A reader of the library, with the command's words and status."""
  from glmjax import errors
  from glmjax.data import instructions
  from glmjax.data import text

  try:
    found = instructions.file_instructions(path, 0) if reader == "@instructions" else text.documents(str(path))
    for _ in found:
      pass
    return 0
  except errors.InputError as error:
    print(f"glmjax: {error}", file=sys.stderr)
    return 2


def _cut(world: pathlib.Path) -> None:
  from glmjax.checkpoint import manager
  from glmjax.infer import engine

  def accepted(*_: Any, **__: Any) -> None:
    raise SystemExit(0)

  manager.Manager.__init__ = accepted
  load, loaded, export = engine.Engine.load, {}, (world / "export").resolve()

  def load_once(folder: str | os.PathLike, *arguments: Any, **more: Any) -> engine.Engine:
    if pathlib.Path(folder).resolve() != export:
      return load(folder, *arguments, **more)
    if "model" not in loaded:
      loaded["model"] = load(folder, *arguments, **more)
    return loaded["model"]

  engine.Engine.load = load_once
