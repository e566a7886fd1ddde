"""A causal model is asked as it was trained: behind a [gMASK], from left to right."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import untrained_run

from glmjax import tokens as tokens_lib
from glmjax.checkpoint import folder as folder_lib
from glmjax.cli import evaluation
from glmjax.data import rows as rows_lib
from glmjax.harness import asking
from glmjax.harness import items
from glmjax.harness import layouts
from glmjax.harness import task as task_lib
from glmjax.infer import beam
from glmjax.infer import engine as engine_lib

SPECIALS = tokens_lib.icetk(0, 440)
CONFIG = dataclasses.replace(untrained_run.CONFIG, causal=True)


def layout(config=CONFIG, **keys) -> layouts.Layout:
  task = task_lib.of(
    {"name": "t", "type": "mul", "path": "t", "prompt": {"inputs": "{x}"}, "max_seq_length": 64} | keys, "here"
  )
  return layouts.Layout(task, config, SPECIALS)


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d", "learned_2d"])
def test_texts_are_numbered_as_in_training(positions: str) -> None:
  text = np.arange(100, 163, dtype=np.int32)
  infilling = rows_lib.BlankInfilling(64, SPECIALS, positions, gmask_rate=1.0, gmask_min_ratio=1.0)
  trained = infilling.text_row(text, seed=0, index=5)
  assert trained["attend_end"].tolist() == list(range(1, 65)) and trained["loss_weights"].tolist() == [0, *[1] * 63]
  config = dataclasses.replace(CONFIG, positions=positions)
  row = layout(config).window(items.Window(text[:20].tolist(), text[20:].tolist(), {}))
  assert row.prompt.tokens == trained["tokens"].tolist() and row.targets == text[20:].tolist()
  taken = config.position_kind.of_model(row.prompt.positions)
  np.testing.assert_array_equal(taken, trained["positions"])


@pytest.mark.parametrize("use_task_mask", [False, True])
def test_choices_are_compared_with_what_follows(use_task_mask: bool) -> None:
  own = layout(use_task_mask=use_task_mask)
  question = items.Question([10, 11, own.mask, 12, 13], [[20], [21, 22]], 0, {})
  for row, choice in zip(own.question(question), question.choices, strict=True):
    assert row.targets == [*choice, 12, 13]
    assert row.prompt.tokens == [SPECIALS.gmask, SPECIALS.sop, 10, 11, *choice, 12]
  at_end = dataclasses.replace(question, context=[10, 11])
  assert [row.targets for row in own.question(at_end)] == question.choices


def test_long_contexts_lose_their_beginnings() -> None:
  own = layout()
  question = items.Question(list(range(100, 300)), [[20], [21, 22]], 0, {})
  for row, choice in zip(own.question(question), question.choices, strict=True):
    assert len(row.prompt.tokens) <= 64 and row.prompt.tokens[-len(choice) :] == [299, *choice[:-1]]


def test_answers_are_written_from_what_is_before_the_blank_and_end_at_what_is_behind(tmp_path, monkeypatch) -> None:
  engine = engine_lib.Engine.load(write(tmp_path))
  words = engine.tokenizer
  before, behind = words.encode("the quick brown"), words.encode("lazy")
  item = items.Blank([*before, words.specials.mask, *behind], ["fox"], {})
  task = task_lib.of({"name": "t", "type": "gen", "path": "t", "max_gen_length": 4, "max_seq_length": 64}, "here")
  own = layouts.Layout(task, engine.config, words.specials)
  assert own.blank(item).tokens == [words.specials.gmask, words.specials.sop, *before]
  said = beam.Beam(words.encode("fox lazy dogs"), 0.0)
  monkeypatch.setattr(asking.Asker, "_decode", lambda self, task, asked: [[said]] * len(asked))
  [record] = asking.Asker(engine).ask(asking.placed("all", "f", [item], own))
  assert record["prediction_text"].strip() == "fox" and record["values"]["EM"] == 1


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes an untrained causal model."""
  run = untrained_run.write(folder / "run")
  config = folder_lib.read_config(run)
  folder_lib.write_config(run, dataclasses.replace(config, model=dataclasses.replace(config.model, causal=True)))
  return run


def test_what_follows_costs(tmp_path) -> None:
  """A sentence that goes on is less likely than its beginning, whatever it is: no token sees its future."""
  (tmp_path / "data").mkdir()
  sentences = ["the quick brown fox jumps", "over lazy dogs on day"]
  contexts = [{"before": "on day", "choices": sentences, "behind": behind} for behind in ("", "lazy dogs")]
  lines = [json.dumps(record | {"label": 0}) for record in contexts]
  (tmp_path / "data" / "test.jsonl").write_text("\n".join(lines))
  (tmp_path / "t.yaml").write_text(
    'name: t\ntype: mul\npath: ""\nprompt: {inputs: "{before}[MASK]{behind}", choices: "{choices}", label: "{label}"}\n'
  )
  evaluation.evaluate(write(tmp_path), [tmp_path / "t.yaml"], tmp_path / "data", tmp_path / "out")
  records = map(json.loads, (tmp_path / "out" / "items.jsonl").read_text().splitlines())
  alone, followed = sorted(records, key=lambda record: record["item"])
  assert all(more < less for more, less in zip(followed["scores"], alone["scores"]))
