"""What a program costs: the FLOPs of its products, from its jaxpr, and the bytes that it moves, from its compiled text.

A jaxpr has every product, those that are computed again for backward included, and the lengths of its loops. XLA's own
figures count the body of a loop once.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from glmjax.parallel import collectives

_SIZES = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "f16": 2,
  "bf16": 2,
  "s16": 2,
  "u16": 2,
  "f32": 4,
  "s32": 4,
  "u32": 4,
  "f64": 8,
  "s64": 8,
  "u64": 8,
  "c64": 8,
  "f8e4m3fn": 1,
  "f8e5m2": 1,
  "s4": 1,
  "u4": 1,
}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "partition-id",
  "replica-id",
  "iota",
  "opt-barrier",
}

_ELEMENT_BY_ELEMENT = {"bitcast", "copy", "convert", "pad", "reshape", "transpose"}


def flops(jaxpr: Any, trips: Mapping[str, int]) -> float:
  """FLOPs of all products on all devices; `trips`: named scopes of the loops whose length only the run knows."""
  total = 0.0
  for equation in jaxpr.eqns:
    name, parameters = equation.primitive.name, equation.params
    times = 1
    if name == "dot_general":
      (contracted, _), _ = parameters["dimension_numbers"]
      left = equation.invars[0].aval.shape
      total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
      continue
    if name == "pallas_call":
      estimate = parameters.get("cost_estimate")
      total += float(estimate.flops) if estimate else 0.0
      continue
    if name == "scan":
      times = parameters["length"]
    elif name == "while":
      times = _times(str(equation.source_info.name_stack), trips)
    elif name == "shard_map":  # its shapes are those of a part
      times = math.prod(parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"])
    if name == "cond":
      total += max(flops(branch.jaxpr, trips) for branch in parameters["branches"])
      continue
    for inner in jax.tree.leaves(list(parameters.values()), is_leaf=_is_jaxpr):
      if _is_jaxpr(inner):
        total += times * flops(getattr(inner, "jaxpr", inner), trips)
  return total


def _times(scope: str, trips: Mapping[str, int]) -> int:
  """How often a loop runs that was traced in this scope."""
  innermost = scope.removesuffix("/while").split("/")[-1]
  return math.prod(count for loop, count in trips.items() if loop in innermost)


def _is_jaxpr(x: Any) -> bool:
  return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@dataclasses.dataclass(frozen=True)
class _Instruction:
  size: int  # bytes of the result
  result: int  # of those, the bytes in the device's memory; on TPUs some arrays lie on the chip
  host: int  # and in the host's
  operation: str
  operands: tuple[str, ...]
  text: str


def traffic(text: str, trips: Mapping[str, int]) -> float:
  """Bytes that a device reads and writes in its memory: what goes in and out of each fusion, product and kernel.

  A fusion that takes a slice of an array reads the slice; one that writes a slice of its result writes the slice.
  """
  return _sum(text, trips, _moved)


def fetched(text: str, trips: Mapping[str, int]) -> float:
  """Bytes that a device copies from the host's memory into its own."""
  return _sum(text, trips, _fetched)


def _sum(text: str, trips: Mapping[str, int], measure: Callable[..., float]) -> float:
  """Of `measure` of every instruction, as often as it runs."""
  entry, computations = _parse(collectives.with_trip_counts(text))

  def visit(name: str) -> float:
    total, instructions = 0.0, computations[name]
    for instruction in instructions.values():
      if instruction.operation == "while":
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.text)
        scope = re.search(r'op_name="([^"]*)"', instruction.text)
        times = int(known[1]) if known else _times(scope[1] if scope else "", trips)
        body = re.search(r"body=%?([\w.\-]+)", instruction.text)
        total += times * visit(body[1])
      elif instruction.operation in ("call", "conditional"):
        called = re.findall(r"(?:to_apply|branch_computations=\{|, )%?([\w.\-]+)", instruction.text)
        total += max((visit(c) for c in called if c in computations), default=0.0)
      elif instruction.operation not in _FREE and not instruction.operation.endswith("-done"):
        total += measure(instruction, instructions, computations)
    return total

  return visit(entry)


def _fetched(instruction: _Instruction, around: Mapping[str, _Instruction], computations: Mapping[str, Any]) -> float:
  del computations
  if instruction.operation not in ("copy", "copy-start") or not instruction.result:
    return 0.0
  return sum(around[name].host for name in instruction.operands if name in around)


def _moved(instruction: _Instruction, around: Mapping[str, _Instruction], computations: Mapping[str, Any]) -> float:
  called = re.search(r"calls=%?([\w.\-]+)", instruction.text)
  inner = computations.get(called[1], {}) if called else {}
  sizes = [around[name].result if name in around else 0 for name in instruction.operands]
  result = instruction.result
  if instruction.operation in ("dynamic-slice", "slice", "gather"):
    return instruction.size * bool(sizes and sizes[0]) + result
  if instruction.operation == "dynamic-update-slice":
    return 2 * sizes[1] if len(sizes) > 1 else result
  if instruction.operation == "slice-start":  # its result: what it takes a slice of, the slice, and a number
    return instruction.size - sum(around[name].size for name in instruction.operands if name in around)
  if instruction.operation.endswith("-start"):  # its result: what comes out, and what went in
    return result
  for place, name in _parameters(inner).items():
    if place >= len(sizes):
      continue
    users = [i for i in inner.values() if name in i.operands]
    writes = [i for i in users if i.operation == "dynamic-update-slice" and i.operands[0] == name]
    reads = [i for i in users if i.operation in ("dynamic-slice", "slice", "gather")]
    if not writes or len(reads) + len(writes) < len(users):
      sizes[place] = _read(name, sizes[place], inner, computations)
      continue
    written = sum(inner[i.operands[1]].size for i in writes if i.operands[1] in inner)
    sizes[place], result = sum(i.size for i in reads), min(result, written)
  return result + sum(sizes)


def _parameters(computation: Mapping[str, _Instruction]) -> dict[int, str]:
  """Names by place."""
  return {
    int(m[1]): name
    for name, i in computation.items()
    if i.operation == "parameter" and (m := re.match(r"(\d+)\)", i.text))
  }


def _read(name: str, size: int, around: Mapping[str, _Instruction], computations: Mapping[str, Any]) -> int:
  """Bytes of an array of `size` that are read in a fusion, whose innermost fusions may take slices of it."""
  total = 0
  for user, instruction in around.items():
    if name not in instruction.operands:
      continue
    if instruction.operation in ("dynamic-slice", "slice", "gather"):
      total += instruction.size
    elif instruction.operation in _ELEMENT_BY_ELEMENT:  # and then perhaps sliced
      total += _read(user, size, around, computations)
    elif instruction.operation == "fusion" and (called := re.search(r"calls=%?([\w.\-]+)", instruction.text)):
      inner = computations.get(called[1], {})
      parameters = _parameters(inner)
      total += sum(
        _read(parameters[place], size, inner, computations)
        for place, operand in enumerate(instruction.operands)
        if operand == name and place in parameters
      )
    else:
      return size
  return min(total, size) or size


def _parse(text: str) -> tuple[str, dict[str, dict[str, _Instruction]]]:
  entry, current, computations = "", {}, {}
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
      continue
    found = _LINE.match(line)
    if found:
      name, result, operation, rest = found.groups()
      operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
      current[name] = _Instruction(*_bytes(result), operation, operands, rest)
  assert entry, "no entry computation: not the text of a compiled program"
  return entry, computations


def _bytes(shapes: str) -> tuple[int, int, int]:
  """Of all arrays, of those whose layout names no other memory than the device's first, and of those in the host's."""
  arrays = [
    (_SIZES[kind] * math.prod(int(n) for n in size.split(",") if n), layout)
    for kind, size, layout in _ARRAY.findall(shapes)
    if kind in _SIZES
  ]
  total = lambda keep: sum(size for size, layout in arrays if keep(layout))
  return total(lambda _: True), total(lambda layout: "S(" not in layout), total(lambda layout: "S(5)" in layout)
