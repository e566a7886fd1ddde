"""Files damaged in every way that disks, copies and people do, then read by every command that reads them.

A command goes on with what is good and says so, or refuses in a line that names the place. It never hangs, never
crashes, and never uses what is damaged without a word.
"""

import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
from typing import Any

import forked
import tiny_world
from drill import ground

KINDS = ("flip", "truncate", "delete", "swap", "folder", "FIFO", "empty", "another's")


@dataclasses.dataclass(frozen=True)
class Place:
  """A folder of the world that is damaged, and the commands that read it."""

  folder: str
  share: int  # of 300 damages
  commands: dict[str, tuple[str, ...]]


PLACES = {
  place.folder: place
  for place in (
    Place(
      "half",
      130,
      {
        "train": ("train", ground.GIN, "--workdir=half"),
        "export": ("export", "--checkpoint=half", "--out=out"),
        "generate": ("generate", "--checkpoint=half", "--prompt=a fox [MASK]."),
        "score": ("score", "--checkpoint=half", "--text=a fox"),
        "evaluate": ("evaluate", ground.GIN, "--checkpoint=half", "--out=out.json"),
        "inspect": ("inspect", "half", "--hashes", "--json"),
      },
    ),
    Place(
      "cache",
      50,
      {
        "train": ("train", ground.GIN, "--workdir=out", "--stop_at_step=2"),
        "evaluate": ("evaluate", ground.GIN, "--checkpoint=export", "--out=out.json"),
      },
    ),
    Place(
      "export",
      60,
      {
        "export": ("export", "--checkpoint=export", "--out=out", "--bits=8"),
        "generate": ("generate", "--checkpoint=export", "--prompt=a fox [MASK]."),
        "evaluate": ("evaluate", ground.GIN, "--checkpoint=export", "--out=out.json"),
        "inspect": ("inspect", "export", "--hashes", "--json"),
      },
    ),
    Place(
      "mapped",
      60,
      {
        "export": ("export", "--checkpoint=mapped", "--out=out"),
        "generate": ("generate", "--checkpoint=mapped", "--prompt=a fox [MASK]."),
        "score": ("score", "--checkpoint=mapped", "--text=a fox"),
        "evaluate": ("evaluate", ground.GIN, "--checkpoint=mapped", "--out=out.json"),
        "inspect": ("inspect", "mapped", "--hashes", "--json"),
      },
    ),
  )
}
_RIGHT = ("as before", "fell back", "refused")
_STEPS = ("6", "4", "2")
# What no command of these reads, or what says nothing about results.
_UNREAD = re.compile(r"tensorboard/|config\.gin$")


@dataclasses.dataclass(frozen=True)
class Found:
  """What a command said and gave."""

  ended: forked.Ended
  result: Any


def run(
  name: str, count: int, seed: int, folder: pathlib.Path, scratch: pathlib.Path, first: int = 0
) -> tuple[str, list[str]]:
  """Damages a place `count` times; a table of what became of that, and what was wrong."""
  world, place, counts, wrong = folder / "world", PLACES[name], collections.Counter(), []
  with ground.serve(folder, scratch) as server:
    references = {command: _references(place, command, world, scratch / "case", server) for command in place.commands}
    for number in range(first, first + count):
      r = random.Random(f"{seed}/{name}/{number}")
      tiny_world.lay_out(world, scratch / "case", place.folder)
      command = r.choice(list(place.commands))
      target, kind = _target(r, scratch / "case" / place.folder), r.choice(KINDS)
      shown = damage(r, kind, target, scratch / "case" / place.folder, world / "other" / place.folder)
      found = _run(place, command, scratch / "case", server)
      outcome = _judge(found, references[command], scratch / "case", place, command, shown)
      outcome, problem = (outcome, None) if outcome in _RIGHT else ("wrong", outcome)
      counts[command, kind, outcome] += 1
      if problem:
        wrong.append(f"{command}, {shown}: {problem}\n    python tests/drill damage {name} {seed} {number}")
  return _table(place, counts), wrong


def _table(place: Place, counts: collections.Counter) -> str:
  outcomes = (*_RIGHT, "wrong")

  def cell(command, kind):
    return "/".join(str(counts[command, kind, outcome]) for outcome in outcomes)

  rows = {command: {kind: cell(command, kind) for kind in KINDS} for command in place.commands}
  totals = ", ".join(f"{sum(counts[c, k, o] for c, k, o in counts if o == outcome)} {outcome}" for outcome in outcomes)
  return f"{ground.table(place.folder, rows)}\n{counts.total()} damages: {totals} (each cell in this order)"


def _references(
  place: Place, command: str, world: pathlib.Path, folder: pathlib.Path, server: forked.Server
) -> list[Any]:
  """The undamaged results: of the newest step, then of each older one."""
  results = []
  for newest in range(3 if place.folder == "half" and command != "train" else 1):
    tiny_world.lay_out(world, folder, place.folder)
    for step in _STEPS[:newest]:
      shutil.rmtree(folder / place.folder / "checkpoints" / step)
    found = _run(place, command, folder, server)
    assert found.ended.status == 0, found.ended
    results.append(found.result)
  return results


def _run(place: Place, command: str, folder: pathlib.Path, server: forked.Server) -> Found:
  ended = server.start("forked:command", {"argv": place.commands[command]}, folder).end(ground.LIMIT)
  if ended.status:
    return Found(ended, None)
  if command == "train":
    workdir = folder / place.commands[command][2].partition("=")[2]
    result = ground.losses(workdir), _sums(workdir)
  elif command == "export":
    sums, config = (json.loads((folder / "out" / name).read_bytes()) for name in ("checksums.json", "config.json"))
    config["export"].pop(
      "run", None
    )  # from a record without checksums; an export goes without where that cannot be read
    result = sums["arrays"], config
  elif command == "evaluate":
    result = json.loads((folder / "out.json").read_bytes())
  elif command == "inspect":
    report = json.loads(ended.out)
    result = {name: value for name, value in report.items() if name not in ("files", "file_bytes", "steps")}
  else:
    result = ended.out
  return Found(ended, result)


def _sums(workdir: pathlib.Path) -> dict[str, str]:
  from glmjax.checkpoint import manager

  newest = workdir / "checkpoints" / str(manager.steps(workdir / "checkpoints")[-1])
  return {name: record["sum"] for name, record in manager.read_record(newest)["arrays"].items()} | {"": newest.name}


def _target(r: random.Random, folder: pathlib.Path) -> pathlib.Path:
  """A file: each kind of file as likely as each other, and the newest step's likelier than those of older ones."""
  groups = collections.defaultdict(list)
  for path in sorted(folder.rglob("*")):
    parts = path.relative_to(folder).parts
    if path.is_file() and not _UNREAD.search("/".join(parts)):
      name = "block" if re.fullmatch(r"[\d.]+", parts[-1]) else parts[-1]
      groups[parts[0] if parts[1:] else "", len(parts), name].append(path)
  group = groups[r.choice(sorted(groups))]
  newest = [path for path in group if f"/checkpoints/{_STEPS[0]}/" in str(path)]
  return r.choice(newest if newest and r.random() < 0.7 else group)


def damage(r: random.Random, kind: str, target: pathlib.Path, folder: pathlib.Path, other: pathlib.Path) -> str:
  """Damages a file; says what was done."""
  name, content = target.relative_to(folder), target.read_bytes()
  if kind in ("flip", "truncate") and content:
    place = r.randrange(len(content))
    flipped = content[:place] + bytes([content[place] ^ (1 << r.randrange(8))]) + content[place + 1 :]
    target.write_bytes(flipped if kind == "flip" else content[:place])
    return f"{kind} {name} at {place} of {len(content)}"
  if kind == "swap":
    second = r.choice(
      [path for path in target.parent.rglob("*") if path.is_file() and path != target]
      or [path for path in folder.rglob("*") if path.is_file() and path != target]
    )
    target.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return f"swap {name} and {second.relative_to(folder)}"
  target.unlink()
  if kind == "folder":
    target.mkdir()
  elif kind == "FIFO":
    os.mkfifo(target)
  elif kind == "empty":
    target.touch()
  elif kind == "another's" and (other / name).is_file():
    shutil.copyfile(other / name, target)
  return f"{kind} {name}"


def _judge(found: Found, references: list[Any], folder: pathlib.Path, place: Place, command: str, shown: str) -> str:
  ended = found.ended
  lines = [line for line in ended.err.split("\n") if line.startswith("glmjax: ")]
  if command == "inspect" and ended.status == 2 and not lines:  # its report says what is wrong
    report = json.loads(ended.out)
    lines = [f"{report['path']}: {report['problem']}"]
  warned = re.search(r"damaged|is missing|is no regular file|not what was written", ended.err) is not None
  if ended.hung:
    return "hangs"
  if "Traceback" in ended.err:
    return f"a traceback: {ended.err[-600:]}"
  if ended.status == 2:
    if len(lines) != 1:
      return f"{len(lines)} lines of glmjax: {ended.err[-600:]}"
    named = place.folder in lines[0]
    left = [path.name for path in folder.iterdir() if path.name.startswith((".out", "out")) and command != "train"]
    return "refused" if named and not left else f"refused without the place, or leaving {left}: {lines[0]}"
  if ended.status:
    return f"status {ended.status}: {ended.line[:600]}"
  if command == "train":
    return _judge_training(found, references[0], warned, shown)
  if found.result == references[0]:
    return "as before"
  if found.result in references[1:]:
    return "fell back" if warned else f"fell back without a word: {ended.err[-300:]}"
  if command == "inspect" and found.result.get("problem"):
    return f"a problem and status 0: {found.result['problem']}"
  return f"another result without a word: {str(found.result)[:300]} {ended.err[-300:]}"


def _judge_training(found: Found, reference: Any, warned: bool, shown: str) -> str:
  begun = re.search(r"(?:starting|resumed) at step (\d+)", found.ended.err)
  losses, sums = found.result
  if sums != reference[1]:
    return f"other weights without a word: {found.ended.err[-500:]}"
  changed = re.match(
    r"(flip|swap|another's).* metrics\.jsonl", shown
  )  # a log without checksums: lines that are there stay
  if losses != reference[0] and "metrics.jsonl" not in found.ended.err and not changed:
    return f"other lines in metrics.jsonl without a word: {found.ended.err[-300:]}"
  if begun and begun[1] not in ("0", "6") or begun and "starting" in begun[0] and "half" in found.ended.err:
    return "fell back" if warned else f"fell back without a word: {found.ended.err[-500:]}"
  return "as before"
