"""JSON lines files that answers are added to, batch by batch; what a killed run left is gone on with."""

import contextlib
import fcntl
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from glmjax import errors
from glmjax.io import publish

_OTHER = "choose another file, or --overwrite this one"


@contextlib.contextmanager
def appending(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """The file, open to be added to; whether that is possible is known at once."""
  try:
    if not pathlib.Path(path).absolute().parent.is_dir():
      raise errors.InputError(f"cannot write {path}: no such folder")
    file = open(path, "a+b", buffering=0)  # one write a batch, so that what other processes add stays whole
  except OSError as error:
    raise errors.InputError(f"cannot write {path}: {error.strerror}") from None
  with file:
    yield file


@contextlib.contextmanager
def answering(path: str | os.PathLike, prompts: Sequence[str], settings: Mapping[str, Any], overwrite: bool
              ) -> Iterator[tuple[BinaryIO, int]]:
  """The file for the answers to `prompts` ("-": standard output), and how many of them it holds already.

  Its lines must answer the first of the prompts, with the settings that `begin` noted; half a line at its end,
  which a kill leaves, is removed. Where it is to be overwritten it holds none; emptying it is left to `begin`.
  """
  if path == "-":
    sys.stdout.flush()
    yield sys.stdout.buffer, 0
    return
  if os.path.exists(path) and not os.path.isfile(path):  # one that could not be gone on with
    raise errors.InputError(f"cannot write {path}: no regular file; - is standard output")
  with appending(path) as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise errors.InputError(f"another process is writing {path}: wait for it, or choose another file") from None
    done = 0 if overwrite else _keep_answers(file, path, prompts)
    if done:
      _check_settings(path, settings)
    yield file, done


def begin(file: BinaryIO, path: str | os.PathLike, settings: Mapping[str, Any]) -> None:
  """Empties the file and notes beside it where its answers will come from; nothing for standard output."""
  if path != "-":
    file.truncate(0)  # first: settings never stand beside answers that they did not give
    try:
      publish.write_json(_settings_path(path), settings)
    except OSError as error:
      raise errors.InputError(f"cannot write {_settings_path(path)}: {error.strerror}") from None


def _settings_path(path: str | os.PathLike) -> str:
  return f"{os.fspath(path)}.settings.json"


def _check_settings(path: str | os.PathLike, settings: Mapping[str, Any]) -> None:
  """The answers that are there must come from the same model and sampling as those to come."""
  try:
    noted = json.loads(pathlib.Path(_settings_path(path)).read_bytes())
    different = [f"{name} {noted[name]} there, {value} now" for name, value in settings.items()
                 if name not in ("checkpoint", "weights") and noted[name] != value]
    if noted["weights"] != settings["weights"]:
      different.insert(0, f"another model, then at {noted['checkpoint']}")
  except (OSError, ValueError, KeyError, TypeError):
    raise errors.InputError(f"{path} holds answers, and {_settings_path(path)} does not tell what gave them: "
                            f"{_OTHER}") from None
  if different:
    raise errors.InputError(f"{path} holds answers of other settings ({'; '.join(different)}): {_OTHER}, or go on with "
                            "the settings that it was begun with")


def write(file: BinaryIO, rows: Sequence[Mapping[str, Any]]) -> None:
  """Adds a line for each row."""
  left = memoryview("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())
  while left:  # a full disk takes a part, and says so the next time
    left = left[file.write(left):]
  file.flush()


def _keep_answers(file: BinaryIO, path: str | os.PathLike, prompts: Sequence[str]) -> int:
  """How many answers the file holds, now without half a line at its end."""
  count = whole = 0
  with open(path, "rb") as reader:
    for line in reader:
      if not line.endswith(b"\n"):
        file.truncate(whole)
        break
      try:
        row = json.loads(line)
        found = row["prompt"] if "output" in row else None
      except (ValueError, KeyError, TypeError):
        found = None
      if count == len(prompts) or found != prompts[count]:
        raise errors.InputError(f"{path}: line {count + 1} is no answer to prompt {count + 1} of this run: {_OTHER}")
      count, whole = count + 1, whole + len(line)
  return count
