"""Paths in gin files and in calls of the library: ~ is the home folder, and no folder of that name is ever made."""

import pathlib

import pytest

from glmjax import errors, tokenizer
from glmjax.checkpoint import export
from glmjax.cli import inference
from glmjax.data import loader, text
from glmjax.evaluate import heldout, report
from glmjax.infer import engine
from glmjax.plan import fits
from glmjax.study import weights
from glmjax.thudm import inspection, load

# Each function that takes a path, given one below the home folder that is not there.
CALLS = {
  "Engine.load": engine.Engine.load,
  "generate": lambda path: inference.generate(path, ["a"]),
  "generate, out": lambda path: inference.generate("model", ["a"], output=inference.Output(samples=f"{path}/a.jsonl")),
  "score": lambda path: inference.score(path, ["a"]),
  "export": lambda path: export.export(path, "out"),
  "import": lambda path: load.import_model("chatglm-6b", path, "out"),
  "inspect": inspection.inspect,
  "evaluate": lambda path: heldout.evaluate("model", path),
  "report": report.write,
  "weights": lambda path: weights.measure([path], "out"),
  "loader": lambda path: loader.CachedMixture(path, lambda specials: None).describe(),
  "text": lambda path: text.find_files([path]),
  "tokenizer": tokenizer.Tokenizer.load,
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name, monkeypatch, tmp_path):
  home, here = tmp_path / "home", tmp_path / "here"
  for folder in (home, here):
    folder.mkdir()
  monkeypatch.setenv("HOME", str(home))
  monkeypatch.chdir(here)
  if name == "generate, out":
    monkeypatch.setattr(inference, "model_folder", pathlib.Path)  # the model is there
  for path, expected in (
    ("~/missing", f"{home}/missing"),
    ("gs://b/x", "a bucket is named as|a local path"),
    ("", "is empty"),
    ("a\0b", "NUL"),
  ):
    if path == "" and "out" in name:  # a file of it: /a.jsonl
      continue
    with pytest.raises(errors.InputError, match=expected):
      CALLS[name](path)
  assert not list(here.iterdir()) and not list(home.iterdir())


def test_results_of_a_search_go_below_the_home_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "fits.jsonl").write_text("mine\n")
  with pytest.raises(errors.InputError, match="fits.jsonl is not a file of --fits"):
    fits.smallest({}, out="~/fits.jsonl")
  assert pathlib.Path(tmp_path / "fits.jsonl").read_text() == "mine\n"
