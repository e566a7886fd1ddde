"""A command's standard streams: usable whatever the process was started with, also with a full disk under them."""

import contextlib
import io
import os
import select
import sys
from typing import Any

OUTPUT = "standard output"  # the file name of its errors


class _Forgiving(io.FileIO):
  """A descriptor whose failures are dropped: a full disk or a closed terminal under the messages ends no training."""

  def write(self, data: Any) -> int:
    left = memoryview(data)
    with contextlib.suppress(OSError):
      while left and (written := super().write(left)):  # None: it would block
        left = left[written:]
    return len(data)


class _Output(io.FileIO):
  """Standard output: takes all that is written to it, or raises an error that names it."""

  def write(self, data: Any) -> int:
    left = memoryview(data)
    try:
      while left:
        written = super().write(left)
        if written is None:  # it would block, as another program has set the terminal or pipe
          select.select([], [self], [])
        else:
          left = left[written:]
    except OSError as error:
      error.filename = OUTPUT
      raise
    return len(data)


def open_all() -> None:
  """Makes standard input, output and error usable, whatever the process was started with.

  Closed ones are /dev/null. Into files and pipes goes UTF-8, unless PYTHONIOENCODING says otherwise; a terminal gets
  its own encoding. A character that the encoding lacks is replaced: by ? in the output, by an escape in messages.
  """
  for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
    try:
      os.fstat(descriptor)
    except OSError:
      null = os.open(os.devnull, os.O_RDWR)
      if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
      os.set_inheritable(descriptor, True)
    if getattr(sys, name) is None:  # so Python has it where the descriptor was closed
      setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
  if sys.stdout is sys.__stdout__:  # else another program's
    _write_output_to(1)
  if sys.stderr is sys.__stderr__:
    # Without a buffer, which a signal between its write and its note of that would have write a line twice.
    sys.stderr = io.TextIOWrapper(_Forgiving(2, "wb", closefd=False), sys.stderr.encoding, line_buffering=True)
  for stream, lacking in ((sys.stdin, "replace"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
    if isinstance(stream, io.TextIOWrapper):
      own = stream is sys.stdin or stream.isatty() or os.environ.get("PYTHONIOENCODING", "").split(":")[0]
      stream.reconfigure(encoding=stream.encoding if own else "utf-8", errors=lacking)


def _write_output_to(descriptor: int) -> None:
  """Has standard output written to that descriptor, as it was set up otherwise."""
  raw = _Output(descriptor, "wb", closefd=False)
  unbuffered = isinstance(sys.stdout.buffer, io.RawIOBase)
  sys.stdout = io.TextIOWrapper(
    raw if unbuffered else io.BufferedWriter(raw),
    sys.stdout.encoding,
    sys.stdout.errors,
    line_buffering=sys.stdout.line_buffering,
    write_through=unbuffered,
  )


def keep_output() -> None:
  """Keeps standard output for what Python writes; what libraries print past it, as Gloo does, becomes messages."""
  buffer = getattr(sys.stdout, "buffer", None)
  if isinstance(getattr(buffer, "raw", buffer), _Output):  # else another program's
    sys.stdout.flush()
    _write_output_to(os.dup(1))
    os.dup2(2, 1)


def output_fails() -> bool:
  """Tells whether standard output does not take what was written to it."""
  try:
    sys.stdout.flush()
  except (OSError, ValueError):
    return True
  return False


def drop_output() -> None:
  """Drops what standard output still holds, so that Python does not try again at its end."""
  with contextlib.suppress(OSError, ValueError):
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def is_utf8(stream: Any) -> bool:
  """Tells whether the stream takes every character."""
  return (getattr(stream, "encoding", None) or "utf-8").lower().replace("_", "-").startswith(("utf-", "utf8"))
