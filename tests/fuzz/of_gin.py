"""Inputs in gin: values on the command line, and files."""

import collections.abc
import inspect
import pathlib
import random
import re
import types
import typing
from typing import Any

import tiny_world

from fuzz import odd
from fuzz.case import Case

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
