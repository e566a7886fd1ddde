"""generate and score from files: JSON lines in and out, and runs that are killed and go on."""

import argparse
import dataclasses
import io
import json
import os
import pathlib
import random
import sys
import types
from collections.abc import Sequence

import numpy as np
import pytest

from glmjax import cli, errors
from glmjax.cli import answers, inference, inputs, process
from glmjax.infer import engine
from glmjax.infer import sampling
from glmjax.infer import score as score_lib
from glmjax.parallel import mesh as mesh_lib


ALONE = dict.fromkeys(("coordinator", "num_processes", "process_id", "mesh"))  # flags of a process that is alone


class Model:
  """Answers in capitals and the seed; two prompts at a time."""

  max_batch = 2
  config = types.SimpleNamespace(max_length=50, vocab_size=1 << 30)
  room = engine.Engine.room

  def encode(self, text: str) -> list[int]:
    return [ord(letter) for letter in text]

  def generate(
    self, prompts: Sequence[str], max_tokens: int, how: sampling.Sampling, seed: int
  ) -> list[engine.Generation]:
    assert len(prompts) <= self.max_batch
    if "stop here" in prompts:
      raise KeyboardInterrupt
    return [engine.Generation(f"{prompt.upper()} {seed + i}", ["x"], [[1]], "stop") for i, prompt in enumerate(prompts)]


@pytest.fixture(autouse=True)
def model(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(engine.Engine, "load", lambda checkpoint, **options: Model())
  monkeypatch.setattr(inference, "model_folder", pathlib.Path)
  monkeypatch.setattr(inference, "_fingerprint", str)


def generate(checkpoint: str, prompts: Sequence, **settings) -> list[dict] | dict:
  """inference.generate, its settings by their flags' names."""
  groups = {"decoding": inference.Decoding, "output": inference.Output}
  own = {name: {field.name for field in dataclasses.fields(group)} for name, group in groups.items()}
  assert {*settings} <= {*own["decoding"], *own["output"]}
  made = {name: group(**{k: v for k, v in settings.items() if k in own[name]}) for name, group in groups.items()}
  return inference.generate(checkpoint, prompts, **made)


def read(prompt=None, file=None):
  options = argparse.Namespace(prompt=prompt, file=file, **ALONE)
  assert inputs.check_prompts(options) == {}
  return inputs.prompts(options)


def lines(path: str) -> list[dict]:
  return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def test_what_a_file_holds(monkeypatch):
  rows = [{"prompt": "a [MASK]", "id": 3}, {"prompt": "{\u2028好", "x": {"y": [None]}}]
  text = "\n\n".join(json.dumps(row) for row in rows) + "\r\n"
  for name in ("p.jsonl", "p.txt"):
    pathlib.Path(name).write_bytes(text.encode("utf-8-sig"))
    assert read(file=name) == rows
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
  assert read(file="-") == rows
  pathlib.Path("p.txt").write_text('one\n{"prompt": 1}\n\n"two\n')
  assert read(file="p.txt") == [{"prompt": text} for text in ("one", '{"prompt": 1}', '"two')]
  pathlib.Path("p.txt").write_bytes(b"one\rtwo\r\nthree")
  assert read(file="p.txt") == [{"prompt": text} for text in ("one", "two", "three")]
  assert read_texts(text=["a"]) == ["a"]


def read_texts(**options):
  unset = {"text": None, "context": None, "choice": None, "file": None}
  options = argparse.Namespace(**unset | options, **ALONE)
  assert inputs.check_texts(options) == {}
  return inputs.texts(options)


def test_texts_contexts_and_choices():
  assert read_texts(context="c", text=["a", "b"]) == [{"context": "c", "text": "a"}, {"context": "c", "text": "b"}]
  question = {"context": "c [MASK].", "choices": ["a", "b"]}
  assert read_texts(context="c [MASK].", choice=["a", "b"]) == [question]
  rows = [question | {"label": 1}, {"text": "a"}, {"text": "b", "context": "c", "id": None}]
  pathlib.Path("t.jsonl").write_text("\n".join(map(json.dumps, rows)))
  assert read_texts(file="t.jsonl") == rows


@pytest.mark.parametrize(
  "options, expected",
  [
    ({}, "nothing to read: give --text"),
    ({"context": "c"}, "--context alone has nothing to score"),
    ({"choice": ["a"]}, "--choice needs --context"),
    ({"choice": ["a"], "text": ["b"], "context": "c"}, "--text and --choice are both given"),
    ({"context": "c", "file": "f"}, "--context and --file are both given"),
    ({"context": "c", "choice": ["a", ""]}, "--choice: choice 2 is empty"),
  ],
)
def test_flags_of_score_that_do_not_go_together(options, expected):
  with pytest.raises(errors.InputError, match=expected):
    read_texts(**options)


@pytest.mark.parametrize(
  "row, expected",
  [
    ({"text": ""}, "the text to score is empty"),
    ({"text": "a", "context": 3}, "the field 'context' is 3, not a string"),
    ({"context": "c"}, "no field 'text'"),
    ({"choices": ["a"]}, "no field 'text'"),
    ({"context": "c", "choices": []}, "choices are \\[\\]: give a list of texts"),
    ({"context": "c", "choices": "ab"}, 'choices are "ab": give a list of texts'),
    ({"context": "c", "choices": ["a", 3]}, "number 2: the field 'choice' is 3"),
    ({"context": "c", "choices": ["a", ""]}, "choice 2 is empty"),
    ({"context": "c", "choices": ["a"], "text": "b"}, "both text and choices"),
    *[
      ({"text": "a", name: 1}, f"has a field '{name}', which score would overwrite: rename it")
      for name in ("log_likelihood", "tokens", "bits_per_byte")
    ],
    *[
      ({"context": "c", "choices": ["a"], name: 1}, f"has a field '{name}', which score would overwrite")
      for name in ("log_likelihoods", "tokens", "best")
    ],
  ],
)
def test_bad_records_of_score(row, expected, capsys):
  """In a file and in a call, before the model is loaded."""
  pathlib.Path("t.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps(row))
  with pytest.raises(errors.InputError, match=f"t.jsonl: line 2.*{expected}"):
    read_texts(file="t.jsonl")
  with pytest.raises(errors.InputError, match=f"text 1 of 1.*{expected}"):
    inference.score("nowhere", [row])


@pytest.mark.parametrize(
  "line, expected",
  [
    ('{"prompt": "a"', "p.jsonl: line 3: not JSON"),
    ("plain", "p.jsonl: line 3: not JSON"),
    ("[1]", "p.jsonl: line 3: JSON of a list, not an object"),
    ('{"text": "a"}', "p.jsonl: line 3: no field 'prompt'; the record has text"),
    ('{"prompt": 1}', "p.jsonl: line 3: the field 'prompt' is 1, not a string"),
    ('{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "p.jsonl: line 3: JSON nested deeper than"),
    ('{"prompt": "a", "x": ' + "[" * 200 + "]" * 200 + "}", "p.jsonl: line 3: JSON nested deeper than"),
    ('{"a":' * 100_000, "p.jsonl: line 3: JSON nested deeper than"),
    ('{"prompt": "a\0b"}', "p.jsonl: line 3 holds NUL characters"),
    *[
      (
        json.dumps({"prompt": "a", name: "mine"}),
        f"p.jsonl: line 3 has a field '{name}', which generate would overwrite",
      )
      for name in ("output", "pieces", "finish_reason")
    ],
    (r'{"prompt": "a", "b": "\ud800"}', "p.jsonl: line 3 holds half a surrogate pair"),
    ('{"prompt": "a", "b": [1e999]}', "p.jsonl: line 3 holds a number that is not finite, or too long to be read"),
    ('{"prompt": "a", "b": NaN}', "p.jsonl: line 3 holds a number that is not finite"),
    (f'{{"prompt": "a", "b": {"9" * 5000}}}', "p.jsonl: line 3 holds a number that is not finite, or too long"),
  ],
)
def test_bad_lines_are_named_before_the_model_is_loaded(line, expected, capsys):
  pathlib.Path("p.jsonl").write_text(f'{{"prompt": "a"}}\n\n{line}\n')
  assert cli.main(["generate", "--checkpoint=nowhere", "--file=p.jsonl"]) == 2
  message = capsys.readouterr().err
  assert message.startswith(f"glmjax: {expected}") and message.count("\n") == 1


def test_answers_are_written_whole_or_not_at_all():
  class Short(io.RawIOBase):
    """Takes three bytes at a time, as a file may where the disk is nearly full."""

    def __init__(self):
      self.taken = b""

    def write(self, data):
      self.taken += bytes(data[:3])
      return min(len(data), 3)

  file = Short()
  answers.Files(file, None, "", 0, None).write([{"prompt": "a", "output": "b"}])
  assert json.loads(file.taken) == {"prompt": "a", "output": "b"}


def test_answers_keep_order_and_fields():
  rows = ["one", {"prompt": "two", "id": 7, "label": None}, "three"]
  expected = [
    {"prompt": "one", "output": "ONE 5", "pieces": ["x"], "finish_reason": "stop"},
    {"prompt": "two", "id": 7, "label": None, "output": "TWO 6", "pieces": ["x"], "finish_reason": "stop"},
    {"prompt": "three", "output": "THREE 7", "pieces": ["x"], "finish_reason": "stop"},
  ]
  assert generate("m", rows, seed=5) == expected
  found = generate("runs/m", rows, seed=5, out="a.jsonl", samples="s.jsonl")
  assert found == {"out": "a.jsonl", "answers": 3, "new": 3}
  assert lines("a.jsonl") == expected
  assert lines("s.jsonl") == [{"model": "m", "prompt": row["prompt"], "output": row["output"]} for row in expected]


def test_standard_output(capsysbinary):
  process.begin()
  inference.show_outputs(generate("m", ["好", "b", "c"], out="-"))
  captured = capsysbinary.readouterr()
  assert [json.loads(line)["output"] for line in captured.out.splitlines()] == ["好 0", "B 1", "C 2"]
  assert captured.err == b"standard output: 3 answers, 3 of them new\n"


def test_a_run_killed_anywhere_goes_on():
  """Whatever part of the file is left, the rerun's is the whole run's."""
  prompts = [f"{i} 好" for i in range(7)]
  generate("m", prompts, out="whole.jsonl")
  whole = pathlib.Path("whole.jsonl").read_bytes()
  rng = random.Random(0)
  for left in [0, len(whole), *(rng.randrange(len(whole)) for _ in range(20))]:
    pathlib.Path("a.jsonl").write_bytes(whole[:left])
    found = generate("m", prompts, out="a.jsonl")
    assert found["new"] == 7 - whole[:left].count(b"\n")
    assert pathlib.Path("a.jsonl").read_bytes() == whole


def test_a_batch_is_written_before_the_next_begins():
  with pytest.raises(KeyboardInterrupt):
    generate("m", ["a", "b", "stop here"], out="a.jsonl", samples="s.jsonl")
  assert [row["output"] for row in lines("a.jsonl")] == [row["output"] for row in lines("s.jsonl")] == ["A 0", "B 1"]


def test_files_of_other_prompts_are_left_alone(monkeypatch):
  for content in ('{"prompt": "b", "output": "B"}\n', '{"prompt": "a"}\n', "notes\n", "\n", "[]\n"):
    pathlib.Path("a.jsonl").write_text(content)
    with pytest.raises(errors.InputError, match="a.jsonl: line 1 is no answer to prompt 1"):
      generate("m", ["a"], out="a.jsonl")
    assert pathlib.Path("a.jsonl").read_text() == content
  pathlib.Path("a.jsonl").write_text('{"prompt": "a", "output": "A"}\n' * 2)
  with pytest.raises(errors.InputError, match="line 2 is no answer"):
    generate("m", ["a"], out="a.jsonl")
  with monkeypatch.context() as patch:  # a mistake found after the files are opened: nothing is lost
    patch.setattr(Model, "config", types.SimpleNamespace(max_length=1, vocab_size=1 << 30))
    with pytest.raises(errors.InputError, match="prompt 1 of 1: a prompt takes 2 tokens"):
      generate("m", ["a"], out="a.jsonl", overwrite=True)
  assert len(lines("a.jsonl")) == 2
  generate("m", ["a"], out="a.jsonl", overwrite=True)
  assert len(lines("a.jsonl")) == 1


def test_a_file_of_one_line_without_end_is_left_alone(monkeypatch):
  """It may be anything of the user's, and is no half of an answer; nothing is cut before all is looked at."""
  monkeypatch.setattr(engine.Engine, "load", None)
  for content in ('{"precious": 1}', "notes", '{"prompt": "a", "output": "A"}', '{"pro', "\0"):
    pathlib.Path("a.jsonl").write_text(content)
    with pytest.raises(errors.InputError, match="--overwrite this one"):
      generate("m", ["a"], out="a.jsonl")
    assert pathlib.Path("a.jsonl").read_text() == content


def test_half_a_line_stays_until_the_first_answer(monkeypatch):
  generate("m", ["a", "b"], out="a.jsonl")
  whole = pathlib.Path("a.jsonl").read_bytes()
  pathlib.Path("a.jsonl").write_bytes(whole[:-5])
  with pytest.raises(errors.InputError, match="seed 0 there, 1 now"):
    generate("m", ["a", "b"], out="a.jsonl", seed=1)
  with monkeypatch.context() as patch, pytest.raises(TypeError):
    patch.setattr(engine.Engine, "load", None)
    generate("m", ["a", "b"], out="a.jsonl")
  assert pathlib.Path("a.jsonl").read_bytes() == whole[:-5]
  monkeypatch.setattr(answers, "_LONGEST_LINE", 20)  # no line of ours is longer
  with pytest.raises(errors.InputError, match="line 1 is no answer"):
    generate("m", ["a", "b"], out="a.jsonl")


def test_samples_that_a_kill_left_out_are_added():
  """At any byte of the answers and of the samples, and other models' samples stay."""
  prompts = ["same", "same", "b", "c"]
  other = b'{"model": "other", "prompt": "b", "output": "B"}\n'
  pathlib.Path("s.jsonl").write_bytes(other)
  generate("m", prompts, out="a.jsonl", samples="s.jsonl")
  whole, samples = pathlib.Path("a.jsonl").read_bytes(), pathlib.Path("s.jsonl").read_bytes()
  for left in range(len(other), len(samples), 7):
    answered = samples[:left].count(b"\n") + 1
    for kept in (answered, 4):  # the answers are written first
      pathlib.Path("a.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]))
      pathlib.Path("s.jsonl").write_bytes(samples[:left])
      generate("m", prompts, out="a.jsonl", samples="s.jsonl")
      assert pathlib.Path("a.jsonl").read_bytes() == whole
      assert pathlib.Path("s.jsonl").read_bytes() == samples


def test_a_sample_is_not_glued_to_a_line_without_end():
  mine = '{"model": "other", "prompt": "b", "output": "B"}'
  pathlib.Path("s.jsonl").write_text(mine)
  generate("m", ["a"], samples="s.jsonl")
  assert [row["model"] for row in lines("s.jsonl")] == ["other", "m"]


def test_a_link_and_its_target_are_one_file():
  pathlib.Path("folder").mkdir()
  pathlib.Path("link.jsonl").symlink_to("folder/a.jsonl")
  generate("m", ["a"], out="link.jsonl")
  assert sorted(os.listdir()) == ["folder", "link.jsonl"]
  assert generate("m", ["a"], out="folder/a.jsonl")["new"] == 0
  with answers.files("link.jsonl", None, "", [], {}, True):
    with pytest.raises(errors.InputError, match="another process is writing folder/a.jsonl"):
      generate("m", ["a"], out="folder/a.jsonl")


def test_answers_of_other_settings_are_not_gone_on_with(monkeypatch):
  """Another model or sampling, begun and done or killed: refused in one line, and nothing is touched."""
  with pytest.raises(KeyboardInterrupt):
    generate("m", ["a", "b", "stop here"], out="a.jsonl", seed=3)
  content = pathlib.Path("a.jsonl").read_bytes()
  for prompts in (["a", "b", "c"], ["a", "b"]):
    for checkpoint, changes, line in (
      ("other", {}, r"another model, then at m\)"),
      ("m", {"temperature": 0.5}, r"\(temperature 0.0 there, 0.5 now\)"),
      ("m", {"seed": 4, "max_tokens": 9}, r"\(max_tokens 128 there, 9 now; seed 3 there, 4 now\)"),
    ):
      with pytest.raises(errors.InputError, match=f"{line}: choose another file, or --overwrite this one") as caught:
        generate(checkpoint, prompts, out="a.jsonl", **{"seed": 3} | changes)
      assert "\n" not in str(caught.value) and pathlib.Path("a.jsonl").read_bytes() == content
  generate("m", ["a", "b", "c"], out="a.jsonl", seed=3)
  assert len(lines("a.jsonl")) == 3
  monkeypatch.setattr(inference, "_fingerprint", lambda checkpoint: "m")  # the same, moved elsewhere
  assert generate("elsewhere/m", ["a", "b", "c"], out="a.jsonl", seed=3)["new"] == 0
  generate("m", ["a"], out="a.jsonl", seed=5, overwrite=True)
  assert generate("m", ["a"], out="a.jsonl", seed=5)["new"] == 0
  for settings in (None, "", "[]", "{}"):
    pathlib.Path("a.jsonl.settings.json").unlink()
    if settings is not None:
      pathlib.Path("a.jsonl.settings.json").write_text(settings)
    else:
      with pytest.raises(errors.InputError, match="a.jsonl.settings.json does not tell what gave them"):
        generate("m", ["a"], out="a.jsonl", seed=5)
      pathlib.Path("a.jsonl.settings.json").write_text("{")
    with pytest.raises(errors.InputError, match="does not tell what gave them"):
      generate("m", ["a"], out="a.jsonl", seed=5)


def test_killed_while_beginning(monkeypatch):
  """Settings never stand beside answers that they did not give."""
  generate("m", ["a"], out="a.jsonl")

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(answers.publish, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
      generate("m", ["a"], out="a.jsonl", seed=1, overwrite=True)
  assert pathlib.Path("a.jsonl").read_bytes() == b""
  assert generate("m", ["a"], out="a.jsonl", seed=2)["new"] == 1


@pytest.mark.parametrize("flag", ["out", "samples"])
def test_what_cannot_be_written_is_told_before_the_work(flag, monkeypatch):
  monkeypatch.setattr(engine.Engine, "load", None)
  pathlib.Path("folder").mkdir()
  for path, expected in (
    ("no/such/file", "cannot write no/such/file: no such folder"),
    ("folder", "folder is a folder"),
    ("/proc/file.jsonl", "cannot write /proc/file.jsonl"),
  ):
    with pytest.raises(errors.InputError, match=expected):
      generate("m", ["a"], **{flag: path})


def test_a_device_is_no_file_of_answers():
  with pytest.raises(errors.InputError, match="/dev/null is no regular file"):
    generate("m", ["a"], out="/dev/null")


def test_two_runs_do_not_write_one_file():
  with answers.files("a.jsonl", None, "", [], {}, False):
    with pytest.raises(errors.InputError, match="another process is writing a.jsonl"):
      generate("m", ["a"], out="a.jsonl")


def test_prompts_that_do_not_fit_are_found_before_the_first_answer():
  with pytest.raises(errors.InputError, match="prompt 3 of 3: a prompt takes 61 tokens"):
    generate("m", ["a", "b", "c" * 60], out="a.jsonl")
  assert pathlib.Path("a.jsonl").read_bytes() == b""


def test_score_keeps_fields(monkeypatch):
  scored = [score_lib.Score(np.full(3, -n, np.float32), np.ones(3, bool)) for n in (2, 1)]
  monkeypatch.setattr(Model, "score", lambda self, texts, contexts: scored[:1] * len(texts), raising=False)
  monkeypatch.setattr(
    Model,
    "score_choices",
    lambda self, contexts, choices: [score_lib.Choices(scored, 4) for _ in contexts],
    raising=False,
  )
  found = inference.score("m", ["a", {"context": "c", "choices": ["d", "e"], "id": 2}, {"text": "bc", "id": 1}])
  assert [row.get("id") for row in found] == [None, 2, 1] and found[2]["tokens"] == 3
  assert found[0]["bits_per_byte"] == 2 * found[2]["bits_per_byte"]
  assert found[1] == {
    "context": "c",
    "choices": ["d", "e"],
    "id": 2,
    "log_likelihoods": [-6, -3],
    "tokens": [3, 3],
    "best": 1,
    "context_tokens_left_out": 4,
  }


def test_answers_of_prompts_with_other_fields_are_not_gone_on_with():
  """What a resumed file holds are these very records."""
  generate("m", [{"prompt": "a", "id": 1}], out="a.jsonl")
  content = pathlib.Path("a.jsonl").read_bytes()
  for row in ({"prompt": "a", "id": 2}, {"prompt": "a"}, {"prompt": "a", "id": 1, "more": 0}):
    with pytest.raises(errors.InputError, match="line 1 is no answer to prompt 1"):
      generate("m", [row, "b"], out="a.jsonl")
  assert pathlib.Path("a.jsonl").read_bytes() == content
  generate("m", [{"id": 1, "prompt": "a"}, "b"], out="a.jsonl")
  assert len(lines("a.jsonl")) == 2


@pytest.mark.parametrize(
  "settings, expected",
  [
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": -1}, "temperature is -1"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"min_tokens": -1}, "min_tokens is -1"),
    ({"no_repeat_ngram": 1}, "no_repeat_ngram is 1: give 0"),
    ({"no_repeat_ngram": 65}, "no_repeat_ngram is 65"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ({"num_beams": 0}, "num_beams is 0"),
    ({"num_beams": 65}, "num_beams is 65"),
    ({"num_beams": 2, "temperature": 0.5}, "beam search draws nothing"),
    ({"length_penalty": 2.0}, "only beam search has one"),
  ],
)
def test_settings_out_of_range_are_told_before_the_model_is_loaded(settings, expected, monkeypatch):
  monkeypatch.setattr(engine.Engine, "load", None)
  pathlib.Path("a.jsonl").write_text("mine\n")
  with pytest.raises(errors.InputError, match=expected):
    generate("m", ["a"], out="a.jsonl", overwrite=True, **settings)
  assert pathlib.Path("a.jsonl").read_text() == "mine\n"


def test_settings_noted_by_an_earlier_version():
  """It had no beams: they are as if they were not used."""
  generate("m", ["a"], out="a.jsonl")
  noted = json.loads(pathlib.Path("a.jsonl.settings.json").read_text())
  assert set(noted) == {"checkpoint", "weights", "max_tokens", "temperature", "top_k", "top_p", "seed"}
  with pytest.raises(errors.InputError, match="num_beams unset there, 3 now"):
    generate("m", ["a", "b"], out="a.jsonl", num_beams=3)


@pytest.mark.parametrize(
  "decoding, noted",
  [
    ({}, {}),
    ({"min_tokens": 1}, {"min_tokens": 1}),
    ({"num_beams": 2, "length_penalty": 0}, {"num_beams": 2, "length_penalty": 0}),
    ({"num_beams": 2, "length_penalty": 1.0}, {"num_beams": 2}),
    ({"repetition_penalty": 1, "no_repeat_ngram": 3}, {"no_repeat_ngram": 3}),
  ],
)
def test_whatever_has_an_effect_is_noted(decoding, noted):
  plain = {"max_tokens": 128, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
  assert inference.Decoding(**decoding).noted() == plain | noted


def test_prompts_and_answers_are_not_one_file(capsys):
  pathlib.Path("p.jsonl").write_text('{"prompt": "a"}\n')
  for flag in ("--out", "--samples"):
    assert cli.main(["generate", "--checkpoint=m", "--file=p.jsonl", f"{flag}=./p.jsonl", "--overwrite"]) == 2
    assert "the prompts would be lost" in capsys.readouterr().err
  with pytest.raises(errors.InputError, match="--samples and --out are both"):
    generate("m", ["a"], out="a.jsonl", samples="a.jsonl")
  assert lines("p.jsonl") == [{"prompt": "a"}]


def test_a_pipe_of_the_shell_is_read():
  """generate --file=<(command)"""
  reader, writer = os.pipe()
  os.write(writer, '{"prompt": "好"}\n'.encode("utf-8-sig"))
  os.close(writer)
  assert read(file=f"/dev/fd/{reader}") == [{"prompt": "好"}]
  os.close(reader)


def test_files_that_are_no_text(monkeypatch):
  os.mkfifo("pipe")  # would wait for ever
  pathlib.Path("folder").mkdir()
  pathlib.Path("wide.txt").write_bytes("好的".encode("utf-16"))
  pathlib.Path("gbk.txt").write_bytes(b"a\n" + "好的".encode("gbk"))
  for name, expected in (
    ("pipe", "no regular file"),
    ("folder", "no regular file"),
    ("none", "does not exist"),
    ("wide.txt", "UTF-16"),
    ("gbk.txt", r"gbk.txt: not UTF-8 at byte 2 \(line 2\)"),
  ):
    with pytest.raises(errors.InputError, match=expected):
      read(file=name)
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pathlib.Path("gbk.txt").read_bytes())))
  with pytest.raises(errors.InputError, match="standard input: not UTF-8"):
    read(file="-")


def test_lines_of_prompts_are_bounded(monkeypatch):
  monkeypatch.setattr(inputs, "LONGEST_LINE", 5)
  pathlib.Path("p.txt").write_text("short\nlonger\n")
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"short\nlonger\n")))
  for file, name in (("p.txt", "p.txt"), ("-", "standard input")):
    with pytest.raises(errors.InputError, match=f"{name}: line 2 has more than 5 characters"):
      read(file=file)


def test_offloading_tells_xla_to_copy_ahead(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--mine=1")
  inference.Devices().load("m")
  assert os.environ["XLA_FLAGS"] == "--mine=1"
  inference.Devices(offload_layers=2).load("m")
  # The user's own come last, which is what XLA goes by.
  assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=true --mine=1"


@pytest.mark.parametrize(
  "given, sizes",
  [
    ("tensor=2", "tensor=2"),
    ("mine.gin", dict(data=1, tensor=4)),
    ("meshes/cpu8.gin", dict(data=2, fsdp=2, tensor=2)),
    ("meshes/fsdp.gin", dict(data=1, fsdp=-1)),
    ("meshes/fsdp_tensor8.gin", dict(data=1, fsdp=-1, tensor=8)),
  ],
)
def test_a_mesh_by_its_sizes_or_its_gin_file(monkeypatch, given, sizes):
  """Of this folder or of glmjax's own; the engine is given what train would be given."""
  pathlib.Path("mine.gin").write_text(
    "from __gin__ import dynamic_registration\nfrom glmjax.parallel import mesh\n"
    "mesh.MeshConfig.data = 1\nmesh.MeshConfig.tensor = 4\n"
  )
  meshes = []
  monkeypatch.setattr(engine.Engine, "load", lambda checkpoint, mesh, **options: meshes.append(mesh) or Model())
  assert cli.main(["generate", "--checkpoint=c", "--prompt=a", f"--mesh={given}"]) == 0
  assert meshes == [sizes if isinstance(sizes, str) else mesh_lib.MeshConfig(**sizes)]


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--mesh=none.gin"], "no gin file none.gin"),
    (["--coordinator=h:1", "--num_processes=2", "--process_id=0"], "--coordinator without --mesh"),
    (["--coordinator=h:1", "--mesh=tensor=2"], "--num_processes and --process_id missing"),
  ],
)
def test_meshes_and_hosts_that_are_half_given(capsys, flags, words):
  assert cli.main(["generate", "--checkpoint=c", "--prompt=a", *flags]) == 2
  assert words in capsys.readouterr().err
