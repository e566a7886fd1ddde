"""The inputs of each kind. `KINDS[kind](random, world)` makes one; the same for the same random and world.

A case is a command line with the files that it reads. Its refusal must name one of the case's `places`.
"""

import collections.abc
import dataclasses
import inspect
import io
import json
import pathlib
import random
import re
import struct
import types
import typing
import zipfile
from collections.abc import Mapping
from typing import Any

from fuzz import odd

import tiny_world


@dataclasses.dataclass(frozen=True)
class Case:
  """One input."""

  about: str
  argv: tuple[str, ...]  # of glmjax; or @NAME and a path, for a reader of the library
  places: tuple[str, ...]
  verdict: str = odd.EITHER
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
  copies: tuple[str, ...] = ()  # folders of the world that `files` change
  stdin: bytes | None = None
  out: str | None = None  # what must not be there after a refusal


def number_of(kind: str, seed: int, number: int, world: pathlib.Path) -> Case:
  """Input `number` of a kind."""
  return KINDS[kind](random.Random(f"{seed}/{kind}/{number}"), world)


# gin values.

_FUNCTIONS = (
  "glmjax.train.loop.train",
  "glmjax.train.loop.Intervals",
  "glmjax.train.schedules.Batches",
  "glmjax.train.schedules.LearningRate",
  "glmjax.train.optimizer.AdamW",
  "glmjax.parallel.mesh.MeshConfig",
  "glmjax.train.state.DynamicLossScale",
  "glmjax.models.config.GLMConfig",
  "glmjax.data.loader.CachedMixture",
  "glmjax.data.rows.BlankInfilling",
)
_BROKEN = (
  "",
  " ",
  ")",
  "1 +",
  '"',
  "'''",
  "[1,",
  "{1",
  "{'a':}",
  "@",
  "%",
  "@nothing.here",
  "%NOWHERE",
  "@loop.train(",
  "1 2",
  "lambda: 0",
  "a",
  "yes",
  "float('nan')",
  "__import__('os')",
  "5;6",
  "é",
  "\x00",
  "\ud800",
  "=",
  "==1",
  "0777",
  "[" * 200 + "]" * 200,
  "(" * 100_000,
  "9" * 5_000,
)


def gin_values(r: random.Random, world: pathlib.Path) -> Case:
  """A value for a parameter of what training uses, or for a macro, in --gin.NAME=VALUE."""
  del world
  full = r.choice(_FUNCTIONS)
  module, _, name = full.rpartition(".")
  function = getattr(__import__(module, fromlist=[name]), name)
  hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
  parameter = r.choice(
    [p for p in inspect.signature(function).parameters if p not in ("on_start", "overwrite", "workdir", "stop_at_step")]
  )
  if r.random() < 0.2:
    text, verdict, found = r.choice(_BROKEN), odd.BAD, None
  elif r.random() < 0.1:
    macro = r.choice(
      ("BATCH_SIZE", "TOTAL_SAMPLES", "SEQ_LENGTH", "CACHE", "MODEL", "POSITIONS", "MICRO_BATCH", "PEAK_LEARNING_RATE")
    )
    found = odd.value(r)
    return Case(f"{macro}={found!r:.40}", _train(f"--gin.{macro}={found!r}"), (macro, macro.lower(), *_words(macro)))
  else:
    wanted = hints.get(parameter, Any)
    tries = [_gin_value(r) for _ in range(20)]
    fitting = [found for found in tries if _fits(found, wanted)]
    found = r.choice(fitting if fitting and r.random() < 0.5 else tries)
    text, fits = repr(found), _fits(found, wanted)
    verdict = odd.EITHER if fits in (True, None) else odd.BAD
  scope = "validation/" if "CachedMixture" in full and r.random() < 0.3 else ""
  return Case(
    f"{name}.{parameter}={text:.40}",
    _train(f"--gin.{scope}{full}.{parameter}={text}"),
    (parameter, *_words(parameter), *([found] if isinstance(found, str) and found.strip() else [])),
    verdict,
  )


def _train(*more: str) -> tuple[str, ...]:
  return ("train", "--gin_file=world.gin", "--workdir=new", "--stop_at_step=1", *more)


def _words(name: str) -> tuple[str, ...]:
  return tuple(word for word in name.lower().split("_") if len(word) > 3)


def _gin_value(r: random.Random) -> Any:
  found = odd.value(r)
  how = r.randrange(8)
  if how == 0:
    return tuple(odd.value(r) for _ in range(r.randrange(3)))
  if how == 1:
    return [found] * r.choice((1, 2, 3))
  if how == 2:
    return {"en": found}
  return found


def _fits(found: Any, hint: Any) -> bool | None:
  """Whether a value is of an annotated type; None where the annotation does not tell."""
  origin, inside = typing.get_origin(hint), typing.get_args(hint)
  if (
    hint is Any
    or hint is inspect.Parameter.empty
    or isinstance(hint, typing.TypeVar)
    or origin is collections.abc.Callable
  ):
    return None
  if origin in (typing.Union, types.UnionType):
    answers = [_fits(found, part) for part in inside]
    return True if True in answers else None if None in answers else False
  if origin in (collections.abc.Sequence, list, tuple):
    if not isinstance(found, list | tuple):
      return False
    answers = [_fits(item, inside[0]) for item in found] if inside else [None]
    return False if False in answers else None if None in answers else True
  if origin in (collections.abc.Mapping, dict):
    if not isinstance(found, dict):
      return False
    answers = [_fits(item, part) for pair in found.items() for item, part in zip(pair, inside)]
    return False if False in answers else True
  if hint is float:
    return type(found) in (int, float)
  if hint in (int, str, bool):
    return type(found) is hint
  if hint in (None, type(None)):
    return found is None
  if origin is not None or getattr(hint, "_is_protocol", False) and hint.__module__ == "typing":
    return None
  return isinstance(found, str) if getattr(hint, "__name__", "") == "PathLike" else False


# gin files.

_GIN_WORDS = tuple(word for word in re.split(r"\W+", tiny_world.GIN) if len(word) > 3)  # what a message may name


def gin_files(r: random.Random, world: pathlib.Path) -> Case:
  """A spoiled world.gin."""
  good = tiny_world.GIN
  lines = good.split("\n")
  at = r.randrange(len(lines))
  ways = {
    "spoiled as a text": lambda: odd.spoiled_text(r, good)[1:],
    "a line removed": lambda: ("\n".join(lines[:at] + lines[at + 1 :]).encode(), odd.EITHER),
    "a line twice": lambda: ("\n".join(lines[:at] + lines[at : at + 1] * 2 + lines[at + 1 :]).encode(), odd.EITHER),
    "lines exchanged": lambda: ("\n".join(r.sample(lines, len(lines))).encode(), odd.EITHER),
    "a line put in": lambda: (
      "\n".join(
        [
          *lines[:at],
          r.choice(
            (
              "include 'bad.gin'",
              "include 'nowhere.gin'",
              "include",
              "import os.path",
              "from nowhere import this",
              "  = 5",
              "a.b.c = 5",
              "loop.train.seed =",
              "NOTHING = 5",
              "\tx = 1",
              "@loop.train",
              "%MODEL",
              "\\",
              "\f",
              "'''",
              "loop:",
              "BATCH_SIZE = @loop.train()",
              "BATCH_SIZE = %BATCH_SIZE",
              "BATCH_SIZE = " + "(" * 2_000 + ")" * 2_000,
              "include '" + "x" * 5_000 + "'",
              "include '/'",
              "include ''",
              "x" * 1_000_000,
            )
          ),
          *lines[at:],
        ]
      ).encode(),
      odd.EITHER,
    ),
    "a character changed": lambda: (
      (lambda i: good[:i] + r.choice("()[]{}@%=.'\"\\/:#\n 0é") + good[i + 1 :])(r.randrange(len(good))).encode(),
      odd.EITHER,
    ),
    "a line cut": lambda: (
      "\n".join([*lines[:at], lines[at][: r.randrange(len(lines[at]) + 1)], *lines[at + 1 :]]).encode(),
      odd.EITHER,
    ),
  }
  way = r.choice(list(ways))
  content, verdict = ways[way]()
  return Case(
    way,
    ("train", "--gin_file=bad.gin", "--workdir=new", "--stop_at_step=1"),
    (".gin", "--gin", *_GIN_WORDS),
    verdict if verdict != odd.BAD or content.strip() else odd.EITHER,
    {"bad.gin": content},
  )


# Prompts, and texts to score.


def prompts(r: random.Random, world: pathlib.Path) -> Case:
  """In a flag, a file of lines, a file of JSON lines, or standard input."""
  del world
  command, field = r.choice((("generate", "prompt"), ("score", "text")))
  argv = (
    command,
    "--checkpoint=export",
    *(("--max_tokens=2",) if command == "generate" else ()),
    *(("--json",) if r.random() < 0.5 else ()),
  )
  how = r.randrange(4)
  text = _prompt(r)
  if how == 0:
    shown = text.replace("\0", "")
    return Case(f"--{field} {text[:30]!r}", (*argv, f"--{field}={shown}"), (f"--{field}", f"{field} "))
  name = r.choice(("p.jsonl", "-")) if how < 3 else r.choice(("p.txt", "-", "p"))
  if how == 3:
    about, content, verdict = odd.spoiled_text(r, "a fox [MASK] dogs\n柳树[gMASK]\n\nthe end\n")
  elif r.random() < 0.4:
    good = {field: r.choice(("a fox [MASK].", "柳树")), "id": 7}
    about, content, verdict = odd.spoiled_json(r, good)
    content = content.replace(b"\r\n", b" ").replace(b"\n", b" ") if verdict == odd.GOOD else content
    content = content.replace(b"\n", b" ") if about in ("changed", "nested", "a huge number") else content
  else:
    record = {field: text} | r.choice(
      (
        {},
        {"id": odd.value(r)},
        {"output": "mine"},
        {"pieces": [1]},
        {"finish_reason": None},
        {"tokens": 5},
        {"log_likelihood": 0},
        {"bits_per_byte": 1.0},
        {"": ""},
        {field.upper(): 1},
      )
    )
    about, verdict = f"record {str(record)[:50]}", odd.EITHER
    content = (
      b'{"%s": "a"}\n' % field.encode()
      + json.dumps(record, ensure_ascii=r.random() < 0.5).encode(errors="surrogatepass")
      + b"\n"
    )
  if name == "-" and how < 3:  # what does not begin with { is text there
    verdict = odd.EITHER
  files = {} if name == "-" else {name: content}
  return Case(
    about,
    (*argv, f"--file={name}"),
    (name if name != "-" else "standard input", f"--{field}", f"{field} "),
    verdict,
    files,
    stdin=content if name == "-" else None,
  )


def _prompt(r: random.Random) -> str:
  return r.choice(
    (
      r.choice(odd.STRINGS),
      "".join(r.choices("ab 的[MASK]\n\t\U0001f600é", k=r.randrange(1, 60))),
      "[MASK]" * r.choice((1, 5, 70)),
      "[gMASK] [MASK] [sMASK]",
      "fox " * r.choice((1, 14, 2_000, 200_000)),
      chr(r.randrange(1, 0xD800)) * r.choice((1, 5)),
      chr(r.randrange(0xE000, 0x110000)),
      "\n" * r.choice((1, 100)),
      "\udcff",
      "a\0b",
      "<|startofpiece|>[MASK",
      "[[MASK]]",
    )
  )


# Instruction records and documents.


def instructions(r: random.Random, world: pathlib.Path) -> Case:
  """A file of instruction records."""
  del world
  good = {"inputs": "How many dogs?", "targets": "Nine dogs"}
  how = r.randrange(4)
  if how == 0:
    about, content, verdict = odd.spoiled_text(r, "".join(json.dumps(good) + "\n" for _ in range(3)))
    verdict = odd.EITHER if about in ("with odd spaces", "a long line") else verdict
  elif how == 1:
    about, spoiled, verdict = odd.spoiled_json(r, good)
    spoiled = spoiled.replace(b"\r\n", b" ").replace(b"\n", b" ")
    content = json.dumps(good).encode() + b"\n" + spoiled + b"\n"
    verdict = odd.EITHER if about in ("empty", "with a byte order mark") else verdict
  else:
    record = r.choice(
      (
        {"prompt": "a", "response": "b", "history": [["q", "a"]]},
        {"prompt": "a", "response": "b", "history": []},
        {"prompt": "a", "response": "b", "history": odd.value(r)},
        {"instruction": "a", "input": "b", "output": "c"},
        {"inputs": odd.value(r), "targets": "b"},
        {"inputs": "a", "targets": odd.value(r)},
        {"inputs": "a"},
        {"inputs": "", "targets": "b"},
        {"inputs": "a", "targets": ""},
        {"inputs": "a" * 1_000_000, "targets": "b"},
        {},
        {**good, "prompt": 5},
        {"Inputs": "a", "targets": "b"},
        {"inputs": "\ud800", "targets": "b"},
      )
    )
    about, verdict = f"record {str(record)[:60]}", odd.EITHER
    if not isinstance(record.get("inputs", record.get("prompt")), str):
      verdict = odd.BAD
    content = json.dumps(good).encode() + b"\n" + json.dumps(record).encode() + b"\n"
  return Case(about, ("@instructions", "bad.jsonl"), ("bad.jsonl",), verdict, {"bad.jsonl": content})


def texts(r: random.Random, world: pathlib.Path) -> Case:
  """A file of documents, read by the tokenizer command's own reader, or by all of the command."""
  good = (world / "text" / "en.txt").read_text(encoding="utf-8")
  argv = r.choice(
    (("@documents", "bad.txt"),) * 9
    + (
      (
        "tokenizer",
        "--gin_file=world.gin",
        "--folder=new",
        '--gin.TEXT_FILES={"en": "bad.txt", "zh": "text/zh.jsonl"}',
      ),
    )
  )
  how = r.randrange(10)
  if how == 0:
    return Case("a folder", argv, ("bad.txt",), odd.BAD, {"bad.txt/readme.md": b"x"}, out="new")
  if how == 1:
    about, content, verdict = odd.spoiled_json(r, {"text": "a fox"})
    content = content.replace(b"\r\n", b" ").replace(b"\n", b" ")
    verdict = odd.EITHER if about == "empty" else verdict
    lines = b'{"text": "one"}\n' * 3 + content + b"\n"
    if about == "with a byte order mark":
      lines = content
    return Case(about, ("@documents", "bad.jsonl"), ("bad.jsonl",), verdict, {"bad.jsonl": lines})
  about, content, verdict = odd.spoiled_text(r, good)
  return Case(about, argv, ("bad.txt",), verdict, {"bad.txt": content}, out="new")


# Configurations and indexes.

_HUB = (("inspect", "hub"), ("import", "chatglm-6b", "hub", "new"))
_JSON_FILES = (  # (folder, file, command lines)
  ("export", "config.json", (("inspect", "export"), ("export", "--checkpoint=export", "--out=new"))),
  ("export", "checksums.json", (("inspect", "export"), ("export", "--checkpoint=export", "--out=new"))),
  ("export", "tokenizer/tokenizer.json", (("generate", "--checkpoint=export", "--prompt=a"),)),
  ("export", "config.json", (("generate", "--checkpoint=export", "--prompt=a"),)),
  ("run", "config.json", (("inspect", "run"), ("export", "--checkpoint=run", "--out=new"))),
  ("tokenizer", "tokenizer.json", (("train", "--gin_file=world.gin", "--workdir=new"),)),
  ("cache", "manifest.json", (("train", "--gin_file=world.gin", "--workdir=new"),)),
  ("hub", "config.json", _HUB),
  ("hub", "tokenizer_config.json", _HUB),
  ("hub", "model.safetensors.index.json", _HUB),
)


def configs(r: random.Random, world: pathlib.Path) -> Case:
  """A spoiled JSON file of ours or theirs."""
  folder, name, lines = r.choice(_JSON_FILES)
  good = json.loads((world / folder / name).read_bytes())
  about, content, verdict = odd.spoiled_json(r, good)
  if verdict == odd.GOOD and folder != "hub":
    verdict = odd.EITHER  # some are sealed byte for byte
  argv = r.choice(lines)
  if argv[0] == "train" and folder == "tokenizer":
    verdict = odd.EITHER  # the cache has its own
  if name == "checksums.json" and about == "in UTF-16":
    verdict = odd.EITHER  # its own sum says that it holds what was written
  return Case(
    f"{folder}/{name} {about}",
    argv,
    (folder, pathlib.PurePath(name).name),
    verdict,
    {f"{folder}/{name}": content},
    (folder,),
    out="new" if "new" in " ".join(argv) and argv[0] != "train" else None,
  )


# Files of weights.


def safetensors(r: random.Random, world: pathlib.Path) -> Case:
  """A spoiled shard of the Hub's folder: its header, the header's length, its bytes."""
  name = sorted(path.name for path in (world / "hub").glob("*.safetensors"))[0]
  good = (world / "hub" / name).read_bytes()
  length = int.from_bytes(good[:8], "little")
  header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
  how = r.randrange(5)
  if how == 0:
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
  how = r.randrange(4)
  if how == 0:
    about, content, verdict = odd.spoiled_bytes(r, good)
    verdict = odd.EITHER if about in ("twice", "without its beginning") else verdict
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
  without = lambda *names: {name: content for name, content in members.items() if name not in names}
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
  deep = r.choice((2_000, 100_000))
  place = r.randrange(2, len(good))
  number = lambda n: (
    b"\x8a"
    + bytes([len(n.to_bytes(max(1, (n.bit_length() + 8) // 8), "little", signed=True))])
    + (n.to_bytes(max(1, (n.bit_length() + 8) // 8), "little", signed=True))
  )
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
    "deep": lambda: (b"\x80\x02" + b"]" * deep + b"a" * (deep - 1) + b".", odd.BAD),
    "doubling": lambda: (
      b"\x80\x02]q\0" + b"".join(b"](h\0h\0eq\0" for _ in range(r.choice((30, 200)))) + b".",
      odd.BAD,
    ),
    "sharing tuples": lambda: (b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * r.choice((30, 200)) + b".", odd.BAD),
    "a long string said": lambda: (b"\x80\x02X\xff\xff\xff\x7fabc.", odd.BAD),
    "a long 8-byte string said": lambda: (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x00abc.", odd.BAD),
    "a bytearray said": lambda: (b"\x80\x05\x96" + struct.pack("<Q", 2 ** r.choice((33, 40, 62))) + b"abc.", odd.BAD),
    "a memo far out": lambda: (b"\x80\x02}r\xff\xff\xff\x7f.", odd.BAD),
    "a frame far out": lambda: (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.", odd.BAD),
    "a large range": lambda: (b"\x80\x02c__builtin__\nrange\n" + number(10**12) + b"\x85R.", odd.BAD),
    "a large bytearray": lambda: (b"\x80\x02c__builtin__\nbytearray\n" + number(10**10) + b"\x85R.", odd.BAD),
    "no end": lambda: (good[:-1], odd.BAD),
    "a number": lambda: (b"\x80\x02K\x05.", odd.BAD),
    "an empty dict": lambda: (b"\x80\x02}.", odd.BAD),
    "a dict of numbers": lambda: (b"\x80\x02}X\x01\0\0\0aK\x05s.", odd.BAD),
    "itself inside": lambda: (b"\x80\x02}q\0X\x01\0\0\0ah\0s.", odd.BAD),
    "a shape of billions": lambda: (
      good.replace(
        b"\x8a\x08" + struct.pack("<q", 16), b"\x8a\x08" + struct.pack("<q", r.choice((2**40, 2**62, -1))), 2
      ),
      odd.BAD,
    ),
    "random bytes": lambda: (r.randbytes(200), odd.BAD),
    "many marks": lambda: (b"\x80\x02" + b"(" * 100_000 + b".", odd.BAD),
    "many pushes": lambda: (b"\x80\x02" + b"K\x01" * 1_000_000 + b".", odd.BAD),
  }
  way = r.choice(list(ways))
  return way, *ways[way]()


KINDS = {
  function.__name__: function
  for function in (gin_values, gin_files, prompts, instructions, texts, configs, safetensors, pickles)
}
