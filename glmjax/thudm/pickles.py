"""Pickles of torch.save, read by a machine of our own that runs nothing and cannot be kept busy.

A pickle is a program for a stack machine. This one knows the instructions and none of Python's objects: names of
torch's tensors become descriptions of tensors, names of bookkeeping (optimizers, arguments, random states) become
IGNORED, whatever is done to it, and any other name ends the reading. Each instruction costs as much as it has
bytes, or takes from the stack; nothing is hashed but strings, and nothing is compared, copied, printed or walked
through, so that the time is that of reading the bytes, however often a value contains another.
"""

from collections.abc import Callable
import struct
from typing import Any

from glmjax import errors
from glmjax.io import printable
from glmjax.thudm import pickle_values as values
from glmjax.thudm import tensors

LARGEST = 1 << 26  # bytes; the pickle of a GLM-130B rank has 0.2 MB
MOST_STEPS = 1 << 20  # instructions, and items taken apart: about 40 for each tensor


class Reader:
  """Reads pickles that follow each other in memory.

  Args:
    data: the bytes.
    where: names the file in errors.
  """

  def __init__(self, data: bytes, where: str):
    self.place = 0  # of the next byte
    self.storages: dict[str, values.Storage] = {}  # all that were named
    self._data, self._where = data, where
    self._steps = 0
    self._stack: list[Any] = []
    self._marked: list[list[Any]] = []  # the stacks below each mark
    self._memo: dict[int, Any] = {}

  def read(self) -> Any:
    """Reads one pickle: strings, numbers, tuples, lists, None; Dict, Pending, Storage; IGNORED for anything else.

    Raises:
      Damaged: for bytes that are no pickle of torch.save's.
      errors.InputError: when it asks for a name that no weights need, or has too many steps.
    """
    self._stack, self._marked, self._memo = [], [], {}
    try:
      while True:
        code = self._take(1)
        self._spend(1)
        if code == b".":
          return self._stack.pop()
        if code not in _INSTRUCTIONS:
          raise tensors.Damaged(f"no instruction {code!r} at byte {self.place - 1}")
        method, arguments = _INSTRUCTIONS[code]
        method(self, *arguments)
    except (IndexError, KeyError, OverflowError) as error:
      raise tensors.Damaged(f"an instruction at byte {self.place - 1} finds nothing on the stack") from error

  # Bytes.

  def _spend(self, steps: int) -> None:
    self._steps += steps
    if self._steps > MOST_STEPS:
      raise errors.InputError(
        f"{self._where}: its pickle has more than {MOST_STEPS:,} steps, which no weights need: save the weights alone"
      )

  def _take(self, size: int) -> bytes:
    found = self._data[self.place : self.place + size]
    if len(found) != size:
      raise tensors.Damaged(f"a pickle that ends within a value, at byte {len(self._data)}")
    self.place += size
    return found

  def _number(self, form: str) -> Any:
    return struct.unpack(form, self._take(struct.calcsize(form)))[0]

  def _line(self) -> bytes:
    end = self._data.find(b"\n", self.place)
    if end < 0:
      raise tensors.Damaged(f"a pickle that ends within a line, at byte {len(self._data)}")
    line, self.place = self._data[self.place : end], end + 1
    return line

  # Stack.

  def _push(self, value: Any) -> None:
    self._stack.append(value)

  def _push_number(self, form: str) -> None:
    self._push(self._number(form))

  def _push_counted(self, form: str, convert: Callable[[bytes], Any]) -> None:
    """Pushes what a length and so many bytes behind it say."""
    size = self._number(form)
    if size < 0:
      raise tensors.Damaged(f"a value of {size} bytes")
    self._push(convert(self._take(size)))

  def _push_line(self, convert: Callable[[bytes], Any]) -> None:
    self._push(convert(self._line()))

  def _since_mark(self) -> list[Any]:
    items, self._stack = self._stack, self._marked.pop()
    self._spend(len(items))
    return items

  def _mark(self) -> None:
    self._marked.append(self._stack)
    self._stack = []

  def _pop(self) -> None:
    if self._stack:
      self._stack.pop()
    else:
      self._stack = self._marked.pop()

  def _duplicate(self) -> None:
    self._push(self._stack[-1])

  def _tuple(self, count: int) -> None:
    if len(self._stack) < count:
      raise IndexError
    items = tuple(self._stack[-count:])
    del self._stack[-count:]
    self._push(items)

  # Memo: the place is a number in the bytes (its form), in a line (None), or the next one.

  def _remember(self, form: str | None) -> None:
    key = len(self._memo) if form == "next" else self._key(form)
    self._memo[key] = self._stack[-1]

  def _recall(self, form: str | None) -> None:
    self._push(self._memo[self._key(form)])

  def _key(self, form: str | None) -> int:
    if form is not None:
      return self._number(form)
    line = self._line()
    if len(line) > 9:
      raise tensors.Damaged(f"a place of {len(line)} digits")
    return int(line)

  # Collections.

  def _make(self, kind: type) -> None:
    self._push(kind())

  def _collect(self, make: Callable[[list[Any]], Any]) -> None:
    self._push(make(self._since_mark()))

  def _append(self, many: bool) -> None:
    items = self._since_mark() if many else [self._stack.pop()]
    target = self._stack[-1]
    if type(target) is list:
      target.extend(items)
    elif target is not values.IGNORED:
      raise tensors.Damaged(f"items for {values.kind(target)}")

  def _put(self, many: bool) -> None:
    pairs = self._since_mark() if many else self._stack[-2:]
    if not many:
      del self._stack[-2:]
    target = self._stack[-1]
    if isinstance(target, values.Dict):
      target.put(pairs)
    elif target is not values.IGNORED:
      raise tensors.Damaged(f"keys for {values.kind(target)}")

  # Names, calls, storages.

  def _look_up(self, module: Any, name: Any) -> values.Name:
    if type(module) is not str or type(name) is not str:
      raise tensors.Damaged("a name that is no string")
    if found := values.look_up(module, name):
      return found
    raise errors.InputError(
      f"{self._where} asks for {printable.line(module, 80)}.{printable.line(name, 80)}, which no "
      "weights need: nothing of it was run; do not load this file with other programs"
    )

  def _global(self) -> None:
    module, name = (self._line().decode("utf-8") for _ in range(2))
    self._push(self._look_up(module, name))

  def _stack_global(self) -> None:
    name, module = self._stack.pop(), self._stack.pop()
    self._push(self._look_up(module, name))

  def _call(self, function: Any, arguments: Any) -> None:
    if not isinstance(function, values.Name) or function.name == "storage":
      raise tensors.Damaged(f"a call of {values.kind(function)}")
    if type(arguments) is not tuple:
      raise tensors.Damaged(f"a call with {values.kind(arguments)}")
    makers = {"ignored": values.ignore, "dict": self._dict, "tensor": values.tensor, "parameter": values.parameter}
    self._push(makers[function.name](arguments))

  def _dict(self, arguments: tuple[Any, ...]) -> values.Dict:
    """Makes the dict of OrderedDict(), and of Python 2's OrderedDict([[key, value], ...])."""
    found, pairs = values.Dict(), arguments[0] if arguments else []
    if type(pairs) is not list:
      raise tensors.Damaged(f"a dict of {values.kind(pairs)}")
    self._spend(len(pairs))
    for pair in pairs:
      if type(pair) not in (list, tuple) or len(pair) != 2:
        raise tensors.Damaged("a dict of other things than pairs")
      found.put(list(pair))
    return found

  def _reduce(self) -> None:
    arguments, function = self._stack.pop(), self._stack.pop()
    self._call(function, arguments)

  def _new_with_keywords(self) -> None:
    self._stack.pop()
    self._reduce()

  def _object(self) -> None:
    items = self._since_mark()
    self._call(items[0], tuple(items[1:]))

  def _instance(self) -> None:
    function = self._look_up(*(self._line().decode("utf-8") for _ in range(2)))
    self._call(function, tuple(self._since_mark()))

  def _persistent(self) -> None:
    """Takes in ("storage", type, key, device, elements); a sixth, None, in old files."""
    pid = self._stack.pop()
    if type(pid) is not tuple or not 5 <= len(pid) <= 6 or type(pid[0]) is not str or pid[0] != "storage":
      raise tensors.Damaged("a storage that is not described as one")
    kind, key, size = pid[1], pid[2], pid[4]
    if (
      not isinstance(kind, values.Name)
      or kind.dtype is None
      or type(key) not in (str, int)
      or any(other is not None for other in pid[5:])
      or not values.is_size(size)
    ):
      raise tensors.Damaged("a storage that is not described as one")
    storage = values.Storage(kind.dtype, str(key), size)
    if self.storages.setdefault(storage.key, storage) != storage:
      raise tensors.Damaged(f"storage {printable.line(storage.key, 40)} is described in two ways")
    self._push(storage)


# By their codes: a method, and its arguments.
_INSTRUCTIONS = {
  code: (method, arguments)
  for code, (method, *arguments) in {
    b"\x80": (Reader._take, 1),
    b"\x95": (Reader._take, 8),  # protocol, frame
    b"N": (Reader._push, None),
    b"\x88": (Reader._push, True),
    b"\x89": (Reader._push, False),
    b"J": (Reader._push_number, "<i"),
    b"K": (Reader._push_number, "<B"),
    b"M": (Reader._push_number, "<H"),
    b"G": (Reader._push_number, ">d"),
    b"F": (Reader._push_line, float),
    b"I": (Reader._push_line, values.whole_number),
    b"L": (Reader._push_line, values.whole_number),
    b"\x8a": (Reader._push_counted, "<B", values.long),
    b"\x8b": (Reader._push_counted, "<i", values.long),
    b"S": (Reader._push_line, values.quoted),
    b"V": (Reader._push_line, values.raw_unicode),
    b"U": (Reader._push_counted, "<B", values.latin_1),
    b"T": (Reader._push_counted, "<i", values.latin_1),
    b"\x8c": (Reader._push_counted, "<B", values.utf_8),
    b"X": (Reader._push_counted, "<I", values.utf_8),
    b"\x8d": (Reader._push_counted, "<Q", values.utf_8),
    b"C": (Reader._push_counted, "<B", bytes),
    b"B": (Reader._push_counted, "<I", bytes),
    b"\x8e": (Reader._push_counted, "<Q", bytes),
    b"\x96": (Reader._push_counted, "<Q", bytes),
    b"(": (Reader._mark,),
    b"0": (Reader._pop,),
    b"1": (Reader._since_mark,),
    b"2": (Reader._duplicate,),
    b")": (Reader._push, ()),
    b"\x85": (Reader._tuple, 1),
    b"\x86": (Reader._tuple, 2),
    b"\x87": (Reader._tuple, 3),
    b"t": (Reader._collect, tuple),
    b"l": (Reader._collect, list),
    b"d": (Reader._collect, values.Dict),
    b"]": (Reader._make, list),
    b"}": (Reader._make, values.Dict),
    b"a": (Reader._append, False),
    b"e": (Reader._append, True),
    b"s": (Reader._put, False),
    b"u": (Reader._put, True),
    b"\x8f": (Reader._push, values.IGNORED),
    b"\x90": (Reader._since_mark,),
    b"\x91": (Reader._collect, values.ignore),  # sets
    b"p": (Reader._remember, None),
    b"q": (Reader._remember, "<B"),
    b"r": (Reader._remember, "<I"),
    b"\x94": (Reader._remember, "next"),
    b"g": (Reader._recall, None),
    b"h": (Reader._recall, "<B"),
    b"j": (Reader._recall, "<I"),
    b"c": (Reader._global,),
    b"\x93": (Reader._stack_global,),
    b"R": (Reader._reduce,),
    b"\x81": (Reader._reduce,),
    b"\x92": (Reader._new_with_keywords,),
    b"o": (Reader._object,),
    b"i": (Reader._instance,),
    b"b": (Reader._pop,),  # BUILD: the state of what is not built
    b"Q": (Reader._persistent,),
  }.items()
}
