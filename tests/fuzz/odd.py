"""Odd values, and ways to spoil JSON, text and bytes. Each takes a random.Random, and gives the same for the same one.

A verdict says what must become of an input: GOOD is taken, BAD is refused, EITHER is whatever the reader thinks.
"""

import json
import random
from typing import Any

GOOD, BAD, EITHER = "good", "bad", "either"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 1234567\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"
STRINGS = (
  "",
  " ",
  "a",
  "5",
  "nan",
  "None",
  "true",
  "../..",
  "/",
  "~",
  "中文[MASK]",
  "\u202e\u200d\ufeff",
  "e\u0301" * 50,
  "\U0001f468\u200d\U0001f469\u200d\U0001f467",
  "\x1b[31mred\x07",
  "\r\n\t\x0b\x0c\x85\u2028",
  "%s%n{0}",
  "'\"\\`$(x)",
  "[gMASK]",
  "[MASK][MASK][sMASK]",
  "<sop><eop></s>",
  "float16",
  "x" * 300,
  "\x00",
  "http://a/b",
  "gs://b/c",
)
NUMBERS = (
  0,
  -1,
  1,
  2,
  3,
  7,
  255,
  65_537,
  2**31,
  -(2**31),
  2**32,
  2**63,
  -(2**63) - 1,
  10**30,
  0.0,
  -0.5,
  0.5,
  1e-300,
  1e300,
  1.5e308,
)
SURROGATE = '"\\ud800"'


def value(r: random.Random, depth: int = 2) -> Any:
  """Something that JSON can hold."""
  kind = r.randrange(9 if depth else 7)
  if kind < 3:
    return r.choice(NUMBERS)
  if kind < 6:
    return r.choice(STRINGS)
  if kind == 6:
    return r.choice((None, True, False))
  if kind == 7:
    return [value(r, depth - 1) for _ in range(r.choice((0, 1, 2, 5)))]
  return {r.choice(STRINGS): value(r, depth - 1) for _ in range(r.choice((0, 1, 3)))}


def nested(r: random.Random) -> str:
  """JSON of many levels."""
  depth = r.choice((150, 1_000, 5_000, 100_000))
  begin, end = r.choice((("[", "]"), ('{"a":', "}"), ('[{"a":[', "]}]")))
  return begin * depth + "0" + end * depth


def leaves(content: Any, path: tuple = ()) -> list[tuple]:
  """The paths of all parts of JSON but the whole."""
  items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
  return [found for key, child in items for found in ((*path, key), *leaves(child, (*path, key)))]


def changed(r: random.Random, content: Any) -> Any:
  """A copy of JSON with one part replaced, removed or added."""
  content = json.loads(json.dumps(content))
  path = r.choice(leaves(content))
  parent = content
  for key in path[:-1]:
    parent = parent[key]
  how = r.randrange(5)
  if how < 3:
    parent[path[-1]] = value(r)
  elif how == 3:
    del parent[path[-1]]
  else:
    other = parent[r.choice(list(parent)) if isinstance(parent, dict) else r.randrange(len(parent))]
    parent[path[-1]] = other
  return content


def spoiled_json(r: random.Random, content: dict[str, Any]) -> tuple[str, bytes, str]:
  """(what was done, the file's bytes, verdict) of an object in JSON; half of them are JSON still."""
  good = json.dumps(content, ensure_ascii=False, indent=2)
  field, end = r.choice(list(content)), good.rindex("}")

  def with_field(text: str) -> bytes:
    return f'{good[:end].rstrip()},\n"added": {text}}}'.encode()

  ways = {
    "with a byte order mark": lambda: (b"\xef\xbb\xbf" + good.encode(), GOOD),
    "with CR LF": lambda: (good.replace("\n", "\r\n").encode(), GOOD),
    "cut": lambda: (good[: r.randrange(1, end)].encode(), BAD),
    "with a NUL": lambda: (good.replace("\n", "\0\n", 1).encode(), BAD),
    "with more behind": lambda: (good.encode() + r.choice((b"}", b"{}", b"garbage", b"\0" * 9)), BAD),
    "in single quotes": lambda: (good.replace('"', "'").encode(), BAD),
    "in UTF-16": lambda: (good.encode(r.choice(("utf-16", "utf-16-le", "utf-16-be"))), BAD),
    "in Latin-1": lambda: (good.encode().replace(b'"', b'"\xe9', 1), BAD),
    "nested": lambda: (with_field(nested(r)), BAD),
    "nested wholly": lambda: (nested(r).encode(), BAD),
    "empty": lambda: (r.choice((b"", b" ", b"\n\n", b"\xef\xbb\xbf")), BAD),
    "no object": lambda: (r.choice((b"[]", b"[{}]", b"null", b"5", b'"a"', b"true", b"NaN")), BAD),
    "a pointer": lambda: (LFS, BAD),
    "a web page": lambda: (HTML, BAD),
    "random bytes": lambda: (r.randbytes(r.choice((1, 100, 5_000))), BAD),
    "half a surrogate": lambda: (with_field(SURROGATE), EITHER),
    "a field of half a surrogate": lambda: (
      good.replace(f'"{field}":', f'"{field}": {SURROGATE}, "x":', 1).encode(),
      EITHER,
    ),
    "a huge number": lambda: (with_field("9" * r.choice((400, 5_000, 100_000))), EITHER),
    "a huge exponent": lambda: (with_field(r.choice(("1e999", "-1e999", "NaN", "Infinity"))), EITHER),
    "a long string": lambda: (with_field('"' + "x" * r.choice((10_000, 3_000_000)) + '"'), EITHER),
    "a field twice": lambda: (good.replace("{", '{"' + field + '": ' + json.dumps(value(r)) + ",", 1).encode(), EITHER),
    "unknown field": lambda: (with_field(json.dumps(value(r))), EITHER),
  }
  if r.random() < 0.5:
    return "changed", json.dumps(changed(r, content), ensure_ascii=r.random() < 0.5).encode(errors="replace"), EITHER
  way = r.choice(list(ways))
  return way, *ways[way]()


def spoiled_text(r: random.Random, good: str) -> tuple[str, bytes, str]:
  """(what was done, bytes, verdict) of a text file."""
  place = r.randrange(1, len(good))
  ways = {
    "with a byte order mark": lambda: (b"\xef\xbb\xbf" + good.encode(), GOOD),
    "with CR LF": lambda: (good.replace("\n", "\r\n").encode(), GOOD),
    "with CR": lambda: (good.replace("\n", "\r").encode(), GOOD),
    "with mixed ends": lambda: (
      "".join(c if c != "\n" else r.choice(("\n", "\r\n", "\r")) for c in good).encode(),
      GOOD,
    ),
    "without an end": lambda: (good.rstrip("\n").encode(), GOOD),
    "with odd spaces": lambda: (good.replace(" ", r.choice("\u3000\xa0\u2028\x85\x0b\x0c\t"), 9).encode(), EITHER),
    "in UTF-16 with its mark": lambda: (good.encode("utf-16"), BAD),
    "in UTF-16": lambda: (good.encode(r.choice(("utf-16-le", "utf-16-be"))), BAD),
    "in UTF-32": lambda: (good.encode("utf-32"), BAD),
    "in GB 18030": lambda: (f"{good}\n中文文本\n".encode("gb18030"), BAD),
    "in Latin-1": lambda: ((good[:place] + "é").encode("latin-1", "ignore") + good[place:].encode(), BAD),
    "with a NUL": lambda: ((good[:place] + "\0" * r.choice((1, 1_000)) + good[place:]).encode(), BAD),
    "cut within a character": lambda: (good.encode() + "文".encode()[:2], BAD),
    "with half a surrogate": lambda: (good[:place].encode() + b"\xed\xa0\x80" + good[place:].encode(), BAD),
    "a too long form": lambda: (good[:place].encode() + b"\xc0\xaf" + good[place:].encode(), BAD),
    "empty": lambda: (b"", BAD),
    "blank": lambda: (r.choice((b"\n", b" \n \t\r\n", b"\r\r\r", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n")), BAD),
    "random bytes": lambda: (b"\xff" + r.randbytes(r.choice((10, 5_000))), BAD),
    "a long line": lambda: ((good + "x y " * r.choice((10_000, 400_000))).encode(), EITHER),
    "many blank lines": lambda: (("\n" * r.choice((10_000, 2_000_000)) + good).encode(), EITHER),
    "control characters": lambda: ((good[:place] + "\x1b[2J\x07\x08" + good[place:]).encode(), EITHER),
    "one of many marks": lambda: ((good[:place] + "e" + "\u0301" * 3_000 + good[place:]).encode(), EITHER),
  }
  way = r.choice(list(ways))
  return way, *ways[way]()


def spoiled_bytes(r: random.Random, good: bytes) -> tuple[str, bytes, str]:
  """(what was done, bytes, verdict) of a file that is no text."""
  place, some = r.randrange(len(good)), r.choice((1, 3, 20))
  flipped = bytearray(good)
  for _ in range(some):
    flipped[r.randrange(len(good))] ^= 1 << r.randrange(8)
  ways = {
    "flipped": lambda: (bytes(flipped), EITHER),
    "cut": lambda: (good[:place], BAD),
    "without its beginning": lambda: (good[place + 1 :], BAD),
    "a piece left out": lambda: (good[:place] + good[place + some :], EITHER),
    "a piece put in": lambda: (good[:place] + r.randbytes(some) + good[place:], EITHER),
    "a piece of zeros": lambda: (good[:place] + b"\0" * len(good[place : place + 400]) + good[place + 400 :], EITHER),
    "twice": lambda: (good + good, EITHER),
    "empty": lambda: (b"", BAD),
    "a pointer": lambda: (LFS, BAD),
    "a web page": lambda: (HTML, BAD),
    "random bytes": lambda: (r.randbytes(r.choice((1, 8, 9, 4_000))), BAD),
  }
  way = r.choice(list(ways))
  return way, *ways[way]()
