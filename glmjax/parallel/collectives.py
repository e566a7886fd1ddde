"""What a compiled program sends between devices: its collectives, read from the HLO text that XLA shows.

`of(compiled.as_text(), mesh)` names for each the operation, the arrays that come out of it, the mesh axes it runs
over and how often: tests assert on them, and a plan adds up their bytes.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
  "ragged-all-to-all",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_COLLECTIVE = re.compile(rf"(?:^|\s)({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]+[a-z0-9]*|pred|token)\[([0-9,]*)\]")
_CALLED = re.compile(
  r"\b(?:body|to_apply|calls|called_computations|branch_computations|true_computation|"
  r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_NUMBER = re.compile(r"^\s+%?([\w.\-]+) = [su]32\[\]\S* (constant|get-tuple-element|add)\(([^()]*)\)(?:, index=(\d+))?")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program, on each device."""

  kind: str  # one of KINDS
  arrays: tuple[tuple[str, Shape], ...]  # type and shape of each array that comes out on a device
  axes: tuple[str, ...]  # the mesh axes over which devices exchange, in the mesh's order
  group: int  # devices that exchange with one another
  loops: tuple[int | None, ...]  # trip counts of the loops around it, outermost first; None: known at run time only
  source: str  # where in the traced functions it comes from, as XLA kept it

  @property
  def bytes(self) -> int:
    """Of the arrays that come out on a device, each time."""
    return sum(_bytes(dtype) * math.prod(shape) for dtype, shape in self.arrays)

  @property
  def sent(self) -> float:
    """Bytes that a device sends each time, by the ring algorithms."""
    others = (self.group - 1) / self.group
    return self.bytes * {
      "all-reduce": 2 * others,
      "reduce-scatter": self.group - 1,
      "collective-permute": 1,
      "collective-broadcast": 1,
    }.get(self.kind, others)

  def times(self, unknown: int = 1) -> int:
    """How often it runs in a run of the program, loops of unknown length counting `unknown` times each."""
    return math.prod(unknown if count is None else count for count in self.loops)


def of(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
  """The collectives of a program compiled for this mesh, in the order of its text, once for each way to reach them."""
  entry, computations = _split(with_trip_counts(text))
  found = []

  def visit(name: str, loops: tuple[int | None, ...], caller: str = "") -> None:
    for line in computations[name]:
      match = _COLLECTIVE.search(line)
      if match:
        found.append(_read(line, match, mesh, loops))
        if found[-1].kind == "all-reduce" and "all-reduce-scatter" in name:  # TPU's: fused with the slice of it
          found[-1] = dataclasses.replace(found[-1], kind="reduce-scatter", arrays=_arrays(caller.split(" fusion(")[0]))
        continue  # what it calls is the sum of two numbers
      called = [callee for callee in _called(line) if callee in computations]
      if not called:
        continue
      trips = _TRIP_COUNT.search(line)
      around = (*loops, int(trips[1]) if trips else None) if " while(" in line else loops
      for callee in called:
        visit(callee, around, line)

  visit(entry, ())
  return found


def with_trip_counts(text: str) -> str:
  """The text with a known_trip_count at each loop that counts from 0 to a constant; XLA notes none for TPU."""
  limits: dict[str, tuple[int, str]] = {}  # of conditions: the limit, and which number of the loop's state is compared
  steps: dict[str, dict[str, int]] = {}  # of bodies: by how much numbers of the loop's state grow
  name, constants, states, sums = "", {}, {}, {}
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      name, constants, states, sums = header[2], {}, {}, {}
    number = _NUMBER.match(line)
    if number:
      made, operation, operands, index = number.groups()
      if operation == "constant":
        constants[made] = int(operands)
      elif operation == "get-tuple-element":
        states[made] = index
      else:
        sums[made] = re.findall(r"%([\w.\-]+)", operands)
    compared = re.match(r"^\s+ROOT .* compare\(.*?%([\w.\-]+), .*?%([\w.\-]+)\), direction=LT", line)
    if compared and compared[2] in constants:
      limits[name] = constants[compared[2]], states.get(compared[1], "")
    if re.match(r"^\s+ROOT .* tuple\(", line):
      made = re.findall(r"%([\w.\-]+)", line[line.index(" tuple(") :].split("), ")[0])
      steps[name] = {str(i): constants[by] for i, x in enumerate(made) for by in sums.get(x, ()) if by in constants}

  def note(line: str) -> str:
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line) if " while(" in line else None
    if not condition or condition[1] not in limits or _TRIP_COUNT.search(line):
      return line
    limit, state = limits[condition[1]]
    body = re.search(r"\bbody=%?([\w.\-]+)", line)
    step = steps.get(body[1], {}).get(state, 1) if body else 1
    return f'{line} "known_trip_count":{{"n":"{-(-limit // max(step, 1))}"}}'

  return "\n".join(map(note, text.splitlines()))


def _split(text: str) -> tuple[str, dict[str, list[str]]]:
  """The entry computation's name, and the instructions of all that hold or reach a collective."""
  entry, name, computations = "", "", {}
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      name = header[2]
      computations[name] = []
      entry = name if header[1] else entry
      continue
    instruction = _INSTRUCTION.match(line)
    if instruction and name and (_COLLECTIVE.search(instruction[1]) or _CALLED.search(instruction[1])):
      computations[name].append(instruction[1])
  assert entry, "no entry computation: not the text of a compiled program"
  return entry, computations


def _called(line: str) -> Iterator[str]:
  for several, one in _CALLED.findall(line):
    yield from (name.strip().lstrip("%") for name in (several or one).split(",") if name.strip())


def _read(line: str, match: re.Match[str], mesh: jax.sharding.Mesh, loops: tuple[int | None, ...]) -> Collective:
  kind, started = match[1], match[2]
  arrays = _arrays(line[: match.start()])
  if started and kind != "all-reduce":  # a pair of operands and results, and for a permute two contexts
    arrays = arrays[: 2 * (len(arrays) // 2)] if kind != "collective-permute" else arrays[:2]
    arrays = arrays[len(arrays) // 2 :]
  groups = _groups(line, mesh.size)
  source = _SOURCE.search(line)
  return Collective(kind, arrays, _axes(groups, mesh.shape), max(map(len, groups)), loops, source[1] if source else "")


def _arrays(text: str) -> tuple[tuple[str, Shape], ...]:
  return tuple((dtype, _numbers(shape)) for dtype, shape in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", text)))


def _axes(groups: Sequence[Sequence[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
  """The axes along which the members of a group differ; devices are numbered in the mesh's order."""
  names, shape = tuple(sizes), tuple(sizes.values())
  differ = np.zeros(len(names), bool)
  for group in groups:
    places = np.array(np.unravel_index(list(group), shape))
    differ |= (places != places[:, :1]).any(axis=1)
  return tuple(name for name, yes in zip(names, differ) if yes)


def _groups(line: str, devices: int) -> list[list[int]]:
  """Which devices exchange with one another, from any of the ways in which XLA writes that."""
  pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line)
  if pairs:
    return [list(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
  listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line)
  if listed:
    return [list(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", listed[1])] or [list(range(devices))]
  tiled = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
  if tiled:
    return _iota(tiled[2]).reshape(_numbers(tiled[1])).tolist()
  named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", line)
  assert named, f"unknown replica groups: {line[:400]}"
  return _groups_of_axes(*named.groups(), devices)


def _groups_of_axes(mesh: str, order: str | None, axes: str, devices: int) -> list[list[int]]:
  """Groups along axes of a mesh that XLA has made up; 'x':(2)4 is the part of x with 2 before it and size 4."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
  ids = (
    np.arange(devices)
    if not order
    else (_iota(order) if order.startswith("[") else np.array(_numbers(order.strip("{}"))))
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
  """The numbers of "[4,2]T(1,0)": counted up, shaped, transposed, flat."""
  shape, _, order = text.strip("[)").partition("]")
  numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return (numbers.transpose(_numbers(order.lstrip("T("))) if order else numbers).reshape(-1)


def _numbers(text: str) -> Shape:
  return tuple(int(number) for number in text.split(",") if number.strip())


def _bytes(dtype: str) -> float:
  """Of one element; "bf16", "s32", "pred", "f8e4m3fn"."""
  bits = re.match(r"[a-z]+(\d+)", dtype)
  return {"token": 0, "pred": 1}[dtype] if bits is None else int(bits[1]) / 8
