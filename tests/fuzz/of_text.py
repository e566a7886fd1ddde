"""Inputs that are text or JSON: prompts, instruction records, documents, configurations."""

import json
import pathlib
import random

from fuzz import odd
from fuzz.case import Case

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
    if about == "a long line":
      content = content[:200_000]  # more is real work for a model: a minute a MB
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
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": odd.value(r)}]},
        {"messages": [{"role": odd.value(r), "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [odd.value(r), {"role": "assistant", "content": "b"}]},
        {"messages": odd.value(r)},
      )
    )
    about, verdict = f"record {str(record)[:60]}", odd.EITHER
    if "messages" not in record and not isinstance(record.get("inputs", record.get("prompt")), str):
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
