"""Puts inputs through `fuzz.batch`, beginning again behind one that ended its process."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import forked
import tiny_world
from fuzz import batch

_AT_ONCE = 100  # inputs of one process


def make_world(folder: pathlib.Path) -> pathlib.Path:
  """The files that inputs spoil; made once."""
  world = folder / "world"
  if not (world / "ranks" / "tokenizer").is_dir():
    folder.mkdir(parents=True, exist_ok=True)
    with forked.Server(folder) as server:
      tiny_world.make(world, server)
  return world


def run(
  kind: str, seed: int, numbers: Iterable[int], world: pathlib.Path, scratch: pathlib.Path, server: forked.Server
) -> list[dict[str, Any]]:
  """What became of each input (`batch.run_case`)."""
  results, waiting = {}, list(numbers)
  log, hang = scratch / "results", scratch / "results.hang"
  while waiting:
    log.write_bytes(b"")
    ended = server.start(
      "fuzz.batch:run",
      {
        "kind": kind,
        "seed": seed,
        "numbers": waiting[:_AT_ONCE],
        "world": str(world),
        "folder": str(scratch / "case"),
        "results": str(log),
      },
      scratch,
      memory=batch.ADDRESSES,
    ).end(_AT_ONCE * batch.HANGS)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    results |= {line["number"]: line for line in lines}
    if ended.status:  # in the middle of the last one
      assert lines and (ended.status < 0 or hang.stat().st_size), ended.err  # else the test itself is at fault
      how = "hangs" if hang.stat().st_size else f"ends its process with status {ended.status}"
      results[lines[-1]["number"]] = {
        "number": lines[-1]["number"],
        "problem": how,
        "about": "",
        "status": ended.status,
        "err": (hang.read_text(encoding="utf-8") or ended.err)[-1_500:],
      }
    waiting = [number for number in waiting if number not in results]
  return list(results.values())


def replay(kind: str, seed: int, number: int) -> str:
  """The command that runs one input again."""
  return f"python tests/fuzz {kind} {seed} {number}"


def told(kind: str, seed: int, result: dict[str, Any]) -> str:
  """A failure in words."""
  said = " | ".join(line for line in result["err"].splitlines()[-3:])[-300:]
  return f"{result['about'][:80]}: {result['problem']}: {said}\n    {replay(kind, seed, result['number'])}"
