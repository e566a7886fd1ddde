"""Every flag of every command: numbers out of range, paths that are none, and ~."""

import pathlib

import pytest

from glmjax import cli
from glmjax.cli import commands, run
from glmjax.models import config as config_lib
from glmjax.quantize import qarray
from glmjax.thudm import layouts, write

COMMANDS = {command.name: command for top in commands.COMMANDS.values() for command in (top, *top.modes)}
FLAGS = [(name, flag) for name, command in COMMANDS.items() for flag in command.flags]
NOT_INTEGERS = [
  "nan",
  "inf",
  "-inf",
  "1.5",
  "1e6",
  "",
  " ",
  "abc",
  "0x10",
  "1e999",
  "9" * 30,
  "9" * 5000,
  "None",
  "'3'",
]
NOT_FLOATS = ["nan", "inf", "-inf", "", "abc", "1e999", "-1e999", "9" * 400, "True", "1,5"]


def line(command: str, flag, text: str) -> list[str]:
  """A command line with that flag; positional arguments before it get a name."""
  given = [f"{flag.name}={text}"]
  if not flag.name.startswith("-"):
    given = []
    for other in COMMANDS[command].flags:
      if not other.name.startswith("-"):
        given.append(text if other is flag else (other.choices or ["x"])[0])
  elif any(not other.name.startswith("-") for other in COMMANDS[command].flags):
    given += [(other.choices or ["x"])[0] for other in COMMANDS[command].flags if not other.name.startswith("-")]
  names = [each.name for each in COMMANDS[command].flags]
  words = [f"{word}=x" if word in names else word for word in command.split()]  # a mode that takes a value
  return [*words, *given]


@pytest.mark.parametrize(
  "command, flag",
  [each for each in FLAGS if each[1].type in (int, float)],
  ids=lambda each: getattr(each, "name", each),
)
def test_numbers(command, flag, capsys):
  """nan and infinity are numbers out of range: no advice on quotes."""
  wrong = list(NOT_INTEGERS if flag.type is int else NOT_FLOATS)
  if flag.choices is None:
    assert flag.least is not None or flag.above is not None, "says where it begins"
    wrong += [str(flag.least - 1)] if flag.least is not None else [str(flag.above), str(flag.above - 1)]
    wrong += [str(flag.most + 1)] if flag.most is not None else []
  for text in wrong:
    assert cli.main(line(command, flag, text)) == 2, text[:40]
    message = capsys.readouterr().err
    assert message.startswith(f"glmjax: {flag.name} is ") and message.count("\n") == 1 and len(message) < 300, message
    assert ": give a" in message or ": choose one of " in message
  right = [str(flag.choices[0])] if flag.choices else [str(flag.least if flag.least is not None else flag.above + 0.5)]
  for text in right:
    value = getattr(run._parse_flags(line(command, flag, text)), flag.parameter)
    assert value == ([flag.type(text)] if flag.repeatable else flag.type(text))


@pytest.mark.parametrize(
  "command, flag",
  [*[each for each in FLAGS if each[1].type is pathlib.Path], *[(name, run.STAGES) for name in COMMANDS]],
  ids=lambda each: getattr(each, "name", each),
)
def test_paths(command, flag, capsys, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  for text, expected in (
    ("gs://b/x", "a bucket is named as"),
    ("s3://bucket/a//x", "no empty parts"),
    ("hdfs://bucket/x", "glmjax knows"),
    ("", "is empty"),
    (" ", "is empty"),
    ("a\0b", "NUL"),
    ("a" * 300, "300 bytes"),
    ("~nobody-is-called-this/x", "no user"),
  ):
    assert cli.main(line(command, flag, text)) == 2, text[:40]
    message = capsys.readouterr().err
    assert message.startswith(f"glmjax: {flag.name} ") and expected in message and message.count("\n") == 1, message
  for text, read in (
    ("~/x", str(tmp_path / "x")),
    ("a/~/x", "a/~/x"),
    ("~", str(tmp_path)),
    ("s3://bucket/x/", "s3://bucket/x"),
  ):
    found = getattr(run._parse_flags(line(command, flag, text)), flag.parameter)
    assert (found[-1] if flag.repeatable else found) == read
  assert not list(tmp_path.iterdir())


def test_every_flag_that_sounds_like_a_path_is_one():
  words = ("folder", "file", "directory")
  for command, flag in FLAGS:
    assert flag.type is pathlib.Path or not any(word in flag.help.split()[:2] for word in words), (command, flag.name)


@pytest.mark.parametrize(
  "command, flag", [each for each in FLAGS if each[1].choices], ids=lambda each: getattr(each, "name", each)
)
def test_choices(command, flag, capsys):
  assert cli.main(line(command, flag, "8x")) == 2
  assert capsys.readouterr().err.startswith(f"glmjax: {flag.name} is ")


def test_choices_are_those_of_their_owners():
  """The command line names them without importing what knows them."""
  owners = {
    ("export", "--format"): ("orbax", "cpu", *write.FORMATS),
    ("import", "family"): layouts.FAMILIES,
    ("export", "--bits"): qarray.BITS,
    ("import", "--bits"): qarray.BITS,
    ("import", "--rotary_rounding"): config_lib.ROTARY_ROUNDINGS,
  }
  for name, flag in FLAGS:
    if (name, flag.name) in owners:
      assert sorted(map(str, flag.choices)) == sorted(map(str, owners.pop((name, flag.name))))
  assert not owners
