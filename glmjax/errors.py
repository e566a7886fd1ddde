"""The exceptions for mistakes that a user can mend and for runs that diverge, and the system's refusals in words."""

import errno
import re
from collections.abc import Mapping

_ADVICE = {
  errno.ENOSPC: "the disk is full: free some space",
  errno.EDQUOT: "the disk quota is used up: free some space",
  errno.EMFILE: "this process may open no more files: raise the limit with ulimit -n",
  errno.ENFILE: "the machine may open no more files: end other programs, or raise fs.file-max",
  errno.ENOMEM: "there is not enough memory: end other programs, or raise the memory limit",
  errno.EFBIG: "the file may grow no further: raise the limit with ulimit -f, or use another file system",
  errno.EACCES: "permission denied",
  errno.EPERM: "the system does not permit it",
  errno.ENOENT: "no such file or folder",
  errno.EEXIST: "it is there already",
  errno.ELOOP: "its symbolic links lead in a circle",
  errno.EROFS: "the file system is read-only",
  errno.EIO: "the disk or network reports an input/output error",
  errno.ESTALE: "the network file system has lost the file (stale handle): try again",
  errno.ENAMETOOLONG: "the name is too long",
  errno.ENOTDIR: "a part of the path is a file, not a folder",
  errno.EISDIR: "it is a folder",
}

# What a network, a service, a disk or a crowded machine fails to do, and may do at the next try of the same. Buckets
# that do not answer say EREMOTEIO.
_PASSING = (
  errno.EREMOTEIO,
  errno.EIO,
  errno.ESTALE,
  errno.ENOMEM,
  errno.ETIMEDOUT,
  errno.ECONNREFUSED,
  errno.ECONNRESET,
  errno.ECONNABORTED,
  errno.EHOSTDOWN,
  errno.EHOSTUNREACH,
  errno.ENETDOWN,
  errno.ENETUNREACH,
)


class InputError(ValueError):
  """Bad input: one line that says what is wrong, where, and what to do about it.

  The command line prints the message alone and exits with status 2, or 1 where `may_pass`; a library caller
  meets an ordinary ValueError. What is raised for an OSError is raised `from` it, so that this can be told.
  """

  def __init__(self, message: str = "", *, passes: bool = False):
    """Says `message`; `passes`: of another process, whose error's causes are not here, and whose own `may_pass`."""
    super().__init__(message)
    self.passes = passes


class NotFiniteError(InputError):
  """Weights, or what a model makes of them, that are not finite numbers: nothing asked of it can be answered."""


class Diverged(Exception):
  """A training run whose numbers are not finite any more: a result of its settings and data, no mistake of its input.

  The command line prints the message and exits with status 3; the same command would come to the same end.
  """

  def __init__(
    self,
    message: str,
    step: int,
    samples: tuple[int, int],
    part: str,
    above: Mapping[str, Mapping[str, float]] | None = None,
  ):
    """Says that a run ends at a step.

    Args:
      message: all of it, for people.
      step: the step that was not done, or that was the last.
      samples: its first and last.
      part: where it first shows, in words.
      above: of a spike about which nothing is left to be done, value and limit of each figure that was above its limit.
    """
    super().__init__(message)
    self.step, self.samples, self.part, self.above = step, samples, part, above


def may_pass(error: BaseException | None) -> bool:
  """Tells whether the same may go well at the next try, as behind an error there is what fails by itself for a time:
  no mistake of the user's.
  """
  while error is not None:
    if isinstance(error, OSError):
      return error.errno in _PASSING
    if isinstance(error, InputError) and error.passes:
      return True
    error = error.__cause__
  return False


def reason(error: OSError) -> str:
  """Returns what the system refused and, where it is known, what to do: only what is damaged is called damaged."""
  return _ADVICE.get(error.errno) or error.strerror or str(error) or type(error).__name__


def one_line(error: BaseException) -> str:
  """Returns the start of an error's message, on one line."""
  return re.sub(r"\s+", " ", str(error) or type(error).__name__)[:300]
