"""Files of weights that are not what they should be: bombs, lies, and damage by chance.

`cases(rng)` yields (name, write) for ever: write(folder) makes the folder, of a small ChatGLM-6B in which something is
wrong. Whoever reads it must end in a line or in success, in little time and memory. The same seed, the same folders.
"""

from collections.abc import Callable, Iterator
import io
import json
import pathlib
import pickle
import random
import struct
from typing import Any
import zipfile
import zlib

import numpy as np

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1815217640\n"
PAGE = b"<!DOCTYPE html>\n<html><title>404</title></html>\n"
Write = Callable[[pathlib.Path], None]


# Pickles, and the zip files around them.


def text(s: str) -> bytes:
  return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def number(n: int) -> bytes:
  return b"\x8a\x08" + struct.pack("<q", n)


def tensor(key: bytes, size: bytes, offset: bytes, shape: bytes, strides: bytes) -> bytes:
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\n(("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + key
    + text("cpu")
    + size
    + b"tQ"
    + offset
    + shape
    + strides
    + b"\x89NtR"
  )


def doubled(levels: int) -> bytes:
  """A tuple that contains itself twice, and so on: 2^levels leaves in 3 bytes each."""
  return b")" + b"2\x86" * levels


def bombs() -> dict[str, bytes]:
  """Pickles that ask for much more than their bytes."""
  one = number(1)
  tensors = {
    "a tensor of 2^80 elements": tensor(
      text("0"), number(4), number(0), b"(" + number(1 << 40) * 2 + b"t", b"(KKt".replace(b"KK", b"K\0K\0")
    ),
    "sizes of 2,040 bits": tensor(
      text("0"), one, number(0), b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 200 + b"t", b"(" + b"K\0" * 200 + b"t"
    ),
    "100,000 axes": tensor(text("0"), one, number(0), b"(" + b"K\2" * 100_000 + b"tq\1", b"h\1"),
    "a storage whose key is 2^60 leaves": tensor(doubled(60), one, number(0), b"K\1\x85", b"K\1\x85"),
    "a shape of 2^60 leaves": tensor(text("0"), one, number(0), doubled(60), doubled(60)),
  }
  return {name: b"\x80\x02}" + text("w") + content + b"s." for name, content in tensors.items()} | {
    "2^60 leaves as a key": b"\x80\x02}" + doubled(60) + b"Ns.",
    "2^60 leaves as a value": b"\x80\x02}" + text("w") + doubled(60) + b"s.",
    "2^60 leaves in lists": b"\x80\x02}"
    + text("w")
    + b"]"
    + b"".join(b"q" + bytes([i]) + b"]h" + bytes([i]) + b"ah" + bytes([i]) + b"a" for i in range(60))
    + b"s.",
    "2^60 leaves as a name": b"\x80\x04" + doubled(60) + text("x") + b"\x93.",
    "2^60 leaves as a storage": b"\x80\x02" + doubled(60) + b"Q.",
    "2^60 leaves as arguments": b"\x80\x02ccollections\nOrderedDict\n" + doubled(60) + b"R.",
    "a memo of 2^32 places": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a string of 2^32 bytes": b"\x80\x02X\xff\xff\xff\xff.",
    "bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "a bytearray of 2^40": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "a frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "a number of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a number of a million bytes": b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
    "a number of -1 bytes": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "a million digits": b"\x80\x02L" + b"9" * 10**6 + b"L\n.",
    "a thousand times 4,300 digits": b"\x80\x02" + (b"L" + b"9" * 4299 + b"\n0") * 1000 + b"N.",
    "a million tuples in each other as a key": b"\x80\x02})" + b"\x85" * 10**6 + b"Ns.",
    "a million tuples in each other": b"\x80\x02)" + b"\x85" * 10**6 + b".",
    "100,000 dicts in each other": b"\x80\x02" + (b"}" + text("module")) * 10**5 + b"N" + b"s" * 10**5 + b".",
    "keys of one hash": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (i * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for i in range(1, 50_000))
    + b"u.",
    "a list made a dict 50,000 times": b"\x80\x02]q\0("
    + b"]q\1(NNe" * 3000
    + b"e0ccollections\nOrderedDict\nq\2"
    + b"h\2h\0\x85R0" * 50_000
    + b"N.",
    "three million steps": b"\x80\x02" + b"N0" * 1_500_000 + b"N.",
    "a million marks": b"\x80\x02" + b"(" * 10**6 + b".",
    "64 MiB of nothing": b"\x80\x02" + b"}" * (1 << 26) + b".",
    "a dict in itself": b"\x80\x02}q\0" + text("module") + b"h\0s.",
    "a list in itself": b"\x80\x02]q\0h\0a.",
    "a name of a megabyte": b"\x80\x02c" + b"x" * 10**6 + b"\ny\n.",
    "a name that obeys": b"\x80\x02c\x1b]0;owned\x07\n\x1b[2J\n.",
    "nothing": b"",
    "a mark alone": b"(",
    "an end alone": b".",
    "an empty stack": b"\x80\x02s.",
  }


def stored(content: dict[str, bytes]) -> bytes:
  """A zip file of members as they are."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as archive:
    for name, data in content.items():
      archive.writestr(name, data)
  return out.getvalue()


def _compressed(size: int) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02" + bytes(size) + b".")
  return out.getvalue()


def _changed(data: bytes, mark: bytes, at: int, value: bytes) -> bytes:
  """`data` with `value` at `at` bytes behind the last `mark`."""
  place = data.rindex(mark) + at
  return data[:place] + value + data[place + len(value) :]


def _entry(name: bytes, size: int, place: int) -> bytes:
  return (
    struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 0, 0, size, size, len(name), 0, 0, 0, 0, 0, place)
    + name
  )


def _overlapping(count: int) -> bytes:
  """Members that are all the same bytes, by other names."""
  body = bytes(1000)
  local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0, zlib.crc32(body), 1000, 1000, 1, 0) + b"0" + body
  directory = b"".join(_entry(b"archive/data/%06d" % i, 1000, 0) for i in range(count))
  end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, len(directory), len(local), 0)
  return local + directory + end


def zip_bombs() -> dict[str, bytes]:
  """Zip files that say what is not so."""
  good = stored({"archive/data.pkl": b"\x80\x02}.", "archive/data/0": bytes(64)})
  wide = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, 1 << 60, 1 << 60, 1 << 62, 0)
  end = good.rindex(b"PK\5\6")
  return {
    "64 MB in 64 kB": _compressed(1 << 26),
    "a member of 4 GB": _changed(good, b"PK\1\2", 20, b"\xfe\xff\xff\xff" * 2),
    "sizes that differ": _changed(good, b"PK\1\2", 24, b"\xfe\xff\xff\xff"),
    "a member outside": _changed(good, b"PK\1\2", 42, b"\xf0\xff\xff\x7f"),
    "a directory of 4 GB": _changed(good, b"PK\5\6", 12, b"\xf0\xff\xff\xff"),
    "a directory outside": _changed(good, b"PK\5\6", 16, b"\xf0\xff\xff\xff"),
    "65,000 members that are two": _changed(good, b"PK\5\6", 10, struct.pack("<H", 65_000)),
    "2^60 members": good[:end] + wide + struct.pack("<IIQI", 0x07064B50, 0, end, 1) + good[end:],
    "a wide directory outside": good[:end] + struct.pack("<IIQI", 0x07064B50, 0, 1 << 62, 1) + good[end:],
    "a cut zip64 field": _changed(
      _changed(good, b"PK\1\2", 28, struct.pack("<HH", 6, 8)), b"PK\1\2", 52, struct.pack("<HHI", 1, 24, 0)
    ),
    "50,000 members in one place": _overlapping(50_000),
    "two of one name": stored({"archive/data.pkl": b"\x80\x02}.", "brchive/data.pkl": b"\x80\x02}."}).replace(
      b"brchive", b"archive"
    ),
    "two pickles": stored({"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}."}),
    "no pickle": stored({"a/b": b"x"}),
    "encrypted": _changed(good, b"PK\1\2", 8, b"\1\0"),
    "an end alone": b"PK\5\6" + bytes(18),
    "a beginning alone": good[:60],
    "a large byte order": stored({"archive/data.pkl": b"\x80\x02}.", "archive/byteorder": bytes(10**6)}),
  }


# safetensors.


def safetensors(header: Any, body: bytes = bytes(64)) -> bytes:
  data = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(data).to_bytes(8, "little") + data + body


def _one(shape: str = "[16]", place: str = "[0, 64]", dtype: str = '"F32"') -> bytes:
  return f'{{"w": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {place}}}}}'.encode()


def safetensors_bombs() -> dict[str, bytes]:
  """Headers that say what is not so."""
  whole = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
  odd = [
    "1e999",
    "-1e999",
    "NaN",
    "-16",
    "16.0",
    '"16"',
    "null",
    "true",
    "[16]",
    "{}",
    "9" * 5000,
    str(1 << 63),
    "-0.0",
  ]
  found = {f"a size of {value[:20]}": _one(f"[{value}]") for value in odd}
  found |= {f"a place of {value[:20]}": _one(place=f"[0, {value}]") for value in odd}
  found |= {f"a shape that is {value[:20]}": _one(value) for value in (*odd[:8], '"F"', "{}")}
  found |= {
    f"places that are {value[:20]}": _one(place=value) for value in (*odd[:8], "[]", "[0]", "[0,1,2]", "[64,0]")
  }
  found |= {f"a dtype that is {value[:20]}": _one(dtype=value) for value in (*odd[:8], '"F99"', "[]", '"f32"')}
  found |= {
    "a tensor that is a list": b'{"w": [1]}',
    "a list": b"[]",
    "a number": b"1",
    "not JSON": b"{",
    "not UTF-8": b'{"\xff"}',
    "nested": b'{"w":' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "a million lists": b'{"w": [' + b"[]," * 10**6 + b"[]]}",
    "100,000 axes": _one("[" + "1," * 10**5 + "16]"),
    "zeros and 2^62": _one(f"[0, {1 << 62}, {1 << 62}]", "[0, 0]"),
    "one place for two": json.dumps({"v": whole, "w": whole}).encode(),
    "half of one in the other": json.dumps(
      {"v": whole | {"shape": [8], "data_offsets": [0, 32]}, "w": whole | {"shape": [12], "data_offsets": [16, 64]}}
    ).encode(),
    "a gap": json.dumps({"w": whole | {"shape": [8], "data_offsets": [32, 64]}}).encode(),
    "bytes behind": json.dumps({"w": whole | {"shape": [8], "data_offsets": [0, 32]}}).encode(),
    "two of one name": b'{"w": %b, "w": %b}'
    % (
      json.dumps(whole | {"shape": [8], "data_offsets": [0, 32]}).encode(),
      json.dumps(whole | {"shape": [8], "data_offsets": [32, 64]}).encode(),
    ),
  }
  return {name: safetensors(header) for name, header in found.items()} | {
    "a header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + bytes(100),
    "no header": b"",
    "half a length": b"\1\2\3",
    "a header of nothing": bytes(8) + bytes(64),
    "a header of 40 MB": safetensors(b" " * 40_000_000),
    "an empty one": safetensors({}, b""),
  }


# Folders.


def _pieces(rng: random.Random) -> dict[str, np.ndarray]:
  """A ChatGLM-6B of two layers of width 16 by its keys."""
  found = {"transformer.word_embeddings.weight": (40, 16), "lm_head.weight": (40, 16)}
  for i in range(2):
    at = f"transformer.layers.{i}."
    for norm in ("input", "post_attention"):
      found |= {f"{at}{norm}_layernorm.weight": (16,), f"{at}{norm}_layernorm.bias": (16,)}
    for name, rows, columns in (
      ("attention.query_key_value", 48, 16),
      ("attention.dense", 16, 16),
      ("mlp.dense_h_to_4h", 64, 16),
      ("mlp.dense_4h_to_h", 16, 64),
    ):
      found |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
  found |= {"transformer.final_layernorm.weight": (16,), "transformer.final_layernorm.bias": (16,)}
  values = np.random.default_rng(rng.getrandbits(32))
  return {key: values.standard_normal(shape).astype("f2") for key, shape in found.items()}


_CONFIG = {
  "vocab_size": 40,
  "num_layers": 2,
  "hidden_size": 16,
  "num_attention_heads": 2,
  "inner_hidden_size": 64,
  "max_sequence_length": 32,
  "layernorm_epsilon": 1e-5,
  "position_encoding_2d": True,
  "quantization_bit": 0,
  "bos_token_id": 34,
  "eos_token_id": 35,
  "tie_word_embeddings": False,
}


def _shard(arrays: dict[str, np.ndarray]) -> bytes:
  header, body = {}, b""
  for key, x in arrays.items():
    header[key] = {"dtype": "F16", "shape": list(x.shape), "data_offsets": [len(body), len(body) + x.nbytes]}
    body += x.tobytes()
  return safetensors(header, body)


def _torch(arrays: dict[str, np.ndarray]) -> bytes:
  def described(i: int, x: np.ndarray) -> bytes:
    strides = [int(np.prod(x.shape[axis + 1 :])) for axis in range(x.ndim)]
    found = tensor(
      text(str(i)),
      number(x.size),
      number(0),
      b"(" + b"".join(map(number, x.shape)) + b"t",
      b"(" + b"".join(map(number, strides)) + b"t",
    )
    return found.replace(b"FloatStorage", b"HalfStorage")

  pickled = b"\x80\x02}(" + b"".join(text(key) + described(i, x) for i, (key, x) in enumerate(arrays.items())) + b"u."
  members = {f"archive/data/{i}": x.tobytes() for i, x in enumerate(arrays.values())}
  return stored({"archive/data.pkl": pickled} | members)


def good(rng: random.Random) -> dict[str, bytes]:
  """The files of a folder in which nothing is wrong: safetensors or torch's, in one file or two with an index."""
  arrays, config = _pieces(rng), {"config.json": json.dumps(_CONFIG).encode()}
  pack, stem, suffix = rng.choice([(_shard, "model", "safetensors"), (_torch, "pytorch_model", "bin")])
  if rng.random() < 0.5:
    return config | {f"{stem}.{suffix}": pack(arrays)}
  keys = list(arrays)
  half = rng.randrange(1, len(keys))
  parts = {f"{stem}-{i + 1:05}-of-00002.{suffix}": keys[half * i : half if i == 0 else None] for i in range(2)}
  index = {"metadata": {"total_size": 1}, "weight_map": {key: name for name, some in parts.items() for key in some}}
  return (
    config
    | {f"{stem}.{suffix}.index.json": json.dumps(index).encode()}
    | {name: pack({key: arrays[key] for key in some}) for name, some in parts.items()}
  )


ODD_VALUES: list[Any] = [
  None,
  True,
  -1,
  0,
  1.5,
  float("nan"),
  float("inf"),
  1 << 31,
  1 << 63,
  10**400,
  "4",
  "",
  [],
  {},
  [[]],
  "..",
  "../x",
  "/etc/passwd",
  "a/b",
  "\x1b[2J",
  "\ud800",
  "x" * 300,
  "a\nb",
  {"a": [1, {}]},
]


def _damaged(rng: random.Random, data: bytes) -> bytes:
  """Bytes changed, cut, doubled, or taken by another download's failure."""
  kind = rng.randrange(7)
  if kind == 0:
    return data[: rng.randrange(len(data) + 1)]
  if kind == 1:
    return rng.choice([POINTER, PAGE, b"", b"\0" * 100, b"Entry not found", pickle.dumps({"a": 1})])
  if kind == 2:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randrange(1, 50)) + data[at:]
  if kind == 3:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randrange(1, 50) :]
  changed = bytearray(data)
  first = min(len(data), 4000) if kind == 4 else len(data)  # headers, and anywhere
  for _ in range(rng.randrange(1, 6)):
    changed[rng.randrange(first)] = rng.randrange(256)
  return bytes(changed)


def _odd_json(rng: random.Random, data: bytes) -> bytes:
  content = json.loads(data)
  target = content["weight_map"] if "weight_map" in content and rng.random() < 0.8 else content
  key = rng.choice(list(target))
  if rng.random() < 0.15:
    del target[key]
  else:
    target[key] = rng.choice(ODD_VALUES)
  return json.dumps(content).encode()


def cases(rng: random.Random) -> Iterator[tuple[str, Write]]:
  """Folders in which something is wrong, for ever; see the module."""
  weights = [
    (name, "pytorch_model.bin", stored({"archive/data.pkl": data}))
    for name, data in bombs().items()
    if len(data) < 1 << 20
  ]
  weights += [(name, "pytorch_model.bin", data) for name, data in zip_bombs().items()]
  weights += [(name, "model.safetensors", data) for name, data in safetensors_bombs().items() if len(data) < 1 << 22]
  while True:
    files = good(rng)
    kind = rng.choice(["bomb", "damage", "damage", "json", "json", "missing", "other"])
    name = rng.choice(sorted(files))
    if kind == "bomb":
      what, name, data = rng.choice(weights)
      files = {"config.json": files["config.json"], name: data}
    elif kind == "json":
      name = rng.choice([name for name in sorted(files) if name.endswith(".json")])
      files[name], what = _odd_json(rng, files[name]), "odd JSON"
    elif kind == "damage":
      files[name], what = _damaged(rng, files[name]), "damage"
    elif kind == "missing":
      del files[name]
      what = "missing"
    else:
      what = "the other's bytes"
      files[name] = files[rng.choice(sorted(files))]
    yield f"{what} ({name})", _writer(files)


def _writer(files: dict[str, bytes]) -> Write:
  def write(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True)
    for name, data in files.items():
      (folder / name).write_bytes(data)

  return write
