"""Running a command: flags and gin files are read and checked, its function called, its result printed."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import glmjax
from glmjax import errors
from glmjax.config import gin_files, signatures
from glmjax.cli import commands, hosts, process, streams
from glmjax.cli.flags import Command, Flag
from glmjax.io import paths, publish

GIN_HELP = "gin file, searched here and then among glmjax's own (repeatable)"
STAGES = Flag("--stages", "JSON lines file to add the command's seconds to", pathlib.Path)


class _Parser(argparse.ArgumentParser):
  """argparse whose mistakes are InputErrors of one line."""

  def error(self, message: str) -> None:
    raise errors.InputError(f"{message}; see {self.prog} --help")


def run(arguments: list[str]) -> int:
  """Parses the command line and gin files, calls the command's function, prints what it returns."""
  given_gin = [argument.removeprefix("--gin.") for argument in arguments if argument.startswith("--gin.")]
  arguments = [argument for argument in arguments if not argument.startswith("--gin.")]
  started = time.time()
  options = _parse_flags(arguments)
  if options is None:
    return 0
  command, options.gin = options.command, given_gin
  given = settle(command, options, {})
  process.quieten()
  if options.stages:
    from glmjax.evaluate import timings

    timings.prepare(options.stages)
  with command.within(options) if command.within else contextlib.nullcontext():
    process.met()
    for parameter, read in command.reads.items():
      given[parameter] = hosts.from_first(lambda read=read: read(options))
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
      result = call(command, given)
    if hosts.is_first():
      _print_result(command, result, options.json)
      if options.stages:
        timings.append(options.stages, command.name, started, time.time() - started)
  return command.status(result) if command.status else 0


def command_named(name: str) -> Command:
  """Returns the command of that name, or raises InputError."""
  if not isinstance(name, str) or name not in commands.COMMANDS:
    close = signatures.nearest(str(name), commands.COMMANDS)
    advice = f"did you mean {close}?" if close else f"there are {', '.join(commands.COMMANDS)}"
    raise errors.InputError(f"no command {name}; {advice}")
  return commands.COMMANDS[name]


def settle(command: Command, options: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
  """Has gin parse files, with bindings and flags over them; returns the arguments of the call.

  Args:
    options: the value of each of the command's flags, None where it was not given; `gin_file`, the files, and `gin`,
      the bindings, as "NAME=value".
    given: arguments that are no flags.

  Raises:
    errors.InputError: for a mistake in any of them.
  """
  given, files = {**given, **(command.prepare(options) if command.prepare else {})}, list(options.gin_file)
  overrides = [f"{command.target}.{name}=@{made}()" for name, made in command.groups.items()] + options.gin
  for flag in command.flags:
    value = getattr(options, flag.parameter)
    if value is None or flag.kind == "prepared":
      continue
    if flag.makes and isinstance(value, str) and value.endswith(".gin"):
      files.append(value)
      overrides.append(f"{flag.of or command.target}.{flag.parameter}=@{flag.makes}()")
    elif flag.kind == "bound" and (isinstance(value, (str, int, float)) or flag.of and _is_of_texts(value)):
      overrides.append(f"{flag.of or command.target}.{flag.parameter}={value!r}")
    else:
      given[flag.parameter] = value
  gin_files.parse(files, overrides, command.target, [*given, *command.reads], commands.targets())
  return given


def _is_of_texts(value: Any) -> bool:
  """Tells whether a value is a list of texts: those of a flag that may be given several times."""
  return isinstance(value, list) and all(isinstance(each, str) for each in value)


def call(command: Command, given: dict[str, Any]) -> Any:
  """Calls the command's function and leaves the configuration in the folder that it wrote.

  A function that works for hours takes `on_start`, to be called with the folder once that is its own.
  """
  function = gin_files.configured(command.target)
  if "on_start" in inspect.signature(function).parameters:
    users = given.get("on_start")

    def on_start(folder: paths.Path) -> None:
      _write_config(folder)
      if users is not None:
        users(folder)

    given = given | {"on_start": on_start}
  result = function(**given)  # one that fails leaves no configuration: the folder may be another run's
  folder = gin_files.binding(function, command.folder) if command.folder else None
  if folder is not None:
    _write_config(paths.named(folder))
  return result


def _write_config(folder: paths.Path) -> None:
  """Writes config.gin beside the result: every value used, defaults included."""
  if folder.is_dir() and hosts.is_first():
    publish.write_text(folder / "config.gin", gin_files.operative_config())


def _parse_flags(arguments: list[str]) -> argparse.Namespace | None:
  """Returns the parsed flags, or None after --help or --version."""
  parser = _Parser(
    prog="glmjax",
    description=glmjax.__doc__,
    allow_abbrev=False,
    add_help=False,
    usage="glmjax COMMAND [FLAGS]",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  names = "\n".join(f"  {command.name:11}{command.help}" for command in commands.COMMANDS.values())
  parser.epilog = f"commands:\n{names}\n\nglmjax COMMAND --help shows a command's flags and an example."
  parser.add_argument("--version", action="store_true", help="print the version")
  parser.add_argument("--help", "-h", action="store_true", help="print this")
  name = arguments[0] if arguments else "--help"
  if not name.startswith("-"):
    command = command_named(name)
    given = {argument.split("=")[0] for argument in arguments}
    mode = next((mode for mode in command.modes if mode.name.split()[-1] in given), command)
    return _parse_command(mode, arguments[1:])
  if name == "--version":
    print(f"glmjax {glmjax.__version__}")
  elif name in ("--help", "-h"):
    parser.print_help()
  else:
    raise errors.InputError(f"no command before {name}; write glmjax COMMAND {name}, or see glmjax --help")
  return None


def _parse_command(command: Command, arguments: Sequence[str]) -> argparse.Namespace | None:
  parser = _Parser(
    prog=f"glmjax {command.name}",
    description=f"{command.help[0].upper()}{command.help[1:]}.",
    epilog=f"example:\n  {command.example}",
    allow_abbrev=False,
    add_help=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  for flag in command.flags:
    settings = (
      {"action": "store_true", "default": None}
      if flag.type is bool
      else {"nargs": "*" if flag.optional else "+"}
      if flag.repeatable and not flag.name.startswith("-")
      else {"action": "append" if flag.repeatable else "store"}
    )
    if flag.choices:
      settings["metavar"] = f"{{{','.join(map(str, flag.choices))}}}"
    parser.add_argument(flag.name, help=flag.help, **settings)
  for mode in command.modes:
    parser.add_argument(mode.name.split()[-1], action="store_true", help=f"{mode.help}; see glmjax {mode.name} --help")
  for flag in command.name.split()[1:]:
    if flag not in [each.name for each in command.flags]:
      parser.add_argument(flag, action="store_true", help="this")
  parser.add_argument("--gin_file", action="append", default=[], help=GIN_HELP)
  parser.add_argument(
    "--gin.NAME=VALUE",
    action="store_true",
    dest="gin",
    help="set a macro or parameter, e.g. --gin.TOTAL_SAMPLES=3200 or --gin.loop.train.seed=1",
  )
  parser.add_argument("--json", action="store_true", help="print the result as JSON; all else goes to standard error")
  parser.add_argument(STAGES.name, metavar="FILE", help=STAGES.help)
  parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
  parser.add_argument("--help", "-h", action="store_true", help="print this")
  if "--help" in arguments or "-h" in arguments:
    parser.print_help()
    return None
  options, unknown = parser.parse_known_args(arguments)
  if unknown:
    close = signatures.nearest(unknown[0].split("=")[0], parser._option_string_actions)
    raise errors.InputError(
      f"unknown argument {unknown[0]}; " + (f"did you mean {close}?" if close else f"see {parser.prog} --help")
    )
  options.command = command
  for flag in (*command.flags, STAGES):
    given = getattr(options, flag.parameter)
    if flag.optional and not given:
      setattr(options, flag.parameter, None)
    elif given is not None and flag.type is not bool:
      read = [flag.read(text) for text in given] if flag.repeatable else flag.read(given)
      setattr(options, flag.parameter, read)
  return options


def _print_result(command: Command, result: Any, as_json: bool) -> None:
  """Prints JSON on standard output with --json; otherwise the command's own way, or nothing for None."""
  result = command.describe(result) if command.describe else result
  ascii_only = not streams.is_utf8(sys.stdout)  # JSON has its own spelling of what the stream lacks
  if as_json:
    print(json.dumps(result, ensure_ascii=ascii_only, default=_plain))
  elif command.show:
    command.show(result)
  elif result is not None:
    print(json.dumps(result, ensure_ascii=ascii_only, indent=2, default=_plain))
  sys.stdout.flush()


def _plain(value: Any) -> Any:
  """Returns as plain values what json cannot write itself: numpy scalars and arrays, paths, dataclasses."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
  if hasattr(value, "tolist"):
    return value.tolist()
  return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
