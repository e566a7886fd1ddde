"""How long each command of a chain took: one line per command in a file that they share."""

import json
import logging
import math
import os

from glmjax import errors
from glmjax.io import bucket_path, folders, paths, user_json, user_text

_log = logging.getLogger("glmjax")


def prepare(file: paths.Named) -> None:
  """Makes the file's folder, and the file; raises InputError before any work where that cannot be."""
  path = folders.claim_file(file, "--stages")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(path, bucket_path.BucketPath):
      path.bucket.create(path.key, b"")
    else:
      path.open("ab").close()
  except OSError as error:
    raise errors.InputError(f"cannot write --stages={path}: {errors.reason(error)}; choose another file") from error


def append(file: paths.Named, stage: str, started: float, seconds: float) -> None:
  """Adds one line in a single short write, so that what other processes add stays whole.

  Where that fails it is said, and no more: the command itself has done its work.
  """
  path = paths.named(file, "--stages")
  line = json.dumps({"stage": stage, "started": round(started, 3), "seconds": round(seconds, 3)}) + "\n"
  try:
    if isinstance(path, bucket_path.BucketPath):
      path.append(line.encode())
      return
    with open(path, "ab", buffering=0) as out:
      before = os.fstat(out.fileno()).st_size
      if out.write(line.encode()) < len(line):
        os.truncate(path, before)
        raise OSError("the disk is full")
  except OSError as error:
    _log.warning("--stages=%s: the seconds of %s could not be added: %s", path, stage, errors.reason(error))


def read(file: paths.Named) -> dict[str, float]:
  """Reads seconds of each stage in the order they first ran, the runs of one stage added up; {} without a file."""
  path, seconds = paths.named(file, "--stages"), {}
  if not path.exists():
    return seconds
  for number, line in user_text.lines(path):
    where = f"{path}: line {number}"
    record = user_json.parse(line, where, expected="remove the line")
    taken = record.get("seconds")
    if not isinstance(record.get("stage"), str) or not isinstance(taken, int | float) or not math.isfinite(taken):
      raise errors.InputError(f"{where}: not a stage's record; remove the line")
    seconds[record["stage"]] = seconds.get(record["stage"], 0.0) + float(taken)
  return seconds
