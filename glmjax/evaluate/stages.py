"""How long each command of a chain took: one line per command in a file that they share."""

import json
import os
import pathlib

from glmjax import errors


def prepare(file: str | os.PathLike) -> None:
  """Makes the file's folder, and the file; raises InputError before any work where that cannot be."""
  path = pathlib.Path(file)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  except OSError as error:
    raise errors.InputError(f"cannot write --stages={path}: {error.strerror}; choose another file") from error


def append(file: str | os.PathLike, stage: str, started: float, seconds: float) -> None:
  """Adds one line; a single short write, so that what other processes add stays whole."""
  line = json.dumps({"stage": stage, "started": round(started, 3), "seconds": round(seconds, 3)}) + "\n"
  with open(file, "ab", buffering=0) as out:
    out.write(line.encode())


def read(file: str | os.PathLike) -> dict[str, float]:
  """Seconds of each stage in the order they first ran, the runs of one stage added up; {} without a file."""
  path, seconds = pathlib.Path(file), {}
  if not path.exists():
    return seconds
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    try:
      record = json.loads(line)
      seconds[record["stage"]] = seconds.get(record["stage"], 0.0) + float(record["seconds"])
    except (ValueError, KeyError, TypeError) as error:
      raise errors.InputError(f"{path}, line {number}: not a stage's record; remove the line") from error
  return seconds
