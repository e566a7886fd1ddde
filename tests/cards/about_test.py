"""What owners state: every mistake is said in a line that names the place."""

import pathlib

import pytest

from glmjax import errors
from glmjax.cards import about


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
  path = folder / about.FILE
  path.write_text(text, encoding="utf-8")
  return path


@pytest.mark.parametrize("name", about.shipped())
def test_those_that_come_with_it_can_be_read(name: str, tmp_path: pathlib.Path) -> None:
  found = about.find(tmp_path, name)
  stated = found.about
  assert stated.name and stated.architecture and stated.languages and found.where == name


def test_the_template_states_nothing_until_it_is_filled_in(tmp_path: pathlib.Path) -> None:
  filled = "\n".join(line.removeprefix("# ") for line in about.TEMPLATE.splitlines()[3:])
  stated = about.read(write(tmp_path, filled))
  assert (stated.name, stated.version, stated.grid.kg_co2_per_kwh) == ("My model", "1.0.0", 0.581)
  assert stated.data["pretrain_en"]["license"] == "cc-by-4.0"


def test_nothing_is_stated_where_there_is_no_file(tmp_path: pathlib.Path) -> None:
  assert about.find(tmp_path, None) == about.Stated(about.About(), None)


@pytest.mark.parametrize(
  "text,said",
  [
    ("licence: mit", "'licence' is unknown: is it license?"),
    ("version: 1.0", "version is '1.0': give a text"),
    ("version: '1.0'", "version is '1.0': give it as 1.0.0"),
    ("license: do what you want", "give it as apache-2.0"),
    ("languages: en", "give a list of languages"),
    ("data: {pretrain_en: {licence: mit}}", "give a table of source, license, notes"),
    ("grid: {kg_co2_per_kwh: 0.5}", "grid is .*: give all of"),
    ("grid: {kg_co2_per_kwh: -1, source: x, year: 2020}", "kg_co2_per_kwh"),
    ("pue: 0.5", "pue"),
    ("published: [{what: a, value: b}]", "entry 1 .*give what, value and source"),
    ('name: "x\\ud800"', "half a character|not YAML"),
    ("- a", "is a table of keys and values"),
    ("a: &x 1\nb: *x", "aliases"),
    ("a: 2022-13-45", "not YAML"),
    ("name: [", "not YAML"),
  ],
)
def test_mistakes_are_named(tmp_path: pathlib.Path, text: str, said: str) -> None:
  with pytest.raises(errors.InputError, match=said) as caught:
    about.read(write(tmp_path, text))
  assert "\n" not in str(caught.value) and about.FILE in str(caught.value)


def test_a_file_of_megabytes_is_refused(tmp_path: pathlib.Path) -> None:
  with pytest.raises(errors.InputError, match="at most"):
    about.read(write(tmp_path, "name: " + "a" * (1 << 20)))


def test_a_file_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
  with pytest.raises(errors.InputError, match="no such file, and none of those that come with it: chatglm-6b"):
    about.find(tmp_path, "nowhere.yaml")
