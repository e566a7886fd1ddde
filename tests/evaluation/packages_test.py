"""benchmarks/evaluation_data.py on packages that are made here."""

import importlib.util
import json
import pathlib
import types
import zipfile

import pytest

from glmjax.harness import reading

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
  spec = importlib.util.spec_from_file_location("evaluation_data_script", ROOT / "benchmarks" / "evaluation_data.py")
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_a_package_that_is_there_is_not_fetched(script: types.ModuleType, tmp_path: pathlib.Path) -> None:
  with zipfile.ZipFile(tmp_path / "ferries-1.0-py3-none-any.whl", "w") as archive:
    archive.writestr("ferries/data/b.txt", "two")
    archive.writestr("ferries/data/a.txt", "one")
    archive.writestr("ferries/code.py", "raise SystemExit")
  assert script.files("ferries==1.0", tmp_path, r"ferries/data/(.*)\.txt") == {"a": "one", "b": "two"}
  with pytest.raises(SystemExit, match="nothing of the name"):
    script.files("ferries==1.0", tmp_path, "none")


def test_last_words_that_are_known(script: types.ModuleType) -> None:
  """The last word is a longer one that stands in the paragraph before."""
  start = "Many people waited for the ferry, which did not come before the evening; in the end there was no other "
  assert script.english(f"{start}ferry.") == f"{start}ferry"
  assert script.english(f"{start}boat.") == script.english("The ferry, a ferry.") == ""
  words = ["渡船/n", "很/d", "慢/a", "，/w"] * 9
  assert script.chinese("  ".join([*words, "坐/v", "渡船/n", "。/w"])) == {
    "before": "渡船很慢，" * 9 + "坐",
    "word": "渡船",
    "behind": "。",
  }
  assert script.chinese("  ".join([*words, "坐/v", "火车/n", "。/w"])) is None
  assert script.chinese("  ".join([*words, "坐/v", "渡船/n"])) is None and script.chinese("") is None


def test_characters(script: types.ModuleType) -> None:
  found = list(script.characters("坐船\t坐船\n做船去\t坐船去\n我坐传\t我坐船\n"))
  assert found == [
    {"before": "", "behind": "船去", "first": "坐", "second": "做", "label": 0},
    {"before": "我坐", "behind": "", "first": "船", "second": "传", "label": 0},
  ]


def test_official_layouts(script: types.ModuleType, tmp_path: pathlib.Path) -> None:
  question = {"question": "Where?", "options": "\nA. here\nB. there", "answer": "B. there"}
  stem = script.stem(question)
  assert stem["answerKey"] == "B" and [choice["text"] for choice in stem["question"]["choices"]] == ["here", "there"]
  own = {"target": "sailor", "bias_type": "profession", "stereotype": "A b d.", "anti-stereotype": "A c d."}
  record = own | {"type": "intrasentence", "context": "A BLANK d.", "unrelated": "A e d."}
  path = tmp_path / "dev.json"
  path.write_text(json.dumps(script.stereoset([record])))
  [(found, _)] = reading.Reader("stereoset_intra").read(path)
  assert found["choices"] == ["b", "c", "e"] and found["goal_label"][0] == "stereotype"


def test_summaries(script: types.ModuleType, tmp_path: pathlib.Path) -> None:
  script.lay_out_summaries([{"id": "7", "document": "It was late.\nVery.", "summary": "A late ferry."}], tmp_path)
  [(found, _)] = reading.Reader("xsum").read(tmp_path / "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json")
  assert found == {"document": "It was late.\nVery.", "summary": "A late ferry."}


def test_spread(script: types.ModuleType) -> None:
  assert script.spread(range(10), 3) == [0, 3, 6] and script.spread(range(2), 3) == [0, 1]
