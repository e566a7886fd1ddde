"""Gin files: finding, checking and parsing them. The one module that knows gin.

`check` reads the files with gin's own parser but imports none of the modules they name (signatures.py reads
their source), so that a mistake is answered before JAX is loaded. It is stricter than gin, which accepts a
macro that nothing uses and finds a missing value only when training asks for it.
"""

import dataclasses
import copy
import functools
import importlib
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gin

from glmjax import errors, gin_checker, signatures


@dataclasses.dataclass(frozen=True)
class Checked:
  """Files and overrides found to be in order, ready for gin."""

  paths: tuple[str, ...]
  imports: tuple[str, ...]  # import statements that the overrides need
  overrides: tuple[str, ...]


def packaged_folder() -> pathlib.Path:
  """Where glmjax's own gin files are: inside the installed package, or beside it in a checkout."""
  package = pathlib.Path(__file__).parent
  installed = package / "gin_configs"
  return installed if installed.is_dir() else package.parent / "gin"


def find(name: str, where: str = "--gin_file") -> pathlib.Path:
  """The gin file of that name, in the working directory or else in the packaged folder."""
  for folder in (pathlib.Path.cwd(), packaged_folder()):
    if (folder / name).is_file():
      return folder / name
  known = [str(path.relative_to(packaged_folder())) for path in packaged_folder().rglob("*.gin")]
  known += [str(path) for pattern in ("*.gin", "*/*.gin") for path in pathlib.Path().glob(pattern)]
  by_last_part = {os.path.basename(path): path for path in known}
  close = signatures.nearest(name, known)
  close = close or by_last_part.get(signatures.nearest(os.path.basename(name), by_last_part))
  advice = f"did you mean {close}?" if close else f"searched here and in {packaged_folder()}"
  raise errors.InputError(f"{where}: no gin file {name}; {advice}")


def check(
  files: Sequence[str], overrides: Sequence[str] = (), entry: str | None = None, given: Iterable[str] = ()
) -> Checked:
  """Raises InputError for the first mistake in files and overrides; imports none of the modules they name.

  overrides are "NAME=value" or "scope/module.function.parameter=value". Where entry, the full name of the
  function to be called, is named, each of its parameters without a default must be bound, or be among those
  given.
  """
  checker = gin_checker.Checker(find)
  paths = []
  for file in files:
    path = find(file)
    paths.append(str(path.resolve()))
    checker.read_file(path)
  for override in overrides:
    checker.read_override(override)
  checker.check_scopes()
  checker.check_macros()
  checker.check_required()
  checker.check_types()
  if entry is not None:
    checker.check_entry(entry, set(given))
  return Checked(tuple(paths), tuple(checker.override_imports()), tuple(overrides))


def parse(
  files: Sequence[str], overrides: Sequence[str] = (), entry: str | None = None, given: Iterable[str] = ()
) -> None:
  """Checks, then lets gin parse (which imports the modules named) and locks the configuration."""
  checked = check(files, overrides, entry, given)
  gin.clear_config()
  _search_packaged_folder()
  lines = ["from __gin__ import dynamic_registration", *checked.imports, *checked.overrides]
  try:
    gin.parse_config_files_and_bindings(list(checked.paths), lines)
  except (SyntaxError, ValueError, NameError, AttributeError) as error:
    lines = str(error).strip().splitlines()
    where = f" ({lines[-1].strip()})" if len(lines) > 1 else ""
    raise errors.InputError(f"gin: {lines[0]}{where}") from error


@functools.cache
def _search_packaged_folder() -> None:
  """Tells gin where included files may be; once, since gin only ever adds."""
  gin.add_config_file_search_path(str(packaged_folder()))


def configured(entry: str) -> Callable[..., Any]:
  """The function of that full name, its parameters bound as the parsed files say."""
  module_name, _, name = entry.rpartition(".")
  function = getattr(importlib.import_module(module_name), name)
  try:
    return gin.get_configurable(function)
  except ValueError:  # no file names it
    with gin.unlock_config():
      return gin.external_configurable(function, module=module_name)


def binding(function: Callable[..., Any], parameter: str) -> Any:
  """The value that the parsed files give a parameter of a configured function; None without one."""
  value = gin.get_bindings(function, resolve_references=False).get(parameter)
  return copy.deepcopy(value)  # gin's way to evaluate a macro


def original(error: Exception) -> Exception:
  """The exception that a configured function raised; gin re-raises a look-alike that loses errno."""
  kind = type(error)
  while kind.__qualname__ == kind.__base__.__qualname__ and type(error.__context__) is kind.__base__:
    error, kind = error.__context__, kind.__base__
  return error


def config() -> str:
  """Every binding parsed, as a gin file."""
  return gin.config_str(max_line_length=110)


def operative_config() -> str:
  """The values used so far, defaults included, as a gin file."""
  return gin.operative_config_str(max_line_length=110)
