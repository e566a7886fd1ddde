"""Cards that are kept: elsewhere, over kills and edits, and of no more than their weights' past."""

import json
import pathlib
import shutil

import pytest

from glmjax import errors
from glmjax.cards import card
from glmjax.cards import evaluations
from glmjax.cards import files
from glmjax.cards import integrity


@pytest.fixture
def model(world, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of the export, with nothing beside it."""
  shutil.copytree(world.export, tmp_path / "model")
  return tmp_path / "model"


def missing(content: dict, name: str) -> list[str]:
  return next(each["missing"] for each in content["integrity"] if each["name"] == name)


def test_statements_and_licence_may_be_kept_elsewhere(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  kept, out = tmp_path / "kept", tmp_path / "card"
  kept.mkdir()
  (kept / "LICENSE").write_text("Apache License", encoding="utf-8")
  about = kept / "mine.yaml"
  about.write_text("name: Mine\nlicense: apache-2.0\n", encoding="utf-8")
  content = card.make(model, out, about)
  assert not [text for text in missing(content, "licence clarity") if "LICENSE" in text]

  def problems(**given) -> list[str]:
    found = files.check(model, out, waive=integrity.names(), **given)
    return found["problems"]

  assert problems()[0] == "the card has the statements of a file elsewhere: name that with --about"
  assert problems(about=about) == []
  (model / "about.yaml").write_text("name: Another\n", encoding="utf-8")  # of which the card is not
  assert problems(about=about) == []
  about.write_text("name: Mine now\nlicense: apache-2.0\n", encoding="utf-8")
  assert problems(about=about) == ["--about says other things than the card: make it again"]
  about.write_text("name: Mine\nlicense: apache-2.0\n", encoding="utf-8")
  (kept / "LICENSE").unlink()
  assert problems(about=about) == ["LICENSE is other than the card says: make it again"]


def test_statements_that_come_with_glmjax_are_found_again(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  card.make(model, tmp_path / "card", "quickstart")
  assert files.check(model, tmp_path / "card", integrity.names())["problems"] == []


def test_an_edited_card_is_told(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  card.make(model, tmp_path / "card")
  path = tmp_path / "card" / files.JSON
  content = json.loads(path.read_text(encoding="utf-8"))
  for each in content["integrity"]:
    each["missing"] = []
  path.write_text(json.dumps(content), encoding="utf-8")
  assert files.check(model, tmp_path / "card")["problems"] == ["card.json is other than the card says: make it again"]


def test_a_card_that_was_killed_is_made_again(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  whole = card.make(model, tmp_path / "card")
  for name in (files.JSON, files.PAGE):
    (tmp_path / "card" / name).unlink()
    assert card.make(model, tmp_path / "card")["written"] == whole["written"]


def test_what_is_not_compared_is_refused(world, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  with pytest.raises(errors.InputError, match="--run: .* is a training run itself"):
    card.make(world.run, tmp_path / "card", run=world.export)
  with pytest.raises(errors.InputError, match="--text: give --cache too"):
    card.make(model, text=tmp_path / "report.json")


def test_interventions_are_those_behind_the_weights(world, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
  run = tmp_path / "run"
  shutil.copytree(world.run, run)
  lines = [
    {"step": 1, "action": "skip"},
    {"step": 2, "action": "skip"},  # the weights are of step 1
    {"step": 9, "action": "roll_back", "back_to_step": 1},
    {"step": 30, "action": "roll_back", "back_to_step": 20},
  ]
  (run / "interventions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
  assert card.make(model, tmp_path / "card", run=run)["interventions"] == {"skip": 1, "roll_back": 1}


def test_a_folder_named_by_a_dot_has_its_name(model: pathlib.Path, monkeypatch) -> None:
  monkeypatch.chdir(model)
  assert card.make(pathlib.Path("."))["model"]["folder"] == "model"
  assert "\n# model\n" in (model / "README.md").read_text(encoding="utf-8")


def test_parts_of_the_held_out_text_are_parts(tmp_path: pathlib.Path) -> None:
  figures = {"tokens": 10, "bytes": 30, "bits_per_byte": 2.5}
  path = tmp_path / "heldout.json"
  for more, part in (
    ({}, ("en: how much of the held-out text was read is not recorded",)),
    ({"split_tokens": 25}, ("en: 10 of the 25 tokens that are held out",)),
    ({"split_tokens": 10}, ()),
  ):
    path.write_text(json.dumps({"en": figures | more, "model": {"weights": "1"}}), encoding="utf-8")
    assert evaluations.read(path, "1").parts == part
  path.write_text(json.dumps({"model": {"weights": "1"}}), encoding="utf-8")
  with pytest.raises(errors.InputError, match="has no figures"):
    evaluations.read(path, "1")


def test_versions_are_ordered_as_semver_says() -> None:
  ordered = ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11"]
  ordered += ["1.0.0-rc.1", "1.0.0", "1.0.1", "1.10.0", "2.0.0"]  # semver.org, point 11
  assert sorted(reversed(ordered), key=integrity._ordered) == ordered
  assert integrity._ordered("1.0.0+a") == integrity._ordered("1.0.0+b")
