"""Instruction pairs: the fields that make them, earlier rounds, and what is refused rather than dropped."""

import json

import pytest

from glmjax import errors
from glmjax.data import instructions
from glmjax.infer import chat


def read(path, *records, **options):
  path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
  return [pair for _, pair in instructions.file_instructions(path, 0, **options)]


@pytest.fixture
def path(tmp_path):
  return tmp_path / "pairs.jsonl"


def fails(match, path, *records, **options):
  with pytest.raises(errors.InputError, match=match) as caught:
    read(path, *records, **options)
  assert "\n" not in str(caught.value)


def test_pairs_and_the_held_out_ones(path):
  records = {"inputs": "a", "targets": "b"}, {"prompt": "", "response": "d"}
  assert read(path, *records) == [("a", "b"), ("", "d")]
  assert [split for split, _ in instructions.file_instructions(path, 0)] == ["train", "train"]
  assert list(instructions.file_instructions(path, 48)) == [("train", ("a", "b")), ("validation", ("", "d"))]
  assert read(path, {"content": "a", "summary": "b"}, fields=[("content", "summary")]) == [("a", "b")]
  fails(
    "pairs.jsonl:1: no fields content and summary; the record has inputs, targets",
    path,
    records[0],
    fields=[("content", "summary")],
  )
  for blank in ("", " \n", "\u3000"):
    fails("pairs.jsonl:1: the field 'targets' is empty", path, {"inputs": "a", "targets": blank})
  with pytest.raises(errors.InputError, match="read from .jsonl"):
    list(instructions.file_instructions(path.with_suffix(".txt"), 0))


def test_history_becomes_the_rounds_that_the_chat_writes(path):
  record = {"prompt": "晴朗吗？", "response": "是的。", "history": [["你好", "你好！"], ["今天\n星期几？", "星期三。"]]}
  ((inputs, targets),) = read(path, record)
  assert inputs == (
    "[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：今天\n星期几？\n答：星期三。\n[Round 2]\n问：晴朗吗？\n答："
  )
  assert targets == "是的。"
  assert inputs == chat.prompt([chat.Round(*each) for each in record["history"]], record["prompt"])
  for none in ([], None, ""):
    assert read(path, record | {"history": none}) == [("晴朗吗？", "是的。")]


@pytest.mark.parametrize("history", ["text", {"a": "b"}, ["a", "b"], [["a"]], [["a", "b", "c"]], [["a", 5]], 5, False])
def test_history_of_another_shape_is_refused(path, history):
  fails(
    'pairs.jsonl:1: the field "history" is .*not a list of .question, answer. pairs',
    path,
    {"prompt": "a", "response": "b", "history": history},
  )


def test_history_in_a_field_of_another_name(path):
  record = {"content": "c", "summary": "d", "past": [["a", "b"]]}
  fields = [("content", "summary")]
  assert read(path, record, fields=fields, history="past") == [("[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答：", "d")]
  fails("the field 'past' is not read", path, record, fields=fields)
  fails('the field "past" is 5, not a list', path, record | {"past": 5}, fields=fields, history="past")


def test_half_a_surrogate_in_history_is_refused(path):
  path.write_text('{"prompt": "a", "response": "b", "history": [["\\ud800", "c"]]}')
  with pytest.raises(errors.InputError, match="surrogate"):
    list(instructions.file_instructions(path, 0))


@pytest.mark.parametrize(
  "name",
  [
    "system",
    "instruction",
    "input",
    "context",
    "messages",
    "conversations",
    "choices",
    "Input",
    "passage",
    "weight",
    "whatever",
  ],
)
def test_fields_that_might_belong_to_the_sample_are_refused(path, name):
  fails(
    f"pairs.jsonl:2: the field '{name}' is not read.*write it into 'inputs', remove it, or move it into",
    path,
    {"inputs": "a", "targets": "b"},
    {"inputs": "a", "targets": "b", name: "c"},
  )
  assert read(path, {"inputs": "a", "targets": "b", name: ""}, {"inputs": "a", "targets": "b", name: None})


def test_fields_that_describe_a_pair_are_passed_over(path):
  described = {"id": 5, "Source": "book", "metadata": {"system": "x"}, "task_name": "qa", "lang": "en", "score": 0.5}
  assert read(path, {"inputs": "a", "targets": "b"} | described) == [("a", "b")]


@pytest.mark.parametrize(
  "record", [{"instruction": "a", "input": "", "output": "b"}, {"conversations": [{"from": "human", "value": "a"}]}, {}]
)
def test_records_of_other_formats_are_told_what_to_do(path, record):
  fails("no fields inputs and targets or prompt and response; the record has .*: rename its fields", path, record)


def test_a_number_of_5000_digits_in_a_field_that_is_passed_over(path):
  path.write_text('{"inputs": "a", "targets": "b", "id": ' + "9" * 5000 + "}")
  assert [pair for _, pair in instructions.file_instructions(path, 0)] == [("a", "b")]
