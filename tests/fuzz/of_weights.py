"""Inputs that are files of weights: safetensors and pickles in zip files."""

import functools
import io
import json
import pathlib
import random
import struct
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import hostile_files

from fuzz import odd
from fuzz.case import Case


class _Bombs(NamedTuple):
  pickles: dict[str, bytes]  # in zip files
  zips: dict[str, bytes]
  headers: dict[str, bytes]  # of safetensors


@functools.cache
def _bombs() -> _Bombs:
  """Files that ask for far more than their bytes, by what they do."""
  pickled = {name: hostile_files.stored({"archive/data.pkl": data}) for name, data in hostile_files.bombs().items()}
  return _Bombs(pickled, hostile_files.zip_bombs(), hostile_files.safetensors_bombs())


def safetensors(r: random.Random, world: pathlib.Path) -> Case:
  """A spoiled shard of the Hub's folder: its header, the header's length, its bytes."""
  name = sorted(path.name for path in (world / "hub").glob("*.safetensors"))[0]
  good = (world / "hub" / name).read_bytes()
  length = int.from_bytes(good[:8], "little")
  header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
  how = r.randrange(6)
  if how == 5:
    about = r.choice(sorted(_bombs().headers))
    content, verdict = _bombs().headers[about], odd.EITHER if about == "an empty one" else odd.BAD
  elif how == 0:
    about, content, verdict = odd.spoiled_bytes(r, good)
    verdict = odd.EITHER if about in ("cut", "without its beginning") else verdict
  elif how == 1:
    size = r.choice((0, 1, 2, length - 1, length + 1, len(good), len(good) - 8, 2**31, 2**63, 2**64 - 1))
    about, content, verdict = f"a header of {size}", size.to_bytes(8, "little") + good[8:], odd.BAD
  elif how == 2:
    about, text, verdict = odd.spoiled_json(r, header)
    verdict = odd.EITHER if verdict == odd.GOOD or len(text) < 2 else verdict
    content = len(text).to_bytes(8, "little") + text + data
  else:
    key = r.choice([key for key in header if key != "__metadata__"])
    text, entry = json.dumps(header), header[key]
    field = r.choice(("dtype", "shape", "data_offsets"))
    wrong = r.choice(
      (
        "1e999",
        "[1e999]",
        "[-1, 4]",
        "null",
        "[null]",
        "{}",
        '""',
        '"F8_E4M3"',
        '"BF16"',
        "[0, 1e30]",
        "[]",
        "[9223372036854775807, 9223372036854775807]",
        "[2, 2, 2]",
        "[4294967296, 4294967296]",
        "[true]",
        '["1"]',
        "[0.5]",
        "NaN",
        "[" * 3_000 + "]" * 3_000,
        "[0, 0]",
        "[1, 0]",
        "9" * 5_000,
        "[" + "1," * 100_000 + "1]",
      )
    )
    text = text.replace(json.dumps(entry), json.dumps(entry | {field: "@@"}).replace('"@@"', wrong), 1).encode()
    about, verdict = f"{field} {wrong[:20]}", odd.BAD
    if (
      wrong == '"BF16"'
      or json.dumps(entry[field]) == wrong
      or wrong == "[" + "1," * 100_000 + "1]"
      and field == "shape"
    ):
      verdict = odd.EITHER
    content = len(text).to_bytes(8, "little") + text + data
  argv = r.choice((("inspect", f"hub/{name}"), ("inspect", "hub"), ("import", "chatglm-6b", "hub", "new")))
  if argv == ("inspect", "hub") and verdict == odd.BAD and about == "flipped":
    verdict = odd.EITHER
  return Case(about, argv, ("hub", name), verdict, {f"hub/{name}": content}, ("hub",), out="new")


def pickles(r: random.Random, world: pathlib.Path) -> Case:
  """A spoiled file of torch.save, in the Hub's folder or among the ranks."""
  folder, name = r.choice(
    (("bin", sorted(p.name for p in (world / "bin").glob("*.bin"))[0]), ("ranks", "49300/mp_rank_01_model_states.pt"))
  )
  good = (world / folder / name).read_bytes()
  how = r.randrange(5)
  if how == 0:
    about, content, verdict = odd.spoiled_bytes(r, good)
    verdict = odd.EITHER if about in ("twice", "without its beginning") else verdict
  elif how == 4:
    bombs = r.choice((_bombs().pickles, _bombs().zips))
    about, verdict = r.choice(sorted(bombs)), odd.BAD
    content = bombs[about]
  elif how == 1:
    about, content, verdict = _spoiled_zip(r, good)
  else:
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
      members = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    about, members[pickled], verdict = _spoiled_pickle(r, members[pickled])
    content = _zipped(members)
  command = ("import", "chatglm-6b" if folder == "bin" else "glm-130b", folder, "new")
  argv = r.choice((("inspect", f"{folder}/{name}"), ("inspect", folder), command))
  return Case(
    about, argv, (folder, pathlib.PurePath(name).name), verdict, {f"{folder}/{name}": content}, (folder,), out="new"
  )


def _zipped(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", compression) as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return out.getvalue()


def _spoiled_zip(r: random.Random, good: bytes) -> tuple[str, bytes, str]:
  with zipfile.ZipFile(io.BytesIO(good)) as archive:
    members = {info.filename: archive.read(info) for info in archive.infolist()}
  pickled = next(name for name in members if name.endswith("data.pkl"))
  root = pickled.removesuffix("data.pkl")
  data = r.choice([name for name in members if "/data/" in name])

  def without(*names):
    return {name: content for name, content in members.items() if name not in names}

  ways = {
    "no data.pkl": lambda: (_zipped(without(pickled)), odd.BAD),
    "two of data.pkl": lambda: (_zipped({**members, "other/data.pkl": b"\x80\x02."}), odd.BAD),
    "a storage missing": lambda: (_zipped(without(data)), odd.BAD),
    "a storage too short": lambda: (_zipped({**members, data: members[data][:-2]}), odd.BAD),
    "compressed": lambda: (_zipped(members, zipfile.ZIP_DEFLATED), odd.EITHER),
    "big-endian": lambda: (_zipped({**members, f"{root}byteorder": b"big"}), odd.BAD),
    "a bomb": lambda: (
      _zipped({**members, pickled: b"\x80\x02" + b"\0" * r.choice((10**7, 4 * 10**8))}, zipfile.ZIP_DEFLATED),
      odd.BAD,
    ),
    "a bomb beside": lambda: (
      _zipped({**members, f"{root}data/zeros": b"\0" * 3 * 10**8}, zipfile.ZIP_DEFLATED),
      odd.EITHER,
    ),
    "names that climb": lambda: (_zipped({**members, "../../evil": b"x", "/etc/evil": b"x"}), odd.EITHER),
    "a directory that lies": lambda: (
      good.replace(struct.pack("<I", len(members[pickled])), struct.pack("<I", r.choice((0, 1, 2**31, 2**32 - 1)))),
      odd.EITHER,
    ),
    "no zip at all": lambda: (members[pickled], odd.BAD),
    "many members": lambda: (_zipped({**members, **{f"{root}x{i}": b"" for i in range(3_000)}}), odd.EITHER),
  }
  way = r.choice(list(ways))
  return way, *ways[way]()


def _spoiled_pickle(r: random.Random, good: bytes) -> tuple[str, bytes, str]:
  place = r.randrange(2, len(good))
  ways = {
    "a flipped bit": lambda: (
      good[:place] + bytes([good[place] ^ (1 << r.randrange(8))]) + good[place + 1 :],
      odd.EITHER,
    ),
    "cut": lambda: (good[:place], odd.BAD),
    "os.system": lambda: (b"\x80\x02cos\nsystem\nX\x08\0\0\0touch new\x85R.", odd.BAD),
    "builtins.eval": lambda: (b"\x80\x02cbuiltins\neval\nX\x02\0\0\x001+\x85R.", odd.BAD),
    "getattr": lambda: (b"\x80\x02c__builtin__\ngetattr\nctorch\nload\nX\x01\0\0\0a\x86R.", odd.BAD),
    "a stack global": lambda: (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85R.", odd.BAD),
    "no end": lambda: (good[:-1], odd.BAD),
    "a number": lambda: (b"\x80\x02K\x05.", odd.BAD),
    "an empty dict": lambda: (b"\x80\x02}.", odd.BAD),
    "a dict of numbers": lambda: (b"\x80\x02}X\x01\0\0\0aK\x05s.", odd.BAD),
    "a shape of billions": lambda: (
      good.replace(
        b"\x8a\x08" + struct.pack("<q", 16), b"\x8a\x08" + struct.pack("<q", r.choice((2**40, 2**62, -1))), 2
      ),
      odd.BAD,
    ),
    "random bytes": lambda: (r.randbytes(200), odd.BAD),
  }
  way = r.choice(list(ways))
  return way, *ways[way]()
