"""Whether a value in a gin file is of the type that its parameter's annotation asks for.

Both are read from source: nothing is imported. What source does not tell (types of other libraries, functions that
do not say what they return) is let through.
"""

import ast
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from glmjax import errors
from glmjax.config import signatures
from glmjax.config.gin_reader import Macro, Reference
from glmjax.io import paths

_SIMPLE = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "bytes": (bytes,)}
_SEQUENCES = ("Sequence", "list", "List", "Iterable", "Iterator", "Collection", "set", "frozenset")
_MAPPINGS = ("Mapping", "dict", "Dict")
_INTEGERS = range(-(1 << 63), 1 << 64)  # what numpy and XLA can hold
_LONGEST = 80  # characters of a value that is printed


Class = tuple[signatures.Module, ast.ClassDef]  # where it is defined


@dataclasses.dataclass(frozen=True)
class Type:
  """A type expression, taken apart."""

  kind: str  # any, none, simple, path, literal, sequence, tuple, mapping, callable, class, union
  shown: str  # as written, aliases spelled out
  parts: tuple["Type", ...] = ()  # of a union, a tuple; the items of a sequence; keys and values of a mapping
  name: str = ""  # of a simple type
  choices: tuple[Any, ...] = ()  # of a literal
  definition: Class | None = None  # of a class


@dataclasses.dataclass(frozen=True)
class Mismatch:
  """The part of a value that is wrong."""

  value: Any
  wanted: str
  advice: str = ""
  where: str = ""  # of the macro that it is in


Lookup = Callable[[Macro], tuple[Any, str] | None]  # a macro's value and where it was set


def parse(annotation: signatures.Annotation) -> Type:
  """Says what an annotation asks for; aliases and quoted names are followed."""
  return _parse(annotation.node, annotation.module, 0)


def mismatch(value: Any, wanted: Type, lookup: Lookup) -> Mismatch | None:
  """Returns the innermost part of a value that is not what was wanted; None where all of it is."""
  if isinstance(value, Macro):
    known = None if value.is_required else lookup(value)
    found = None if known is None else mismatch(known[0], wanted, lookup)
    return found and dataclasses.replace(found, where=found.where or known[1])
  if wanted.kind == "union":
    found = [mismatch(value, part, lookup) for part in wanted.parts]
    if None in found:
      return None
    inner = [each for each in found if each.value is not value]
    if len(inner) == 1:
      return inner[0]
    advice = {each.advice for each in found} - {""}
    return Mismatch(value, wanted.shown, advice.pop() if len(advice) == 1 else "")
  if wanted.kind == "any":
    return None
  if isinstance(value, Reference):
    return _reference_mismatch(value, wanted)
  if wanted.kind in ("simple", "path"):
    return _simple_mismatch(value, wanted)
  return _container_mismatch(value, wanted, lookup)


def shown(value: Any) -> str:
  """Writes a value for an error message, with its type."""
  try:
    text = repr(value)
  except ValueError:  # an integer of more digits than Python writes
    text = "a number of more than 4,300 digits"
  text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
  if value is None or isinstance(value, Reference):
    return text
  kind = type(value).__name__
  return f"{text} ({'an' if kind == 'int' else 'a'} {kind})"


def _parse(node: ast.expr | None, module: signatures.Module, depth: int) -> Type:
  anything = Type("any", "anything")
  if node is None or depth > 20:
    return anything
  text = ast.unparse(node)
  if isinstance(node, ast.Constant):
    if node.value is None:
      return Type("none", "None")
    if isinstance(node.value, str):
      return _parse(ast.parse(node.value, mode="eval").body, module, depth + 1)
    return anything
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    return _union((node.left, node.right), module, depth)
  if isinstance(node, ast.Subscript):
    return _subscripted(node, text, module, depth)
  chain = signatures.dotted(node)
  return _named(chain, text, module, depth) if chain else anything


def _union(nodes: tuple[ast.expr, ...], module: signatures.Module, depth: int) -> Type:
  parts: list[Type] = []
  for node in nodes:
    part = _parse(node, module, depth + 1)
    parts += part.parts if part.kind == "union" else [part]
  if any(part.kind == "path" for part in parts):  # a text for a path is looked at as one
    parts = [part for part in dict.fromkeys(parts) if part.name != "str"]
  if len(parts) == 1:
    return parts[0]
  return Type("union", " | ".join(part.shown for part in parts), tuple(parts))


def _subscripted(node: ast.Subscript, text: str, module: signatures.Module, depth: int) -> Type:
  name = (signatures.dotted(node.value) or ("",))[-1]
  inside = tuple(node.slice.elts) if isinstance(node.slice, ast.Tuple) else (node.slice,)
  if name == "Optional":
    return _union((*inside, ast.Constant(None)), module, depth)
  if name == "Union":
    return _union(inside, module, depth)
  if name == "Literal":
    return Type("literal", text, choices=tuple(each.value for each in inside if isinstance(each, ast.Constant)))
  if name in ("Annotated", "Final", "ClassVar"):
    return _parse(inside[0], module, depth + 1)
  if name in ("Callable", "type", "Type"):
    return Type("callable", text)
  parts = tuple(
    _parse(each, module, depth + 1) for each in inside if not isinstance(each, ast.Constant) or each.value is not ...
  )
  endless = len(parts) < len(inside)
  text_of_parts = f"{name}[{', '.join([part.shown for part in parts] + ['...'] * endless)}]"
  if name in ("tuple", "Tuple"):
    return Type("sequence" if endless else "tuple", text_of_parts, parts)
  if name in _SEQUENCES:
    return Type("sequence", text_of_parts, parts)
  return Type("mapping", text_of_parts, parts) if name in _MAPPINGS else Type("any", text)


def _named(chain: tuple[str, ...], text: str, module: signatures.Module, depth: int) -> Type:
  name = chain[-1]
  if chain[:-1] in ((), ("typing",), ("collections", "abc"), ("os",)):
    if name in _SIMPLE:
      return Type("simple", text, name=name)
    if name == "PathLike":
      return Type("path", "path")
    if name in (*_SEQUENCES, "tuple", "Tuple"):
      return Type("sequence", text)
    if name in _MAPPINGS:
      return Type("mapping", text)
    if name == "Callable":
      return Type("callable", text)
  found = signatures.definition(module, chain, within=module.name.split(".")[0])
  if found is None:
    return Type("any", text)
  where, node = found
  if isinstance(node, ast.ClassDef):
    return Type("path", "path") if name == "BucketPath" else Type("class", text, definition=found)
  if isinstance(node, ast.Assign | ast.AnnAssign) and not isinstance(node.value, ast.Call):  # an alias
    return _parse(node.value, where, depth + 1)
  return Type("any", text)


def _simple_mismatch(value: Any, wanted: Type) -> Mismatch | None:
  if wanted.kind == "path":
    if not isinstance(value, str):
      return Mismatch(value, "a path")
    try:
      paths.named(value, "it")
    except errors.InputError as error:
      return Mismatch(value, "a path", str(error))
    return None
  if type(value) not in _SIMPLE[wanted.name]:
    return Mismatch(value, wanted.shown, _advice(value, wanted.name))
  if isinstance(value, float) and not math.isfinite(value):
    return Mismatch(value, f"{wanted.shown}, and a finite one")
  if type(value) is int and value not in _INTEGERS:
    return Mismatch(value, f"{wanted.shown} of at most 64 bits")
  if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
    return Mismatch(value, f"{wanted.shown} without half a surrogate pair")
  return None


def _advice(value: Any, name: str) -> str:
  """Says how a number that was written as something else would be written."""
  if name == "int" and isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 1e15:
    return f"write {int(value):_}"
  if isinstance(value, str) and name in ("int", "float"):
    try:
      float(value)
    except ValueError:
      return ""
    return f"write {value} without quotes" if name == "float" or value.strip("+-").isdecimal() else ""
  if isinstance(value, str) and name == "bool" and value.lower() in ("true", "false"):
    return f"write {value.capitalize()} without quotes"
  return ""


def _container_mismatch(value: Any, wanted: Type, lookup: Lookup) -> Mismatch | None:
  if wanted.kind == "none":
    return None if value is None else Mismatch(value, wanted.shown)
  if wanted.kind == "literal":
    fits = any(type(value) is type(choice) and value == choice for choice in wanted.choices)
    return None if fits else Mismatch(value, f"one of {', '.join(map(repr, wanted.choices))}")
  if wanted.kind == "mapping" and isinstance(value, dict):
    pairs = [(part, kind) for item in value.items() for part, kind in zip(item, wanted.parts)]
  elif wanted.kind == "sequence" and isinstance(value, list | tuple | set):
    pairs = [(part, kind) for part in value for kind in wanted.parts]
  elif wanted.kind == "tuple" and isinstance(value, list | tuple) and len(value) == len(wanted.parts):
    pairs = list(zip(value, wanted.parts))
  else:
    return Mismatch(value, _made(wanted) if wanted.kind in ("class", "callable") else wanted.shown)
  return next((found for part, kind in pairs if (found := mismatch(part, kind, lookup))), None)


def _made(wanted: Type) -> str:
  """Says how gin gives what is no plain value."""
  return f"{wanted.shown}, as @module.{'Name()' if wanted.kind == 'class' else 'function'} gives it"


def _reference_mismatch(value: Reference, wanted: Type) -> Mismatch | None:
  """Checks a function or class (@name), or what calling it makes (@name()), by what its source says."""
  module_name = module_of(value.selector)
  module = signatures.find_module(module_name)
  attributes = value.selector.removeprefix(f"{module_name}.").split(".")
  found = signatures.definition(module, attributes) if module is not None else None
  if found is None or value.selector.startswith("gin."):
    return None
  if not value.evaluate:
    if wanted.kind == "callable" or wanted.kind == "class" and _is_callable_protocol(*wanted.definition):
      return None
    return Mismatch(value, wanted.shown, f"write {value!r}() for what it makes")
  module, node = found
  if isinstance(node, ast.ClassDef):
    made = Type("class", node.name, definition=found)
  elif isinstance(node, ast.FunctionDef):
    made = _parse(node.returns, module, 0)
  else:
    return None
  return None if _may_be(made, wanted) else Mismatch(value, wanted.shown, f"it makes {made.shown}")


def _is_callable_protocol(module: signatures.Module, node: ast.ClassDef) -> bool:
  return "Protocol" in _base_names(node) and "__call__" in _members(module, node)


def module_of(name: str) -> str:
  """Returns the module in a full name such as package.module.Class.method; empty where there is none."""
  while name and signatures.find_module(name) is None:
    name = name.rpartition(".")[0]
  return name


def _may_be(made: Type, wanted: Type) -> bool:
  """Tells whether something of one type can be of another."""
  if "any" in (made.kind, wanted.kind):
    return True
  if made.kind == "union":
    return any(_may_be(part, wanted) for part in made.parts)
  if wanted.kind == "union":
    return any(_may_be(made, part) for part in wanted.parts)
  if wanted.kind == "path":
    return made.kind == "path" or made.kind == "simple" and made.name == "str"
  if made.kind == "class":
    return _class_may_be(made.definition, wanted)
  if made.kind == "simple" and wanted.kind == "simple":
    return made.name == wanted.name or (made.name, wanted.name) == ("int", "float")
  if made.kind == "simple" and wanted.kind == "literal":
    return any(type(choice).__name__ == made.name for choice in wanted.choices)
  if wanted.kind == "class":
    return made.kind not in ("none", "simple", "path") and "Protocol" in _base_names(wanted.definition[1])
  return made.kind == wanted.kind or {made.kind, wanted.kind} == {"sequence", "tuple"}


def _class_may_be(made: Class, wanted: Type) -> bool:
  ancestors = list(_ancestors(*made))
  if None in ancestors:  # a class of another library, say
    return True
  if wanted.kind == "class":
    if "Protocol" in _base_names(wanted.definition[1]):
      return _members(*wanted.definition) <= _members(*made)
    return any(node is wanted.definition[1] for _, node in ancestors)
  special = {"callable": "__call__", "sequence": "__iter__", "tuple": "__iter__", "mapping": "__getitem__"}
  return special.get(wanted.kind) in _members(*made)


def _ancestors(module: signatures.Module, node: ast.ClassDef) -> Iterator[Class | None]:
  """Yields a class and all that it inherits from; None for one that source does not tell."""
  yield module, node
  for base in node.bases:
    chain = signatures.dotted(base)
    if chain and chain[-1] in ("Protocol", "ABC", "object", "Generic", "NamedTuple"):
      continue
    found = signatures.definition(module, chain) if chain else None
    if found is None or not isinstance(found[1], ast.ClassDef):
      yield None
    else:
      yield from _ancestors(*found)


def _base_names(node: ast.ClassDef) -> set[str]:
  return {chain[-1] for base in node.bases if (chain := signatures.dotted(base))}


def _members(module: signatures.Module, node: ast.ClassDef) -> set[str]:
  """Returns the names of methods and fields, those inherited too."""
  names = set()
  for each in filter(None, _ancestors(module, node)):
    for statement in each[1].body:
      if isinstance(statement, ast.FunctionDef):
        names.add(statement.name)
      elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        names.add(statement.target.id)
      elif isinstance(statement, ast.Assign):
        names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
  return names


def check_path(value: Any, wanted: Type, what: str, lookup: Lookup) -> None:
  """Raises InputError for a text that is wanted as a path and cannot be one."""
  if isinstance(value, Macro) and not value.is_required and (found := lookup(value)):
    value, what = found[0], f"{found[1]}: {what.partition(': ')[2]}"
  kinds = wanted.parts if wanted.kind == "union" else (wanted,)
  if isinstance(value, str) and any(kind.kind == "path" for kind in kinds):
    paths.named(value, what)


def error_of(where: str, name: str, whole: Type, value: Any, found: Mismatch) -> errors.InputError:
  """Returns the one line for a value of a wrong type."""
  inner = "" if found.value is value else f": {shown(found.value)} is not {found.wanted}"
  wanted = whole.shown if inner else found.wanted
  advice = f"; {found.advice}" if found.advice else ""
  return errors.InputError(f"{found.where or where}: {name} takes {wanted}, not {shown(value)}{inner}{advice}")
