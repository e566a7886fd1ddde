"""Evaluation tasks as pairs to learn from."""

import json
import pathlib

import evaluation_data
import pytest
import seqio

from glmjax import errors
from glmjax import tokenizer as tokenizer_lib
from glmjax.data import seqio_tasks
from glmjax.tasks import evaluation_sets

WRITTEN = "name: written\ntype: gen\npath: own\nfile_pattern: '*.jsonl'\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A tokenizer, BoolQ's file, and records of another task."""
  path = tmp_path_factory.mktemp("sets")
  asked = [
    {"question": f"is it {i}", "title": "", "answer": i % 2 == 0, "passage": "The ferry leaves."} for i in range(60)
  ]
  written = [{"inputs_pretokenized": "When? ", "targets_pretokenized": ["at nine", "nine"]}]
  for name, records in (("boolq/dev.jsonl", asked), ("own/a.jsonl", written)):
    (path / name).parent.mkdir()
    (path / name).write_text("".join(f"{json.dumps(record)}\n" for record in records))
  (path / "written.yaml").write_text(WRITTEN)
  tokenizer_lib.train([str(record) for record in asked * 3], path / "tokenizer", vocab_size=400)
  return path


def test_questions_and_their_answers(folder: pathlib.Path) -> None:
  tasks = ["boolq", folder / "written.yaml"]
  assert evaluation_sets.register(tasks, folder, folder / "tokenizer", {"boolq": 3, "written": 1}) == "evaluation_sets"
  mixture, tokenizer = seqio_tasks.mixture("evaluation_sets"), tokenizer_lib.Tokenizer.load(folder / "tokenizer")
  assert mixture.rates == {"evaluate_boolq": 3, "evaluate_written": 1}
  pairs = {split: list(mixture.task("evaluate_boolq").examples(split)) for split in ("train", "validation")}
  assert [len(own) for own in pairs.values()] == [59, 1]
  assert pairs["train"][1] == ("The ferry leaves.\nQuestion: is it 1?\nAnswer:", "No")
  assert list(mixture.task("evaluate_written").examples("train")) == [("When? ", "at nine")]
  dataset = seqio.get_mixture_or_task("evaluate_boolq").get_dataset(split="train", shuffle=False)
  first = next(dataset.as_numpy_iterator())
  assert tokenizer.decode(first["targets"].tolist()) == "Yes" and not len(first["text"])


@pytest.mark.parametrize("task, message", [("wikitext_2", "has texts, and no answers"), ("siqa", "there is no folder")])
def test_tasks_that_are_no_pairs(task: str, message: str, folder: pathlib.Path) -> None:
  with pytest.raises(errors.InputError, match=message):
    evaluation_sets.register([task], folder, folder / "tokenizer")


def test_files_of_any_format(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """CSV, JSON."""
  evaluation_data.write(tmp_path)
  evaluation_sets.register(["ethos_zero", "truthfulqa"], tmp_path, folder / "tokenizer", mixture="formats")
  for task in seqio_tasks.mixture("formats").tasks:
    pairs = list(task.examples("train"))
    assert pairs and all(inputs and answer for inputs, answer in pairs)


def test_blanks_within_are_no_pairs(folder: pathlib.Path) -> None:
  task = folder / "within.yaml"
  task.write_text(
    "name: within\ntype: mul\npath: own\nfile_pattern: '*.jsonl'\n"
    'prompt: {inputs: "a [MASK] b", choices: [x, y], label: "0"}\n'
  )
  evaluation_sets.register([task], folder, folder / "tokenizer", mixture="within")
  with pytest.raises(errors.InputError, match="a.jsonl, line 1: its blank is within"):
    list(seqio_tasks.mixture("within").tasks[0].examples("train"))


def test_rates_are_those_of_the_tasks(folder: pathlib.Path) -> None:
  for rates in ({"bolq": 1}, {"boolq": 1, "siqa": 1}, {}):
    with pytest.raises(errors.InputError, match="give one of each task, boolq"):
      evaluation_sets.register(["boolq"], folder, folder / "tokenizer", rates, "other")
