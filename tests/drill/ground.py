"""What the drill works on: tiny runs, caches and exports, and the ways to run commands in copies of them.

FOLDER/world/  as tiny_world makes it, and  half/ (a run stopped at step 6 of 8, with checkpoints 2, 4 and 6)
               mapped/ (the export for CPUs: --format=cpu, INT4)
               prompts.txt   adapter.gin   other/{half,cache,export,mapped} (of another seed and other text)
"""

import json
import os
import pathlib
import shutil
import signal
import time

import forked
import tiny_world

LIMIT = 90  # seconds that a command may take
GIN = "--gin_file=world.gin"
HALF = ("train", GIN, "--stop_at_step=6")
MAPPED = ("--format=cpu", "--bits=4")
ADAPTER = """
include "world.gin"
from __gin__ import dynamic_registration
from glmjax.data import loader
from glmjax.train import loop
from glmjax.train import trainable

trainable.LoRA.dropout = 0.1
loop.train:
  weights = "export"
  trainable = @trainable.LoRA()
  probe = @validation/loader.CachedMixture()
"""


def serve(folder: pathlib.Path, scratch: pathlib.Path) -> forked.Server:
  """A server whose commands compile equal programs once."""
  return forked.Server(scratch, **forked.compiled_once(folder / "compiled"))


def make(folder: pathlib.Path) -> pathlib.Path:
  """The world; made once."""
  world = folder / "world"
  if (folder / "made").exists():
    return world
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  with serve(folder, folder) as server:
    tiny_world.make(world, server)
    (world / "prompts.txt").write_text("".join(f"a fox on day {i} [MASK].\n" for i in range(40)), encoding="utf-8")
    (world / "adapter.gin").write_text(ADAPTER, encoding="utf-8")
    other = folder / "other"
    tiny_world.write_text(other)
    for name in ("en.txt", "zh.jsonl"):
      path = other / "text" / name
      path.write_text(path.read_text(encoding="utf-8").replace("day", "hill").replace("天", "山"), encoding="utf-8")
    shutil.copytree(world / "tokenizer", other / "tokenizer")
    for where, argv in (
      (world, (*HALF, "--workdir=half")),
      (other, ("cache", GIN, "--num_workers=0")),
      (other, (*HALF, "--workdir=half", "--gin.loop.train.seed=1")),
      (other, ("export", "--checkpoint=half", "--out=export")),
      *((each, ("export", "--checkpoint=export", "--out=mapped", *MAPPED)) for each in (world, other)),
    ):
      ended = server.command(*argv, cwd=where)
      assert ended.status == 0, f"{argv}: {ended}"
    other.rename(world / "other")
  (folder / "made").touch()
  return world


def contents(folder: pathlib.Path) -> dict[str, bytes | None]:
  """Every file below a folder with its bytes, every folder with None."""
  return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def group_ends(group: int, seconds: float = 10) -> bool:
  """Whether all processes of a group end within so many seconds; they are killed if not."""
  for _ in range(int(seconds * 20)):
    try:
      os.killpg(group, 0)
    except ProcessLookupError:
      return True
    time.sleep(0.05)
  os.killpg(group, signal.SIGKILL)
  return False


def losses(workdir: pathlib.Path) -> list[tuple]:
  """What metrics.jsonl says that must be the same in each run; of a line that is no JSON, the line."""
  path = workdir / "metrics.jsonl"
  found = []
  for line in path.read_bytes().splitlines() if path.is_file() else ():
    try:
      found.append(tuple(json.loads(line).get(name) for name in ("step", "loss", "eval_loss", "grad_norm")))
    except (ValueError, AttributeError):
      found.append((line,))
  return found


def table(title: str, rows: dict[str, dict[str, str]]) -> str:
  """Cells in columns."""
  columns = list(dict.fromkeys(name for row in rows.values() for name in row))
  lines = [[title, *columns], *([name, *(row.get(column, "") for column in columns)] for name, row in rows.items())]
  widths = [max(map(len, column)) for column in zip(*lines)]
  return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines)
