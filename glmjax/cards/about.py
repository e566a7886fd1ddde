"""about.yaml: what the owner of a model states, and nothing else can know."""

import dataclasses
import difflib
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from glmjax import errors
from glmjax import ranges
from glmjax.cards import emissions
from glmjax.io import paths
from glmjax.io import user_yaml

FILE, ELSEWHERE = "about.yaml", "--about"
_LONGEST = 20_000  # characters of a text
_MOST = 1000  # entries of a list or a table
VERSION = re.compile(
  r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})(-[0-9A-Za-z.-]{1,40})?(\+[0-9A-Za-z.-]{1,40})?"
)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")

TEMPLATE = """\
# What glmjax card is to say of this model beyond what its files show. Leave out what you do not know: the card lists it
# as not known. docs/cards.md has every key.
#
# name: My model
# version: 1.0.0                # of the weights: MAJOR.MINOR.PATCH (semver.org)
# summary: What it is, in a sentence or two.
# owner: Who answers for it
# contact: me@example.org
# license: apache-2.0           # of the weights: its name at spdx.org/licenses
# languages: [en, zh]
# data:                         # by the names that the token cache has
#   pretrain_en: {source: "https://example.org/corpus", license: cc-by-4.0}
# uses: {intended: "...", unsuitable: "...", limits: "..."}
# grid: {kg_co2_per_kwh: 0.581, source: "who says so", year: 2020}
# pue: 1.1                      # power that the data centre takes over what the computers take
# changes: What is other than in the version before.
"""


@dataclasses.dataclass(frozen=True)
class Published:
  """A fact that was published elsewhere."""

  what: str
  value: str
  source: str


@dataclasses.dataclass(frozen=True)
class About:
  """The owner's statements; None and empty: not stated."""

  name: str | None = None
  version: str | None = None
  summary: str | None = None
  owner: str | None = None
  contact: str | None = None
  license: str | None = None
  languages: tuple[str, ...] = ()
  architecture: str | None = None  # where it was published: a paper, an address
  tokenizer: str | None = None  # where it comes from
  base_model: str | None = None  # of what was tuned: its name on the hub
  data: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)  # task: source, license, notes
  uses: Mapping[str, str] = dataclasses.field(default_factory=dict)  # intended, unsuitable, limits
  grid: emissions.Grid | None = None  # carbon dioxide of electricity, where and when it was used
  pue: float | None = None
  changes: str | None = None
  published: tuple[Published, ...] = ()


_TABLES = {"data": ("source", "license", "notes"), "uses": ("intended", "unsuitable", "limits")}
_TEXTS = (
  *("name", "version", "summary", "owner", "contact", "license", "architecture", "tokenizer", "base_model", "changes"),
)


@dataclasses.dataclass(frozen=True)
class Stated:
  """What is stated of a model, and where."""

  about: About
  where: str | None  # FILE: in the model's folder; the name of one that comes with glmjax; ELSEWHERE; None: nowhere
  folder: paths.Path | None = None  # of the file, unless it comes with glmjax


def find(folder: paths.Path, named: paths.Named | None) -> Stated:
  """Returns what is stated of a model: by `named`, a file, which may be one that comes with glmjax (quickstart,
  glm-130b, chatglm-6b), or else by the folder's about.yaml, where there is one.

  Raises:
    errors.InputError: where it cannot be used.
  """
  if named is None:
    file = folder / FILE
    return Stated(read(file), FILE, folder) if file.exists() else Stated(About(), None)
  known = shipped()
  if str(named) in known:
    return Stated(read(known[str(named)]), str(named))
  file = paths.named(named, "--about")
  if not file.exists():
    raise errors.InputError(
      f"--about is {named}: no such file, and none of those that come with it: {', '.join(known)}"
    )
  return Stated(read(file), ELSEWHERE, file.parent)


def shipped() -> dict[str, pathlib.Path]:
  """Returns the files that come with glmjax, by their names."""
  return {path.stem: path for path in sorted((pathlib.Path(__file__).parent / "known").glob("*.yaml"))}


def read(path: paths.Path) -> About:
  """Reads a model's about.yaml.

  Raises:
    errors.InputError: naming what in it is wrong.
  """
  content = user_yaml.read(pathlib.Path(str(path)), "what is said about a model", "name: My model")
  known = [field.name for field in dataclasses.fields(About)]
  for key in content:
    if key not in known:
      near = difflib.get_close_matches(str(key), known, 1)
      advice = f"is it {near[0]}?" if near else f"known are {', '.join(known)}"
      raise errors.InputError(f"{path}: {str(key)[:60]!r} is unknown: {advice}")
  given = {key: value for key, value in content.items() if value is not None}
  try:
    return About(**{key: _READERS[key](f"{path}: {key}", value) for key, value in given.items()})
  except TypeError as error:
    raise errors.InputError(f"{path}: {errors.one_line(error)}") from None


def _text(where: str, value: Any) -> str:
  if not isinstance(value, str) or not value.strip() or len(value) > _LONGEST:
    raise errors.InputError(f"{where} is {str(value)[:60]!r}: give a text of 1 to {_LONGEST:,} characters, in quotes")
  if any("\ud800" <= letter <= "\udfff" for letter in value):
    raise errors.InputError(f"{where} has half a character (a surrogate): write it as UTF-8 text")
  return value.strip()


def _matching(pattern: re.Pattern[str], example: str, where: str, value: Any) -> str:
  text = _text(where, value)
  if not pattern.fullmatch(text):
    raise errors.InputError(f"{where} is {text[:60]!r}: give it as {example}")
  return text


def _languages(where: str, value: Any) -> tuple[str, ...]:
  if not isinstance(value, list) or len(value) > _MOST:
    raise errors.InputError(f"{where} is {str(value)[:60]!r}: give a list of languages, as [en, zh]")
  return tuple(
    _matching(re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]+)*"), "en, zh or zh-Hant", where, each) for each in value
  )


def _table(allowed: tuple[str, ...], where: str, value: Any) -> dict[str, str]:
  if not isinstance(value, dict) or not {*value} <= {*allowed}:
    raise errors.InputError(f"{where} is {str(value)[:60]!r}: give a table of {', '.join(allowed)}")
  return {key: _text(f"{where}: {key}", each) for key, each in value.items() if each is not None}


def _data(where: str, value: Any) -> dict[str, dict[str, str]]:
  if not isinstance(value, dict) or len(value) > _MOST:
    raise errors.InputError(f"{where} is {str(value)[:60]!r}: give a table of {', '.join(_TABLES['data'])} by task")
  return {str(task)[:200]: _table(_TABLES["data"], f"{where}: {str(task)[:60]}", each) for task, each in value.items()}


def _grid(where: str, value: Any) -> emissions.Grid:
  example = '{kg_co2_per_kwh: 0.581, source: "who says so", year: 2020}'
  if not isinstance(value, dict) or {*value} != {"kg_co2_per_kwh", "source", "year"}:
    raise errors.InputError(f"{where} is {str(value)[:60]!r}: give all of {example}")
  source = _text(f"{where}: source", value["source"])
  try:
    return emissions.Grid(value["kg_co2_per_kwh"], source, value["year"])
  except errors.InputError as error:
    raise errors.InputError(f"{where}: {error}") from None


def _pue(where: str, value: Any) -> float:
  ranges.number(where, value, least=1, most=10)
  return float(value)


def _published(where: str, value: Any) -> tuple[Published, ...]:
  names = ("what", "value", "source")
  if not isinstance(value, list) or len(value) > _MOST:
    raise errors.InputError(f"{where} is {str(value)[:60]!r}: give a list of {', '.join(names)}")
  found = []
  for i, each in enumerate(value):
    own = _table(names, f"{where}, entry {i + 1}", each)
    if len(own) < len(names):
      raise errors.InputError(f"{where}, entry {i + 1} is {str(each)[:60]!r}: give what, value and source")
    found.append(Published(**own))
  return tuple(found)


_READERS = {name: _text for name in _TEXTS} | {
  "version": functools.partial(_matching, VERSION, "1.0.0"),
  "license": functools.partial(_matching, _LICENSE, "apache-2.0, its name at spdx.org/licenses"),
  "languages": _languages,
  "data": _data,
  "uses": functools.partial(_table, _TABLES["uses"]),
  "grid": _grid,
  "pue": _pue,
  "published": _published,
}
