"""Prompts and texts from flags, files and standard input."""

import argparse
import sys
from typing import Any

from glmjax import errors


def prompts(options: argparse.Namespace) -> dict[str, Any]:
  """generate's argument."""
  return {"prompts": _lines("--prompt", options.prompt, options.file)}


def texts(options: argparse.Namespace) -> dict[str, Any]:
  """score's argument."""
  return {"texts": _lines("--text", options.text, options.file)}


def _lines(flag: str, values: list[str] | None, file: str | None) -> list[str]:
  """The flag's values, or the lines of a file (- for standard input), without empty ones."""
  if values and file:
    raise errors.InputError(f"{flag} and --file are both given; use one")
  if not values and not file:
    raise errors.InputError(f"nothing to read: give {flag}, or --file (- for standard input)")
  if not file:
    return values
  name = "standard input" if file == "-" else file
  try:
    if file == "-":
      data = sys.stdin.buffer.read()
    else:
      with open(file, "rb") as stream:
        data = stream.read()
    lines = [line.rstrip("\r") for line in data.decode("utf-8").split("\n") if line.strip()]
  except OSError as error:
    raise errors.InputError(f"--file: cannot read {name}: {error.strerror}") from None
  except UnicodeDecodeError as error:
    raise errors.InputError(f"{name}: not UTF-8 text (byte {error.start})") from None
  if not lines:
    raise errors.InputError(f"{name}: empty; expected one text a line")
  return lines
