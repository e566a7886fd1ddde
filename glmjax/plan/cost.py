"""What a program costs: the FLOPs of its products, from its jaxpr, and the bytes that it moves, from its compiled text.

A jaxpr has every product, those that are computed again for backward included, and the lengths of its loops. XLA's own
figures count the body of a loop once.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from glmjax.parallel import hlo

_MOVES_NOTHING = {
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
  """Counts the FLOPs of all products on all devices; `trips`: named scopes of the loops whose length only the run
  knows.
  """
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
  """Says how often a loop runs that was traced in this scope."""
  innermost = scope.removesuffix("/while").split("/")[-1]
  return math.prod(count for loop, count in trips.items() if loop in innermost)


def _is_jaxpr(x: Any) -> bool:
  return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def traffic(program: hlo.Program, trips: Mapping[str, int]) -> float:
  """Returns the bytes that a device reads and writes in its memory: what goes in and out of each fusion, product and
  kernel.

  A fusion that takes a slice of an array reads the slice; one that writes a slice of its result writes the slice.
  """
  return _sum(program, trips, _moved)


def fetched(program: hlo.Program, trips: Mapping[str, int]) -> float:
  """Returns the bytes that a device copies from the host's memory into its own."""
  return _sum(program, trips, _fetched)


def _sum(program: hlo.Program, trips: Mapping[str, int], measure: Callable[..., float]) -> float:
  """Sums `measure` of every instruction, as often as it runs."""

  def visit(name: str) -> float:
    total, instructions = 0.0, program.computations[name]
    for instruction in instructions.values():
      called = [callee for callee in instruction.called if callee in program.computations]
      if instruction.operation == "while":
        known = program.trips(instruction)
        total += (known if known is not None else _times(instruction.source, trips)) * sum(map(visit, called))
      elif instruction.operation in ("call", "conditional"):
        total += max(map(visit, called), default=0.0)
      elif instruction.operation not in _MOVES_NOTHING and not instruction.operation.endswith("-done"):
        total += measure(instruction, instructions, program.computations)
    return total

  return visit(program.entry)


def _size(instruction: hlo.Instruction) -> int:
  """Returns the bytes of the result."""
  return sum(array.bytes for array in instruction.arrays)


def _on_device(instruction: hlo.Instruction) -> int:
  """Returns the bytes of the result that are in the device's memory."""
  return sum(array.bytes for array in instruction.arrays if array.on_device)


def _on_host(instruction: hlo.Instruction) -> int:
  """Returns the bytes of the result that are in the host's memory."""
  return sum(array.bytes for array in instruction.arrays if array.on_host)


def _fetched(
  instruction: hlo.Instruction, around: hlo.Computation, computations: Mapping[str, hlo.Computation]
) -> float:
  del computations
  if instruction.operation not in ("copy", "copy-start") or not _on_device(instruction):
    return 0.0
  return sum(_on_host(around[name]) for name in instruction.operands if name in around)


def _moved(instruction: hlo.Instruction, around: hlo.Computation, computations: Mapping[str, hlo.Computation]) -> float:
  inner = _inside(instruction, computations)
  sizes = [_on_device(around[name]) if name in around else 0 for name in instruction.operands]
  result = _on_device(instruction)
  if instruction.operation in ("dynamic-slice", "slice", "gather"):
    return _size(instruction) * bool(sizes and sizes[0]) + result
  if instruction.operation == "dynamic-update-slice":
    return 2 * sizes[1] if len(sizes) > 1 else result
  if instruction.operation == "slice-start":  # its result: what it takes a slice of, the slice, and a number
    return _size(instruction) - sum(_size(around[name]) for name in instruction.operands if name in around)
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
    written = sum(_size(inner[i.operands[1]]) for i in writes if i.operands[1] in inner)
    sizes[place], result = sum(map(_size, reads)), min(result, written)
  return result + sum(sizes)


def _inside(instruction: hlo.Instruction, computations: Mapping[str, hlo.Computation]) -> hlo.Computation:
  """Returns the computation that a fusion fuses; an empty one where it names none."""
  called = re.search(r"calls=%?([\w.\-]+)", instruction.text)
  return computations.get(called[1], {}) if called else {}


def _parameters(computation: hlo.Computation) -> dict[int, str]:
  """Returns the names of a computation's parameters by their places."""
  return {
    int(m[1]): name
    for name, i in computation.items()
    if i.operation == "parameter" and (m := re.match(r"(\d+)\)", i.text))
  }


def _read(name: str, size: int, around: hlo.Computation, computations: Mapping[str, hlo.Computation]) -> int:
  """Returns the bytes of an array of `size` that are read in a fusion; its innermost fusions may take slices of it."""
  total = 0
  for user, instruction in around.items():
    if name not in instruction.operands:
      continue
    if instruction.operation in ("dynamic-slice", "slice", "gather"):
      total += _size(instruction)
    elif instruction.operation in _ELEMENT_BY_ELEMENT:  # and then perhaps sliced
      total += _read(user, size, around, computations)
    elif instruction.operation == "fusion" and (inner := _inside(instruction, computations)):
      parameters = _parameters(inner)
      total += sum(
        _read(parameters[place], size, inner, computations)
        for place, operand in enumerate(instruction.operands)
        if operand == name and place in parameters
      )
    else:
      return size
  return min(total, size) or size
