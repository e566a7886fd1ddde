"""What a flag and a command are, and how a flag's text is read: numbers in their ranges, paths with ~ expanded."""

import argparse
import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from glmjax import errors, ranges
from glmjax.io import bucket_path, paths

_LONGEST = 60  # characters of a value that is printed


@dataclasses.dataclass(frozen=True)
class Flag:
  """A command-line flag for one parameter of the command's function, which bears its name.

  A name without dashes is that of a positional argument.
  """

  name: str
  help: str
  type: type = str  # int, float, bool (given or not), pathlib.Path, str
  choices: tuple[Any, ...] | None = None
  repeatable: bool = False
  optional: bool = False  # of a repeatable positional argument: a gin file may bind it instead
  kind: str = "bound"  # by gin, and so in config.gin; "passed": to this call alone; "prepared": for `prepare`
  least: float | None = None  # of a number; None: what 32 bits hold
  most: float | None = None
  above: float | None = None  # in place of `least`, where that itself is too little
  of: str | None = None  # full name of the class whose field it sets, one of the command's `groups`; None: the function
  makes: str | None = None  # full name of the class that a gin file, given in place of a value, is for

  @property
  def parameter(self) -> str:
    return self.name.removeprefix("--")

  def read(self, text: str) -> Any:
    """Returns the value that a text on the command line gives; paths as text.

    Raises:
      errors.InputError: in one line that names the flag and what it takes.
    """
    if self.type is pathlib.Path:
      return text if text == "-" else str(paths.named(text, self.name))
    if self.choices is not None:
      if text not in map(str, self.choices):
        raise errors.InputError(f"{self.name} is {_cut(text)}: choose one of {', '.join(map(str, self.choices))}")
      return self.type(text)
    return self._number(text) if self.type in (int, float) else text

  def read_value(self, value: Any) -> Any:
    """Returns what a Python object gives: of plain ones what their text would, others as they are; a list of the one
    text where there may be several.

    Raises:
      errors.InputError: as `read`; for a truth value where none is taken, and for another value in its place.
    """
    if value is None or self.type is bool and isinstance(value, bool):
      return value
    if self.type is bool:
      raise errors.InputError(f"{self.name} is {_cut(repr(value))}: give True or False")
    if isinstance(value, bool):
      raise errors.InputError(f"{self.name} is {value}: it is no flag that is on or off")
    if self.type is pathlib.Path and isinstance(value, (int, float)):
      raise errors.InputError(f"{self.name} is {value}: give a path")
    if not isinstance(value, (str, os.PathLike, bucket_path.BucketPath, int, float)):
      return value
    read = self.read(os.fspath(value) if isinstance(value, os.PathLike) else str(value))
    return [read] if self.repeatable else read

  def _number(self, text: str) -> int | float:
    try:
      value = self.type(text)
    except ValueError:
      try:
        value = float(text)  # so that the range is said of nan, 1.5 and 1e6 too
      except ValueError:
        value = text
    if self.type is int:
      ranges.whole(
        self.name,
        value,
        -(1 << 31) if self.least is None else self.least,
        (1 << 31) - 1 if self.most is None else self.most,
      )
    else:
      limits = {"least": self.least, "most": self.most, "above": self.above}
      ranges.number(self.name, value, **{name: limit for name, limit in limits.items() if limit is not None})
    return value


@dataclasses.dataclass(frozen=True)
class Command:
  """One subcommand: a function of the library under gin."""

  name: str
  target: str  # full name of the function
  help: str
  example: str
  flags: tuple[Flag, ...] = ()
  prepare: Callable[[argparse.Namespace], dict[str, Any]] | None = None  # arguments of the call
  # Parameters of the call by what reads them, of files and standard input: in process 0 of several alone.
  reads: Mapping[str, Callable[[argparse.Namespace], Any]] = dataclasses.field(default_factory=dict)
  groups: Mapping[str, str] = dataclasses.field(default_factory=dict)  # parameters that are objects of these classes
  describe: Callable[[Any], Any] | None = None  # the function's result as the command's
  show: Callable[[Any], None] | None = None  # prints the result for people
  status: Callable[[Any], int] | None = None  # the exit status that the result asks for; None: 0
  folder: str | None = None  # the parameter that names the folder which config.gin is written to
  # Entered when flags and gin files are in order, left when the result is printed.
  within: Callable[[argparse.Namespace], contextlib.AbstractContextManager[None]] | None = None
  # Named "plan --fits": what the command is instead with that flag; of "plan --fits --html" with the last.
  modes: tuple["Command", ...] = ()


def _cut(text: str) -> str:
  return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
