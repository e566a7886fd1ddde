"""Zip files of torch.save: where their members lie. Nothing is unpacked; what cannot be such a file is refused.

torch stores its members as they are, one after another. So a member that is compressed, that lies in another or in
the directory, or that is larger than the file cannot be torch's, and the sizes that the directory declares are
those that the disk holds.
"""

from collections.abc import Iterator, Sequence
import concurrent.futures
import dataclasses
import struct
from typing import BinaryIO
import zlib

from glmjax.io import bucket_path
from glmjax.io import paths
from glmjax.io import printable
from glmjax.thudm import tensors

MOST_MEMBERS = 1 << 17  # one for each tensor, and a few
_LARGEST_DIRECTORY = 1 << 25  # bytes
_END, _END_64, _LOCATOR_64, _DIRECTORY, _LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
_COMMENT = 65_535  # bytes at most, behind the end record of 22
_WIDE = 0xFFFFFFFF  # "see the extra field"
_HEADER = 30  # bytes of a local header, before the name
_AT_ONCE = 16  # requests for headers
_PIECE = 1 << 22


@dataclasses.dataclass(frozen=True)
class Member:
  """A member that is stored as it is."""

  name: str
  start: int  # byte of the file
  size: int
  crc: int


def members(path: paths.Path) -> dict[str, Member] | None:
  """Returns the members of a zip file by name, in the order of their places; None when it is no zip file.

  Raises:
    Damaged: as the module says.
    OSError: when the file cannot be read.
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    found = _end(file, size)
    if found is None:
      return None
    count, length, start = found
    if count > MOST_MEMBERS or length > _LARGEST_DIRECTORY:
      raise tensors.Damaged(f"a zip file of {count:,} members in a directory of {length:,} bytes")
    file.seek(start)
    listed = sorted(_listed(file.read(length)), key=_place)
    if len(listed) != count:
      raise tensors.Damaged(f"a zip file of {count:,} members that lists {len(listed):,}")
    headers = _headers(path, file, [at for _, at, _, _ in listed])
  found, free = {}, 0
  for (name, at, member_size, crc), header in zip(listed, headers, strict=True):
    data = _data(header, name, at)
    if at < free or data + member_size > start:
      raise tensors.Damaged(f"the member {printable.line(name, 80)} lies in another or in the directory")
    if name in found:
      raise tensors.Damaged(f"two members {printable.line(name, 80)}")
    found[name], free = Member(name, data, member_size, crc), data + member_size
  return found


def _place(entry: tuple[str, int, int, int]) -> int:
  return entry[1]


def _read(file: BinaryIO, at: int, size: int) -> bytes:
  file.seek(at)
  found = file.read(size)
  if len(found) != size:
    raise tensors.Damaged("a zip file that ends within a record")
  return found


def _end(file: BinaryIO, size: int) -> tuple[int, int, int] | None:
  """Returns (members, bytes, first byte) of the directory, from the record at the file's end."""
  tail = _read(file, max(0, size - 22 - _COMMENT), min(size, 22 + _COMMENT))
  at = tail.rfind(_END)
  if at < 0 or len(tail) - at < 22:
    return None
  count, length, start = struct.unpack("<HII", tail[at + 10 : at + 20])
  before = size - len(tail) + at
  if before >= 20 and (locator := _read(file, before - 20, 20)).startswith(_LOCATOR_64):
    before = struct.unpack("<Q", locator[8:16])[0]
    record = _read(file, before, 56) if before < size else b""
    if not record.startswith(_END_64):
      raise tensors.Damaged("a zip file whose directory is not where it says")
    count, length, start = struct.unpack("<QQQ", record[32:56])
  if start + length > before:
    raise tensors.Damaged("a zip file whose directory is not where it says")
  return count, length, start


def _listed(directory: bytes) -> Iterator[tuple[str, int, int, int]]:
  """Yields (name, place of the local header, size, crc) of each member."""
  at = 0
  while at < len(directory):
    if not directory.startswith(_DIRECTORY, at) or len(directory) - at < 46:
      raise tensors.Damaged("a zip file with a damaged directory")
    flags, method = struct.unpack_from("<HH", directory, at + 8)
    crc, packed, size, name_length, extra_length, comment_length = struct.unpack_from("<IIIHHH", directory, at + 16)
    (place,) = struct.unpack_from("<I", directory, at + 42)
    at += 46
    name = directory[at : at + name_length].decode("utf-8", "replace")
    extra = directory[at + name_length : at + name_length + extra_length]
    at += name_length + extra_length + comment_length
    size, packed, place = _wide(extra, [size, packed, place])
    if method or packed != size or flags & 1:
      raise tensors.Damaged(
        f"the member {printable.line(name, 80)} is compressed or encrypted, which torch.save's never are"
      )
    yield name, place, size, crc
  if at != len(directory):
    raise tensors.Damaged("a zip file with a damaged directory")


def _wide(extra: bytes, numbers: list[int]) -> list[int]:
  """Returns the numbers of 32 bits, with those of 64 from the extra field where they are there."""
  at = 0
  while at + 4 <= len(extra):
    kind, length = struct.unpack_from("<HH", extra, at)
    if kind == 1:
      if at + 4 + length > len(extra):
        raise tensors.Damaged("a zip file with a cut zip64 field")
      wide = [value for (value,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])]
      return [wide.pop(0) if number == _WIDE and wide else number for number in numbers]
    at += 4 + length
  return numbers


def _headers(path: paths.Path, file: BinaryIO, places: Sequence[int]) -> list[bytes]:
  """Reads the local headers at these places; from a bucket many at a time, and no more than them."""
  if not isinstance(path, bucket_path.BucketPath):
    return [_read(file, at, _HEADER) for at in places]
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    return list(pool.map(lambda at: path.read_range(at, at + _HEADER), places))


def _data(header: bytes, name: str, at: int) -> int:
  """Returns the first byte of a member's data, behind its local header at `at`."""
  if len(header) != _HEADER:
    raise tensors.Damaged("a zip file that ends within a record")
  if not header.startswith(_LOCAL):
    raise tensors.Damaged(f"the member {printable.line(name, 80)} is not where the directory says")
  name_length, extra_length = struct.unpack("<HH", header[26:30])
  return at + _HEADER + name_length + extra_length


def read(path: paths.Path, member: Member, largest: int) -> bytes:
  """Reads all bytes of a member of at most `largest` bytes."""
  if member.size > largest:
    raise tensors.Damaged(
      f"{printable.line(member.name, 80)} has {member.size:,} bytes, {largest:,} at most being expected"
    )
  with path.open("rb") as file:
    return _read(file, member.start, member.size)


def damaged_member(path: paths.Path) -> str | None:
  """Returns the first member whose bytes are not those of its CRC; all are read, unless torch was told to leave CRCs
  out.
  """
  found = (members(path) or {}).values()
  if not any(member.crc for member in found):
    return None
  with path.open("rb") as file:
    for member in found:
      file.seek(member.start)
      left, crc = member.size, 0
      while left and (piece := file.read(min(_PIECE, left))):
        crc, left = zlib.crc32(piece, crc), left - len(piece)
      if crc != member.crc:
        return member.name
  return None
