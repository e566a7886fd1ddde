"""Prompts and texts from flags, files and standard input: one a line, or JSON lines."""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glmjax import errors
from glmjax.cli import hosts
from glmjax.io import paths, user_json, user_text

LONGEST_LINE = 1 << 26  # characters, of JSON with the user's own fields; far beyond what a model reads
GENERATED = ("output", "pieces", "finish_reason")  # fields that generate adds to a prompt's own
_PROMPTS, _TEXTS = ("prompt",), ("text", "choice", "context")  # flags that may be given in place of --file
SCORED = ("log_likelihood", "tokens", "bits_per_byte")  # that score adds to a text's
CHOSEN = ("log_likelihoods", "tokens", "best", "context_tokens_left_out")  # and to a question's with choices


def check_prompts(options: argparse.Namespace) -> dict[str, Any]:
  """Raises InputError for flags of generate that do not go together; they are no arguments of the call."""
  _check_given(_PROMPTS, options)
  return hosts.check_mesh(options)


def check_texts(options: argparse.Namespace) -> dict[str, Any]:
  """Raises InputError likewise for flags of score."""
  _check_given(_TEXTS, options)
  if options.text and options.choice:
    raise errors.InputError("--text and --choice are both given; use one")
  if options.choice and options.context is None:
    raise errors.InputError("--choice needs --context, the text whose [MASK] it would fill")
  if options.context is not None and not options.text and not options.choice:
    raise errors.InputError("--context alone has nothing to score: give --text or --choice")
  return hosts.check_mesh(options)


def prompts(options: argparse.Namespace) -> list[str | dict[str, Any]]:
  """Returns what generate is asked; raises InputError for a bad line, with its number."""
  if options.file and options.file != "-":
    for name in ("out", "samples"):
      path = getattr(options, name, None)
      if path and path != "-" and _same_file(paths.named(path, f"--{name}"), paths.named(options.file, "--file")):
        raise errors.InputError(f"--{name} and --file are both {path}: the prompts would be lost; choose another file")
  if not options.file:
    return options.prompt
  return [prompt(row, where) for row, where in _rows(options.file, '{"prompt": "..."}')]


def _same_file(a: paths.Path, b: paths.Path) -> bool:
  if isinstance(a, pathlib.Path) and isinstance(b, pathlib.Path):
    return a.exists() and b.exists() and os.path.samefile(a, b)
  return a == b


def texts(options: argparse.Namespace) -> list[str | dict[str, Any]]:
  """Returns what score is asked: texts, texts behind --context, or one question with its choices; raises as
  `prompts`.
  """
  if options.file:
    expected = '{"text": "..."}, {"context": "...", "text": "..."} or {"context": "...", "choices": ["...", ...]}'
    return [text(row, where) for row, where in _rows(options.file, expected)]
  if options.choice:
    return [text({"context": options.context, "choices": options.choice}, "--choice")]
  if options.context is None:
    return options.text
  return [text({"context": options.context, "text": each}, "--context") for each in options.text]


def prompt(row: str | Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns a prompt as a record that generate can add to.

  Raises:
    errors.InputError: naming `where` the record is and what is wrong.
  """
  row = {"prompt": row} if isinstance(row, str) else dict(row)
  user_json.string(row, "prompt", where)
  _check_fields(row, GENERATED, where, "generate")
  return row


def text(row: str | Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns a text to score, behind a context or not, or a context with choices, as a record that score can add to.

  Raises:
    errors.InputError: naming `where` the record is and what is wrong.
  """
  row = {"text": row} if isinstance(row, str) else dict(row)
  if "choices" in row and "context" in row and "text" not in row:
    choices = row["choices"]
    if not isinstance(choices, list | tuple) or not choices:
      raise errors.InputError(f"{where}: choices are {_cut(choices)}: give a list of texts")
    for number, choice in enumerate(choices, 1):
      if not user_json.string({"choice": choice}, "choice", f"{where}: number {number}"):
        raise errors.InputError(f"{where}: choice {number} is empty: give at least one character")
    user_json.string(row, "context", where)
    _check_fields(row, CHOSEN, where, "score")
    return row
  if "choices" in row and "text" in row:
    raise errors.InputError(f"{where}: both text and choices: give one of them, choices with a context")
  if not user_json.string(row, "text", where):
    raise errors.InputError(f"{where}: the text to score is empty: give at least one character")
  if "context" in row:
    user_json.string(row, "context", where)
  _check_fields(row, SCORED, where, "score")
  return row


def _check_fields(row: Mapping[str, Any], added: Sequence[str], where: str, command: str) -> None:
  """Checks that the user's fields can be written again as they are, and that none has a name that the command
  writes.
  """
  try:
    json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
  except UnicodeEncodeError:  # escapes can spell what no file can hold
    raise errors.InputError(f"{where} holds half a surrogate pair, which is not valid Unicode") from None
  except ValueError:  # as are 1e999, NaN and integers of more than 4,300 digits once they are read
    raise errors.InputError(
      f"{where} holds a number that is not finite, or too long to be read: write it as a string"
    ) from None
  except TypeError as error:
    raise errors.InputError(f"{where} cannot be written as JSON ({error}): leave the field out") from None
  if taken := [name for name in added if name in row]:
    raise errors.InputError(
      f"{where} has a field {taken[0]!r}, which {command} would overwrite: rename it, "
      f"or leave it out ({command} writes {', '.join(added)})"
    )


def _check_given(names: Sequence[str], options: argparse.Namespace) -> None:
  """Checks that something is to be read: flags, or a file."""
  flags = [f"--{name}" for name in names if getattr(options, name)]
  if flags and options.file:
    raise errors.InputError(f"{flags[0]} and --file are both given; use one")
  if not flags and not options.file:
    raise errors.InputError(f"nothing to read: give --{names[0]}, or --file (- for standard input)")


def _rows(file: str, expected: str) -> list[tuple[str | dict[str, Any], str]]:
  """Returns what the lines of a file hold (- for standard input), each with its place.

  Lines are objects if the file is called .jsonl or its first line starts with {; else texts. Empty ones are left out.
  """
  name = "standard input" if file == "-" else file
  rows: list[tuple[str | dict[str, Any], str]] = []
  as_json = file.endswith(".jsonl")
  for number, line in _lines(file, name):
    if not line.strip():
      continue
    as_json = as_json or not rows and line.lstrip().startswith("{")
    where = f"{name}: line {number}"
    rows.append((user_json.parse(line, where, dict, f"expected {expected}") if as_json else line, where))
  if not rows:
    raise errors.InputError(f"{name}: empty; expected one text a line")
  return rows


def _lines(file: str, name: str) -> Iterator[tuple[int, str]]:
  if file == "-":
    if sys.stdin is None:
      raise errors.InputError("standard input is closed: give --file=FILE")
    return user_text.lines_of(sys.stdin.buffer, name, LONGEST_LINE)
  return _piped_lines(file) if file.startswith(("/dev/", "/proc/")) else user_text.lines(file, LONGEST_LINE)


def _piped_lines(file: str) -> Iterator[tuple[int, str]]:
  """Yields lines of what a shell gives for <(command), and of /dev/stdin."""
  try:
    stream = open(file, "rb")
  except OSError as error:
    raise errors.InputError(f"cannot read {file}: {errors.reason(error)}") from error
  with stream:
    yield from user_text.lines_of(stream, file, LONGEST_LINE)


def _cut(value: Any) -> str:
  shown = json.dumps(value, ensure_ascii=True, default=str)
  return shown if len(shown) <= 60 else f"{shown[:60]}..."
