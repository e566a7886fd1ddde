"""Judging what gin files say, more strictly than gin does, and choosing what one command needs of it.

gin accepts a macro or a binding that nothing uses, and finds a missing value only when training asks for it.
With dynamic registration a binding has an effect only where its function is a command's own, or is referred
to (@module.function) by a value that has an effect: what the library calls by itself is not gin's to change.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from glmjax import errors
from glmjax.config import gin_reader, gin_types, signatures
from glmjax.config.gin_reader import Binding, Identity, Macro, Reference

OURS = "glmjax"  # the package whose annotations are held to; those of users' own functions are theirs


@dataclasses.dataclass(frozen=True)
class Program:
  """The statements that one command needs, for gin, and where each was written."""

  lines: tuple[str, ...]
  places: tuple[str, ...]
  modules: dict[str, str]  # that the statements import -> where each is named
  values: dict[str, list[Any]]  # of each parameter by its full name, in any scope; macros are resolved


def check(reader: gin_reader.Reader, entry: str | None, given: Iterable[str], commands: Sequence[str]) -> Program:
  """Raises InputError for the first mistake; entry is the function to call, `commands` any command's."""
  _check_scopes(reader)
  _check_overridden_macros(reader)
  signature = _signature(entry) if entry else None
  everything = [*reader.bindings.values(), *reader.replaced]
  if signature is None or len(_reach(everything, [signature.identity])) < len(everything):
    roots = [_signature(command) for command in commands]  # their modules are parsed, which takes a while
    if roots and None not in roots:
      _check_used(reader, _reach(everything, [root.identity for root in roots]))
  if signature is None:
    needed = list(reader.bindings.values())
  else:
    needed = _reach(list(reader.bindings.values()), [signature.identity])
  _check_macros(reader, needed)
  _check_types(reader)
  _check_required(needed)
  if signature is not None:
    given = set(given)
    _check_entry(entry, signature, needed, given)
    _check_called([b for b in reader.bindings.values() if not _is_given(b, signature, given)], signature)
  return _program(needed, reader.side_effects)


def _signature(name: str) -> signatures.Signature | None:
  """Returns the signature of a function by its full name; None where source does not tell."""
  module_name = gin_types.module_of(name)
  try:
    found = signatures.resolve(signatures.find_module(module_name), name.removeprefix(f"{module_name}.").split("."))
  except signatures.NameNotFound:
    return None
  return found if isinstance(found, signatures.Signature) else None


def _reach(bindings: Sequence[Binding], roots: Iterable[Identity]) -> list[Binding]:
  """Returns those of the bindings that calls of the root functions depend on, macros among them, in their order."""
  functions, macros = set(roots), set()
  size = -1
  while size != len(functions) + len(macros):
    size = len(functions) + len(macros)
    for binding in bindings:
      if functions.intersection(binding.identities) or not binding.parameter and binding.shown in macros:
        for value in gin_reader.flatten(binding.value):
          if isinstance(value, Reference):
            functions.add(value.identity)
          elif isinstance(value, Macro):
            macros.add(value.name)
  return [
    binding
    for binding in bindings
    if functions.intersection(binding.identities) or not binding.parameter and binding.shown in macros
  ]


def _check_scopes(reader: gin_reader.Reader) -> None:
  """Checks that a binding's scope is one that a reference enters, or a macro: its value is made within its name."""
  used = reader.scopes_used | {scope for name in reader.macros_used for scope in name.split("/")}
  for binding in reader.bindings.values():
    for scope in binding.scope.split("/") if binding.parameter and binding.scope else ():
      if scope not in used:
        close = signatures.nearest(scope, used)
        advice = signatures.advice(close, f"a value such as @{scope}/module.function would use it")
        raise errors.InputError(f"{binding.where}: nothing uses the scope {scope}/; {advice}")


def _check_overridden_macros(reader: gin_reader.Reader) -> None:
  """Checks that a macro on the command line is one that the files use."""
  defined = {b.shown for b in reader.bindings.values() if not b.parameter} - set(reader.override_macros)
  known = sorted(defined | set(reader.macros_used))
  for name, where in reader.override_macros.items():
    if name not in reader.macros_used:
      advice = signatures.advice(signatures.nearest(name, known), f"there are {', '.join(known) or 'none'}")
      raise errors.InputError(f"{where}: no gin file uses the macro {name}; {advice}")


def _check_used(reader: gin_reader.Reader, reached: list[Binding]) -> None:
  """Checks that some command's work depends on every binding, or did until another was replaced."""
  used = {binding.key for binding in reached}
  now = {binding.selector: binding.shown for binding in reached if binding.parameter}
  names = {*now.values()}
  for binding in reader.bindings.values():
    if binding.parameter and binding.key not in used:
      renamed = now.get(signatures.RENAMED.get(binding.selector, ""))
      close = renamed or signatures.nearest(binding.shown, names - {binding.shown})
      advice = signatures.advice(close, f"a value such as @{binding.shown} in what a command uses would")
      raise errors.InputError(f"{binding.where}: nothing uses {binding.shown}; {advice}")


def _check_macros(reader: gin_reader.Reader, needed: list[Binding]) -> None:
  """Checks that macros that are needed are defined, without a circle, and those defined are used somewhere."""
  macros = {b.shown: b for b in reader.bindings.values() if not b.parameter}
  unused = [name for name in macros if name not in reader.macros_used]
  undefined = {}
  for binding in needed:
    for name in _macros_in(binding):
      if name not in macros:
        undefined.setdefault(name, binding.where)
  for name, where in undefined.items():
    close = signatures.nearest(name, unused) or signatures.nearest(name, macros)
    others = f" (nor {', '.join(n for n in undefined if n != name)})" if len(undefined) > 1 else ""
    advice = signatures.advice(close, f"add the gin file that defines it, or --gin.{name}=VALUE")
    raise errors.InputError(f"{where}: %{name} is not defined{others}; {advice}")
  for name in unused:
    advice = signatures.advice(signatures.nearest(name, reader.macros_used), f"remove the line, or use it as %{name}")
    raise errors.InputError(f"{macros[name].where}: nothing uses the macro {name}; {advice}")
  for name, binding in macros.items():
    inside, size = set(_macros_in(binding)), -1
    while size != len(inside):
      size = len(inside)
      inside |= {n for other in inside & set(macros) for n in _macros_in(macros[other])}
    if name in inside:
      raise errors.InputError(f"{binding.where}: the macro {name} is defined by itself")


def _macros_in(binding: Binding) -> Iterator[str]:
  for value in gin_reader.flatten(binding.value):
    if isinstance(value, Macro) and not value.is_required:
      yield value.name


def _check_required(needed: list[Binding]) -> None:
  """Names every value that a file leaves to the user and the user has not given."""
  missing = [
    binding
    for binding in needed
    if any(isinstance(v, Macro) and v.is_required for v in gin_reader.flatten(binding.value))
  ]
  if missing:
    flags = " ".join(f"--gin.{binding.name}=VALUE" for binding in missing)
    places = ", ".join(dict.fromkeys(binding.where for binding in missing))
    raise errors.InputError(f"{len(missing)} required value(s) not set: add {flags} (asked for at {places})")


def _check_types(reader: gin_reader.Reader) -> None:
  """Checks every value against the annotation of the parameter of ours that it is given to."""

  def lookup(macro: Macro) -> tuple[Any, str] | None:
    binding = reader.bindings.get(("macro", macro.name))
    return binding and (binding.value, binding.where)

  for binding in reader.bindings.values():
    annotation = binding.signature.parameters.get(binding.parameter) if binding.signature else None
    if annotation is None or annotation.module.name.split(".")[0] != OURS:
      continue
    source = binding
    while isinstance(source.value, Macro) and ("macro", source.value.name) in reader.bindings:
      source = reader.bindings[("macro", source.value.name)]
    wanted = gin_types.parse(annotation)
    gin_types.check_path(binding.value, wanted, f"{binding.where}: {binding.name}", lookup)
    if found := gin_types.mismatch(source.value, wanted, lookup):
      raise gin_types.error_of(source.where, binding.name, wanted, source.value, found)


def _check_entry(entry: str, signature: signatures.Signature, needed: list[Binding], given: set[str]) -> None:
  """Checks that the command's function gets all that it has no default for."""
  bound = {b.parameter for b in needed if signature.identity in b.identities[:1] and not b.scope}
  missing = [name for name in signature.required if name not in bound | given]
  if missing:
    them = "it" if len(missing) == 1 else "them"
    raise errors.InputError(
      f"no value for {', '.join(missing)} of {entry}: add the --gin_file that binds "
      f"{them}, or --gin.{entry}.{missing[0]}=VALUE"
    )


def _is_given(binding: Binding, signature: signatures.Signature, given: set[str]) -> bool:
  """Tells whether the command's function gets another value than the binding's."""
  return signature.identity in binding.identities[:1] and binding.parameter in given


def _check_called(bindings: list[Binding], signature: signatures.Signature) -> None:
  """Checks that what a value calls (@module.function()) gets all that it has no default for.

  What is passed uncalled gets arguments from who calls it, and is left aside.
  """
  needed = _reach(bindings, [signature.identity])
  for binding in needed:
    for value in gin_reader.flatten(binding.value):
      if not isinstance(value, Reference) or not value.evaluate or value.selector.startswith("gin."):
        continue
      called = _signature(value.selector)
      bound = {b.parameter for b in needed if value.identity in b.identities[:1] and _applies(b.scope, value)}
      if missing := [name for name in called.required if name not in bound] if called else []:
        target = "/".join([*value.scopes, value.written])
        raise errors.InputError(
          f"{binding.where}: no value for {', '.join(missing)} of {target}: bind {target}.{missing[0]} in the file, or "
          f"add --gin.{target}.{missing[0]}=VALUE"
        )


def _applies(scope: str, reference: Reference) -> bool:
  """Tells whether a binding of that scope may count where the reference is called: without scopes of its own it is
  called in those of whoever needs it.
  """
  entered = "/".join(reference.scopes)
  return not scope or not entered or f"{entered}/".startswith(f"{scope}/")


def _program(needed: list[Binding], side_effects: dict[str, str]) -> Program:
  """Returns the needed bindings as gin statements under imports of their own."""
  references = {
    value.selector: binding.where
    for binding in needed
    for value in gin_reader.flatten(binding.value)
    if isinstance(value, Reference)
  }
  places = {**side_effects}
  for selector, where in [(b.selector, b.where) for b in needed if b.parameter] + list(references.items()):
    if not selector.startswith("gin."):
      places.setdefault(gin_types.module_of(selector), where)
  names: dict[str, str] = {}  # module -> its name in the statements
  lines = [("from __gin__ import dynamic_registration", "")]
  for module, where in places.items():
    parts = module.split(".")
    length = 1
    while "_".join(parts[-length:]) in (*names.values(), "gin"):  # data.cache and infer.cache, say
      length += 1
    names[module] = "_".join(parts[-length:])
    alias = f" as {names[module]}" if length > 1 else ""
    from_package = f"from {'.'.join(parts[:-1])} import {parts[-1]}{alias}"
    lines.append((from_package if parts[1:] else f"import {module}", where))
  for binding in sorted(needed, key=lambda binding: bool(binding.parameter)):
    target = binding.shown
    if binding.parameter:
      selector = _shorten(binding.selector, names)
      target = f"{binding.scope}/{selector}" if binding.scope else selector
      target = f"{target}.{binding.parameter}"
    lines.append((f"{target} = {_written(binding.value, names)!r}", binding.where))
  return Program(*zip(*lines), places, _values(needed))


def _values(needed: list[Binding]) -> dict[str, list[Any]]:
  """Returns what each parameter is bound to."""
  macros = {binding.shown: binding.value for binding in needed if not binding.parameter}
  found: dict[str, list[Any]] = {}
  for binding in needed:
    value = binding.value
    while isinstance(value, Macro) and value.name in macros:
      value = macros[value.name]
    if binding.parameter:
      found.setdefault(f"{binding.selector}.{binding.parameter}", []).append(value)
  return found


def _shorten(selector: str, names: dict[str, str]) -> str:
  """Returns a full name as the statements' imports allow it to be written."""
  if selector.startswith("gin."):
    return selector
  module = gin_types.module_of(selector)
  return names[module] + selector.removeprefix(module)


def _written(value: object, names: dict[str, str]) -> object:
  """Returns the value with its references' names shortened."""
  if isinstance(value, dict):
    return {_written(key, names): _written(part, names) for key, part in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(_written(part, names) for part in value)
  if isinstance(value, Reference):
    return dataclasses.replace(value, selector=_shorten(value.selector, names))
  return value
