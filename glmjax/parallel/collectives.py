"""What a compiled program sends between devices: its collectives, as its HLO tells.

`of(hlo.read(compiled.as_text()), mesh)` names for each the operation, the arrays that come out of it, the mesh axes it
runs over and how often: tests assert on them, and a plan adds up their bytes.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from glmjax.parallel import hlo

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
  "ragged-all-to-all",
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program, on each device."""

  kind: str  # one of KINDS
  arrays: tuple[tuple[str, tuple[int, ...]], ...]  # type and shape of each array that comes out on a device
  axes: tuple[str, ...]  # the mesh axes over which devices exchange, in the mesh's order
  group: int  # devices that exchange with one another
  loops: tuple[int | None, ...]  # trip counts of the loops around it, outermost first; None: known at run time only
  source: str  # where in the traced functions it comes from, as XLA kept it

  @property
  def bytes(self) -> int:
    """The bytes of the arrays that come out on a device, each time."""
    return sum(hlo.Array(dtype, shape).bytes for dtype, shape in self.arrays)

  @property
  def sent(self) -> float:
    """The bytes that a device sends each time, by the ring algorithms."""
    others = (self.group - 1) / self.group
    return self.bytes * {
      "all-reduce": 2 * others,
      "reduce-scatter": self.group - 1,
      "collective-permute": 1,
      "collective-broadcast": 1,
    }.get(self.kind, others)

  def times(self, unknown: int = 1) -> int:
    """Says how often it runs in a run of the program, loops of unknown length counting `unknown` times each."""
    return math.prod(unknown if count is None else count for count in self.loops)


def of(program: hlo.Program, mesh: jax.sharding.Mesh) -> list[Collective]:
  """Returns the collectives of a program compiled for this mesh, in its order, once for each way to reach them."""
  found = []

  def visit(name: str, loops: tuple[int | None, ...], caller: hlo.Instruction | None = None) -> None:
    for instruction in program.computations[name].values():
      if instruction.operation.removesuffix("-start") in KINDS:
        found.append(_read(instruction, mesh, loops))
        if caller is not None and found[-1].kind == "all-reduce" and "all-reduce-scatter" in name:
          # TPU's: fused with the slice of it
          found[-1] = dataclasses.replace(found[-1], kind="reduce-scatter", arrays=_types(caller))
        continue  # what it calls is the sum of two numbers
      around = (*loops, program.trips(instruction)) if instruction.operation == "while" else loops
      for callee in instruction.called:
        if callee in program.computations:
          visit(callee, around, instruction)

  visit(program.entry, ())
  return found


def _read(instruction: hlo.Instruction, mesh: jax.sharding.Mesh, loops: tuple[int | None, ...]) -> Collective:
  kind, arrays = instruction.operation.removesuffix("-start"), _types(instruction)
  if kind != instruction.operation and kind != "all-reduce":  # operands and results, and for a permute two contexts
    arrays = arrays[: 2 * (len(arrays) // 2)] if kind != "collective-permute" else arrays[:2]
    arrays = arrays[len(arrays) // 2 :]
  groups = _groups(instruction.text, mesh.size)
  return Collective(kind, arrays, _axes(groups, mesh.shape), max(map(len, groups)), loops, instruction.source)


def _types(instruction: hlo.Instruction) -> tuple[tuple[str, tuple[int, ...]], ...]:
  return tuple((array.dtype, array.shape) for array in instruction.arrays)


def _axes(groups: Sequence[Sequence[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the axes along which the members of a group differ; devices are numbered in the mesh's order."""
  names, shape = tuple(sizes), tuple(sizes.values())
  differ = np.zeros(len(names), bool)
  for group in groups:
    places = np.array(np.unravel_index(list(group), shape))
    differ |= (places != places[:, :1]).any(axis=1)
  return tuple(name for name, yes in zip(names, differ) if yes)


def _groups(line: str, devices: int) -> list[list[int]]:
  """Returns which devices exchange with one another, from any of the ways in which XLA writes that."""
  pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line)
  if pairs:
    return [list(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
  listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line)
  if listed:
    return [list(hlo.numbers(group)) for group in re.findall(r"\{([\d,]+)\}", listed[1])] or [list(range(devices))]
  tiled = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
  if tiled:
    return _iota(tiled[2]).reshape(hlo.numbers(tiled[1])).tolist()
  named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", line)
  assert named, f"unknown replica groups: {line[:400]}"
  return _groups_of_axes(*named.groups(), devices)


def _groups_of_axes(mesh: str, order: str | None, axes: str, devices: int) -> list[list[int]]:
  """Returns groups along axes of a mesh that XLA has made up; 'x':(2)4 is the part of x with 2 before it and size 4."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
  ids = (
    np.arange(devices)
    if not order
    else (_iota(order) if order.startswith("[") else np.array(hlo.numbers(order.strip("{}"))))
  )
  taken: dict[str, list[tuple[int, int]]] = {}
  for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
    taken.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
  shape, chosen = [], []
  for name, whole in sizes.items():
    done = 1
    for before, size in sorted(taken.get(name, [])):
      shape += [before // done, size]
      chosen.append(len(shape) - 1)
      done = before * size
    shape.append(whole // done)
  others = [axis for axis in range(len(shape)) if axis not in chosen]
  group = math.prod(shape[axis] for axis in chosen)
  return ids.reshape(shape).transpose(others + chosen).reshape(-1, group).tolist()


def _iota(text: str) -> np.ndarray:
  """Returns the numbers of "[4,2]T(1,0)": counted up, shaped, transposed, flat."""
  shape, _, order = text.strip("[)").partition("]")
  numbers = np.arange(math.prod(hlo.numbers(shape))).reshape(hlo.numbers(shape))
  return (numbers.transpose(hlo.numbers(order.lstrip("T("))) if order else numbers).reshape(-1)
