"""What a run tells about itself: a JSON line a step, TensorBoard where it is installed, a readable line."""

import json
import math
import pathlib
import sys
from typing import Any

import numpy as np
import tqdm

from glmjax import tokens as tokens_lib

Record = dict[str, Any]


def record_of(metrics: dict[str, np.ndarray]) -> Record:
  """A step's metrics as JSON values; the loss of each objective that the batch held."""
  record = {"loss": float(metrics["loss"])}
  record |= objective_losses(metrics["losses"], metrics["weights"])
  record |= {name: float(value) for name, value in metrics.items()
             if name not in ("loss", "losses", "weights", "applied")}
  return record


def objective_losses(losses: np.ndarray, weights: np.ndarray, prefix: str = "loss_") -> Record:
  """Mean loss per objective, of those that have any token."""
  return {f"{prefix}{name}": float(loss / weight)
          for name, loss, weight in zip(tokens_lib.OBJECTIVES, losses, weights) if weight > 0}


def truncate_after(path: pathlib.Path, step: int) -> None:
  """Removes the lines behind `step` from a metrics file, and a half-written last one.

  Reads from the end, so that a long file costs no more than what is removed.
  """
  if not path.exists():
    return
  with open(path, "r+b") as file:
    size = file.seek(0, 2)
    block, keep = 1 << 20, None
    while keep is None:
      start = max(0, size - block)
      file.seek(start)
      keep = _end_of_step(file.read(size - start), step, whole=start == 0)
      block *= 4
    file.truncate(start + keep)


def _end_of_step(tail: bytes, step: int, whole: bool) -> int | None:
  """Where the last complete line of a step up to `step` ends in `tail`; None: not in it, unless it is whole."""
  end = tail.rfind(b"\n") + 1
  while end > 0:
    start = tail.rfind(b"\n", 0, end - 1) + 1
    if start == 0 and not whole:
      return None
    try:
      if json.loads(tail[start:end])["step"] <= step:
        return end
    except (ValueError, KeyError, TypeError):
      pass  # not ours, or damaged: goes with what is behind it
    end = start
  return 0 if whole else None


class Writer:
  """metrics.jsonl and TensorBoard events."""

  def __init__(self, path: pathlib.Path, tensorboard: pathlib.Path):
    self._file = open(path, "a", encoding="utf-8")
    self._board = None
    try:
      import tensorboardX  # optional: the report extra
    except ImportError:
      return
    self._board = tensorboardX.SummaryWriter(str(tensorboard))

  def write(self, record: Record) -> None:
    """One step; the line is with the operating system when this returns."""
    # JSON has no NaN: what is not finite becomes null.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    self._file.write(json.dumps(clean) + "\n")
    self._file.flush()
    if self._board is not None:
      for name, value in record.items():
        if isinstance(value, float):
          self._board.add_scalar(name, value, record["step"])

  def close(self) -> None:
    """Writes what is buffered."""
    self._file.close()
    if self._board is not None:
      self._board.close()


class Console:
  """A progress bar on a terminal, and one readable line per log interval."""

  def __init__(self, total_samples: int, samples: int, silent: bool = False):
    self._bar = tqdm.tqdm(total=total_samples, initial=min(samples, total_samples), unit=" samples", leave=False,
                          dynamic_ncols=True, disable=silent or not sys.stderr.isatty())
    self._silent = silent
    self._total = total_samples
    self._pace: float | None = None  # seconds per sample, smoothed

  def say(self, line: str) -> None:
    """Prints a line above the bar."""
    if not self._silent:
      tqdm.tqdm.write(line, file=sys.stderr)
      sys.stderr.flush()

  def step(self, record: Record, seconds: float, samples: int, show: bool) -> None:
    """After a step of that many samples; `show` prints its line."""
    pace = seconds / max(samples, 1)
    self._pace = pace if self._pace is None else 0.9 * self._pace + 0.1 * pace
    self._bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s", refresh=False)
    self._bar.update(min(record["samples_seen"], self._total) - self._bar.n)
    if show:
      left = max(self._total - record["samples_seen"], 0) * self._pace
      parts = " ".join(f"{name} {record[f'loss_{name}']:.3f}" for name in tokens_lib.OBJECTIVES
                       if f"loss_{name}" in record)
      evaluated = f"  eval {record['eval_loss']:.4f}" if "eval_loss" in record else ""
      self.say(f"step {record['step']:,}  loss {record['loss']:.4f} ({parts}){evaluated}  "
               f"grad {record['grad_norm']:.2f}  lr {record['learning_rate']:.2e}  "
               f"{record['tokens_per_second']:,.0f} tokens/s  ETA {duration(left)}")

  def close(self) -> None:
    """Takes the bar away."""
    self._bar.close()


def duration(seconds: float) -> str:
  """Like 1:02:03, or 4:05."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
