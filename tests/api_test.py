"""What people call: `import glmjax` is instant; load, train and plan do what the commands do, from Python."""

import dataclasses
import html.parser
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import patterns
import pytest

import glmjax
from glmjax import errors
from glmjax import tokenizer
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import manager
from glmjax.cli import run
from glmjax.io import tokenizer_folder
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.parallel import mesh as mesh_lib
from glmjax.train import loop
from glmjax.train import schedules

NASTY = "<script>alert('&')</script> "
SENTENCES = [f"On day {i} the quick brown fox <b>jumps</b> over {i * i} lazy dogs & sleeps." for i in range(60)]
PNG = b"\x89PNG\r\n\x1a\n"


class Words(html.parser.HTMLParser):
  """The text that a browser would show, and the tags that it would obey."""

  def __init__(self, source: str):
    super().__init__()
    self.text, self.tags, self.inside = "", set(), {}
    self._open = []
    self.feed(source)

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.text += data
    self.inside.setdefault(self._open[-1], []).append(data)


def shown(value) -> Words:
  found = Words(value._repr_html_())
  assert found.tags <= {"div", "mark", "span", "table", "tr", "th", "td"}
  return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A run with a random model, and a tokenizer that knows its few sentences."""
  folder = tmp_path_factory.mktemp("api")
  tokenizer.train(SENTENCES, folder / "tokenizer", 400)
  config = config_lib.GLMConfig(
    vocab_size=400, num_layers=1, embed_dim=32, num_heads=4, mlp_dim=48, max_length=128, init_std=0.5
  )
  layout = tokenizer_folder.copy(folder / "tokenizer", folder / "run" / folder_lib.TOKENIZER)
  folder_lib.write_config(folder / "run", folder_lib.FolderConfig(config, {"mixture": "m"}, layout))
  saver = manager.Manager(folder / "run" / "checkpoints")
  saver.save(1, {"params": glm.init_params(config, jax.random.key(0)), "step": jnp.int32(1)}, {"samples_seen": 1})
  saver.close()
  return folder / "run"


@pytest.fixture(scope="module")
def model(folder):
  return glmjax.load(folder)


def test_importing_is_instant_and_says_what_there_is():
  code = """
import sys, glmjax
assert {"load", "train", "run", "plan", "Training", "Plan", "errors", "show"} == set(glmjax.__all__) <= set(dir(glmjax))
assert callable(glmjax.load) and callable(glmjax.train) and callable(glmjax.plan) and glmjax.errors.InputError
assert not {"jax", "numpy", "gin", "tensorflow"} & set(sys.modules)
assert not hasattr(glmjax, "trian")
"""
  subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("first", ["import glmjax.train.loop", "from glmjax import train", "glmjax.train", "pass"])
def test_train_is_a_package_and_a_function_whatever_comes_first(first):
  code = f"""
import glmjax
from glmjax import errors
{first}
from glmjax.train import schedules
import glmjax.train.schedules as again
assert glmjax.train.schedules is schedules is again
try:
  glmjax.train("no/such.gin")
except errors.InputError as error:
  assert "no/such.gin" in str(error), error
else:
  raise AssertionError
"""
  subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_blanks_are_marked_where_they_were_filled(model):
  answer = model.fill(f"{SENTENCES[3][:20]}[MASK]<b>jumps[MASK]", max_tokens=5)
  assert [answer.text[first:end] for first, end in answer.places] == answer.pieces and len(answer.pieces) == 2
  found = shown(answer)
  assert found.text == answer.text and found.inside["mark"] == [piece for piece in answer.pieces if piece]
  assert answer == model.generate([f"{SENTENCES[3][:20]}[MASK]<b>jumps[MASK]"], max_tokens=5)[0]
  with pytest.raises(errors.InputError, match=r"no blank in 'plain'.*\[MASK\]"):
    model.fill("plain")


def test_scores_are_shown_token_by_token(model):
  text = NASTY + SENTENCES[5]
  [score] = model.score([text])
  assert "".join(score.pieces) == text and len(score.pieces) == score.count
  assert shown(score).inside["span"] == list(score.pieces)
  [behind] = model.score(["sleeps."], ["the [MASK] fox"])
  assert "".join(behind.pieces) == "sleeps."
  [choices] = model.score_choices(["the [MASK] fox"], [["<quick>", "lazy"]])
  found = shown(choices)
  assert found.inside["td"].count("best") == 1 and {"<quick>", "lazy"} <= set(found.inside["td"])


def test_a_conversation_is_a_session_of_the_model(model):
  session = model.chat(max_length=64, seed=1)
  reply = "".join(session.ask("<b>who?"))
  assert session.rounds[0].reply == reply and "<b>who?" in shown(session).text


def objects(**changes):
  """The run of `patterns.GIN` with one layer and fewer samples, from Python objects."""
  model = config_lib.GLMConfig(
    vocab_size=64, num_layers=1, embed_dim=32, num_heads=4, mlp_dim=48, max_length=16, hidden_dropout=0.1
  )
  return (
    dict(
      model=model,
      data=patterns.Source(),
      batches=schedules.Batches(16),
      total_samples=64,
      learning_rate=schedules.LearningRate(peak=1e-2, minimum=1e-3, warmup_samples=32, decay_samples=160),
      mesh=mesh_lib.MeshConfig(),
      intervals=loop.Intervals(log=1, save=3),
    )
    | changes
  )


def test_gin_strings_and_objects_give_the_same_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "run.gin").write_text(patterns.GIN, encoding="utf-8")
  bindings = ["loop.train.total_samples = 64", "config.GLMConfig.num_layers = 1"]
  by_gin = glmjax.train("run.gin", bindings=[*bindings, "loop.Intervals.evaluate = 0"], workdir="by_gin")
  assert by_gin.workdir == pathlib.Path("by_gin") and by_gin.figures["step"] == 4
  assert "by_gin" in (tmp_path / "by_gin" / "config.gin").read_text(encoding="utf-8")
  whole = glmjax.train(workdir="objects", **objects())
  assert whole.figures["loss"] == by_gin.figures["loss"]
  assert [line["loss"] for line in whole.metrics] == [line["loss"] for line in by_gin.metrics]
  assert whole.plot()._repr_png_().startswith(PNG)
  assert f"{whole.figures['loss']:,.6g}" in shown(whole).text
  whole.plot().save("loss.png")
  assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_mistakes_are_the_command_lines(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "run.gin").write_text(patterns.GIN, encoding="utf-8")
  with pytest.raises(errors.InputError, match="did you mean total_samples"):
    glmjax.train("run.gin", bindings="loop.train.total_sample = 64", workdir="run")
  with pytest.raises(errors.InputError, match="workdir") as caught:
    glmjax.train("run.gin")
  assert "In call to configurable" not in str(caught.value)
  with pytest.raises(errors.InputError, match="max_length") as caught:  # raised within gin's call
    short = dataclasses.replace(objects()["model"], max_length=8)  # in place of the file's
    glmjax.train("run.gin", model=short, workdir="run")
  assert type(caught.value) is errors.InputError and "In call to configurable" not in str(caught.value)


def test_commands_run_in_this_process(folder, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  words = glmjax.run("tokenizer", documents=SENTENCES, folder=tmp_path / "words", vocab_size=400)
  assert words.decode(words.encode(SENTENCES[0])) == SENTENCES[0] and words.vocab_size == 400
  assert "vocab_size = 400" in (tmp_path / "words" / "config.gin").read_text(encoding="utf-8")
  (tmp_path / "mine.gin").write_text(
    "from __gin__ import dynamic_registration\nfrom glmjax.checkpoint import export\nexport.export.bits = 8\n",
    encoding="utf-8",
  )
  int8 = glmjax.run("export", "mine.gin", checkpoint=folder, out="int8")
  int4 = glmjax.run("export", "mine.gin", bindings="export.export.bits = 4", checkpoint=folder, out="int4")
  assert int4["array_bytes"] < int8["array_bytes"]
  assert f"{int4['array_bytes']:,}" in shown(int4).inside["td"]
  assert (
    glmjax.run("export", checkpoint=folder, out="int4", bits=8, overwrite=True)["array_bytes"] == int8["array_bytes"]
  )
  assert glmjax.run("inspect", path="int4")["bits"] == 8
  with pytest.raises(errors.InputError, match="int4"):
    glmjax.run("export", checkpoint=folder, out="int4")


def test_tasks_are_put_to_a_model_and_compared(folder, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("t.yaml").write_text("name: t\ntype: mul\npath: ''\n", encoding="utf-8")
  record = {"inputs_pretokenized": "On day", "choices_pretokenized": ["1", "2"], "label": 0}
  pathlib.Path("data").mkdir()
  pathlib.Path("data", "t.jsonl").write_text(f"{json.dumps(record)}\n" * 3, encoding="utf-8")
  made = [
    glmjax.run("evaluate", checkpoint=folder, tasks=tasks, data="data", out=out, limit=2)
    for tasks, out in (("t.yaml", "a"), (["t.yaml"], "b"))
  ]
  assert made[0]["tasks"] == made[1]["tasks"] and made[0]["tasks"]["t"]["figures"]["Accuracy"]["items"] == 2
  found = glmjax.run("compare", runs=["a", "b"])
  assert found["tasks"]["t"]["Accuracy"][1]["difference"] == [0, 0, 0]


@pytest.mark.parametrize(
  "arguments, named, said",
  [
    (["exprot"], {}, "no command exprot; did you mean export"),
    (["chat"], {}, r"call glmjax.load\(folder\).chat"),
    (["train"], {}, "call glmjax.train"),
    (["export"], {"chekpoint": "run"}, "no argument chekpoint; did you mean checkpoint"),
    (["export"], {"coordinator": "a:1"}, "no argument coordinator"),
    (["export"], {"checkpoint": "run", "out": "out", "bits": 3}, "bits is 3: choose one of 8, 4"),
    (["export", "no/such.gin"], {}, "no gin file no/such.gin"),
    (["export"], {"checkpoint": "no/such", "out": "out"}, "no/such: no such folder"),
  ],
)
def test_mistakes_in_commands_are_one_line(tmp_path, monkeypatch, arguments, named, said):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.InputError, match=said) as caught:
    glmjax.run(*arguments, **named)
  assert "\n" not in str(caught.value)


def test_a_plan_is_the_commands(monkeypatch):
  figures = {
    "target": "rtx3090:4",
    "devices": 4,
    "device": "<RTX>",
    "mesh": {"data": 1, "tensor": 4},
    "fits": True,
    "peak_bytes_per_device": 18 << 30,
    "usable_memory_bytes": 22 << 30,
    "headroom_bytes": 4 << 30,
    "memory": {"parameters": 16 << 30, "kv_cache": 1 << 30, "temporaries": 1 << 30},
    "host_bytes_per_device": 0,
    "host_bytes_moved": 0,
    "collectives": [],
    "compile_seconds": 3.0,
    "compile_host_bytes": 1 << 30,
  }
  numbers = "step compute memory waited_exchange overlapped_exchange".split()
  figures |= {f"{name}_seconds": 0.5 for name in numbers}
  figures |= {name: 2.0 for name in ("hardware_flops", "tokens_per_second", "mfu", "hfu", "tokens_per_day")}
  asked = []

  def answer(command, **kwargs):
    asked.append(command)
    return subprocess.CompletedProcess(command, 0, json.dumps(figures), "")

  monkeypatch.setattr(subprocess, "run", answer)
  plan = glmjax.plan("plans/a.gin", bindings=["TENSOR = 4"], target="rtx3090:4", python="/other/python")
  assert asked == [
    ["/other/python", "-m", "glmjax", "plan", "--json", "--gin_file=plans/a.gin", "--gin.TENSOR = 4"]
    + ["--target=rtx3090:4"]
  ]
  assert plan.fits and plan.figures == figures
  assert "<RTX>" in shown(plan).text and plan.plot()._repr_png_().startswith(PNG)


def test_a_search_is_the_command_lines(monkeypatch):
  done = subprocess.CompletedProcess([], 0, json.dumps({"plans": [], "left_out": {}}), "")
  monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: done)
  with pytest.raises(errors.InputError, match="a search of meshes: run `glmjax plan`"):
    glmjax.plan("searched.gin")


def test_a_plan_that_cannot_be_made_is_one_line():
  """From the command itself, in the process of its own."""
  before = dict(os.environ)
  with pytest.raises(errors.InputError, match="target 'abacus:4' is not known"):
    glmjax.plan("plans/chatglm_6b_int4_rtx2080ti_1.gin", target="abacus:4")
  assert dict(os.environ) == before


def test_a_signal_is_an_interrupt_once_the_step_is_saved(monkeypatch):
  """As train/stopping.py ends a run: nothing is lost, and a notebook goes on."""

  def stopped(command, given):
    raise SystemExit(130)

  monkeypatch.setattr(run, "call", stopped)
  with pytest.raises(KeyboardInterrupt, match="saved; the same call goes on"):
    glmjax.train(workdir="nowhere", **objects())


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: glmjax.run(None), "no command None"),
    (lambda: glmjax.run(["text"]), "no command"),
    (lambda: glmjax.run("doctor", x=1), "no argument x; there are bucket"),
    (lambda: glmjax.run("inspect", path="here", hashes="no"), "--hashes is 'no': give True or False"),
    (lambda: glmjax.run("export", checkpoint="c", out=True), "--out is True"),
    (lambda: glmjax.run("launch", out=5), "--out is 5: give a path"),
    (lambda: glmjax.run("export", checkpoint="c", out="o", bits=5), "--bits is 5: choose one of 8, 4"),
    (lambda: glmjax.run("report", bindings=5), "bindings is 5: give text"),
    (lambda: glmjax.train("runs/quickstart.gin", bindings=[5]), r"bindings is \[5\]: give text"),
    (lambda: glmjax.train("runs/quickstart.gin", overwrite="no"), "--overwrite is 'no': give True or False"),
    (lambda: glmjax.plan("plans/glm_130b_int4_rtx3090_4.gin", python="/no/such"), "python: cannot start /no/such"),
  ],
)
def test_odd_arguments_are_told_in_a_line(call, words, tmp_path, monkeypatch):
  """Nothing is written, and nothing that is there is replaced."""
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.InputError, match=words):
    call()
  assert not list(tmp_path.iterdir())
