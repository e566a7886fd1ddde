"""The glmjax command. Each subcommand is one function of the library, bound by gin files and a few flags.

Flags and gin files are checked before the function's module, and so JAX, is imported.
"""

import errno
import sys
from collections.abc import Sequence

from glmjax import errors
from glmjax.io import printable

_GIN = "  In call to configurable"
_LONGEST = 1000  # characters of an error that is printed
_READER_LEFT = 141  # as of a program that SIGPIPE ended

# What the system refuses and the user can mend, so that no restart of the same command helps (status 2). Short memory,
# a sick disk or network, a crowded machine may be better the next time: status 1.
_MENDED_BY_USER = (
  errno.EACCES,
  errno.EPERM,
  errno.EROFS,
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.EEXIST,
  errno.ENOTEMPTY,
  errno.ENAMETOOLONG,
  errno.ELOOP,
  errno.EILSEQ,
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EMFILE,
  errno.EXDEV,
  errno.ENOTSUP,
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns its exit status: 0 done, 2 a mistake to mend, 3 a training run that diverged, 128 + n
  after signal n, 1 anything else.
  """
  try:
    from glmjax.cli import process  # here: from the first line on an interrupt has its line and status

    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
      process.speak_utf8()
    process.begin(arguments)
    return _run(arguments)
  except KeyboardInterrupt as interrupt:
    if hasattr(interrupt, "number"):
      process.end(interrupt.number)
    print("glmjax: interrupted", file=sys.stderr)
    return 130


def _run(arguments: list[str]) -> int:
  from glmjax.cli import process, streams

  before = process.stopped()
  try:
    from glmjax.cli import run  # here, so that whatever fails in the imports is one line as well

    status = run.run(arguments)
    sys.stdout.flush()
    return status
  except Exception as error:
    if before is None and (number := process.stopped()) is not None:
      process.end(number)
    if "glmjax.config.gin_files" in sys.modules:  # else the import itself failed
      error = sys.modules["glmjax.config.gin_files"].original(error)
    if isinstance(error, BrokenPipeError) and error.filename == streams.OUTPUT:  # as in `glmjax ... | head`
      return _READER_LEFT
    if "--debug" in arguments:
      import traceback

      traceback.print_exc()
    return _fail(*_describe(error))
  finally:
    if streams.output_fails():  # the error under way tells
      streams.drop_output()


def _describe(error: Exception) -> tuple[str, int]:
  """Returns one line for an error, and the exit status."""
  if isinstance(error, errors.InputError):
    return _one_line(error), 1 if errors.may_pass(error) else 2
  if isinstance(error, errors.Diverged):
    return _one_line(error), 3
  again = "run again with --debug for the traceback"
  if isinstance(error, ModuleNotFoundError) and error.name:
    from glmjax.config import signatures

    extra = signatures.EXTRAS.get(error.name.split(".")[0])
    if extra:
      return f"this needs {error.name}: pip install 'glmjax[{extra}]'", 2
  if isinstance(error, OSError) and error.errno is not None:
    place = f"{error.filename}: " if isinstance(error.filename, str) else ""
    if error.errno in _MENDED_BY_USER:
      return f"{place}{errors.reason(error)}; run the same command again once that is mended", 2
    return f"{place}{errors.reason(error)} ({again})", 1
  if isinstance(error, MemoryError):
    return f"{errors.reason(OSError(errno.ENOMEM, ''))} ({again})", 1
  return f"{type(error).__name__}: {_one_line(error)} ({again})", 1


def _one_line(error: Exception) -> str:
  """Returns the message, its lines joined, without those that gin appends; a library's essay is cut."""
  lines = [line.strip() for line in str(error).splitlines() if not line.startswith(_GIN)]
  text = " ".join(filter(None, lines)) or "no message"
  return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _fail(message: str, status: int) -> int:
  from glmjax.cli import process

  print(f"glmjax: {printable.text(message)}", file=sys.stderr, flush=True)
  process.leave_others(status, message)
  return status
