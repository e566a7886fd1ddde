"""Files of torch.save, read and written without torch.

A pickle can call any function that it names. This reader gives it none but its own: names of torch's
tensors become descriptions of tensors, names of bookkeeping (optimizers, arguments, random states) become
objects that ignore all that is done to them, and any other name ends the reading.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import io
import math
import pathlib
import pickle
import struct
from typing import Any, BinaryIO
import zipfile

import ml_dtypes
import numpy as np

from glmjax import errors
from glmjax.thudm import tensors

_STORAGES = {"DoubleStorage": np.dtype("f8"), "FloatStorage": np.dtype("f4"), "HalfStorage": np.dtype("f2"),
             "BFloat16Storage": np.dtype(ml_dtypes.bfloat16), "LongStorage": np.dtype("i8"),
             "IntStorage": np.dtype("i4"), "ShortStorage": np.dtype("i2"), "CharStorage": np.dtype("i1"),
             "ByteStorage": np.dtype("u1"), "BoolStorage": np.dtype("?")}
# Whose objects training leaves beside the weights; they are read as nothing.
_IGNORED = ("torch", "numpy", "collections", "argparse", "deepspeed", "apex", "megatron", "fp16", "mpu", "sat",
            "SwissArmyTransformer", "_codecs", "copy_reg", "copyreg", "transformers")
_IGNORED_BUILTINS = ("set", "frozenset", "slice", "complex", "bytearray", "object", "list", "dict", "tuple", "int",
                     "float", "bool", "str", "bytes", "range", "long", "unicode")
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # a pickle of torch's magic number
_ALIGNMENT = 64  # bytes, of tensors in the files that are written; torch's own

Entry = tuple[np.dtype, tuple[int, ...]]


class _Inert:
  """What a pickle may hold but not change: BUILD, its means for that, calls __setstate__."""

  def _nothing(self, *_: Any) -> None:
    pass

  __setstate__ = _nothing


@dataclasses.dataclass(frozen=True)
class _StorageType(_Inert):
  dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Storage(_Inert):
  dtype: np.dtype
  key: str
  size: int  # elements


@dataclasses.dataclass(frozen=True)
class _Pending(_Inert):
  """A tensor whose storage has not been located yet."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Dict(_Inert, dict):
  """Stands for OrderedDict; a state dict's attributes are of no use here."""


class _Ignored(_Inert):
  """Stands for what holds no weights: whatever is done to it does nothing."""

  def __new__(cls, *_: Any, **__: Any) -> "_Ignored":
    return super().__new__(cls)

  def __init__(self, *_: Any, **__: Any):
    pass

  append = extend = add = update = __setitem__ = _Inert._nothing


class _RebuildTensor(_Inert):
  """torch._utils._rebuild_tensor_v2."""

  def __call__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...],
               *_: Any) -> _Pending:
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or not all(
        isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides)):
      raise pickle.UnpicklingError("a tensor without storage, shape or strides")
    if math.prod(shape) and offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) >= storage.size:
      raise pickle.UnpicklingError("a tensor outside of its storage")
    return _Pending(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter(_Inert):
  """torch._utils._rebuild_parameter."""

  def __call__(self, tensor: Any, *_: Any) -> Any:
    return tensor


_FUNCTIONS = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
}


class _Unpickler(pickle.Unpickler):
  """Knows tensors; see the module."""

  def __init__(self, file: BinaryIO, path: pathlib.Path):
    super().__init__(file, encoding="latin1")
    self._path = path

  def find_class(self, module_name: str, global_name: str) -> Any:
    if (module_name, global_name) in _FUNCTIONS:
      return _FUNCTIONS[module_name, global_name]
    if module_name == "torch" and global_name in _STORAGES:
      return _StorageType(_STORAGES[global_name])
    builtin = module_name in ("builtins", "__builtin__") and global_name in _IGNORED_BUILTINS
    if builtin or module_name.split(".")[0] in _IGNORED:
      return _Ignored
    raise errors.InputError(f"{self._path} asks for {module_name}.{global_name}, which no weights need: nothing of it "
                            "was run; do not load this file with other programs")

  def persistent_load(self, pid: Any) -> Any:
    kind, type_, key, _, size, *rest = pid
    if kind != "storage" or not isinstance(type_, _StorageType) or not isinstance(size, int) or any(rest):
      raise pickle.UnpicklingError(f"a storage {str(pid)[:60]}")
    return _Storage(type_.dtype, str(key), size)


def open_torch(path: pathlib.Path) -> Any:
  """What torch.save was given, with a `tensors.Tensor` for each tensor; objects of classes are nothing.

  Raises:
    errors.InputError: when the file is damaged, ends too early, or names functions that are not torch's.
  """
  try:
    with open(path, "rb") as file:
      if file.read(len(_LEGACY)) == _LEGACY:
        return _open_legacy(path, file)
    if not zipfile.is_zipfile(path):
      raise errors.InputError(f"{path} is truncated, or no file of torch.save: {path.stat().st_size} bytes without the "
                              "directory that its end should have; copy it again")
    with zipfile.ZipFile(path) as archive:
      return _open_zip(path, archive)
  except errors.InputError:
    raise
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {error.strerror or error}") from error
  except Exception as error:  # a damaged pickle can raise anything
    raise errors.InputError(f"{path} is damaged, or no file of torch.save ({type(error).__name__}: "
                            f"{str(error)[:100]}): copy it again") from error


def _open_zip(path: pathlib.Path, archive: zipfile.ZipFile) -> Any:
  [pickled] = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
  folder = pickled.removesuffix("data.pkl")
  if folder + "byteorder" in archive.namelist() and archive.read(folder + "byteorder") != b"little":
    raise errors.InputError(f"{path} was written on a big-endian machine: save it again on another")
  starts = {}
  with open(path, "rb") as file:
    for info in archive.infolist():
      if info.filename.startswith(folder + "data/"):
        file.seek(info.header_offset + 26)  # the lengths of the local header's name and extra field
        start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        tensors.check_inside(path, start + info.file_size)
        if info.compress_type != zipfile.ZIP_STORED:
          raise ValueError("compressed tensors")
        starts[info.filename.removeprefix(folder + "data/")] = start, info.file_size
  content = _Unpickler(io.BytesIO(archive.read(pickled)), path).load()

  def locate(storage: _Storage) -> int:
    start, size = starts[storage.key]
    if storage.size * storage.dtype.itemsize > size:
      raise ValueError(f"storage {storage.key} is too short")
    return start

  return _located(content, path, locate)


def _open_legacy(path: pathlib.Path, file: BinaryIO) -> Any:
  """Before torch 1.6: pickles of magic number, protocol, machine, content and storage keys, then the storages."""
  file.seek(0)
  _, protocol, machine = (_Unpickler(file, path).load() for _ in range(3))
  if protocol != 1001 or not machine["little_endian"]:
    raise ValueError(f"protocol {protocol}")
  content = _Unpickler(file, path).load()
  keys = _Unpickler(file, path).load()
  dtypes = {storage.key: storage.dtype for storage in _storages(content)}
  starts = {}
  for key in keys:
    size = int.from_bytes(file.read(8), "little")
    starts[key] = file.tell()
    file.seek(size * dtypes.get(key, np.dtype("u1")).itemsize, io.SEEK_CUR)
    if key not in dtypes:
      raise ValueError(f"storage {key} has no tensor")
  tensors.check_inside(path, file.tell())
  return _located(content, path, lambda storage: starts[storage.key])


def _storages(content: Any) -> Iterator[_Storage]:
  if isinstance(content, _Pending):
    yield content.storage
  elif isinstance(content, _Storage):
    yield content
  elif isinstance(content, Mapping):
    for value in content.values():
      yield from _storages(value)
  elif isinstance(content, list | tuple):
    for value in content:
      yield from _storages(value)


def _located(content: Any, path: pathlib.Path, locate: Any) -> Any:
  """Tensors in place of pending ones, in dicts and lists however deep."""
  if isinstance(content, _Pending):
    storage = content.storage
    start = locate(storage) + content.offset * storage.dtype.itemsize
    return tensors.Tensor(path, start, storage.dtype, content.shape, content.strides)
  if isinstance(content, Mapping):
    return {key: _located(value, path, locate) for key, value in content.items()}
  if isinstance(content, list | tuple):
    return [_located(value, path, locate) for value in content]
  return content


def open_state_dict(path: pathlib.Path) -> dict[str, tensors.Tensor]:
  """The weights of a file: its "module", or the file itself where that is a dict of tensors.

  Raises:
    errors.InputError: as `open_torch`; when there is anything but tensors.
  """
  content = open_torch(path)
  for name in ("module", "state_dict"):
    if isinstance(content, dict) and isinstance(content.get(name), dict):
      content = content[name]
  if not isinstance(content, dict) or not content:
    raise errors.InputError(f"{path} holds no weights: expected a dict of tensors")
  for name, value in content.items():
    if not isinstance(value, tensors.Tensor):
      raise errors.InputError(f"{path}: {str(name)[:80]} is no tensor; expected a dict of tensors")
  return content


class TorchWriter:
  """Writes a state dict as torch.save does, tensor by tensor, the data in pieces.

  Args:
    path: of the file.
    entries: dtypes and shapes by name, in the order in which `write` will be called.
    inside: the state dict is the value of this key of a dict; None: it is the content itself.
  """

  def __init__(self, path: pathlib.Path, entries: Mapping[str, Entry], inside: str | None = None):
    self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
    self._folder, self._count = path.stem, 0
    self._put("data.pkl", [_pickled(entries, inside)])
    self._put("byteorder", [b"little"])

  def write(self, pieces: Iterable[bytes | memoryview]) -> None:
    """The next tensor's elements."""
    self._put(f"data/{self._count}", pieces)
    self._count += 1

  def close(self) -> None:
    """Completes the file."""
    self._put("version", [b"3\n"])
    self._archive.close()

  def _put(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
    info = zipfile.ZipInfo(f"{self._folder}/{name}")
    # The header has 30 bytes, the name, zip64's sizes (20) and this filling before the data.
    before = self._archive.start_dir + 30 + len(info.filename) + 20 + 4
    info.extra = struct.pack("<HH", 0x4246, -before % _ALIGNMENT) + b"Z" * (-before % _ALIGNMENT)
    with self._archive.open(info, "w", force_zip64=True) as file:
      for piece in pieces:
        file.write(piece)


def _pickled(entries: Mapping[str, Entry], inside: str | None) -> bytes:
  """The pickle, protocol 2, of a dict of tensors whose storages are numbered in order."""
  storages = {dtype: name for name, dtype in _STORAGES.items()}
  text = lambda s: b"X" + struct.pack("<I", len(s.encode())) + s.encode()
  number = lambda n: b"\x8a\x08" + struct.pack("<q", n)
  numbers = lambda ns: b"(" + b"".join(map(number, ns)) + b"t"
  out = [b"\x80\x02"]
  if inside is not None:
    out += [b"}", text(inside)]
  out.append(b"}(")
  for i, (name, (dtype, shape)) in enumerate(entries.items()):
    storage = [text("storage"), b"ctorch\n" + storages[dtype].encode() + b"\n", text(str(i)), text("cpu"),
               number(math.prod(shape))]
    out += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n", b"((", *storage, b"tQ", number(0), numbers(shape),
            numbers(tensors.contiguous(shape)), b"\x89ccollections\nOrderedDict\n)RtR"]
  out.append(b"u" + (b"s" if inside is not None else b"") + b".")
  return b"".join(out)
