"""Real tasks, a slice of each, put to a model that has learned nothing: layouts, intervals, and that nothing breaks."""

import os
import pathlib

import pytest
import untrained_run

from glmjax.cli import evaluation

DATA = pathlib.Path(os.environ.get("GLMJAX_EVALUATION_DATA", ""))
ITEMS = 50
TASKS = ["boolq", "commonsenseqa", "packages_characters", "packages_lambada_en"]


@pytest.mark.skipif(
  not (DATA / "packages" / "characters.jsonl").is_file(),
  reason="GLMJAX_EVALUATION_DATA, set by `make test`, is what benchmarks/evaluation_data.py lays out: it is not there",
)
def test_a_slice_of_real_tasks(tmp_path: pathlib.Path) -> None:
  run, items = untrained_run.write(tmp_path / "run"), evaluation.Items(limit=ITEMS)
  found = evaluation.evaluate(run, TASKS, DATA, tmp_path / "out", items=items)
  page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
  assert [*found["tasks"]] == TASKS
  for name in TASKS:
    figure = found["tasks"][name]["figures"]["Accuracy"]
    assert figure["items"] == ITEMS and f"| {name} | Accuracy |" in page
    assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 100
    assert 5 < figure["high"] - figure["low"] < 30  # Wilson's, of 50: 7 at the ends, 27 in the middle
