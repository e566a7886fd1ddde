"""--adapter of chat and serve: a folder that is always on, or several by name."""

import io
import pathlib
import sys

import pytest
import untrained_adapters
import untrained_run

from glmjax import cli, errors
from glmjax.cli import inference
from glmjax.infer import adapters as adapters_lib


def test_names_and_folders(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert inference.named_adapters(["runs/lora"]) == pathlib.Path("runs/lora")
  for folder in ("./a=b", "runs/rate=1e-3/lora"):
    assert inference.named_adapters([folder]) == pathlib.Path(folder)
  assert inference.named_adapters(["a=~/x", "b=y=z"]) == {"a": tmp_path / "x", "b": pathlib.Path("y=z")}
  assert inference.named_adapters([]) is None
  for given, words in (
    (["a=x", "y"], "--adapter=y has no name, and would always be on"),
    (["a=x", "a=y"], "there are two of the name 'a'"),
    (["a="], "--adapter=a is empty"),
    (["=x"], "'' is no name for one"),
  ):
    with pytest.raises(errors.InputError, match=words):
      adapters_lib.read(inference.named_adapters(given))


def test_a_chat_with_several(tmp_path, monkeypatch, capsys):
  run = untrained_run.write(tmp_path / "run")
  folders = untrained_adapters.write(run, tmp_path)
  lines = "On day\n/adapter\n/adapter mlp\n/clear\nOn day\n/adapter none\n/clear\nOn day\n/adapter nope\n"
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
  flags = [f"--adapter={name}={folders[name]}" for name in ("wide", "mlp")]
  assert cli.main(["chat", f"--checkpoint={run}", "--max_length=40", "--temperature=0", *flags]) == 0
  captured = capsys.readouterr()
  first, second, third = [line for line in captured.out.splitlines() if line][:3]
  assert first == third != second
  assert (
    "(adapters: none (now), wide, mlp)" in captured.err and "no adapter 'nope': there are wide, mlp" in captured.err
  )
