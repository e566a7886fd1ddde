"""What a run tells about itself: a JSON line a step, TensorBoard where it is installed, a readable line.

None of it may end a run or hold it up: what cannot be written is said once, and training goes on.
"""

import collections
import contextlib
import json
import logging
import os
import pathlib
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import tqdm

from glmjax import errors
from glmjax import tokens as tokens_lib
from glmjax.io import growing
from glmjax.io import paths
from glmjax.io import progress
from glmjax.io import publish

Record = dict[str, Any]

_MOST_WAITING = 100_000  # records that wait for room, about 60 MB of them

_log = logging.getLogger("glmjax")


def record_of(metrics: dict[str, Any]) -> Record:
  """Returns a step's metrics as JSON values; the loss of each objective that the batch held. Those of single layers
  are left out: they are another file's (layers.py).
  """
  record = {"loss": float(metrics["loss"])}
  record |= objective_losses(metrics["losses"], metrics["weights"])
  record |= {
    name: float(value)
    for name, value in metrics.items()
    if name not in ("loss", "losses", "weights", "applied", "advanced", "held", "layers")
  }
  return record


def objective_losses(losses: np.ndarray, weights: np.ndarray, prefix: str = "loss_") -> Record:
  """Returns the mean loss per objective, of those that have any token."""
  return {
    f"{prefix}{name}": float(loss / weight)
    for name, loss, weight in zip(tokens_lib.OBJECTIVES, losses, weights)
    if weight > 0
  }


def truncate_after(path: pathlib.Path, step: int) -> int:
  """Removes the lines behind `step` from a file of them, and a half-written last one; returns the last one's step, 0
  where none is left.

  Reads from the end, so that a long file costs no more than what is removed.
  """
  last = 0
  if path.exists():
    with _open(path, "r+b") as file:
      size = file.seek(0, 2)
      block, found = 1 << 20, None
      while found is None:
        start = max(0, size - block)
        file.seek(start)
        found = _end_of_step(file.read(size - start), step, whole=start == 0)
        block *= 4
      end, last = found
      file.truncate(start + end)
  return last


def last_steps(path: pathlib.Path, step: int, count: int) -> list[Record]:
  """Returns what a metrics file that was truncated after `step` has of the last `count` steps; what is no record is
  left out.
  """
  with contextlib.suppress(OSError), _open(path, "rb") as file:
    size = file.seek(0, 2)
    tail, block = b"", 1 << 16
    while tail.count(b"\n") <= count and len(tail) < size:
      file.seek(max(0, size - block))
      tail, block = file.read(block), 4 * block
    records = []
    for line in tail.splitlines()[-count:]:
      with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        record = json.loads(line)
        if step - count < record["step"] <= step:
          records.append(record)
    return records
  return []


def _end_of_step(tail: bytes, step: int, whole: bool) -> tuple[int, int] | None:
  """Finds where the last complete line of a step up to `step` ends in `tail`, and its step; None: not in this much."""
  end = tail.rfind(b"\n") + 1
  while end > 0:
    start = tail.rfind(b"\n", 0, end - 1) + 1
    if start == 0 and not whole:
      return None
    try:
      if (found := json.loads(tail[start:end])["step"]) <= step:
        return end, int(found)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
      pass  # not ours, or damaged: goes with what is behind it
    end = start
  return (0, 0) if whole else None


def _open(path: pathlib.Path, mode: str) -> BinaryIO:
  """Opens a file that is one: a FIFO would wait for its reader.

  Raises:
    OSError: also for what is no regular file.
  """
  file = open(
    path,
    mode,
    buffering=0 if mode == "ab" else -1,
    opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666),
  )
  if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
    file.close()
    raise OSError(f"{path} is no regular file")
  return file


class Lines:
  """A file of JSON lines, one for each step, or for some, of a run."""

  def __init__(self, path: paths.Path, step: int = 0, of_each_step: bool = True):
    """Opens the file of a run that goes on from `step`: lines behind it are removed.

    Args:
      path: where it belongs.
      step: 0: of a new run.
      of_each_step: steps that have no line are told.

    Raises:
      errors.InputError: when what a bucket has of the lines cannot be read.
    """

    def prepare(local: pathlib.Path) -> None:
      last = truncate_after(local, step)
      if of_each_step and last < step:
        _log.warning(
          "%s: the lines of steps %d to %d are missing or damaged; training goes on without them", path, last + 1, step
        )

    self.file = growing.File(path)
    self._appended = _Appended(self.file, prepare, path)

  def write(self, record: Record, is_saved: bool = False) -> None:
    """Writes one step; the line is with the operating system when this returns, if there is room for it.

    In a bucket it is within half a minute, and at once where the step is being saved.
    """
    self._appended.write((json.dumps(publish.finite(record)) + "\n").encode())
    if is_saved:
      self.file.put_soon()

  def close(self) -> None:
    """Writes what still waits, if there is room now."""
    self._appended.close()


class Writer:
  """metrics.jsonl and TensorBoard events."""

  def __init__(self, path: paths.Path, tensorboard: paths.Path, step: int = 0):
    """Opens the files of a run that goes on from `step`.

    Raises:
      errors.InputError: when what a bucket has of the lines cannot be read.
    """
    self.lines = Lines(path, step)
    self._board = _Board(tensorboard)

  def write(self, record: Record, is_saved: bool = False) -> None:
    """Writes one step, as Lines does."""
    self.lines.write(record, is_saved)
    self._board.write(record)

  def close(self) -> None:
    """Writes what still waits, if there is room now."""
    self.lines.close()
    self._board.close()


class _Appended:
  """A file of whole records. What it does not take waits, and a part that a full disk took is taken back."""

  def __init__(self, file: growing.File, prepare: Callable[[pathlib.Path], object], shown: paths.Path):
    """Takes `prepare`, which is called before the file is opened for the first time; it may raise OSError."""
    self._place, self._prepare, self._path = file, prepare, shown
    self._file: BinaryIO | None = None
    self._end: int | None = None  # where the last whole record ends; None: the file was not opened yet
    self._waiting: collections.deque[bytes] = collections.deque(maxlen=_MOST_WAITING)
    self._failed = False
    self._put()

  def write(self, data: bytes) -> None:
    """Appends a record, now or when there is room for it."""
    self._waiting.append(data)
    self._put()

  def close(self) -> None:
    """Gives up what still does not find room."""
    self._put()
    if self._waiting:
      _log.warning("%s: the last %d records are lost", self._path, len(self._waiting))
    self._drop()
    self._place.close()

  def _put(self) -> None:
    """Writes what waits, as far as possible."""
    try:
      file = self._opened()
      while self._waiting:
        left = memoryview(self._waiting[0])
        while left:  # a full disk takes a part, and says so the next time
          left = left[file.write(left) :]
        self._end += len(self._waiting.popleft())
    except OSError as error:
      self._drop()
      if not self._failed:
        self._failed = True
        _log.warning(
          "%s: cannot be written: %s; training goes on, and what is missing is written once that is mended",
          self._path,
          errors.reason(error),
        )
      return
    if self._failed:
      self._failed = False
      _log.info("%s: written again", self._path)

  def _opened(self) -> BinaryIO:
    if self._file is None:
      if self._end is None:
        self._prepare(self._place.local)
      self._file = _open(self._place.local, "ab")
      if self._end is None:
        self._end = os.fstat(self._file.fileno()).st_size
    return self._file

  def _drop(self) -> None:
    """Closes the file, without a part of a record at its end."""
    if self._file is not None:
      with contextlib.suppress(OSError):
        self._file.truncate(self._end)
      with contextlib.suppress(OSError):
        self._file.close()
      self._file = None


class _Board:
  """TensorBoard's events, where tensorboardX is installed.

  Written here: tensorboardX's own thread dies at the first error, and then its queue holds up whoever writes.
  """

  def __init__(self, folder: paths.Path):
    self._folder = folder
    self._file: _Appended | None = None
    self._off = False

  def write(self, record: Record) -> None:
    """Writes the step's numbers as scalars."""
    if self._off:
      return
    try:
      if self._file is None:
        path = self._folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._file = _Appended(
          growing.File(path, fresh=True), lambda local: local.parent.mkdir(parents=True, exist_ok=True), path
        )
        self._file.write(_event(file_version="brain.Event:2"))
      self._file.write(
        _event(step=record["step"], scalars={name: value for name, value in record.items() if isinstance(value, float)})
      )
    except Exception as error:  # not installed; or of another version of it or of protobuf
      self._off = True
      if not isinstance(error, ImportError):
        _log.warning("%s: no TensorBoard events: %s: %s", self._folder, type(error).__name__, error)

  def close(self) -> None:
    """Writes what still waits, if there is room now."""
    if self._file is not None:
      self._file.close()


def _event(scalars: dict[str, float] | None = None, **fields: Any) -> bytes:
  """Returns an event of TensorBoard in its file's frame: length, its checksum, the event, its checksum."""
  from tensorboardX import record_writer  # optional: the report extra
  from tensorboardX.proto import event_pb2, summary_pb2

  if scalars:
    fields["summary"] = summary_pb2.Summary(
      value=[summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    )
  data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
  length = struct.pack("<Q", len(data))
  checked = (part + struct.pack("<I", record_writer.masked_crc32c(part)) for part in (length, data))
  return b"".join(checked)


class Console:
  """A progress bar on a terminal, and one readable line per log interval."""

  def __init__(self, total_samples: int, samples: int, silent: bool = False):
    self._silent = silent or sys.stderr is None  # which printing would take for standard output
    self._bar = progress.bar(
      total=total_samples,
      initial=min(samples, total_samples),
      unit=" samples",
      leave=False,
      dynamic_ncols=True,
      disable=True if self._silent else None,
    )
    self._total = total_samples
    self._pace: float | None = None  # seconds per sample, smoothed

  def say(self, line: str) -> None:
    """Prints a line above the bar."""
    if not self._silent:
      with contextlib.suppress(OSError, ValueError):  # a closed or full stream of the program that calls us
        tqdm.tqdm.write(line, file=progress.stream())
        progress.stream().flush()

  def step(self, record: Record, seconds: float, samples: int, show: bool) -> None:
    """Moves the bar on after a step of that many samples; `show` prints its line."""
    pace = seconds / max(samples, 1)
    self._pace = pace if self._pace is None else 0.9 * self._pace + 0.1 * pace
    self._bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s", refresh=False)
    self._bar.update(min(record["samples_seen"], self._total) - self._bar.n)
    if show:
      left = max(self._total - record["samples_seen"], 0) * self._pace
      parts = " ".join(
        f"{name} {record[f'loss_{name}']:.3f}" for name in tokens_lib.OBJECTIVES if f"loss_{name}" in record
      )
      evaluated = f"  eval {record['eval_loss']:.4f}" if "eval_loss" in record else ""
      parts += f", ordered {record['ordered']:.2f}" if "ordered" in record else ""
      evaluated += f", ordered {record['eval_ordered']:.2f}" if "eval_ordered" in record else ""
      self.say(
        f"step {record['step']:,}  loss {record['loss']:.4f} ({parts}){evaluated}  "
        f"grad {record['grad_norm']:.2f}  lr {record['learning_rate']:.2e}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  ETA {progress.duration(left)}"
      )

  def close(self) -> None:
    """Takes the bar away."""
    self._bar.close()
