"""Readers, prompts, examples, intervals: each by itself."""

import json
import pathlib
from typing import Any

import engine_models
import numpy as np
import pytest

from glmjax import errors
from glmjax.harness import asking
from glmjax.harness import compare
from glmjax.harness import gathering
from glmjax.harness import items
from glmjax.harness import metrics
from glmjax.harness import questions
from glmjax.harness import reading
from glmjax.harness import results
from glmjax.harness import samples
from glmjax.harness import statistics
from glmjax.harness import task as task_lib
from glmjax.harness import template

FILES = {
  "list.json": ('{"data": {"rows": [{"a": "1"}, {"a": "2"}]}}', {"format": "json", "records": "data.rows"}),
  "head.csv": ('a,b\n1,"x, y"\n2,z\n', "csv"),
  "bare.csv": ("1,x\n2,z\n", {"format": "csv", "columns": ["a", "b"]}),
  "head.tsv": ("a\tb\n1\tx\n2\tz\n", "tsv"),
  "lines.jsonl": ('{"a": "1"}\n{"a": "2"}\n', "jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_readers(name: str, tmp_path: pathlib.Path) -> None:
  content, reader = FILES[name]
  (tmp_path / name).write_text(content)
  found = list(reading.Reader.of(reader).read(tmp_path / name))
  assert [record["a"] for record, _ in found] == ["1", "2"]
  assert len({where for _, where in found}) == 2 and all(where.startswith(str(tmp_path / name)) for _, where in found)


@pytest.mark.parametrize(
  "name, content, reader, message",
  [
    ("a.csv", "a,b\n1\n", "csv", "line 2: 1 columns, and there are 2 names"),
    ("a.json", '{"rows": 1}', {"format": "json", "records": "rows"}, "no list rows"),
    ("a.json", "[1]", "json", "record 1: no object"),
    ("a.csv", "a,b\n", "csv", "is empty"),
    ("a.jsonl", "\n", "jsonl", "line 1: empty"),
  ],
)
def test_files_that_are_none(name: str, content: str, reader, message: str, tmp_path: pathlib.Path) -> None:
  (tmp_path / name).write_text(content)
  with pytest.raises(errors.InputError, match=message):
    list(reading.Reader.of(reader).read(tmp_path / name))


def test_a_reader_that_there_is_not() -> None:
  with pytest.raises(errors.InputError, match="one of jsonl, json, csv, tsv"):
    reading.Reader.of("parquet")
  with pytest.raises(errors.InputError, match="no key 'colums'"):
    reading.Reader.of({"format": "csv", "colums": ["a"]})


@pytest.mark.parametrize(
  "label, more, number",
  [("yes", {}, 1), ("1", {}, 1), (1, {}, 1), ("B", {}, 1), ("b", {}, 1), ("ja", {"labels": ["nein", "ja"]}, 1)],
)
def test_labels(label, more, number: int) -> None:
  prompt = template.Prompt.of({"inputs": "{q.0.text}?", "choices": ["no", "{w}"], "label": "{l}", **more})
  found = prompt.fill({"q": [{"text": "so"}], "w": "yes", "l": label}, "here")
  assert found["inputs_pretokenized"] == "so?" and found["choices_pretokenized"] == ["no", "yes"]
  assert found["label"] == number


def test_lists_and_targets() -> None:
  prompt = template.Prompt.of({"inputs": "{q}", "choices": "{options}", "targets": "{answers.text}"})
  found = prompt.fill({"q": "q", "options": ["a", 2], "answers": {"text": ["x"]}}, "here")
  assert found["choices_pretokenized"] == ["a", "2"] and found["targets_pretokenized"] == ["x"]


@pytest.mark.parametrize(
  "record, message",
  [
    ({"l": "no"}, "no field 'q'"),
    ({"q": "q", "l": "maybe"}, "the label 'maybe' is none of"),
    ({"q": {}}, "no field 'l'"),
  ],
)
def test_records_that_do_not_fit(record, message: str) -> None:
  prompt = template.Prompt.of({"inputs": "{q}", "choices": ["no", "yes"], "label": "{l}"})
  with pytest.raises(errors.InputError, match=f"^here: {message}"):
    prompt.fill(record, "here")


def test_a_template_reaches_no_attribute() -> None:
  with pytest.raises(errors.InputError, match="no field '__class__'"):
    template.Prompt.of({"inputs": "{__class__}"}).fill({"q": "q"}, "here")
  with pytest.raises(errors.InputError, match="no field 'q.__class__'"):
    template.Prompt.of({"inputs": "{q.__class__}"}).fill({"q": "q"}, "here")


def _questions(folder: pathlib.Path, **more) -> list[dict]:
  records = [{"inputs_pretokenized": f"q{i}", "choices_pretokenized": ["n", "y"], "label": i % 2} for i in range(6)]
  (folder / "a.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
  task = task_lib.Task("t", "mul", ".", **more)
  return [record for record, _ in questions.read(task, folder / "a.jsonl", folder)]


def test_examples(tmp_path: pathlib.Path) -> None:
  """The same for all questions, never the question itself, with their answers, of a fixed seed."""
  found = _questions(tmp_path, num_shots=2, shots_separator="|")
  assert found == _questions(tmp_path, num_shots=2, shots_separator="|")
  for i, record in enumerate(found):
    *shots, own = record["inputs_pretokenized"].split("|")
    assert own == f"q{i}" and len(shots) == 2
    numbers = [int(shot[1]) for shot in shots]
    assert i not in numbers and shots == [f"q{n} {'ny'[n % 2]}" for n in numbers]
    assert record["shots"] == [f"a.jsonl, line {n + 1}" for n in numbers]
  others = [_questions(tmp_path, num_shots=2, shots_seed=seed)[0]["shots"] for seed in range(8)]
  assert len({tuple(each) for each in others}) > 1
  with pytest.raises(errors.InputError, match="6 examples, and there are 6"):
    _questions(tmp_path, num_shots=6)


def test_texts_as_items(tmp_path: pathlib.Path) -> None:
  """Every token is scored once, whatever the windows; bytes and words are the whole text's."""
  tokenizer = engine_models.Letters()
  text = "abcde fghij " * 9
  (tmp_path / "a.txt").write_text(text)
  task = task_lib.Task("t", "lm", ".", max_seq_length=32, generation_length=10, use_task_mask=True)
  found = list(items.read(task, tmp_path / "a.txt", tmp_path, tokenizer))
  assert [token for window in found for token in window.text] == tokenizer.encode(text)
  assert {window.fields["bytes"] for window in found} == {len(text)}


@pytest.mark.parametrize(
  "module, more, message",
  [
    ("crows-pair.tasks.CrowsPairTask", {"bias_type": "age", "sent_ID": 1}, "no text or number 'pair_ID'"),
    ("stereoset.tasks.StereoSetTask", {"bias_type": "age"}, "goal_label is no list of texts"),
    ("stereoset.tasks.StereoSetTask", {"bias_type": "age", "goal_label": ["stereotype"]}, "one for each choice"),
  ],
)
def test_what_a_metric_reads_is_there(module: str, more: dict, message: str, tmp_path: pathlib.Path) -> None:
  """It is looked for before a model is asked, not when the report is made."""
  record = {"inputs_pretokenized": "ab", "choices_pretokenized": ["c", "de"], "label": 0, **more}
  (tmp_path / "a.jsonl").write_text(json.dumps(record))
  task = task_lib.Task("t", "mul", ".", f"tasks.ethnic.{module}")
  with pytest.raises(errors.InputError, match=f"a.jsonl, line 1: .*{message}"):
    list(items.read(task, tmp_path / "a.jsonl", tmp_path, engine_models.Letters()))


def test_records_of_any_text_are_read_again(tmp_path: pathlib.Path) -> None:
  """Half a surrogate pair, which a data set's own field may hold, is no UTF-8."""
  records = [{"task": "t", "group": "all", "file": "a", "item": i, "x": x} for i, x in enumerate(("北京", "\ud800"))]
  results.begin(tmp_path / "run", {}, False)
  with (tmp_path / "run" / results.ITEMS).open("ab", buffering=0) as file:
    results.append(file, records)
  assert results.read(tmp_path / "run") == ({}, records)


@pytest.mark.parametrize("line", ['{"task": "t"}', '{"task": [], "group": "", "file": "", "item": 0}', "x" * 2000])
def test_lines_that_are_no_records_are_kept(line: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Only half a line at the end is cut off."""
  monkeypatch.setattr(results, "_LONGEST_LINE", 1000)
  results.begin(tmp_path, {}, False)
  (tmp_path / results.ITEMS).write_text(f"{line}\n")
  with pytest.raises(errors.InputError, match="byte 0: no record of an item"):
    results.begin(tmp_path, {}, False)
  assert (tmp_path / results.ITEMS).read_text() == f"{line}\n"


def test_searches_that_there_are_not(tmp_path: pathlib.Path) -> None:
  task = task_lib.Task("t", "gen", ".", sampling_strategy="BeamSearchStrategy", num_beams=1000)
  config, _ = engine_models.model()
  with pytest.raises(errors.InputError, match="num_beams is 1000"):
    gathering.gather(config, engine_models.Letters(), [task], tmp_path)


def test_a_limit_reads_no_further(tmp_path: pathlib.Path) -> None:
  """Than the batch of the last item, whose longest prompt counts in beam search; items are what they are without."""
  lines = [json.dumps({"inputs_pretokenized": "ab" * n, "targets_pretokenized": ["c"]}) for n in (1, 20, 2, 3)]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  config, _ = engine_models.model()

  def gather(limit: int | None) -> list[asking.Asked]:
    search = {"sampling_strategy": "BeamSearchStrategy", "max_gen_length": 4}
    task = task_lib.Task("t", "gen", ".", file_pattern="*.jsonl", micro_batch_size=2, **search)
    return gathering.gather(config, engine_models.Letters(), [task], tmp_path, limit)

  whole = gather(None)
  assert [each.item.context for each in whole] == [engine_models.Letters().encode("ab" * n) for n in (1, 20, 2, 3)]
  assert len(whole[0].padded) == len(whole[1].padded) > len(whole[2].padded)
  for limit in range(1, 5):
    assert gather(limit) == whole[:limit]
  (tmp_path / "a.jsonl").write_text("\n".join([*lines[:2], "no record"]))
  assert gather(1) == whole[:1] and gather(2) == whole[:2]
  with pytest.raises(errors.InputError, match="line 3"):
    gather(3)


def test_a_file_in_two_groups_is_compared_once(tmp_path: pathlib.Path) -> None:
  place = {"task": "t", "file": "a", "target": 0}
  runs = [tmp_path / name for name in ("one", "other")]
  for run in runs:
    results.begin(run, {"model": run.name}, False)
    records = [
      {**place, "group": group, "item": i, "loss": "the data set's", "values": {"Accuracy": float(i == 0)}}
      for group in ("a", "b")
      for i in range(2)
    ]
    with (run / results.ITEMS).open("ab", buffering=0) as file:
      results.append(file, records)
  found = compare.compare(runs)
  assert found["items"] == 2 and found["tasks"]["t"]["Accuracy"][1]["items"] == 2


LABELS = ["stereotype", "anti-stereotype", "unrelated"]


def stereotypes(seed: int) -> list[dict[str, Any]]:
  """Records of StereoSet's items from a model that prefers this and that."""
  draw = np.random.default_rng(seed)
  chosen = draw.choice(3, 60, p=[0.5, 0.3, 0.2]).tolist()
  fields = {"values": {}, "bias_type": "age", "goal_label": LABELS, "target": 0}
  return [{"file": "a", "item": i, "prediction": each, **fields} for i, each in enumerate(chosen)]


def pairs(seed: int) -> list[dict[str, Any]]:
  """Records of the two sentences of each of CrowS-Pairs' pairs."""
  scores = np.random.default_rng(seed).normal(-40, 3, 60).tolist()
  fields = {"values": {}, "bias_type": "age", "target": 0}
  return [
    {"file": "a", "item": i, "pair_ID": i // 2, "sent_ID": 1 + i % 2, "scores": [score], **fields}
    for i, score in enumerate(scores)
  ]


def test_figures_of_stereotypes_are_those_of_the_original() -> None:
  languages, scores, together = metrics.of_file("SS_ICAT", stereotypes(0))
  found = {name: sample.value for name, sample in samples.of(stereotypes(0)).items()}
  assert found == pytest.approx({"LMS": languages["overall"], "SS": scores["overall"], "ICAT": together["overall"]})
  [pair] = samples.of(pairs(0)).values()
  assert pair.value == pytest.approx(100 * metrics.of_file("CP", pairs(0))["age"]) and len(pair.units_UK) == 30
  nothing = [record | {"prediction": 2} for record in stereotypes(0)]
  assert [sample.value for sample in samples.of(nothing).values()] == [0, 0, 0]


@pytest.mark.parametrize("make, right", [(stereotypes, {"LMS"}), (pairs, {"CP"})])
def test_stereotypes_of_two_models_are_compared_item_by_item(
  make: Any, right: set[str], tmp_path: pathlib.Path
) -> None:
  runs = [tmp_path / str(seed) for seed in range(2)]
  for seed, run in enumerate(runs):
    results.begin(run, {"model": run.name}, False)
    with (run / results.ITEMS).open("ab", buffering=0) as file:
      results.append(file, [record | {"task": "t", "group": "all"} for record in make(seed)])
  found = compare.compare([runs[0], runs[0], runs[1]])["tasks"]["t"]
  assert {name for name, figures in found.items() if "p" in figures[1]} == right
  for first, same, other in found.values():
    assert first["low"] < first["value"] < first["high"]
    assert same["difference"] == [0, 0, 0] and same.get("p", 1) == 1
    value, low, high = other["difference"]
    assert value == pytest.approx(other["value"] - first["value"]) and low < value < high


def test_wilson() -> None:
  """Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
  for hits, count, low, high in (
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0, 0.1611),
    (1, 29, 0.0061, 0.1718),
  ):
    assert statistics.wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


def test_mcnemar() -> None:
  """Both tails of a fair coin."""
  first, second = np.array([1] * 8 + [0] * 2 + [1] * 5), np.array([0] * 8 + [1] * 2 + [1] * 5)
  assert statistics.mcnemar(first, second) == pytest.approx(2 * sum((1, 10, 45)) / 1024)
  assert statistics.mcnemar(first, first) == 1


@pytest.mark.parametrize("count", [400, 5_000, 50_000])  # the last two: in parts, of few units and of many
def test_bootstrap(count: int) -> None:
  """Covers the mean of normal values as the normal interval does, and is the same each time."""
  values = np.random.default_rng(0).normal(3, 2, count)
  sample = statistics.mean(values / 100)
  low, high = statistics.bootstrap(sample)
  assert (low, high) == statistics.bootstrap(sample)
  spread = 1.96 * values.std() / count**0.5
  assert (low, high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.15 * spread)


def test_a_difference_is_that_of_the_same_items() -> None:
  """What two models have in common leaves the interval of their difference; a figure may be no mean."""
  draw = np.random.default_rng(1)
  common, own = draw.normal(0, 10, 1_000), draw.normal(0, 0.1, 1_000)
  first, second = statistics.mean(common), statistics.mean(common + own + 0.02)
  value, low, high = statistics.difference(second, first)
  assert value == pytest.approx(second.value - first.value) and 0.5 < low < value < high < 3.5
  assert statistics.difference(first, first) == (0, 0, 0)
