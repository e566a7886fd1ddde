"""`glmjax evaluate --tasks` and `glmjax compare`: from files to a report, stopped and gone on with."""

import itertools
import json
import logging
import pathlib
import random
import re

import pytest
import untrained_run

from glmjax import errors
from glmjax.cli import evaluation
from glmjax.harness import asking
from glmjax.harness import compare
from glmjax.harness import results

TASKS = {
  "choices": "name: choices\ntype: mul\npath: choices\n",
  "filled": "name: filled\ntype: gen\npath: filled\nmax_gen_length: 4\n",
  "beams": "name: beams\ntype: gen\npath: filled\nmax_gen_length: 4\nsampling-strategy: BeamSearchStrategy\n"
  "num-beams: 2\n",
  "text": "name: text\ntype: lm\npath: text\nuse_task_mask: true\nmax_seq_length: 64\ngeneration-length: 32\n"
  "file-pattern: '*.txt'\n",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
  return untrained_run.write(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture
def files(tmp_path) -> tuple[list[pathlib.Path], pathlib.Path]:
  """Tasks, and the folder of their data."""
  draw = random.Random(0)
  words = "on day the quick brown fox jumps over lazy dogs".split()

  def text(count: int) -> str:
    return " ".join(draw.choices(words, k=count))

  data, tasks = tmp_path / "data", tmp_path / "tasks"
  for name in ("choices", "filled", "text"):
    (data / name).mkdir(parents=True)
  questions = [
    {"inputs_pretokenized": text(4 + i), "choices_pretokenized": [text(1 + i % 3) for _ in range(3)], "label": i % 3}
    for i in range(12)
  ]
  blanks = [{"inputs_pretokenized": text(5 + i), "targets_pretokenized": [text(1)]} for i in range(4)]
  for name, records in (("choices", questions), ("filled", blanks)):
    (data / name / "test.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
  for i in range(3):
    (data / "text" / f"{i}.txt").write_text(text(60))
  tasks.mkdir()
  for name, content in TASKS.items():
    (tasks / f"{name}.yaml").write_text(content)
  return [tasks], data


def test_a_report(model, files, tmp_path, capsys) -> None:
  tasks, data = files
  found = evaluation.evaluate(model, tasks, data, tmp_path / "out")
  assert found == json.loads((tmp_path / "out" / "report.json").read_text())
  assert found["tasks"].keys() == TASKS.keys()
  figure = found["tasks"]["choices"]["figures"]["Accuracy"]
  assert figure["items"] == 12 and figure["low"] <= figure["value"] <= figure["high"]
  assert found["tasks"]["text"]["figures"]["bits_per_byte"]["items"] == 3
  page = (tmp_path / "out" / "report.md").read_text()
  assert "| choices | Accuracy |" in page and "Evaluation results of task beams:" in page
  evaluation.show(found)
  assert "choices" in capsys.readouterr().out
  run, records = results.read(tmp_path / "out")
  assert run["tasks"]["choices"]["type"] == "mul" and len(run["weights"]) == 64
  assert len(records) == found["run"]["items"]
  assert len(records) > 12 + 4 + 4 + 3  # texts have several windows


def test_a_stopped_run_goes_on(model, files, tmp_path, monkeypatch) -> None:
  """What was asked is not asked again, half a line counts for nothing, and the report is the same."""
  tasks, data = files
  whole = evaluation.evaluate(model, tasks, data, tmp_path / "whole")
  monkeypatch.setattr(evaluation, "_TOKENS", 200)
  asked, ask = [], asking.Asker.ask

  def stop(self, some):
    if len(asked) == 3:
      raise KeyboardInterrupt
    asked.append(some)
    return ask(self, some)

  monkeypatch.setattr(asking.Asker, "ask", stop)
  with pytest.raises(KeyboardInterrupt):
    evaluation.evaluate(model, tasks, data, tmp_path / "out")
  items = tmp_path / "out" / results.ITEMS
  kept = items.read_bytes().count(b"\n")
  assert kept == sum(map(len, asked)) > 0
  with items.open("ab") as file:
    file.write(b'{"task": "choi')
  asked.clear()
  monkeypatch.setattr(asking.Asker, "ask", lambda self, some: asked.extend(some) or ask(self, some))
  found = evaluation.evaluate(model, tasks, data, tmp_path / "out")
  assert len(asked) == whole["run"]["items"] - kept
  for name, own in whole["tasks"].items():
    for metric, figure in own["figures"].items():
      assert found["tasks"][name]["figures"][metric] == pytest.approx(figure, abs=1e-4)
  asked.clear()
  assert evaluation.evaluate(model, tasks, data, tmp_path / "out") == found and not asked


def test_settings_must_be_those_of_the_records(model, files, tmp_path) -> None:
  tasks, data = files
  one = [tasks[0] / "choices.yaml"]
  evaluation.evaluate(model, one, data, tmp_path / "out", items=evaluation.Items(limit=2))
  with pytest.raises(errors.InputError, match="records of other settings \\(limit: 2 there, 3 now; data"):
    evaluation.evaluate(model, one, data, tmp_path / "out", items=evaluation.Items(limit=3))
  found = evaluation.evaluate(model, one, data, tmp_path / "out", True, evaluation.Items(limit=3))
  questions = data / "choices" / "test.jsonl"
  questions.write_text(questions.read_text().replace('"label": 0', '"label": 1'))
  with pytest.raises(errors.InputError, match="records of other settings \\(data: "):
    evaluation.evaluate(model, one, data, tmp_path / "out", items=evaluation.Items(limit=3))
  assert found["tasks"]["choices"]["figures"]["Accuracy"]["items"] == 3
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "letter.txt").write_text("dear")
  with pytest.raises(errors.InputError, match="holds other things"):
    evaluation.evaluate(model, one, data, tmp_path / "other")


def test_texts_longer_than_the_model(model, files, tmp_path) -> None:
  """A task's windows are no longer than the model's rows."""
  tasks, data = files
  text = tasks[0] / "text.yaml"
  text.write_text(text.read_text().replace("max_seq_length: 64", "max_seq_length: 2048"))
  (data / "text" / "0.txt").write_text((data / "text" / "0.txt").read_text() * 20)
  found = evaluation.evaluate(model, [text], data, tmp_path / "new" / "out")
  assert found["tasks"]["text"]["figures"]["bits_per_byte"]["items"] == 3


def test_what_has_no_file_is_an_error_unless_it_is_to_be_left_out(model, files, tmp_path) -> None:
  tasks, data = files
  questions = data / "choices" / "test.jsonl"
  kept = questions.rename(tmp_path / "kept")
  with pytest.raises(errors.InputError, match="task choices: nothing in"):
    evaluation.evaluate(model, tasks, data, tmp_path / "out")
  found = evaluation.evaluate(model, tasks, data, tmp_path / "out", items=evaluation.Items(skip=True))
  assert "choices" not in found["tasks"] and "text" in found["tasks"]
  kept.rename(questions)
  with pytest.raises(errors.InputError, match=r"records of other settings \(skip: True there, False now; data: "):
    evaluation.evaluate(model, tasks, data, tmp_path / "out")


def test_a_run_goes_on_with_or_without_skip_where_nothing_was_left_out(model, files, tmp_path) -> None:
  tasks, data = files
  one, out = [tasks[0] / "choices.yaml"], tmp_path / "out"
  found = evaluation.evaluate(model, one, data, out)
  assert evaluation.evaluate(model, one, data, out, items=evaluation.Items(skip=True))["tasks"] == found["tasks"]


def test_how_far_it_is_without_a_terminal(model, files, tmp_path, monkeypatch, caplog) -> None:
  tasks, data = files
  monkeypatch.setattr(evaluation, "_TOKENS", 200)
  now = itertools.count(0, 61)
  monkeypatch.setattr(evaluation.progress.time, "monotonic", lambda: next(now))
  caplog.set_level(logging.INFO, "glmjax")
  evaluation.evaluate(model, [tasks[0] / "choices.yaml"], data, tmp_path / "out")
  told = [line for line in caplog.messages if "items asked" in line]
  assert len(told) > 1 and all(re.fullmatch(r"\d+ of 12 items asked, ETA [\d:]+", line) for line in told)


def test_an_item_without_room_is_an_error_unless_it_is_to_be_left_out(model, files, tmp_path) -> None:
  tasks, data = files
  one, file = [tasks[0] / "choices.yaml"], data / "choices" / "test.jsonl"
  long = {"inputs_pretokenized": "on", "choices_pretokenized": ["day " * 400, "fox"], "label": 0}
  file.write_text(f"{json.dumps(long)}\n{file.read_text()}")
  with pytest.raises(errors.InputError, match="task choices, test.jsonl, item 0: 2 choices take"):
    evaluation.evaluate(model, one, data, tmp_path / "out")
  found = evaluation.evaluate(model, one, data, tmp_path / "out", items=evaluation.Items(skip=True))
  assert found["tasks"]["choices"]["figures"]["Accuracy"]["items"] == 12


def test_models_side_by_side(model, files, tmp_path, tmp_path_factory) -> None:
  tasks, data = files
  other = untrained_run.write(tmp_path_factory.mktemp("other") / "run2", seed=2)
  runs = [tmp_path / name for name in ("a", "b", "c")]
  for run, checkpoint in zip(runs, (model, model, other)):
    evaluation.evaluate(checkpoint, tasks, data, run)
  found = compare.compare(runs)
  assert found["items"] == json.loads((runs[0] / "report.json").read_text())["run"]["items"]
  assert found["models"] == [str(run) for run in runs]
  accuracy = found["tasks"]["choices"]["Accuracy"]
  assert accuracy[1]["difference"] == [0, 0, 0] and accuracy[1]["p"] == 1
  bits = found["tasks"]["text"]["bits_per_byte"]
  assert bits[1]["difference"] == [0, 0, 0] and bits[2]["difference"][0] == pytest.approx(
    bits[2]["value"] - bits[0]["value"]
  )
  assert "| choices | Accuracy | 12 |" in compare.markdown(found)
  with pytest.raises(errors.InputError, match="two folders or more"):
    compare.compare(runs[:1])
  with pytest.raises(errors.InputError, match="no folder that glmjax evaluate"):
    compare.compare([runs[0], tmp_path])
  records = [json.loads(line) for line in (runs[2] / results.ITEMS).read_text().splitlines()]
  for record in records:
    if "target" in record:
      record["target"] += 1
  (runs[2] / results.ITEMS).write_text("".join(f"{json.dumps(record)}\n" for record in records))
  with pytest.raises(errors.InputError, match="target is not the same"):
    compare.compare(runs)


def test_a_model_is_called_as_its_folder_however_that_is_written(tmp_path, monkeypatch) -> None:
  for name in ("mine", "tuned"):
    (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path / "mine")
  assert evaluation._called(pathlib.Path("."), None) == "mine"
  (tmp_path / "newest").symlink_to("mine")
  assert evaluation._called(tmp_path / "newest", None) == "newest"  # as records of before have it
  assert evaluation._called(pathlib.Path("../tuned/.."), pathlib.Path("../tuned/.")) == f"{tmp_path.name} with tuned"
