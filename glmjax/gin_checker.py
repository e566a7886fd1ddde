"""What gin files and overrides say, collected and judged without importing the modules they name.

gin's own parser reads them. The judgement is stricter than gin's, which accepts a macro that nothing uses and
finds a missing value only when training asks for it.
"""

import dataclasses
import os
import pathlib
import tokenize
from collections.abc import Callable, Iterator
from typing import Any

from gin import config_parser

from glmjax import errors, signatures

_SIMPLE_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "None": (type(None),)}


@dataclasses.dataclass(frozen=True)
class Reference:
  """@scope/module.function or @scope/module.function()."""

  name: str


@dataclasses.dataclass(frozen=True)
class Macro:
  """%NAME."""

  name: str

  @property
  def is_required(self) -> bool:
    return self.name in ("gin.REQUIRED", "REQUIRED")


@dataclasses.dataclass(frozen=True)
class Binding:
  """One parameter (`target` is its function) or macro (`target` is None) set to a value."""

  key: tuple  # what a later binding replaces
  name: str  # as written, scope included
  parameter: str
  target: signatures.Signature | None
  value: Any
  where: str


class _Delegate(config_parser.ParserDelegate):
  """Keeps references and macros as names; gin's own would import what they name."""

  def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
    return Reference(scoped_configurable_name)

  def macro(self, macro_name: str) -> Macro:
    return Macro(macro_name)


class Checker:
  """Collects what the files say, then judges it."""

  def __init__(self, find: Callable[[str, str], pathlib.Path]) -> None:
    self.find = find  # the file of an include statement
    self.effective: dict[tuple, Binding] = {}  # the last binding of each key
    self.macros_used: dict[str, str] = {}  # macro -> where it is first used
    self.scopes_used: set[str] = set()
    self.imports: list[str] = []  # the import statements of all files
    self.modules: dict[str, str] = {}  # of all files: name -> module
    self.scoped: list[Binding] = []
    self.override_macros: list[tuple[str, str]] = []
    self.open_files: list[pathlib.Path] = []

  def read_file(self, path: pathlib.Path) -> None:
    label = os.path.relpath(path) if path.is_relative_to(pathlib.Path.cwd()) else str(path)
    if path in self.open_files:
      raise errors.InputError(f"{label}: includes itself")
    self.open_files.append(path)
    try:
      text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
      raise errors.InputError(f"{label}: not UTF-8 text (byte {error.start})") from None
    modules: dict[str, str] = {}
    dynamic = False
    for statement in _statements(text, label):
      where = f"{label}:{statement.location.line_num}"
      if isinstance(statement, config_parser.ImportStatement):
        if statement.module == "__gin__.dynamic_registration":
          dynamic = True
        else:
          modules[statement.bound_name()] = self._import(statement, where)
      elif isinstance(statement, config_parser.IncludeStatement):
        self.read_file(self.find(statement.filename, where))
      else:
        if not dynamic and (isinstance(statement, config_parser.BlockDeclaration) or statement.arg_name):
          raise errors.InputError(
            f"{where}: the file must begin with `from __gin__ import dynamic_registration`"
          )
        self._bind(statement, modules, where)
    self.open_files.pop()

  def read_override(self, override: str) -> None:
    name, separator, text = override.partition("=")
    where = f"--gin.{name.strip()}"
    if not separator or not text.strip():
      raise errors.InputError(f"{where}: has no value; write {where}=VALUE")
    try:
      statements = list(_statements(f"{override}\n", where))
    except errors.InputError:
      if text.strip()[0] in "\"'@%([{-" or not _is_name(name.strip()):
        raise
      raise errors.InputError(
        f"{where}: {text} is not a gin value; a text needs quotes of its own: '{where}=\"{text}\"'"
      ) from None
    for statement in statements:
      if not isinstance(statement, config_parser.BindingStatement):
        raise errors.InputError(f"{where}: not of the form NAME=VALUE or module.function.parameter=VALUE")
      modules = self.modules
      if statement.selector.startswith("glmjax."):
        modules = {**self.modules, "glmjax": "glmjax"}
      if not statement.arg_name:
        self.override_macros.append((_scoped(statement.scope, statement.selector), where))
      self._bind(statement, modules, where)

  def override_imports(self) -> Iterator[str]:
    """The import statements under which the overrides' names mean what they mean in the files."""
    yield from self.imports
    for binding in self.effective.values():
      if binding.where.startswith("--gin.") and binding.name.startswith("glmjax."):
        yield f"import {self._module_of(binding.name)}"

  def _module_of(self, name: str) -> str:
    while signatures.find_module(name) is None:
      name = name.rpartition(".")[0]
    return name

  def _import(self, statement: config_parser.ImportStatement, where: str) -> str:
    module = signatures.find_module(statement.module)
    if module is None:
      raise errors.InputError(f"{where}: {_missing_module(statement.module)}")
    bound_to = statement.module if statement.is_from or statement.alias else statement.module.split(".")[0]
    self.imports.append(statement.format())
    self.modules[statement.bound_name()] = bound_to
    return bound_to

  def _resolve(self, selector: str, modules: dict[str, str], where: str) -> signatures.Signature | object:
    """What a selector names, through the imports of its file."""
    first, *attributes = selector.split(".")
    if first == "gin":
      return signatures.OPAQUE
    if first not in modules:
      known = {b.name.split("/")[-1] for b in self.effective.values() if b.target}
      ending = next((name for name in known if name.endswith(f".{selector}")), None)
      close = signatures.nearest(first, modules) or ending or signatures.nearest(selector, known)
      raise errors.InputError(
        f"{where}: no import provides {first}; {_advice(close, 'import its module in the file')}"
      )
    try:
      found = signatures.resolve(signatures.find_module(modules[first]), attributes)
    except signatures.NameNotFound as error:
      close = signatures.nearest(error.name, error.candidates)
      source = f" ({os.path.relpath(error.path)})" if error.path else ""
      raise errors.InputError(
        f"{where}: {error}; {_advice(close, 'it has ' + ', '.join(error.candidates[:8]))}{source}"
      ) from None
    if isinstance(found, signatures.Module):
      raise errors.InputError(f"{where}: {selector} is a module; name a function or class in it")
    return found

  def _bind(
    self,
    statement: config_parser.BindingStatement | config_parser.BlockDeclaration,
    modules: dict[str, str],
    where: str,
  ) -> None:
    if isinstance(statement, config_parser.BlockDeclaration):
      self._resolve(statement.selector, modules, where)
      return
    for value in _flatten(statement.value):
      if isinstance(value, Macro) and not value.is_required:
        self.macros_used.setdefault(value.name, where)
      elif isinstance(value, Reference):
        *scopes, selector = value.name.split("/")
        self.scopes_used.update(scopes)
        self._resolve(selector, modules, where)
    name = _scoped(statement.scope, statement.selector)
    if not statement.arg_name:
      self.effective[("macro", name)] = Binding(("macro", name), name, "", None, statement.value, where)
      return
    found = self._resolve(statement.selector, modules, where)
    signature = found if isinstance(found, signatures.Signature) else None
    if signature and statement.arg_name not in signature.parameters and not signature.takes_any:
      close = signatures.nearest(statement.arg_name, signature.parameters)
      advice = _advice(
        close, "it takes " + ", ".join(signature.parameters) if signature.parameters else "it takes none"
      )
      raise errors.InputError(
        f"{where}: {statement.selector} has no parameter {statement.arg_name}; {advice} "
        f"({os.path.relpath(signature.path)}:{signature.line})"
      )
    function = (signature.path, signature.line) if signature else statement.selector
    key = (statement.scope, function, statement.arg_name)
    self.effective[key] = Binding(key, name, statement.arg_name, signature, statement.value, where)
    if statement.scope:
      self.scoped.append(self.effective[key])

  def check_scopes(self) -> None:
    for binding in self.scoped:
      for scope in binding.name.split("/")[:-1]:
        if scope not in self.scopes_used:
          close = signatures.nearest(scope, self.scopes_used)
          advice = _advice(close, f"a value such as @{scope}/module.function would use it")
          raise errors.InputError(f"{binding.where}: nothing uses the scope {scope}/; {advice}")

  def check_macros(self) -> None:
    defined = {b.name: b for b in self.effective.values() if b.target is None and b.key[0] == "macro"}
    in_files = {name for name, b in defined.items() if not b.where.startswith("--gin.")} | set(
      self.macros_used
    )
    for name, where in self.override_macros:
      if name not in self.macros_used:
        advice = _advice(
          signatures.nearest(name, in_files - {name}), f"there are {', '.join(sorted(in_files)) or 'none'}"
        )
        raise errors.InputError(f"{where}: no gin file uses the macro {name}; {advice}")
    undefined = {name: where for name, where in self.macros_used.items() if name not in defined}
    unused = [binding for name, binding in defined.items() if name not in self.macros_used]
    for name, where in undefined.items():
      close = signatures.nearest(name, (b.name for b in unused)) or signatures.nearest(name, defined)
      others = f" (nor {', '.join(n for n in undefined if n != name)})" if len(undefined) > 1 else ""
      advice = _advice(close, f"add the gin file that defines it, or --gin.{name}=VALUE")
      raise errors.InputError(f"{where}: %{name} is not defined{others}; {advice}")
    for binding in unused:
      advice = _advice(
        signatures.nearest(binding.name, self.macros_used), "remove the line, or use it as %" + binding.name
      )
      raise errors.InputError(f"{binding.where}: nothing uses the macro {binding.name}; {advice}")

  def check_required(self) -> None:
    missing = []
    for binding in self.effective.values():
      if any(isinstance(value, Macro) and value.is_required for value in _flatten(binding.value)):
        missing.append((f"{binding.name}.{binding.parameter}".rstrip("."), binding.where))
    if missing:
      flags = " ".join(f"--gin.{name}=VALUE" for name, _ in missing)
      places = ", ".join(dict.fromkeys(where for _, where in missing))
      raise errors.InputError(
        f"{len(missing)} required value(s) not set: add {flags} (asked for at {places})"
      )

  def check_types(self) -> None:
    """Numbers, texts and truth values against simple annotations of glmjax's own parameters."""
    library = pathlib.Path(__file__).parent
    for binding in self.effective.values():
      if binding.target is None or not binding.target.path.is_relative_to(library):
        continue
      where, value = binding.where, binding.value
      while isinstance(value, Macro) and ("macro", value.name) in self.effective:
        macro = self.effective[("macro", value.name)]
        where, value = macro.where, macro.value
      annotation = (binding.target.parameters.get(binding.parameter) or "").strip("'\"")
      names = [part.strip() for part in annotation.split("|")]
      if not isinstance(value, bool | int | float | str | None) or not set(names) <= set(_SIMPLE_TYPES):
        continue
      allowed = {allowed_type for name in names for allowed_type in _SIMPLE_TYPES[name]}
      if type(value) not in allowed:
        raise errors.InputError(
          f"{where}: {binding.name}.{binding.parameter} takes {annotation}, "
          f"not {value!r} (a {type(value).__name__})"
        )

  def check_entry(self, entry: str, given: set[str]) -> None:
    module_name = self._module_of(entry)
    attributes = entry.removeprefix(module_name + ".").split(".")
    signature = signatures.resolve(signatures.find_module(module_name), attributes)
    if not isinstance(signature, signatures.Signature):
      return
    bound = {
      b.parameter for b in self.effective.values() if b.key[:2] == ("", (signature.path, signature.line))
    }
    missing = [name for name in signature.required if name not in bound | given]
    if missing:
      raise errors.InputError(
        f"no value for {', '.join(missing)} of {entry}: add the --gin_file that binds "
        f"{'it' if len(missing) == 1 else 'them'}, or --gin.{entry}.{missing[0]}=VALUE"
      )


def _statements(text: str, label: str) -> Iterator[Any]:
  """gin's statements; a syntax error becomes one line that says where."""
  try:
    yield from config_parser.ConfigParser(text, _Delegate())
  except (SyntaxError, tokenize.TokenError) as error:
    detail = error.args[1] if len(error.args) > 1 else (None, None)
    line = detail[0] if isinstance(error, tokenize.TokenError) else error.lineno
    where = label if line is None or label.startswith("--gin.") else f"{label}:{line}"
    message = str(error.args[0]).strip().splitlines()[0].rstrip(".")
    content = text.splitlines()[line - 1].strip() if line and line <= len(text.splitlines()) else ""
    raise errors.InputError(f"{where}: {message}: {content}") from None


def _missing_module(name: str) -> str:
  """Why a module named in a gin file cannot be imported, and what was probably meant."""
  top = name.split(".")[0]
  if signatures.find_module(top) is None:
    extra = signatures.EXTRAS.get(top)
    return f"{top} is not installed; " + (f"pip install 'glmjax[{extra}]'" if extra else "check its name")
  parent, _, last = name.rpartition(".")
  while signatures.find_module(parent) is None:
    parent, _, last = parent.rpartition(".")
  module = signatures.find_module(parent)
  if module.folders is None:
    return f"{parent} is a module: import it, not {last} in it"
  close = signatures.nearest(last, signatures.submodules(module))
  return f"no module {parent}.{last}; {_advice(close and f'{parent}.{close}', 'check the import')}"


def _flatten(value: Any) -> Iterator[Any]:
  if isinstance(value, dict):
    value = [*value.keys(), *value.values()]
  if isinstance(value, list | tuple):
    for part in value:
      yield from _flatten(part)
  else:
    yield value


def _advice(close: str | None, otherwise: str) -> str:
  return f"did you mean {close}?" if close else otherwise


def _scoped(scope: str, selector: str) -> str:
  return f"{scope}/{selector}" if scope else selector


def _is_name(name: str) -> bool:
  return all(part.isidentifier() for part in name.replace("/", ".").split("."))
