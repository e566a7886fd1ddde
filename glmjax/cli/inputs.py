"""Prompts and texts from flags, files and standard input: one a line, or JSON lines."""

import argparse
import json
import sys
from typing import Any

from glmjax import errors


def prompts(options: argparse.Namespace) -> dict[str, Any]:
  """generate's argument."""
  return {"prompts": _rows("--prompt", options.prompt, options.file, "prompt")}


def texts(options: argparse.Namespace) -> dict[str, Any]:
  """score's argument."""
  return {"texts": _rows("--text", options.text, options.file, "text")}


def _rows(flag: str, values: list[str] | None, file: str | None, field: str) -> list[str | dict[str, Any]]:
  """The flag's values, or what the lines of a file hold (- for standard input), without empty ones.

  Lines are objects with `field` if the file is called .jsonl or its first line starts with {; else texts.
  """
  if values and file:
    raise errors.InputError(f"{flag} and --file are both given; use one")
  if not values and not file:
    raise errors.InputError(f"nothing to read: give {flag}, or --file (- for standard input)")
  if not file:
    return values
  name = "standard input" if file == "-" else file
  lines = [(number, line.rstrip("\r")) for number, line in enumerate(_read(file, name).split("\n"), 1)
           if line.strip()]
  if not lines:
    raise errors.InputError(f"{name}: empty; expected one text a line")
  if file.endswith(".jsonl") or lines[0][1].lstrip().startswith("{"):
    return [_object(line, field, f"{name}: line {number}") for number, line in lines]
  return [line for _, line in lines]


def _read(file: str, name: str) -> str:
  try:
    if file == "-":
      data = sys.stdin.buffer.read()
    else:
      with open(file, "rb") as stream:
        data = stream.read()
    return data.decode("utf-8-sig")
  except OSError as error:
    raise errors.InputError(f"--file: cannot read {name}: {error.strerror}") from None
  except UnicodeDecodeError as error:
    raise errors.InputError(f"{name}: not UTF-8 text (byte {error.start})") from None


def _object(line: str, field: str, where: str) -> dict[str, Any]:
  """A line of JSON, checked for what it must have."""
  try:
    row = json.loads(line)
    json.dumps(row, ensure_ascii=False).encode()  # escapes can spell what no file can hold: half a surrogate pair
  except UnicodeEncodeError:
    raise errors.InputError(f"{where} holds half a surrogate pair, which is not valid Unicode") from None
  except ValueError as error:
    raise errors.InputError(f"{where} is not JSON ({error}); expected {{\"{field}\": \"...\"}}") from None
  if not isinstance(row, dict) or not isinstance(row.get(field), str):
    raise errors.InputError(f"{where} has no text called {field}; expected {{\"{field}\": \"...\"}}")
  return row
