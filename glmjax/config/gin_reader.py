"""Reading gin files and overrides with gin's own parser, without importing the modules that they name.

The result is one flat list: each parameter and macro with the last value given to it, names made full
(loop.train becomes glmjax.train.loop.train), each with the place it was set.
"""

import dataclasses
import os
import pathlib
import tokenize
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gin import config_parser

from glmjax import errors
from glmjax.config import signatures
from glmjax.io import paths, user_text

_LARGEST_FILE = 1 << 20  # bytes
_LONGEST_LINE = 100  # characters of a line that is printed
Identity = tuple | str  # of a function or class: where its source is, or its name where that is not known


@dataclasses.dataclass(frozen=True)
class Reference:
  """@scope/module.function, or with () its result."""

  scopes: tuple[str, ...]
  selector: str  # full name, once read
  evaluate: bool
  identity: Identity = ""
  written: str = ""  # the name that the file has for it, once read

  def __repr__(self) -> str:
    return f"@{'/'.join([*self.scopes, self.selector])}{'()' * self.evaluate}"


@dataclasses.dataclass(frozen=True)
class Macro:
  """A macro that is referred to as %NAME."""

  name: str

  @property
  def is_required(self) -> bool:
    return self.name in ("gin.REQUIRED", "REQUIRED")

  def __repr__(self) -> str:
    return f"%{self.name}"


@dataclasses.dataclass(frozen=True)
class Binding:
  """A value of a function's parameter, or of a macro (which has neither function nor parameter)."""

  scope: str
  shown: str  # the function or macro as written, scope included
  value: Any
  where: str
  parameter: str = ""
  selector: str = ""  # full name of the function
  identities: tuple[Identity, ...] = ()  # of the function; for a method, then of its class
  signature: signatures.Signature | None = None

  @property
  def key(self) -> tuple:
    """The key that a later binding of the same thing shares."""
    return (self.scope, self.identities[0], self.parameter) if self.parameter else ("macro", self.shown)

  @property
  def name(self) -> str:
    return f"{self.shown}.{self.parameter}" if self.parameter else self.shown


class Reader:
  """Collects what gin files, and then overrides, say."""

  def __init__(self, find: Callable[[str, str], paths.Path], packages: Iterable[str] = ("glmjax",)) -> None:
    self.find = find  # the file of an include statement
    self.packages = {*packages}  # whose full names overrides may use without an import in a file
    self.bindings: dict[tuple, Binding] = {}
    self.replaced: list[Binding] = []  # by later ones
    self.macros_used: dict[str, str] = {}  # macro -> where it is first used
    self.scopes_used: set[str] = set()
    self.side_effects: dict[str, str] = {}  # modules imported for what importing them does -> where
    self.modules: dict[str, str] = {}  # names that the files import -> module
    self.override_macros: dict[str, str] = {}  # macro -> where
    self.open_files: list[paths.Path] = []

  def read_file(self, path: paths.Path) -> None:
    """Reads one file and what it includes; names mean what this file's own imports make them mean."""
    label = os.path.relpath(path) if path.is_relative_to(pathlib.Path.cwd()) else str(path)
    if path in self.open_files:
      raise errors.InputError(f"{label}: includes itself")
    self.open_files.append(path)
    text = user_text.read(label, _LARGEST_FILE)
    imports: dict[str, tuple[str, str]] = {}  # name -> full name of the statement's module, where
    modules: dict[str, str] = {}
    used: set[str] = set()
    dynamic = False
    for statement in _statements(text, label):
      where = f"{label}:{statement.location.line_num}"
      if isinstance(statement, config_parser.ImportStatement):
        if statement.module == "__gin__.dynamic_registration":
          dynamic = True
          continue
        if signatures.find_module(statement.module) is None:
          raise errors.InputError(f"{where}: {_missing_module(statement.module)}")
        whole = statement.is_from or statement.alias
        imports[statement.bound_name()] = (statement.module, where)
        modules[statement.bound_name()] = statement.module if whole else statement.module.split(".")[0]
      elif isinstance(statement, config_parser.IncludeStatement):
        self.read_file(self.find(statement.filename, where))
      elif not dynamic and (isinstance(statement, config_parser.BlockDeclaration) or statement.arg_name):
        raise errors.InputError(f"{where}: begin the file with `from __gin__ import dynamic_registration`")
      else:
        self._bind(statement, modules, where, used)
    self.modules.update(modules)
    self.side_effects.update(module for name, module in imports.items() if name not in used)
    self.open_files.pop()

  def read_override(self, override: str) -> None:
    """Reads NAME=value or scope/module.function.parameter=value."""
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
      if not statement.arg_name:
        self.override_macros[_scoped(statement.scope, statement.selector)] = where
      full_names = {package: package for package in self.packages}
      self._bind(statement, full_names | self.modules, where, set())

  def _bind(self, statement: Any, modules: dict[str, str], where: str, used: set[str]) -> None:
    """Takes in a binding, or the declaration of a block; `used` gathers the imported names it needs."""
    selector, _, found = ("", (), None)
    if isinstance(statement, config_parser.BlockDeclaration) or statement.arg_name:
      selector, identities, found = self._resolve(statement.selector, modules, where, used)
      if isinstance(statement, config_parser.BlockDeclaration):
        return
    value = self._full_names(statement.value, modules, where, used)
    shown = _scoped(statement.scope, statement.selector)
    if not statement.arg_name:
      binding = Binding(statement.scope, shown, value, where)
    else:
      signature = found if isinstance(found, signatures.Signature) else None
      if signature is not None:
        _check_parameter(signature, statement, where)
      binding = Binding(statement.scope, shown, value, where, statement.arg_name, selector, identities, signature)
    if binding.key in self.bindings:
      self.replaced.append(self.bindings.pop(binding.key))
    self.bindings[binding.key] = binding

  def _full_names(self, value: Any, modules: dict[str, str], where: str, used: set[str]) -> Any:
    """Returns the value with its references' names made full."""
    if isinstance(value, dict):
      full = [[self._full_names(part, modules, where, used) for part in item] for item in value.items()]
      return dict(full)
    if isinstance(value, list | tuple):
      return type(value)(self._full_names(part, modules, where, used) for part in value)
    if isinstance(value, Macro) and not value.is_required:
      self.macros_used.setdefault(value.name, where)
    if not isinstance(value, Reference):
      return value
    self.scopes_used.update(value.scopes)
    selector, identities, _ = self._resolve(value.selector, modules, where, used)
    return dataclasses.replace(value, selector=selector, identity=identities[0], written=value.selector)

  def _resolve(
    self, selector: str, modules: dict[str, str], where: str, used: set[str]
  ) -> tuple[str, tuple[Identity, ...], Any]:
    """Returns full name, identities and signature (or OPAQUE) of what a selector names through the imports."""
    first, *attributes = selector.split(".")
    if first == "gin":
      return selector, (selector,), signatures.OPAQUE
    if first not in modules:
      raise errors.InputError(f"{where}: no import provides {first}; {self._advice(selector, modules)}")
    used.add(first)
    try:
      found = signatures.resolve(signatures.find_module(modules[first]), attributes)
      owner = signatures.resolve(signatures.find_module(modules[first]), attributes[:-1])
    except signatures.NameNotFound as error:
      close = signatures.nearest(error.name, error.candidates)
      advice = signatures.advice(close, f"it has {', '.join(error.candidates[:8])}")
      source = f" ({os.path.relpath(error.path)})" if error.path else ""
      raise errors.InputError(f"{where}: {error}; {advice}{source}") from None
    if isinstance(found, signatures.Module):
      raise errors.InputError(f"{where}: {selector} is a module; name a function or class in it")
    full = ".".join([modules[first], *attributes])
    own = found.identity if isinstance(found, signatures.Signature) else full
    of_class = (owner.identity,) if isinstance(owner, signatures.Signature) else ()
    return full, (own, *of_class), found

  def _advice(self, selector: str, modules: dict[str, str]) -> str:
    """Says what to do about a name whose first part no import provides."""
    bound = {b.selector: b.shown.split("/")[-1] for b in self.bindings.values() if b.parameter}
    otherwise = "import its module in the file"
    if selector in bound.values():  # in a file with the import
      return otherwise
    for old, now in signatures.RENAMED.items():
      if f".{old}".endswith(f".{selector}") and now in bound:
        return f"did you mean {bound[now]}? If not, {otherwise}"
    ending = next((name for name in bound.values() if name.endswith(f".{selector}")), None)
    close = signatures.nearest(selector.split(".")[0], modules) or ending
    return signatures.advice(close or signatures.nearest(selector, bound.values()), otherwise)


def flatten(value: Any) -> Iterator[Any]:
  """Yields the parts of nested lists, tuples and dicts."""
  if isinstance(value, dict):
    value = [*value.keys(), *value.values()]
  if isinstance(value, list | tuple):
    for part in value:
      yield from flatten(part)
  else:
    yield value


class _Delegate(config_parser.ParserDelegate):
  """Keeps references and macros as names; gin's own would import what they name."""

  def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
    *scopes, selector = scoped_configurable_name.split("/")
    return Reference(tuple(scopes), selector, evaluate)

  def macro(self, macro_name: str) -> Macro:
    return Macro(macro_name)


def _statements(text: str, label: str) -> Iterator[Any]:
  """Yields gin's statements; a syntax error becomes one line that says where."""
  try:
    yield from config_parser.ConfigParser(text, _Delegate())
  except RecursionError:
    raise errors.InputError(f"{label}: values nested too deep") from None
  except UnicodeEncodeError:  # Python 3.12's tokenizer works on UTF-8
    raise errors.InputError(f"{label}: half a surrogate pair, which is no valid Unicode") from None
  except TypeError as error:  # {[]: 1}
    raise errors.InputError(f"{label}: {error}, as a key") from None
  except (SyntaxError, tokenize.TokenError) as error:
    detail = error.args[1] if len(error.args) > 1 else (None, None)
    line = detail[0] if isinstance(error, tokenize.TokenError) else error.lineno
    where = label if line is None or label.startswith("--gin.") else f"{label}:{line}"
    content = text.splitlines()[line - 1].strip() if line and line <= len(text.splitlines()) else ""
    raise errors.InputError(f"{where}: {_reason(error)}: {content[:_LONGEST_LINE]}") from None


def _reason(error: Exception) -> str:
  """Returns the parser's message without what only its authors can use."""
  message = str(error.args[0]).strip().splitlines()[0].rstrip(".")
  if message.startswith(("malformed node", "Unable to parse value")):  # the latter since Python 3.12
    return "not a gin value"
  if message.startswith("too many nested"):  # Python 3.12's tokenizer; before, the parser ran out of stack
    return "values nested too deep"
  if message.startswith("Exceeds the limit"):
    return "a number of more than 4,300 digits"
  return message.removesuffix(" (<unknown>, line 1)")


def _check_parameter(signature: signatures.Signature, statement: config_parser.BindingStatement, where: str) -> None:
  if statement.arg_name in signature.parameters or signature.takes_any:
    return
  close = signatures.nearest(statement.arg_name, signature.parameters)
  advice = signatures.advice(close, f"it takes {', '.join(signature.parameters) or 'none'}")
  source = f"{os.path.relpath(signature.path)}:{signature.line}"
  raise errors.InputError(f"{where}: {statement.selector} has no parameter {statement.arg_name}; {advice} ({source})")


def _missing_module(name: str) -> str:
  """Says why a module named in a gin file cannot be imported, and what was probably meant."""
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
  moved = [f"{top}.{part}.{last}" for part in signatures.submodules(signatures.find_module(top))]
  meant = next(
    filter(signatures.find_module, moved), close and f"{parent}.{close}"
  )  # it may have moved to another part
  return f"no module {parent}.{last}; {signatures.advice(meant, 'check the import')}"


def _scoped(scope: str, selector: str) -> str:
  return f"{scope}/{selector}" if scope else selector


def _is_name(name: str) -> bool:
  return all(part.isidentifier() for part in name.replace("/", ".").split("."))
