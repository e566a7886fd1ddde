"""Files of torch.save, read and written without torch: zip files, and the pickles from before torch 1.6."""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import math
import struct
from typing import Any
import zipfile

import numpy as np

from glmjax import errors
from glmjax.io import downloads
from glmjax.io import paths
from glmjax.io import printable
from glmjax.io import user_text
from glmjax.thudm import pickle_values
from glmjax.thudm import pickles
from glmjax.thudm import tensors
from glmjax.thudm import zips

_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # a pickle of torch's magic number
_LEGACY_PROTOCOL = 1001
_ALIGNMENT = 64  # bytes, of tensors in the files that are written; torch's own
_MOST_SHARED = 2  # times that the file's bytes may be in its tensors: a table may be the head, too

Entry = tuple[np.dtype, tuple[int, ...]]


def open_state_dict(path: paths.Path) -> dict[str, tensors.Tensor]:
  """Returns the weights of a file: its "module" or "state_dict", or the file itself where that is a dict of tensors.

  Raises:
    errors.InputError: when the file is damaged, ends too early, names functions that are not torch's, is a failed
      download, or holds anything but tensors.
  """
  content, starts = _opened(path)
  for name in ("module", "state_dict"):
    if isinstance(content, pickle_values.Dict) and isinstance(content.items.get(name), pickle_values.Dict):
      content = content.items[name]
  if not isinstance(content, pickle_values.Dict) or not content.items or content.has_other_keys:
    raise errors.InputError(f"{path} holds no weights: expected a dict of tensors")
  found = {}
  for name, value in content.items.items():
    if not isinstance(value, pickle_values.Pending):
      raise errors.InputError(f"{path}: {printable.line(name, 80)} is no tensor; expected a dict of tensors")
    found[name] = _located(value, path, starts)
  if (total := sum(tensor.nbytes for tensor in found.values())) > _MOST_SHARED * path.stat().st_size:
    raise errors.InputError(
      f"{path} is damaged: its tensors take {total:,} bytes, and the file has {path.stat().st_size:,}; copy it again"
    )
  return found


def _opened(path: paths.Path) -> tuple[Any, dict[str, tuple[int, int]]]:
  """Returns what torch.save was given, and the first byte and the size of each storage in bytes."""
  user_text.check_regular(path)
  try:
    with path.open("rb") as file:
      start = file.read(downloads.HEAD)
    downloads.check(start, str(path))
    if start.startswith(_LEGACY):
      return _open_legacy(path)
    members = zips.members(path)
    if members is None:
      raise errors.InputError(
        f"{path} is truncated, or no file of torch.save: {path.stat().st_size} bytes without the "
        "directory that its end should have; copy it again"
      )
    return _open_zip(path, members)
  except errors.InputError:  # a ValueError, too
    raise
  except OSError as error:
    raise errors.InputError(f"cannot read {path}: {errors.reason(error)}") from error
  except ValueError as error:
    raise errors.InputError(
      f"{path} is damaged, or no file of torch.save ({printable.line(error, 100)}): copy it again"
    ) from error


def _open_zip(path: paths.Path, members: Mapping[str, zips.Member]) -> tuple[Any, dict[str, tuple[int, int]]]:
  pickled = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
  if len(pickled) != 1:
    raise tensors.Damaged(f"a zip file with {len(pickled)} data.pkl")
  folder = pickled[0].removesuffix("data.pkl")
  order = members.get(folder + "byteorder")
  if order is not None and zips.read(path, order, 16) != b"little":
    raise errors.InputError(f"{path} was written on a big-endian machine: save it again on another")
  content = pickles.Reader(zips.read(path, members[pickled[0]], pickles.LARGEST), str(path)).read()
  data = folder + "data/"
  return content, {
    name.removeprefix(data): (member.start, member.size) for name, member in members.items() if name.startswith(data)
  }


def _open_legacy(path: paths.Path) -> tuple[Any, dict[str, tuple[int, int]]]:
  """Opens a file from before torch 1.6: pickles of magic number, protocol, machine, content and storage keys, then
  the storages.
  """
  end = path.stat().st_size
  with path.open("rb") as file:
    reader = pickles.Reader(file.read(pickles.LARGEST), str(path))
  _, protocol, machine = (reader.read() for _ in range(3))
  if type(protocol) is not int or protocol != _LEGACY_PROTOCOL:
    raise tensors.Damaged("a protocol that is not torch's")
  if not isinstance(machine, pickle_values.Dict) or machine.items.get("little_endian") is not True:
    raise tensors.Damaged("a machine that is not little-endian")
  content, keys = reader.read(), reader.read()
  if type(keys) is not list:
    raise tensors.Damaged("no list of storages")
  starts, place = {}, reader.place
  for key in keys:
    storage = reader.storages.get(key) if type(key) is str else None
    if storage is None or key in starts:
      raise tensors.Damaged("a storage without tensor")
    tensors.check_inside(path, end, place + 8)
    size = int.from_bytes(tensors.read_bytes(path, place, 8).tobytes(), "little") * storage.dtype.itemsize
    starts[key], place = (place + 8, size), place + 8 + size
    tensors.check_inside(path, end, place)
  return content, starts


def _located(tensor: pickle_values.Pending, path: paths.Path, starts: Mapping[str, tuple[int, int]]) -> tensors.Tensor:
  storage = tensor.storage
  if storage.key not in starts:
    raise errors.InputError(f"{path} is damaged: storage {printable.line(storage.key, 40)} is missing; copy it again")
  start, size = starts[storage.key]
  if storage.size * storage.dtype.itemsize > size:
    raise errors.InputError(f"{path} is damaged: storage {printable.line(storage.key, 40)} is too short; copy it again")
  return tensors.Tensor(
    path, start + tensor.offset * storage.dtype.itemsize, storage.dtype, tensor.shape, tensor.strides
  )


class TorchWriter:
  """Writes a state dict as torch.save does, tensor by tensor, the data in pieces; as a context, it is closed behind it.

  Args:
    path: of the file.
    entries: dtypes and shapes by name, in the order in which `write` will be called.
    inside: the state dict is the value of this key of a dict; None: it is the content itself.
  """

  def __init__(self, path: paths.Path, entries: Mapping[str, Entry], inside: str | None = None):
    self._stream = path.open("wb")
    self._archive = zipfile.ZipFile(self._stream, "w", zipfile.ZIP_STORED, allowZip64=True)
    self._folder, self._count = path.stem, 0
    with contextlib.ExitStack() as stack:
      stack.push(self)  # closes the file where its beginning cannot be written
      self._put("data.pkl", [_pickled(entries, inside)])
      self._put("byteorder", [b"little"])
      stack.pop_all()

  def write(self, pieces: Iterable[bytes | memoryview]) -> None:
    """Writes the next tensor's elements."""
    self._put(f"data/{self._count}", pieces)
    self._count += 1

  def __enter__(self) -> "TorchWriter":
    return self

  def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
    if kind is None:
      self.close()
      return
    self._archive.fp = None  # it would write its directory when it is collected
    with contextlib.suppress(OSError):
      self._stream.__exit__(kind, *rest)

  def close(self) -> None:
    """Completes the file."""
    with self._stream:
      try:
        self._put("version", [b"3\n"])
        self._archive.close()
      finally:
        self._archive.fp = None

  def _put(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
    info = zipfile.ZipInfo(f"{self._folder}/{name}")
    # The header has 30 bytes, the name, zip64's sizes (20) and this filling before the data.
    before = self._archive.start_dir + 30 + len(info.filename) + 20 + 4
    info.extra = struct.pack("<HH", 0x4246, -before % _ALIGNMENT) + b"Z" * (-before % _ALIGNMENT)
    with self._archive.open(info, "w", force_zip64=True) as file:
      for piece in pieces:
        file.write(piece)


def _pickled_text(text: str) -> bytes:
  return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _pickled_number(number: int) -> bytes:
  return b"\x8a\x08" + struct.pack("<q", number)


def _pickled_numbers(numbers: Sequence[int]) -> bytes:
  return b"(" + b"".join(map(_pickled_number, numbers)) + b"t"


def _pickled(entries: Mapping[str, Entry], inside: str | None) -> bytes:
  """Returns the pickle, protocol 2, of a dict of tensors whose storages are numbered in order."""
  storages = {dtype: name for name, dtype in pickle_values.STORAGES.items()}
  out = [b"\x80\x02"]
  if inside is not None:
    out += [b"}", _pickled_text(inside)]
  out.append(b"}(")
  for i, (name, (dtype, shape)) in enumerate(entries.items()):
    storage = [
      _pickled_text("storage"),
      b"ctorch\n" + storages[dtype].encode() + b"\n",
      _pickled_text(str(i)),
      _pickled_text("cpu"),
      _pickled_number(math.prod(shape)),
    ]
    out += [
      _pickled_text(name),
      b"ctorch._utils\n_rebuild_tensor_v2\n",
      b"((",
      *storage,
      b"tQ",
      _pickled_number(0),
      _pickled_numbers(shape),
      _pickled_numbers(tensors.contiguous(shape)),
      b"\x89ccollections\nOrderedDict\n)RtR",
    ]
  out.append(b"u" + (b"s" if inside is not None else b"") + b".")
  return b"".join(out)
