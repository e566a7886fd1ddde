"""The evaluation harness against GLM-130B's own evaluate.py on a tiny random model (cases/README.md).

GLMJAX_EVALUATION_DIR names another folder of cases: same files, any sizes.
"""

import functools
import json
import pathlib
import re
from typing import Any

import evaluation_cases as cases
import golden_models
import numpy as np
import pytest

from glmjax import errors
from glmjax.harness import asking
from glmjax.harness import gathering
from glmjax.harness import summary
from glmjax.harness import task as task_lib

TOLERANCE = 1e-3  # of log-probabilities, losses and scores, as cases/README.md suggests
ROUNDINGS = {"results": "half_frequencies", "results_fp32rope": "none"}
each_rounding = pytest.mark.parametrize(
  "results", ["results", pytest.param("results_fp32rope", marks=pytest.mark.slow)]
)
EMPTY = {"nothing", "nothing-gen"}  # tasks without a file, which the original passes over


@functools.cache
def expected(results: str) -> dict[str, Any]:
  return json.loads((cases.folder() / f"{results}.json").read_text())


def tasks() -> list[task_lib.Task]:
  return task_lib.find([cases.folder() / "tasks"])


@functools.cache
def answered(results: str) -> tuple[list[asking.Asked], list[dict[str, Any]]]:
  """All items of all tasks but for the empty ones, put to the model together."""
  asker = cases.asker(ROUNDINGS[results])
  asked = gathering.gather(
    golden_models.config("evaluation"), cases.tokenizer(), tasks(), cases.folder() / "data", skip=True
  )
  return asked, asker.ask(asked)


def check_item(asked: asking.Asked, record: dict[str, Any], wanted: dict[str, Any]) -> None:
  where = f"{asked.key}"
  if "loss" in wanted:
    np.testing.assert_allclose(record["loss"], wanted["loss"], atol=TOLERANCE, err_msg=where)
    assert record["tokens"] == wanted["scored_tokens"], where
    return
  if "log_probs" in wanted:
    np.testing.assert_allclose(record["scores"], wanted["log_probs"], atol=TOLERANCE, err_msg=where)
    if isinstance(wanted["prediction"], int):  # of pairs of sentences it is the scores
      assert record["prediction"] == wanted["prediction"], where
    assert record["tokens"] == wanted["choice_lens"] and record["target"] == wanted["label"], where
    return
  assert record["prediction"] == wanted["prediction"], where
  assert record["prediction_text"] == wanted["prediction_text"], where
  assert record["targets"] == wanted["targets_text"], where
  for beam, other in zip(record.get("beams", []), wanted.get("beams", []), strict=True):
    assert beam["tokens"] == other["tokens"], where
    np.testing.assert_allclose(beam["score"], other["penalized_score"], atol=TOLERANCE, err_msg=where)
  values = {
    "Accuracy" if name == "correct" else name: wanted[name] for name in ("EM", "F1", "correct") if name in wanted
  }
  assert record["values"] == {name: pytest.approx(float(value)) for name, value in values.items()}, where


def check_summary(task: task_lib.Task, found: dict[str, Any], wanted: dict[str, Any]) -> None:
  assert found["files"].keys() == wanted["files"].keys()
  for file, figures in found["files"].items():
    for name, value in wanted["files"][file]["metrics"].items():
      assert figures["metrics"][name] == approximately(value), (task.name, file, name)
  for group, figures in wanted["groups"].items():
    if not figures["files"]:
      continue
    own = found["groups"][group.removeprefix("OVERALL:")]
    assert own["files"] == figures["files"] and own["weights"] == figures["weights"]
    if figures["stats"] is not None:  # special metrics have none
      assert own["stats"] == {name: approximately(value) for name, value in figures["stats"].items()}


def approximately(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: approximately(each) for name, each in value.items()}
  if isinstance(value, list):
    return [approximately(each) for each in value]
  return pytest.approx(value, rel=1e-4)


@each_rounding
def test_items(results: str) -> None:
  """Predictions, beams and generated tokens to the letter; log-probabilities, losses and scores within 1e-3."""
  wanted = expected(results)["tasks"]
  asked, records = answered(results)
  assert {each.task.name for each in asked} == {*wanted} - EMPTY
  for each, record in zip(asked, records, strict=True):
    check_item(each, record, wanted[each.task.name]["files"][each.file]["items"][each.number])


def test_inputs() -> None:
  """Every row that is read is one of the original's, token by token: what it reads, where, what it sees."""
  arrays = np.load(cases.folder() / "inputs.npz")
  wanted = expected("results")["tasks"]
  for each in answered("results")[0]:
    item = wanted[each.task.name]["files"][each.file]["items"][each.number]
    batch = f"{each.task.name}/{each.file}/batch{item['batch']}"
    given = {name: arrays[f"{batch}/{name}"][item["row"]] for name in ("tokens", "position_ids", "attention_mask")}
    cases.check_inputs(each, given)


@each_rounding
def test_reports(results: str) -> None:
  wanted = expected(results)["tasks"]
  _, records = answered(results)
  for task in tasks():
    if task.name not in EMPTY:
      own = [record for record in records if record["task"] == task.name]
      check_summary(task, summary.summarize(task, own), wanted[task.name])


@each_rounding
def test_printed_lines(results: str) -> None:
  """What the original prints of each task, but for its configuration."""
  printed = {}
  for line in expected(results)["stdout"]:
    if match := re.fullmatch(r"Evaluating task (.*):", line):
      lines = printed.setdefault(match[1], [])
    elif "Config(name=" in line or line.startswith("> "):
      lines = []
    if printed and line.strip():
      lines.append(line.rstrip())
  _, records = answered(results)
  for task in tasks():
    if task.name not in EMPTY:
      own = [record for record in records if record["task"] == task.name]
      found = [line.rstrip() for line in summary.lines(task, summary.summarize(task, own))]
      groups = expected(results)["tasks"][task.name]["groups"]
      empty = [name for name, group in groups.items() if not group["files"]]
      named = {text for name in empty for text in (f"    Evaluating group {name}:", f"      Group {name}:")}
      assert [numbers(line) for line in found] == [numbers(x) for x in printed[task.name] if x not in named]


def numbers(line: str) -> list[Any]:
  """A line's words, with its numbers as such: the last digit of a large perplexity is not the original's."""
  found = re.split(r"(\d+\.\d+)", line)
  return [pytest.approx(float(part), rel=1e-4, abs=2e-3) if i % 2 else part for i, part in enumerate(found)]


def edge_cases() -> dict[str, dict[str, Any]]:
  content = json.loads((cases.folder() / "edge_cases.json").read_text())
  return {name: case for name, case in content.items() if isinstance(case, dict) and "outcome" in case}


# What the original passes over, and here is an error.
REFUSED = {
  "config_unknown_metric": "no metric of type",
  "mul_empty_file_and_other": "is empty",
  "crows_empty_group": "nothing in",
}
# What the original's batches cannot hold, and is well asked here.
TAKEN = ["lm_batch_of_2_short_last_window"]


@pytest.mark.parametrize("name", edge_cases())
def test_edge_cases(name: str) -> None:
  """What the original crashes on is one clear line; the rest gives the same."""
  case, asker = edge_cases()[name], cases.asker(ROUNDINGS["results"])

  def ask() -> tuple[task_lib.Task, list[asking.Asked], list[dict[str, Any]]]:
    task = task_lib.read(cases.folder() / "edge" / "tasks" / f"{name}.yaml")
    asked = gathering.gather(
      golden_models.config("evaluation"), cases.tokenizer(), [task], cases.folder() / "edge" / "data"
    )
    return task, asked, asker.ask(asked)

  if name in REFUSED or (case["outcome"] == "raises" and name not in TAKEN):
    with pytest.raises(errors.InputError, match=REFUSED.get(name)) as caught:
      ask()
    assert "\n" not in str(caught.value)
    return
  task, asked, records = ask()
  if name in TAKEN:
    assert all(np.isfinite(record["loss"]) for record in records)
    return
  wanted = case["tasks"][task.name]
  for each, record in zip(asked, records, strict=True):
    check_item(each, record, wanted["files"][each.file]["items"][each.number])
  check_summary(task, summary.summarize(task, records), wanted)


@pytest.mark.parametrize("name", sorted(EMPTY))
def test_tasks_without_a_file_are_refused(name: str) -> None:
  [task] = [task for task in tasks() if task.name == name]
  with pytest.raises(errors.InputError, match="there is no folder|nothing in"):
    task.files(pathlib.Path(cases.folder() / "data"))
