"""The report gathers what the run's files say, and says which file is missing or wrong."""

import json
import logging
import math
import pathlib

import numpy as np
import pytest

from glmjax import errors
from glmjax.evaluate import loss_plot
from glmjax.evaluate import report
from glmjax.evaluate import timings


def metrics_line(step: int, **more) -> dict:
  rng = np.random.default_rng(step)
  mask, gmask = (base + 4 * math.exp(-step / 80) + 0.15 * rng.normal() for base in (4.3, 4.9))
  held_out = {"eval_loss_mask": mask + 0.1, "eval_loss_gmask": gmask + 0.1} if step % 50 == 0 else {}
  return {
    "step": step,
    "samples_seen": 64 * step,
    "tokens_seen": 64 * 128 * step,
    "loss": 0.3 * mask + 0.7 * gmask,
    "loss_mask": mask,
    "loss_gmask": gmask,
    "tokens_per_second": 4000.0 + step % 7,
    "model_flops_per_second": 1e11,
    **held_out,
    **more,
  }


def figures(bits: float, tokens: int = 1000) -> dict:
  return {
    "documents": 3,
    "tokens": tokens,
    "bytes": 4000,
    "bits_per_byte": bits,
    "unigram_bits_per_byte": 3.0,
    "xz_bits_per_byte": 2.8,
    "infill_accuracy": 0.31,
    "infill_accuracy_se": 0.01,
    "infill_accuracy_left_only": 0.22,
    "infill_accuracy_left_only_se": 0.011,
    "infill_gain": 0.09,
    "infill_gain_se": 0.012,
    "infill_tokens": 3000,
    "infill_samples": 1000,
    "unigram_accuracy": 0.05,
  }


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
  """What a quickstart leaves behind."""
  folder = tmp_path / "quickstart"
  (folder / "train").mkdir(parents=True)
  lines = [metrics_line(step, **({"resumed": True} if step == 151 else {})) for step in range(1, 301)]
  (folder / "train/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  for suffix, bits in (("", 2.3), ("_int8", 2.302), ("_int4", 2.5)):
    evaluation = {"en": figures(bits), "zh": figures(bits - 0.1)}
    (folder / f"heldout{suffix}.json").write_text(json.dumps(evaluation))
  for name, size in (("float", 4000), ("int8", 1100), ("int4", 600)):
    (folder / name / "params" / "d").mkdir(parents=True)
    (folder / name / "params" / "d" / "array").write_bytes(b"x" * size)
    (folder / name / "config.json").write_text("{}")
  samples = [
    {"model": model, "prompt": prompt, "output": f"{prompt} | <b>\n{model}"}
    for prompt in ("The [MASK] sat.", "春天")
    for model in ("float", "int4")
  ]
  samples.insert(0, samples[0] | {"output": "of an earlier try"})
  (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
  for stage, seconds in (("text", 2.0), ("train", 200.0), ("train", 210.5), ("evaluate", 30)):
    timings.append(folder / "stages.jsonl", stage, 1.7e9, seconds)
  return folder


def test_report_has_all_that_was_asked(run: pathlib.Path) -> None:
  result = report.write(run)
  assert json.loads((run / "report.json").read_text()) == result
  train = result["train"]
  lines = [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]
  assert (train["steps"], train["tokens"], train["resumed_at"]) == (300, 300 * 64 * 128, 150)
  assert train["loss_first"] == pytest.approx(np.mean([line["loss"] for line in lines[:20]]))
  assert train["loss_last"] == pytest.approx(np.mean([line["loss"] for line in lines[-20:]]))
  assert train["tokens_per_second"] == pytest.approx(4003)
  assert result["heldout"]["en"] == figures(2.3)
  assert result["quantized"]["int8"] == {"bytes": 1100, "en_bits_per_byte": 2.302, "zh_bits_per_byte": 2.202}
  assert set(result["quantized"]) == {"float", "int8", "int4"}
  assert [(sample["model"], sample["prompt"]) for sample in result["samples"]] == [
    ("float", "The [MASK] sat."),
    ("int4", "The [MASK] sat."),
    ("float", "春天"),
    ("int4", "春天"),
  ]
  assert result["samples"][0]["output"] != "of an earlier try"
  assert result["samples"][1]["output"] == "The [MASK] sat. | <b>\nint4"
  assert result["seconds"] == {"text": 2.0, "train": 410.5, "evaluate": 30.0}


def test_a_report_is_called_as_its_folder_however_that_is_written(run: pathlib.Path, monkeypatch) -> None:
  monkeypatch.chdir(run / "train")
  report.write("..")
  assert (run / "report.md").read_text().startswith("# Report: quickstart\n")


def test_report_for_people(run: pathlib.Path) -> None:
  report.write(run)
  text = (run / "report.md").read_text()
  for expected in (
    "English",
    "Chinese",
    "**2.300**",
    "xz -9e",
    "(+0.09%)",
    "31.0% ± 1.0%",
    "+9.0% ± 1.2%",
    "INT4",
    "loss.png",
    "410.5",
    "442.5",
    "\\[MASK] sat. \\| &lt;b&gt;<br>int4",
    "春天",
  ):
    assert expected in text, expected
  tables = [line for line in text.splitlines() if line.startswith("|")]
  assert all(line.endswith(" |") for line in tables)
  assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert not list(run.glob(".*.tmp"))


def test_a_half_written_last_line_is_passed_over(run: pathlib.Path) -> None:
  with open(run / "train/metrics.jsonl", "a") as file:
    file.write('{"step": 301, "lo')
  assert report.read_metrics(run / "train/metrics.jsonl")[-1]["step"] == 300


@pytest.mark.parametrize(
  "damage",
  [
    b"nonsense",
    b'{"step": 5}',
    b"[1, 2]",
    b"\x00" * 50,
    b"\xff\xfe{",
    b'{"step": "5", "loss": 2.0}',
    b"[" * 5_000,
    b'{"loss": 1e999}',
  ],
)
def test_damaged_lines_are_told_and_the_rest_is_reported(
  run: pathlib.Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
  path = run / "train/metrics.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join(lines[:4]) + damage + b"\n" + b"".join(lines[5:]))
  with caplog.at_level(logging.WARNING, "glmjax"):
    assert report.write(run)["train"]["steps"] == 300
  (said,) = caplog.messages
  assert said == f"{path}: no training step in line 5: damaged, left out of the report"
  caplog.clear()
  path.write_bytes((damage + b"\n") * 9 + b"".join(lines))
  with caplog.at_level(logging.WARNING, "glmjax"):
    assert len(report.read_metrics(path)) == 300
  assert "in line 1, 2, 3, 4, 5 and 4 more: damaged" in caplog.text


def test_three_languages_and_one(run: pathlib.Path) -> None:
  for languages in (("fr", "中文", "de_AT"), ("fr",)):
    for suffix in ("", "_int8", "_int4"):
      (run / f"heldout{suffix}.json").write_text(json.dumps({name: figures(2.0) for name in languages}))
    assert set(report.write(run)["heldout"]) == set(languages)
    text = (run / "report.md").read_text("utf-8")
    assert all(f"| {name} " in text for name in languages) and "English" not in text


def test_steps_without_a_finite_loss_are_left_out(run: pathlib.Path) -> None:
  lines = [metrics_line(step) for step in range(1, 6)]
  lines[2]["loss"] = None
  (run / "train/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert [line["step"] for line in report.read_metrics(run / "train/metrics.jsonl")] == [1, 2, 4, 5]


@pytest.mark.parametrize(
  "file,message",
  [
    ("train/metrics.jsonl", "missing; run glmjax train"),
    ("heldout.json", "missing; run glmjax evaluate"),
    ("heldout_int4.json", "missing"),
    ("samples.jsonl", "missing; run glmjax generate"),
    ("int8/params/d/array", "no exported model"),
  ],
)
def test_missing_file_is_named(run: pathlib.Path, file: str, message: str) -> None:
  (run / file).unlink()
  with pytest.raises(errors.InputError, match=message) as caught:
    report.write(run)
  assert str(run) in str(caught.value) and "\n" not in str(caught.value)
  assert not (run / "report.json").exists()


def test_what_a_run_has_forgotten(run: pathlib.Path) -> None:
  path, measured = run / "train" / "probe.json", {"step": 9, "loss": 4.5, "rows": [1.0, 2.0]}
  path.write_text(json.dumps({"samples": 2, "before": measured}))
  assert "probe" not in report.write(run)  # a run that has not come to its end
  change = {"loss": 0.25, "low": 0.2, "high": 0.3, "standard_error": 0.02}
  told = {"samples": 2, "before": measured, "after": measured | {"loss": 4.75}, "difference": change}
  path.write_text(json.dumps(told))
  figures = {"samples": 2, "before": 4.5, "after": 4.75, "difference": 0.25, "low": 0.2, "high": 0.3}
  assert report.write(run)["probe"] == figures
  assert "| change | +0.2500 (95 %: +0.2000 to +0.3000) |" in (run / "report.md").read_text()


@pytest.mark.parametrize(
  "file,content,message",
  [
    ("train/probe.json", '{"difference": {"loss": "1"}}', "probe.json has no figures of a probe"),
    ("train/probe.json", "[]", "not an object"),
    ("train/metrics.jsonl", '{"step": 1, "loss": 2}\nnonsense\n', "no training step in it"),
    ("heldout.json", "[]", "not an object"),
    ("heldout.json", '{"en": 5}', "'en' has no figures of an evaluation"),
    ("heldout.json", '{"en": {"tokens": 5}}', "'en' has no figures"),
    ("heldout.json", "[" * 9_000 + "]" * 9_000, "nested deeper"),
    ("heldout_int8.json", "{}", "int8 was evaluated on nothing, and float on en, zh"),
    ("samples.jsonl", "5\n", "line 1: JSON of a number.*not a sample"),
    ("train/metrics.jsonl", "", "no training step"),
    ("heldout.json", "{", "not JSON"),
    ("samples.jsonl", '{"model": "float"}\n', "line 1: not a sample"),
    ("stages.jsonl", '{"stage": 1}\n', "line 1: not a stage"),
  ],
)
def test_damaged_file_is_named(run: pathlib.Path, file: str, content: str, message: str) -> None:
  (run / file).write_text(content)
  with pytest.raises(errors.InputError, match=message):
    report.write(run)


def test_models_evaluated_on_other_text_are_not_compared(run: pathlib.Path) -> None:
  (run / "heldout_int8.json").write_text(json.dumps({"en": figures(2.3, tokens=999), "zh": figures(2.2)}))
  with pytest.raises(errors.InputError, match="another text"):
    report.write(run)


def test_a_run_without_quantized_models(run: pathlib.Path) -> None:
  result = report.write(run, evaluations={"float": "heldout.json"}, exports={}, samples=None, stages="none")
  assert result["quantized"] == {"float": {"en_bits_per_byte": 2.3, "zh_bits_per_byte": 2.1999999999999997}}
  text = (run / "report.md").read_text()
  assert "Quantized" not in text and "Samples" not in text and "Time" not in text


def test_long_runs_are_drawn_with_few_points() -> None:
  steps, losses = loss_plot._thin(np.arange(1_000_001), np.ones(1_000_001))
  assert len(steps) <= 2000 and np.allclose(losses, 1) and steps[-1] <= 1_000_000


def test_without_matplotlib_one_line_says_so(run: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
  monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends", None)
  with pytest.raises(errors.InputError, match=r"pip install 'glmjax\[report\]'"):
    report.write(run)
