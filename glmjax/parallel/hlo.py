"""The text of a compiled program (HLO, as XLA shows it), read: computations, instructions, and how often loops run."""

from collections.abc import Mapping
import dataclasses
import functools
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+[0-9]+[a-z0-9]*|pred|token)\[([0-9,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
  r"\b(?:body|to_apply|calls|called_computations|branch_computations|true_computation|"
  r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array that an instruction makes, or one of a tuple of them."""

  dtype: str  # as XLA writes it: bf16, s32, pred
  shape: tuple[int, ...]
  layout: str = ""  # "{1,0:T(8,128)S(1)}"

  @property
  def bytes(self) -> int:
    """The bytes of all elements; numbers of four bits take a byte."""
    bits = re.match(r"[a-z]+(\d+)", self.dtype)
    return math.prod(self.shape) * ({"token": 0, "pred": 1}[self.dtype] if bits is None else max(1, int(bits[1]) // 8))

  @property
  def on_device(self) -> bool:
    """Whether it lies in the device's memory: on TPUs some arrays lie on the chip."""
    return "S(" not in self.layout

  @property
  def on_host(self) -> bool:
    """Whether it lies in the host's memory."""
    return "S(5)" in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation."""

  name: str
  result: str  # types and layouts of what it makes
  operation: str  # fusion, all-reduce-start, ...
  text: str  # all behind "operation("
  is_root: bool

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    """The arrays that it makes."""
    return tuple(Array(dtype, numbers(shape), layout) for dtype, shape, layout in _ARRAY.findall(self.result))

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """The names of the instructions, of the same computation, whose results it takes."""
    return tuple(_NAME.findall(self.text.split("), ")[0]))

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """The names of the computations that it runs: a loop's body, a fusion's, branches. A loop's condition is none."""
    found = [several or one for several, one in _CALLED.findall(self.text)]
    return tuple(name.strip().lstrip("%") for names in found for name in names.split(",") if name.strip())

  @property
  def source(self) -> str:
    """Where in the traced functions it comes from, as XLA kept it."""
    found = _SOURCE.search(self.text)
    return found[1] if found else ""

  @property
  def integer(self) -> int | None:
    """The value of a constant that is one whole number."""
    found = re.match(r"(-?\d+)\)", self.text)
    return int(found[1]) if self.operation == "constant" and found and _is_whole_number(self) else None


Computation = Mapping[str, Instruction]  # by their names


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program."""

  entry: str  # name of the computation that it runs
  computations: Mapping[str, Computation]

  def trips(self, loop: Instruction) -> int | None:
    """Says how often a `while` runs: as XLA noted, or by its counter, since XLA notes none for TPU; None: cannot be
    told.
    """
    if known := _TRIP_COUNT.search(loop.text):
      return int(known[1])
    condition = self._attribute(loop, "condition")
    compared = _root(condition)
    if compared is None or compared.operation != "compare" or "direction=LT" not in compared.text:
      return None
    state, limit = (condition.get(name) for name in compared.operands[:2])
    if limit is None or limit.integer is None:
      return None
    return -(-limit.integer // max(self._step(loop, state), 1))

  def _step(self, loop: Instruction, state: Instruction | None) -> int:
    """Says by how much a turn raises the number of the loop's state that its condition reads; 1 where it cannot be
    told.
    """
    index = None if state is None else re.search(r"index=(\d+)", state.text)
    body = self._attribute(loop, "body")
    made = _root(body)
    if index is None or made is None or made.operation != "tuple" or int(index[1]) >= len(made.operands):
      return 1
    grown = body.get(made.operands[int(index[1])])
    if grown is None or grown.operation != "add" or not _is_whole_number(grown):
      return 1
    steps = [body[name].integer for name in grown.operands if name in body]
    return next((step for step in steps if step is not None), 1)

  def _attribute(self, loop: Instruction, name: str) -> Computation:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", loop.text)
    return self.computations.get(found[1], {}) if found else {}


def read(text: str) -> Program:
  """Returns the program of which `compiled.as_text()` is the text."""
  entry, current, computations = "", {}, {}
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif found := _INSTRUCTION.match(line):
      root, name, result, operation, rest = found.groups()
      current[name] = Instruction(name, result, operation, rest, root is not None)
  assert entry, "no entry computation: not the text of a compiled program"
  return Program(entry, computations)


def numbers(text: str) -> tuple[int, ...]:
  """Returns the whole numbers of "4,8"; none of ""."""
  return tuple(int(number) for number in text.split(",") if number.strip())


def _root(computation: Computation) -> Instruction | None:
  return next((instruction for instruction in computation.values() if instruction.is_root), None)


def _is_whole_number(instruction: Instruction) -> bool:
  return re.match(r"[su]32\[\]", instruction.result) is not None
