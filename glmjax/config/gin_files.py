"""Gin files: finding, checking and parsing them. The one module that knows gin.

`check` reads the files with gin's own parser but imports none of the modules they name (signatures.py reads
their source), so that a mistake is answered before JAX is loaded. It is stricter than gin, which accepts a
macro that nothing uses and finds a missing value only when training asks for it.
"""

import copy
import importlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gin

from glmjax import errors
from glmjax.config import gin_checker, gin_reader, signatures
from glmjax.io import bucket_path, paths


def packaged_folder() -> pathlib.Path:
  """Returns where glmjax's own gin files are: inside the installed package, or beside it in a checkout."""
  return paths.shipped("gin_configs", "gin")


def find(name: str, where: str = "--gin_file") -> paths.Path:
  """Finds the gin file of that name, in the working directory or else in the packaged folder, or in its bucket."""
  path = paths.named(name, where if where.startswith("--") else f"{where}: the file to include")
  if isinstance(path, bucket_path.BucketPath):
    return path  # what is not there is said when it is read
  name = str(path)
  for folder in (pathlib.Path.cwd(), packaged_folder()):
    if os.path.lexists(folder / name):  # what is there and no file is said when it is read
      return folder / name
  known = [str(path.relative_to(packaged_folder())) for path in packaged_folder().rglob("*.gin")]
  known += [str(path) for pattern in ("*.gin", "*/*.gin") for path in pathlib.Path().glob(pattern)]
  by_last_part = {os.path.basename(path): path for path in known}
  close = signatures.nearest(name, known)
  close = close or by_last_part.get(signatures.nearest(os.path.basename(name), by_last_part))
  advice = f"did you mean {close}?" if close else f"searched here and in {packaged_folder()}"
  raise errors.InputError(f"{where}: no gin file {name}; {advice}")


def check(
  files: Sequence[str],
  overrides: Sequence[str] = (),
  entry: str | None = None,
  given: Iterable[str] = (),
  commands: Sequence[str] = (),
) -> gin_checker.Program:
  """Raises InputError for the first mistake in files and overrides; imports none of the modules they name.

  Args:
    files: gin files, later ones over earlier.
    overrides: "NAME=value" or "scope/module.function.parameter=value".
    entry: full name of the function to be called: what it does not depend on is left aside, and each of its
      parameters without a default must be bound, or be among those `given`.
    commands: full names of all functions that commands call: what none of them depends on is a mistake.
  """
  packages = {name.split(".")[0] for name in ("glmjax", *commands, *([entry] if entry else []))}
  reader = gin_reader.Reader(find, packages)
  for file in files:
    reader.read_file(find(file))
  for override in overrides:
    reader.read_override(override)
  return gin_checker.check(reader, entry, given, commands)


def parse(
  files: Sequence[str],
  overrides: Sequence[str] = (),
  entry: str | None = None,
  given: Iterable[str] = (),
  commands: Sequence[str] = (),
) -> None:
  """Checks the files, has gin parse what the entry needs (which imports its modules), and locks the configuration."""
  program = check(files, overrides, entry, given, commands)
  gin.clear_config()
  for module, where in program.modules.items():
    _import(module, where)
  try:
    gin.parse_config_files_and_bindings([], list(program.lines))
  except (SyntaxError, ValueError, NameError, AttributeError) as error:
    lines = str(error).strip().splitlines()
    number = next((int(found[1]) for line in lines if (found := re.search(r"line (\d+)$", line))), 1)
    raise errors.InputError(f"{program.places[number - 1] or 'gin'}: {lines[0]}") from original(error)


def _import(module: str, where: str) -> None:
  """Imports a module that gin files name; ours may fail as they do, a user's own is the user's to mend."""
  try:
    importlib.import_module(module)
  except (errors.InputError, OSError, MemoryError):
    raise
  except Exception as error:
    is_extra = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in signatures.EXTRAS
    if is_extra or module.split(".")[0] == "glmjax":
      raise
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise errors.InputError(
      f"{where}: {module} cannot be imported ({reason}): mend it, or install what it needs"
    ) from error


def configured(entry: str) -> Callable[..., Any]:
  """Returns the function of that full name, its parameters bound as the parsed files say."""
  module_name, _, name = entry.rpartition(".")
  function = getattr(importlib.import_module(module_name), name)
  try:
    return gin.get_configurable(function)
  except ValueError:  # no file names it
    with gin.unlock_config():
      return gin.external_configurable(function, module=module_name)


def binding(function: Callable[..., Any], parameter: str) -> Any:
  """Returns the value that the parsed files give a parameter of a configured function; None without one."""
  value = gin.get_bindings(function, resolve_references=False).get(parameter)
  return copy.deepcopy(value)  # gin's way to evaluate a macro


def original(error: Exception) -> Exception:
  """Returns the exception that a configured function raised; gin re-raises a look-alike that loses errno."""
  kind = type(error)
  while kind.__qualname__ == kind.__base__.__qualname__ and type(error.__context__) is kind.__base__:
    error, kind = error.__context__, kind.__base__
  return error


def operative_config() -> str:
  """Returns the values used so far, defaults included, as a gin file."""
  return gin.operative_config_str(max_line_length=110)
