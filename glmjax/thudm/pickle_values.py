"""What a pickle of torch.save may hold: descriptions of tensors and storages, dicts, and what is read as nothing."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from glmjax.io import user_json
from glmjax.thudm import tensors

MOST_AXES = 32  # of a tensor
LARGEST_NUMBER = 1 << 62  # of elements, in sizes and strides

STORAGES = {
  "DoubleStorage": np.dtype("f8"),
  "FloatStorage": np.dtype("f4"),
  "HalfStorage": np.dtype("f2"),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype("i8"),
  "IntStorage": np.dtype("i4"),
  "ShortStorage": np.dtype("i2"),
  "CharStorage": np.dtype("i1"),
  "ByteStorage": np.dtype("u1"),
  "BoolStorage": np.dtype("?"),
}
# Whose objects training leaves beside the weights; they are read as nothing.
_IGNORED_MODULES = (
  "torch",
  "numpy",
  "collections",
  "argparse",
  "deepspeed",
  "apex",
  "megatron",
  "fp16",
  "mpu",
  "sat",
  "SwissArmyTransformer",
  "_codecs",
  "copy_reg",
  "copyreg",
  "transformers",
)
_IGNORED_BUILTINS = (
  "set",
  "frozenset",
  "slice",
  "complex",
  "bytearray",
  "object",
  "list",
  "dict",
  "tuple",
  "int",
  "float",
  "bool",
  "str",
  "bytes",
  "range",
  "long",
  "unicode",
)


@dataclasses.dataclass(frozen=True)
class Name:
  """What a pickle may call, or take for a class."""

  name: str  # dict, tensor, parameter, storage, ignored
  dtype: np.dtype | None = None  # of a storage


@dataclasses.dataclass(frozen=True)
class Storage:
  """A stretch of the file that tensors lie in."""

  dtype: np.dtype
  key: str
  size: int  # elements


@dataclasses.dataclass(frozen=True)
class Pending:
  """A tensor whose storage has not been located yet."""

  storage: Storage
  offset: int  # elements from the storage's start
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class Dict:
  """A dict of the pickle: values by the keys that are strings, and whether there were others."""

  def __init__(self, pairs: Sequence[Any] = ()) -> None:
    self.items: dict[str, Any] = {}
    self.has_other_keys = False
    self.put(pairs)

  def put(self, pairs: Sequence[Any]) -> None:
    """Takes keys and values in turn."""
    if len(pairs) % 2:
      raise tensors.Damaged("a key without a value")
    for i in range(0, len(pairs), 2):
      if type(pairs[i]) is str:
        self.items[pairs[i]] = pairs[i + 1]
      else:  # hashing whatever it is could take for ever
        self.has_other_keys = True


IGNORED = Name("ignored")
_DICT, _TENSOR, _PARAMETER = Name("dict"), Name("tensor"), Name("parameter")
_NAMES = {
  ("collections", "OrderedDict"): _DICT,
  ("torch._utils", "_rebuild_tensor"): _TENSOR,
  ("torch._utils", "_rebuild_tensor_v2"): _TENSOR,
  ("torch._utils", "_rebuild_parameter"): _PARAMETER,
  ("torch._utils", "_rebuild_parameter_with_state"): _PARAMETER,
  **{("torch", name): Name("storage", dtype) for name, dtype in STORAGES.items()},
}


def look_up(module: str, name: str) -> Name | None:
  """Returns what a name means; None where no weights need it."""
  if (module, name) in _NAMES:
    return _NAMES[module, name]
  builtin = module in ("builtins", "__builtin__") and name in _IGNORED_BUILTINS
  return IGNORED if builtin or module.split(".", 1)[0] in _IGNORED_MODULES else None


def is_size(value: Any) -> bool:
  """Tells whether it is a whole number that sizes, strides and offsets may be."""
  return type(value) is int and 0 <= value <= LARGEST_NUMBER


def kind(value: Any) -> str:
  """Says in words what kind of value it is."""
  return f"a {type(value).__name__.strip('_').lower()}"


def ignore(arguments: Sequence[Any]) -> Name:
  """Returns IGNORED for what is called and read as nothing."""
  return IGNORED


def parameter(arguments: tuple[Any, ...]) -> Any:
  """Returns the tensor that a parameter is made of."""
  return arguments[0]


def tensor(arguments: tuple[Any, ...]) -> Pending:
  """Makes a tensor of (storage, offset, shape, strides, ...); it must lie in its storage, and hold no more elements
  than that.
  """
  storage, offset, shape, strides = arguments[:4] if len(arguments) >= 4 else (None,) * 4
  if not isinstance(storage, Storage) or type(shape) is not tuple or type(strides) is not tuple:
    raise tensors.Damaged("a tensor without storage, shape or strides")
  if len(shape) != len(strides) or len(shape) > MOST_AXES or not all(map(is_size, (offset, *shape, *strides))):
    raise tensors.Damaged("a tensor without storage, shape or strides")
  count, last = 1, offset
  for size, stride in zip(shape, strides):
    count *= size
    last += (size - 1) * stride
  if count and (last >= storage.size or count > storage.size):
    raise tensors.Damaged("a tensor outside of its storage")
  return Pending(storage, offset, shape, strides)


# Values that are written as text, and as bytes.


def whole_number(line: bytes) -> Any:
  """Reads a number, or a truth value, in decimal digits; IGNORED where they are too many for Python."""
  if line in (b"00", b"01"):
    return line == b"01"
  return int(line.removesuffix(b"L")) if len(line) <= user_json.MOST_DIGITS else IGNORED


def quoted(line: bytes) -> Any:
  """Reads a string in quotes; IGNORED where it has escapes."""
  line = line.strip()
  if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
    raise tensors.Damaged("a string without quotes")
  return IGNORED if b"\\" in line else line[1:-1].decode("latin-1")


def long(data: bytes) -> Any:
  """Reads a number in little-endian bytes; IGNORED where they are more than 255."""
  return int.from_bytes(data, "little", signed=True) if len(data) <= 255 else IGNORED


def utf_8(data: bytes) -> str:
  """Reads text, surrogates included."""
  return data.decode("utf-8", "surrogatepass")


def latin_1(data: bytes) -> str:
  """Reads text of Python 2's strings."""
  return data.decode("latin-1")


def raw_unicode(line: bytes) -> str:
  """Reads text of protocol 0's strings."""
  return line.decode("raw-unicode-escape")
