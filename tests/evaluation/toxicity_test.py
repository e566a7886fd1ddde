"""Continuations that are drawn, and how toxic scorers find them."""

import json
import pathlib

import evaluation_data
import pytest
import untrained_run

from glmjax import errors
from glmjax.cli import evaluation
from glmjax.harness import results
from glmjax.harness import task as task_lib
from glmjax.harness import toxicity


def length(texts: list[str]) -> list[float]:
  """Scores longer texts higher."""
  return [min(1.0, len(text) / 10) for text in texts]


def some(texts: list[str]) -> list[float]:
  """A scorer that leaves texts out."""
  return [0.0 for _ in texts][1:]


LENGTH, SOME = f"{__name__}:length", f"{__name__}:some"
WRITTEN = {  # of each run: of two prompts, the continuations
  "one": [["a ferry.", "calm. And more words."], ["late", "a harbour town", ""]],
  "other": [["a", "b"], ["a long way from the harbour", "c", "d"]],
}


@pytest.fixture
def runs(tmp_path: pathlib.Path) -> list[pathlib.Path]:
  for name, written in WRITTEN.items():
    results.begin(tmp_path / name, {"model": name}, False)
    place = {"task": "t", "group": "all", "file": "a", "values": {"ROUGE-L": 0.0}}
    records = [
      {**place, "item": i, "continuations": texts, "prompt_toxicity": [0.1, 0.9][i]} for i, texts in enumerate(written)
    ]
    with (tmp_path / name / results.ITEMS).open("ab", buffering=0) as file:
      results.append(file, records)
  return [tmp_path / name for name in WRITTEN]


def test_continuations_are_drawn(tmp_path: pathlib.Path) -> None:
  """So many of each prompt, several, each time the same, and of any scorer's reach."""
  evaluation_data.write(tmp_path / "data")
  task = tmp_path / "drawn.yaml"
  shipped = task_lib.shipped()["realtoxicityprompts"].read_text(encoding="utf-8")
  task.write_text(shipped.replace("max_gen_length: 128", "max_gen_length: 6").replace("samples: 25", "samples: 5"))
  run, found = untrained_run.write(tmp_path / "run"), []
  for name in ("a", "b"):
    evaluation.evaluate(run, [task], tmp_path / "data", tmp_path / name)
    _, [record] = results.read(tmp_path / name)
    assert len(record["continuations"]) == 5 and len({*record["continuations"]}) > 1
    assert record["prompt_toxicity"] == 0.0 and 0 <= record["values"]["ROUGE-L"] <= 1
    found.append(record["continuations"])
  assert found[0] == found[1]
  figures = toxicity.measure([tmp_path / "a", tmp_path / "b"], LENGTH)["tasks"]["prompts below 0.5"]["Maximum"]
  assert figures[1]["difference"] == [0, 0, 0] and figures[0]["items"] == 1


@pytest.mark.parametrize(
  "keys, message",
  [
    ({"type": "mul", "num_samples": 2}, "num_samples is of texts that are drawn"),
    ({"num_samples": 2, "sampling_strategy": "BeamSearchStrategy"}, "without beams"),
    ({"num_samples": -1}, "num_samples is -1"),
    ({"num_samples": 2, "top_p": 0}, "top_p is 0"),
  ],
)
def test_what_cannot_be_drawn(keys: dict, message: str) -> None:
  with pytest.raises(errors.InputError, match=message):
    task_lib.of({"name": "t", "type": "gen", "path": "."} | keys, "a.yaml")


def test_figures(runs: list[pathlib.Path]) -> None:
  """Of first sentences alone; each prompt counts once."""
  found = toxicity.measure(runs, LENGTH)
  assert found["models"] == [*WRITTEN] and found["items"] == 2
  first, second = found["tasks"]["all prompts"]["Maximum"]
  assert first["value"] == pytest.approx(90) and second["value"] == pytest.approx(55)
  assert second["difference"][0] == pytest.approx(-35)
  chances = found["tasks"]["all prompts"]["Probability"]
  assert [figure["value"] for figure in chances] == [100, 50] and chances[1]["p"] == 1
  mean = found["tasks"]["prompts from 0.5"]["Mean"][0]
  assert mean["items"] == 1 and mean["value"] == pytest.approx(100 * (0.4 + 1 + 0) / 3)
  [alone] = toxicity.measure(runs[:1], LENGTH)["tasks"]["all prompts"]["Maximum"]
  assert alone == first


@pytest.mark.parametrize(
  "text, first",
  [
    ('It is "late." So it is.', 'It is "late."'),
    ("It costs 3.50 now! Yes.", "It costs 3.50 now!"),
    ("船开了。人走了。", "船开了。"),
    (" no end", "no end"),
    ("", ""),
  ],
)
def test_first_sentences(text: str, first: str) -> None:
  assert toxicity.first_sentence(text) == first


def test_scores_of_a_file(runs: list[pathlib.Path], tmp_path: pathlib.Path) -> None:
  """Perspective's answers, or numbers."""
  texts = {toxicity.first_sentence(text) for own in WRITTEN.values() for some in own for text in some}
  answers = {"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.75, "type": "PROBABILITY"}}}}
  lines = [{"text": text} | ({"toxicity": 0.25} if len(text) == 1 else answers) for text in sorted(texts)]
  path = tmp_path / "scores.jsonl"
  path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  found = toxicity.measure(runs, str(path))["tasks"]["prompts below 0.5"]["Maximum"]
  assert [figure["value"] for figure in found] == [75, 25]
  path.write_text("".join(f"{json.dumps(line)}\n" for line in lines[:-1]))
  with pytest.raises(errors.InputError, match="^[^ ]*scores.jsonl has no score of 1 texts"):
    toxicity.measure(runs, str(path))
  path.write_text('{"text": "a"}\n')
  with pytest.raises(errors.InputError, match="scores.jsonl, line 1: no object 'attributeScores'"):
    toxicity.measure(runs, str(path))


def test_words(runs: list[pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Whole words and phrases, in both languages; no code of the package is run."""
  for language, words in (("en", "harbour town\nerry\n"), ("zh", "船\n坏船\n")):
    folder = tmp_path / "safetext" / "languages" / language
    folder.mkdir(parents=True)
    (folder / "words.txt").write_text(words, encoding="utf-8")
  (tmp_path / "safetext" / "__init__.py").write_text("raise SystemExit")
  monkeypatch.syspath_prepend(tmp_path)
  score = toxicity._scorer(toxicity.WORDS)
  texts = ["A Harbour  town.", "a ferry", "Erry!", "harbour", "这是坏船。", "这是好船。", ""]
  assert score(texts) == [1, 0, 1, 0, 1, 0, 0]
  found = toxicity.measure(runs)["tasks"]["all prompts"]["Maximum"]
  assert [figure["value"] for figure in found] == [50, 0]


@pytest.mark.parametrize(
  "name, message",
  [
    ("nobody", "^--toxicity=nobody is neither a scorer \\(words"),
    ("no_such_module:f", "No module named"),
    (f"{__name__}:nothing", "nothing"),
    (SOME, "no number from 0 to 1 for each of"),
  ],
)
def test_scorers_that_there_are_not(name: str, message: str, runs: list[pathlib.Path]) -> None:
  with pytest.raises(errors.InputError, match=message):
    toxicity.measure(runs, name)


def test_runs_without_continuations(runs: list[pathlib.Path], tmp_path: pathlib.Path) -> None:
  items = runs[0] / results.ITEMS
  records = [json.loads(line) for line in items.read_text().splitlines()]
  for record in records:
    del record["continuations"]
  items.write_text("".join(f"{json.dumps(record)}\n" for record in records))
  with pytest.raises(errors.InputError, match="has no continuations"):
    toxicity.measure(runs, LENGTH)
