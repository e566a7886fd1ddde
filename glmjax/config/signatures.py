"""What a module offers, read from its source: names and parameters, found without importing anything.

The command line checks gin files with it before JAX is loaded. Where source alone cannot tell (an extension
module, a name made at run time) the answer is OPAQUE, and gin itself checks later.
"""

import ast
import dataclasses
import difflib
import functools
import pathlib
import sys
from collections.abc import Iterable, Sequence

from glmjax import errors

EXTRAS = {
  "seqio": "data",
  "tensorflow": "data",
  "tensorflow_text": "data",
  "matplotlib": "report",
  "tensorboardX": "report",
  "fastapi": "serve",
  "uvicorn": "serve",
  "prometheus_client": "serve",
}  # what a missing module's extra is called
RENAMED = {
  "glmjax.tasks.pretrain.register": "glmjax.data.mixtures.pretraining",
  "glmjax.tasks.instruct.register": "glmjax.data.mixtures.instruction",
}  # what gin files of before 28 November 2026 bound for the cache, and what its own files bind now
# Decorators that leave parameters as they are; any other may give the function some of its arguments.
_KEEP_PARAMETERS = (
  "staticmethod",
  "classmethod",
  "override",
  "final",
  "cache",
  "lru_cache",
  "contextmanager",
  "dataclass",
)
OPAQUE = object()  # exists, or may exist; its parameters cannot be read from source


@dataclasses.dataclass(frozen=True)
class Module:
  """A module by its full name; path is None where it has no Python source."""

  name: str
  path: pathlib.Path | None
  folders: tuple[str, ...] | None  # where its submodules are, for a package


@dataclasses.dataclass(frozen=True)
class Annotation:
  """A type as written, and the module whose names it uses."""

  node: ast.expr
  module: Module

  def __str__(self) -> str:
    quoted = isinstance(self.node, ast.Constant) and isinstance(self.node.value, str)
    return self.node.value if quoted else ast.unparse(self.node)


@dataclasses.dataclass(frozen=True)
class Signature:
  """A function's or class's parameters as written in its source."""

  name: str
  parameters: dict[str, Annotation | None]
  required: tuple[str, ...]  # those without a default
  takes_any: bool  # **kwargs
  path: pathlib.Path
  line: int

  @property
  def identity(self) -> tuple[str, int]:
    return str(self.path), self.line


class NameNotFound(LookupError):
  """A name that its module or class does not have."""

  def __init__(self, name: str, owner: str, path: pathlib.Path | None, candidates: list[str]) -> None:
    super().__init__(f"{owner} has no {name}")
    self.name, self.owner, self.path, self.candidates = name, owner, path, candidates


def nearest(name: str, candidates: Iterable[str]) -> str | None:
  """Returns the candidate that a typing slip most likely meant."""
  by_lower = {candidate.lower(): candidate for candidate in candidates}
  match = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
  return by_lower[match[0]] if match else None


def advice(close: str | None, otherwise: str) -> str:
  """Says what to tell someone whose name was not found."""
  return f"did you mean {close}?" if close else otherwise


@functools.cache
def find_module(name: str) -> Module | None:
  """Returns the module of that full name, or None; neither it nor its parents are imported."""
  parent_name, _, last = name.rpartition(".")
  folders = None
  if parent_name:
    parent = find_module(parent_name)
    if parent is None or parent.folders is None:
      return None
    folders = list(parent.folders)
    for folder in map(pathlib.Path, folders):
      if (folder / last / "__init__.py").is_file():
        return Module(name, folder / last / "__init__.py", (str(folder / last),))
      if (folder / f"{last}.py").is_file():
        return Module(name, folder / f"{last}.py", None)
  for finder in sys.meta_path:  # editable installs and extension modules
    try:
      spec = finder.find_spec(name, folders)
      inside = spec and spec.submodule_search_locations
      if spec is not None:
        has_source = spec.origin is not None and spec.origin.endswith(".py")
        return Module(
          name, pathlib.Path(spec.origin) if has_source else None, None if inside is None else tuple(inside)
        )
    except (AttributeError, ImportError, KeyError):  # KeyError: a namespace package, parent not imported
      continue
  inside = tuple(str(pathlib.Path(folder, last)) for folder in folders or () if pathlib.Path(folder, last).is_dir())
  return Module(name, None, inside) if inside else None


def submodules(module: Module) -> list[str]:
  """Returns the names of the modules directly inside a package."""
  names = set()
  for folder in module.folders or ():
    for path in pathlib.Path(folder).glob("*"):
      if path.suffix == ".py" and path.stem != "__init__" or (path / "__init__.py").is_file():
        names.add(path.stem)
  return sorted(names)


@functools.cache
def _names(path: pathlib.Path) -> tuple[dict[str, ast.AST], list[ast.ImportFrom], set[str]]:
  """Returns top-level names of a source file with the statement that binds each, its star imports, and which names are
  imported for type checkers alone.
  """
  names, stars, for_types = {}, [], set()
  try:
    waiting = list(reversed(ast.parse(path.read_bytes()).body))
  except (SyntaxError, ValueError) as error:  # ValueError: NUL characters, before Python 3.12
    line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
    raise errors.InputError(f"{path}{line}: no Python source ({getattr(error, 'msg', error)}): mend it") from error
  while waiting:
    node = waiting.pop()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      names[node.name] = node
    elif isinstance(node, ast.Import):
      for alias in node.names:
        names[alias.asname or alias.name.split(".")[0]] = node
    elif isinstance(node, ast.ImportFrom):
      if node.names[0].name == "*":
        stars.append(node)
      for alias in node.names:
        names[alias.asname or alias.name] = node
    elif isinstance(node, ast.Assign | ast.AnnAssign):
      for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        for part in ast.walk(target):
          if isinstance(part, ast.Name):
            names[part.id] = node
    if isinstance(node, ast.If) and dotted(node.test) in (("TYPE_CHECKING",), ("typing", "TYPE_CHECKING")):
      for_types |= {a.asname or a.name for each in node.body if isinstance(each, ast.ImportFrom) for a in each.names}
    for block in ("finalbody", "orelse", "handlers", "body"):
      if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.ExceptHandler):
        waiting.extend(reversed(getattr(node, block, [])))
  return names, stars, for_types


def resolve(module: Module, attributes: list[str]) -> Module | Signature | object:
  """Returns what `module.a.b` is: a Module, a Signature or OPAQUE; raises NameNotFound for a name not there."""
  return _resolve(module, tuple(attributes), frozenset())


def _resolve(module: Module, attributes: tuple[str, ...], seen: frozenset) -> Module | Signature | object:
  if not attributes:
    return module
  if (module.name, attributes) in seen:  # a circular alias: Python itself may still know
    return OPAQUE
  seen = seen | {(module.name, attributes)}
  name, rest = attributes[0], attributes[1:]
  names, stars, for_types = _names(module.path) if module.path else ({}, [], set())
  node = names.get(name)
  if node is None or name in for_types:
    submodule = find_module(f"{module.name}.{name}")
    if submodule is not None:
      return _resolve(submodule, rest, seen)
  if node is None:
    return _from_stars(module, attributes, names, stars, seen)
  if isinstance(node, ast.Import | ast.ImportFrom):
    return _imported(module, node, name, rest, seen)
  if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
    return OPAQUE if rest else _function(node, module, is_method=False)
  if isinstance(node, ast.ClassDef):
    return _member(module, node, rest[0], seen) if rest else _class(module, node, seen)
  chain = dotted(node.value) if isinstance(node, ast.Assign) else None
  return _resolve(module, (*chain, *rest), seen) if chain and chain[0] in names else OPAQUE


def _from_stars(
  module: Module, attributes: tuple[str, ...], names: dict[str, ast.AST], stars: list[ast.ImportFrom], seen: frozenset
) -> Module | Signature | object:
  """Looks for a name in what the module star-imports, and gives up with the names it does have."""
  own = [name for name, node in names.items() if not isinstance(node, ast.Import | ast.ImportFrom)]
  candidates = [*own, *(name for name in names if name not in own), *submodules(module)]
  for star in stars:
    source = find_module(_absolute(module, star))
    if source is None or source.path is None:
      return OPAQUE
    try:
      return _resolve(source, attributes, seen)
    except NameNotFound as error:
      candidates += error.candidates
  makes_names = "__getattr__" in names and module.name != "glmjax"  # ours makes nothing that gin binds
  if module.path is None and module.folders is None or makes_names:
    return OPAQUE
  raise NameNotFound(attributes[0], module.name, module.path, [name for name in candidates if not name.startswith("_")])


def _absolute(module: Module, node: ast.ImportFrom) -> str:
  """Returns the full name of the module that an import statement inside `module` is from."""
  if not node.level:
    return node.module
  parts = module.name.split(".")
  parts = parts[: len(parts) - node.level + (module.folders is not None)]
  return ".".join([*parts, *([node.module] if node.module else [])])


def _imported(
  module: Module, node: ast.Import | ast.ImportFrom, name: str, rest: tuple[str, ...], seen: frozenset
) -> Module | Signature | object:
  """Follows an import statement to what it binds to `name`."""
  target, rest = _import_target(module, node, name, rest)
  return OPAQUE if target is None or target == module and rest[:1] == (name,) else _resolve(target, rest, seen)


def _import_target(
  module: Module, node: ast.Import | ast.ImportFrom, name: str, rest: tuple[str, ...]
) -> tuple[Module | None, tuple[str, ...]]:
  """Returns the module that an import statement takes `name` from, and what `name.rest` is called there."""
  if isinstance(node, ast.Import):
    alias = next(a for a in node.names if (a.asname or a.name.split(".")[0]) == name)
    return find_module(alias.name if alias.asname else name), rest
  alias = next(a for a in node.names if (a.asname or a.name) == name)
  return find_module(_absolute(module, node)), (alias.name, *rest)


def definition(module: Module, attributes: Sequence[str], within: str = "") -> tuple[Module, ast.stmt] | None:
  """Returns the statement that `module.a.b` is defined by, and the module it is in; None where source does not tell.

  Other packages than `within` are not looked into, if it is given.
  """
  attributes = tuple(attributes)
  seen = set()
  while attributes and module.path is not None and (module.name, attributes) not in seen:
    seen.add((module.name, attributes))
    name, rest = attributes[0], attributes[1:]
    node = _names(module.path)[0].get(name)
    if node is None or isinstance(node, ast.Import | ast.ImportFrom):
      found = (find_module(f"{module.name}.{name}"), rest) if node is None else _import_target(module, node, name, rest)
      module, attributes = found
      if module is None or within and module.name.split(".")[0] != within:
        return None
    elif not rest:
      return module, node
    elif isinstance(node, ast.ClassDef):
      method = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == rest[0]), None)
      return (module, method) if method is not None and not rest[1:] else None
    else:
      return None
  return None


def dotted(node: ast.AST | None) -> tuple[str, ...] | None:
  """Returns ('a', 'b') for the expression a.b; None for any other."""
  parts = []
  while isinstance(node, ast.Attribute):
    parts.append(node.attr)
    node = node.value
  return (node.id, *reversed(parts)) if isinstance(node, ast.Name) else None


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, module: Module, is_method: bool) -> Signature:
  positional = [*node.args.posonlyargs, *node.args.args]
  without_default = {a.arg for a in positional[: len(positional) - len(node.args.defaults)]}
  without_default |= {a.arg for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults) if d is None}
  arguments = [*positional, *node.args.kwonlyargs][int(is_method) :]
  parameters = {a.arg: Annotation(a.annotation, module) if a.annotation else None for a in arguments}
  required = tuple(name for name in parameters if name in without_default) if _keeps_parameters(node) else ()
  return Signature(node.name, parameters, required, node.args.kwarg is not None, module.path, node.lineno)


def _keeps_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
  """Tells whether calls need what the source says, whatever decorates it."""
  names = (dotted(d.func if isinstance(d, ast.Call) else d) or ("",) for d in node.decorator_list)
  return all(name[-1] in _KEEP_PARAMETERS for name in names)


def _member(module: Module, node: ast.ClassDef, name: str, seen: frozenset) -> Signature | object:
  """Finds a method of a class."""
  methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
  if name in methods:
    static = any(dotted(d) == ("staticmethod",) for d in methods[name].decorator_list)
    return _function(methods[name], module, is_method=not static)
  if node.bases:
    return OPAQUE
  raise NameNotFound(name, f"{module.name}.{node.name}", module.path, list(methods))


def _class(module: Module, node: ast.ClassDef, seen: frozenset) -> Signature | object:
  """Returns a class's constructor: its __init__, or its fields for a dataclass or NamedTuple, or what it inherits."""
  for method in node.body:
    if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__new__"):
      made = dataclasses.replace(_function(method, module, is_method=True), name=node.name, line=node.lineno)
      return made if _keeps_parameters(node) else dataclasses.replace(made, required=())
  inherited = []
  for base in node.bases:
    chain = dotted(base)
    if chain is None or chain[-1] in ("Protocol", "ABC", "NamedTuple", "object"):
      continue
    inherited.append(_resolve(module, chain, seen) if chain[0] in _names(module.path)[0] else OPAQUE)
  if not all(isinstance(base, Signature) for base in inherited):
    return OPAQUE
  parameters, required = {}, []
  for base in reversed(inherited):
    parameters |= base.parameters
    required += [name for name in base.required if name not in required]
  decorators = [dotted(d.func if isinstance(d, ast.Call) else d) or ("",) for d in node.decorator_list]
  bases = [dotted(base) or ("",) for base in node.bases]
  if any(d[-1] == "dataclass" for d in decorators) or any(b[-1] == "NamedTuple" for b in bases):
    for field in node.body:
      if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
        continue
      annotation, name = ast.unparse(field.annotation), field.target.id
      options = {k.arg: k.value for k in field.value.keywords} if isinstance(field.value, ast.Call) else {}
      is_field_call = isinstance(field.value, ast.Call) and (dotted(field.value.func) or ("",))[-1] == "field"
      if "ClassVar" in annotation or "KW_ONLY" in annotation:
        continue
      if is_field_call and "init" in options and ast.unparse(options["init"]) == "False":
        continue
      parameters[name] = Annotation(field.annotation, module)
      required = [r for r in required if r != name]
      if field.value is None or is_field_call and not {"default", "default_factory"} & set(options):
        required.append(name)
  takes_any = any(base.takes_any for base in inherited)
  needed = tuple(required) if _keeps_parameters(node) else ()
  return Signature(node.name, parameters, needed, takes_any, module.path, node.lineno)
