"""Commands that README, CONTRIBUTING, docs/, notebooks, gin files and the Makefile tell people to type.

Those of glmjax are parsed by its own parser, gin files and bindings with them; make's targets, scripts, files and
extras exist; launch scripts are run dry; what is left is at least shell.
"""

import configparser
import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess

import pytest

from glmjax import cli
from glmjax.cli import commands
from glmjax.cli import run as run_lib

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TYPED = re.compile(
  r"(?:\./|\S*/)?(?:glmjax|make|pip|python3?|pytest|sbatch|srun|sky|mpirun|git|docker)(?![\w.:])|launch/\S"
)
# Programs of others, of which nothing is looked at; `.` and `cd` are the shell's.
OTHERS = {
  "curl",
  "git",
  "gcloud",
  "apt-get",
  "dpkg",
  "echo",
  "jq",
  "seqio_cache_tasks",
  "lm_eval",
  ".",
  "cd",
  "mkdir",
  "cat",
  "printf",
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
EXTRAS = configparser.ConfigParser()
EXTRAS.read(ROOT / "setup.cfg", encoding="utf-8")


def pages():
  """(name, text in Markdown) of documents and of the notebooks' texts."""
  for path in PAGES:
    yield path.name, path.read_text(encoding="utf-8")
  for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    yield path.name, "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def fenced(text: str, language: str) -> list[str]:
  return [
    block for name, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if name == language
  ]


def scripts():
  """(where, text) of everything in a shell's language."""
  made = subprocess.run(["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
  commands_made = re.findall(r"^\S*/(glmjax .*)", made, re.MULTILINE)
  assert len(commands_made) > 10, made
  for command in commands_made:
    yield "Makefile", command
  for path in sorted((ROOT / "gin").rglob("*.gin")):
    header = re.sub(r"^#", "", path.read_text(encoding="utf-8").partition("\nfrom ")[0], flags=re.MULTILINE)
    for command in re.findall(r"^ +(glmjax (?:.*\\\n)*.*)", header, re.MULTILINE):
      yield path.name, command
  for name, text in pages():
    for block in fenced(text, "sh"):
      yield name, block
    for block in fenced(text, ""):
      for line in re.findall(r"^\$ (.*)", block, re.MULTILINE):
        yield name, line
  for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
      if cell["cell_type"] == "code":
        for line in re.findall(r"^[!%](?:pip|\S*glmjax) .*", "".join(cell["source"]), re.MULTILINE):
          yield path.name, line[1:]


def inline():
  """(where, command) of what is written within sentences, in one piece, lines joined."""
  for name, text in pages():
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)):
      words = code.split()
      while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
      if len(words) > 1 and TYPED.match(words[0]):
        yield name, " ".join(code.split())


def simple(script: str):
  """(settings in front, words) of each command of a script; redirections, loops and here-documents left out."""
  script = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", script.replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
  for line in script.splitlines():
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    command, skipped = [], False
    for word in [*words, ";"]:
      if skipped:
        skipped = False
      elif word in ("<", ">", ">>", ">&"):
        skipped = True
      elif not set(word) <= set(";|&"):
        command.append(word)
      elif command:
        settings = {}
        while command and command[0] in ("do", "nice"):
          command.pop(0)
        while command and re.fullmatch(r"[A-Za-z_]+=.*", command[0]):
          name, _, settings[name] = command.pop(0).partition("=")
        if command and command[0] not in ("for", "done"):
          yield settings, command
        command = []


def cases(found):
  return [pytest.param(text, id=f"{name}: {text.strip()[:60]}") for name, text in dict.fromkeys(found)]


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A folder with the files that the pages have one write, and a glmjax that parses and then does nothing."""
  readme, tutorial = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/tutorial.md"))
  name, text = re.search(r"gin file, say `(\S+)`:\n\n```\n(.*?)```", readme, re.DOTALL).groups()
  (tmp_path / name).write_text(text, encoding="utf-8")
  (tmp_path / "float32.gin").write_text('include "runs/quickstart.gin"\nDTYPE = "float32"\n', encoding="utf-8")
  stability = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
  for block in [*fenced(tutorial, ""), *fenced(stability, "")]:
    (tmp_path / block.split()[1]).write_text(block, encoding="utf-8")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(run_lib.gin_files, "parse", run_lib.gin_files.check)
  monkeypatch.setattr(commands.plans, "_shipped", run_lib.gin_files.find)  # which parses
  monkeypatch.setattr(run_lib.hosts, "_join", lambda options: None)
  monkeypatch.setattr(run_lib, "call", lambda command, given: {"problem": None, "problems": [], "failed": {}})
  monkeypatch.setattr(commands.inputs, "_lines", lambda file, name: [(1, '{"prompt": "a", "text": "a"}')])
  monkeypatch.setattr(run_lib, "_print_result", lambda *arguments: None)
  return tmp_path


def check_glmjax(words: list[str], settings: dict[str, str]) -> None:
  """Flags, gin files, macros and parameters; only flags where values are left to the reader, or not given."""
  arguments = [word for word in words if not word.startswith("--stages")]
  named = all(re.fullmatch(r"--[a-z_]+", word) for word in arguments[1:])  # as in "`glmjax plan --search` ranks ..."
  if len(arguments) == 1:
    assert arguments[0] in (*commands.COMMANDS, "--help", "--version")
  elif named or any("..." in word or "NAME" in word for word in arguments):
    run_lib._parse_flags([word for word in arguments if word != "..." and not word.startswith("--gin.")])
  else:
    assert cli.main(arguments) == 0


def check_make(words: list[str], settings: dict[str, str]) -> None:
  for word in words:
    name, variable, _ = word.partition("=")
    assert re.search(rf"^{name} [:?]?= " if variable else rf"^{name}:", MAKEFILE, re.MULTILINE), word


def check_pip(words: list[str], settings: dict[str, str]) -> None:
  assert words[0] == "install"
  for word in words[1:]:
    if extras := re.fullmatch(r"\.\[(.*)\]", word):
      assert set(extras[1].split(",")) <= set(EXTRAS["options.extras_require"]), word


def check_pytest(words: list[str], settings: dict[str, str]) -> None:
  for word in words:
    assert not word.startswith("tests/") or (ROOT / word).exists(), word


def check_python(words: list[str], settings: dict[str, str]) -> None:
  if words[0] == "-m":
    assert importlib.util.find_spec(words[1]), words[1]
    checks = {"pytest": check_pytest, "glmjax": check_glmjax, "pip": check_pip}
    checks.get(words[1], lambda *unused: None)(words[2:], settings)
  elif words[0] != "-":
    assert (ROOT / words[0]).exists(), words[0]


def check_script(words: list[str], settings: dict[str, str]) -> None:
  """A launch script, dry; its arguments are those of the command that it starts."""
  environment = {"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/"), **settings, "DRY_RUN": "1"}
  done = subprocess.run(["bash", ROOT / words[0], *words[1:]], env=environment, capture_output=True, text=True)
  assert done.returncode == 0 and "+ " in done.stdout, done.stderr
  check_glmjax([settings.get("COMMAND", "train"), *words[1:]], settings)


def check_behind(words: list[str], settings: dict[str, str]) -> None:
  """Of a program that starts another: the other."""
  first = next(i for i, word in enumerate(words) if word == "glmjax" or word.startswith("launch/"))
  check(words[first:], settings)


def check_sky(words: list[str], settings: dict[str, str]) -> None:
  assert [word for word in words if word.endswith(".yaml") and (ROOT / word).is_file()]
  for word in words:
    if word.startswith("TRAIN=") and word != "TRAIN=...":
      check_glmjax(["train", *shlex.split(word.removeprefix("TRAIN="))], settings)


CHECKS = {
  "glmjax": check_glmjax,
  "make": check_make,
  "pip": check_pip,
  "pytest": check_pytest,
  "python": check_python,
  "python3": check_python,
  "sbatch": check_behind,
  "srun": check_behind,
  "mpirun": check_behind,
  "sky": check_sky,
}


def check(words: list[str], settings: dict[str, str]) -> None:
  name = pathlib.Path(words[0]).name if words[0] != "." else "."
  if words[0].startswith("launch/"):
    check_script(words, settings)
  elif name not in OTHERS:
    CHECKS[name](words[1:], settings)


@pytest.mark.parametrize("script", cases(scripts()))
def test_scripts(script, place):
  done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")
  for settings, words in simple(script):
    check(words, settings)


@pytest.mark.parametrize("command", cases(inline()))
def test_commands_within_sentences(command, place):
  for settings, words in simple(command):
    check(words, settings)


def test_blocks_of_commands_say_so():
  """A block without a language is a gin file, or what a program prints."""
  wrong = [(name, block.splitlines()[0]) for name, text in pages() for block in fenced(text, "") if TYPED.match(block)]
  assert not wrong


def test_what_is_wrong_is_found(place, capsys):
  """The checks see through prompts, continued lines, settings, pipes and loops."""
  script = (
    "A=1 glmjax generate \\\n  --prompt='a | b' | glmjax score --file=- > out  # glmjax no\nfor x in *; do make x; done"
  )
  assert list(simple(script)) == [
    ({"A": "1"}, ["glmjax", "generate", "--prompt=a | b"]),
    ({}, ["glmjax", "score", "--file=-"]),
    ({}, ["make", "x"]),
  ]
  for wrong in (
    "make nothing",
    "pip install '.[nothing]'",
    "python benchmarks/nothing.py",
    "glmjax trian",
    "glmjax train --gin_file=runs/nothing.gin",
    "glmjax train --gin_file=runs/quickstart.gin --gin.BATCH=3",
    "glmjax train --gin_file=runs/quickstart.gin --work_dir=a",
    "sbatch launch/slurm.sbatch --gin_file=runs/nothing.gin",
    "nothing --at=all",
  ):
    with pytest.raises((AssertionError, KeyError)):
      for settings, words in simple(wrong):
        check(words, settings)
