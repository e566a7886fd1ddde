"""What README, CONTRIBUTING and docs/ show works: gin blocks, commands' names, the example of one test."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

from glmjax.cli import commands
from glmjax.config import gin_files

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = {
  str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
  for path in [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
  ]
}
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def gin_blocks():
  """Blocks without a language that bind something; those of the tutorial are files of their own (tutorial_test.py)."""
  for name, text in TEXTS.items():
    if name == "docs/tutorial.md":
      continue
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
      if not language and re.search(r"^[A-Za-z_./]+( = .*|:)$", block, re.MULTILINE):
        yield pytest.param(block, id=f"{name}: {block.splitlines()[-1][:40]}")


@pytest.mark.parametrize("block", list(gin_blocks()))
def test_gin_blocks_are_whole_files(block, tmp_path):
  """Pasted into a file that is given behind a run's, they are taken as they are."""
  file = tmp_path / "pasted.gin"
  file.write_text(block, encoding="utf-8")
  gin_files.check(["runs/quickstart.gin", str(file)], [], commands=commands.targets())


@pytest.mark.parametrize("name", TEXTS)
def test_lines_are_of_120_columns_at_most(name):
  """Tables and code too: a cell that needs more is a sentence, and stands in the text or in a list."""
  assert not [(number, len(line)) for number, line in enumerate(TEXTS[name].splitlines(), 1) if len(line) > 120]


def test_readme_shows_every_command():
  assert not [name for name in commands.COMMANDS if f"glmjax {name}" not in TEXTS["README.md"]]


def test_the_example_of_one_test_names_one():
  file, name = re.search(r"-m pytest (\S+) -k (\w+)", TEXTS["CONTRIBUTING.md"]).groups()
  assert re.search(rf"^def test_\w*{name}", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_the_api_page_is_that_of_the_source():
  spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
  make_api = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(make_api)
  assert make_api.page() == TEXTS["docs/api.md"], "run `make docs`"
  imports = re.findall(r"^`(from glmjax\S* import \w+)`$", TEXTS["docs/api.md"], re.MULTILINE)
  assert len(imports) == len(make_api.PARTS) - 1
  for each in imports:
    exec(each, {})


def test_python_blocks_name_what_there_is():
  """They compile, and what they take of glmjax is there."""
  blocks = [block for text in TEXTS.values() for block in PYTHON.findall(text.partition("<!-- What follows")[0])]
  assert len(blocks) >= 5
  used = set()
  for block in blocks:
    compile(block, "a block", "exec")
    used |= set(re.findall(r"\bglmjax\.(\w+)\(", block))
  code = f"import glmjax\nfor name in {sorted(used)}: assert callable(getattr(glmjax, name))"
  assert used >= {"load", "train", "plan"}
  subprocess.run([sys.executable, "-c", code], check=True)
