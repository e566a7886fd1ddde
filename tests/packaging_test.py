"""The wheel holds every module, task and gin file, and works in an empty environment elsewhere."""

import configparser
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Built from a copy, so that no build/ of an earlier state gets into it."""
  folder = tmp_path_factory.mktemp("source")
  for name in ("glmjax", "tasks", "gin"):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, folder)
  done = subprocess.run(
    [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  [path] = (folder / "out").glob("*.whl")
  return path


def test_wheel_holds_everything(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  expected = {f"glmjax/{path.relative_to(ROOT / 'glmjax')}" for path in (ROOT / "glmjax").rglob("*.py")}
  expected |= {f"glmjax/tasks/{path.relative_to(ROOT / 'tasks')}" for path in (ROOT / "tasks").rglob("*.py")}
  gin = ROOT / "gin"
  expected |= {f"glmjax/gin_configs/{path.relative_to(gin)}" for path in gin.rglob("*.gin")}
  assert expected <= names, expected - names
  assert not any(name.startswith(("gin/", "tests/", "tasks/")) for name in names)
  assert any(name.endswith("LICENSE") for name in names)


def test_every_package_is_listed():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  listed = set(setup["options"]["packages"].split())
  found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "glmjax").rglob("__init__.py")}
  assert listed == found | {"glmjax.tasks", "glmjax.gin_configs"}


def test_ranges_are_not_pins():
  """Newer Pythons, jax and flax must be able to install."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  requirements = [line for option in setup["options.extras_require"].values() for line in option.split("\n")]
  requirements += setup["options"]["install_requires"].split("\n")
  assert not [line for line in requirements if "==" in line or "<" in line or "~" in line]
  assert setup["options"]["python_requires"] == ">=3.11"


def test_the_lock_file_has_every_package_of_the_tests():
  """make lock writes it; names alone are compared, as pip compares them."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  extras = setup["options.extras_require"]
  required = [setup["options"]["install_requires"], *(extras[name] for name in ("data", "report", "notebooks", "test"))]
  locked = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")
  wanted, found = (
    {re.sub("[-_.]+", "-", name).lower() for name in re.findall(pattern, text, re.M)}
    for pattern, text in ((r"^[\w.-]+", "\n".join(required)), (r"^[\w.-]+(?===)", locked))
  )
  assert wanted - found <= {"setuptools", "glmjax"}, wanted - found  # which pip freeze leaves out


@pytest.mark.slow
def test_wheel_in_an_empty_environment(wheel, tmp_path):
  """Installs the core from the package index, far from the checkout, and finds gin files and tasks."""
  subprocess.run([sys.executable, "-m", "venv", "env"], cwd=tmp_path, check=True)
  python = tmp_path / "env" / "bin" / "python"
  subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], cwd=tmp_path, check=True)
  run = lambda *command: subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: E731
  shown = run(tmp_path / "env" / "bin" / "glmjax", "--help")
  assert shown.returncode == 0 and "generate" in shown.stdout, shown.stderr
  code = """
import importlib.util, pathlib, sys
import glmjax
from glmjax.config import gin_files
assert "site-packages" in glmjax.__file__, glmjax.__file__
for path in gin_files.packaged_folder().rglob("*.gin"):
  assert gin_files.find(str(path.relative_to(gin_files.packaged_folder()))) == path
  print(path.name)
assert importlib.util.find_spec("glmjax.tasks") is not None
import gin
assert gin.parse_config
import glmjax.models.glm
assert not {"tensorflow", "seqio"} & set(sys.modules)
for name in ("tensorflow", "seqio", "torch"):
  assert importlib.util.find_spec(name) is None, name
"""
  done = run(python, "-c", code)
  assert done.returncode == 0, done.stderr
  assert set(done.stdout.split()) == {path.name for path in (ROOT / "gin").rglob("*.gin")}
  size = sum(path.stat().st_size for path in (tmp_path / "env").rglob("*") if path.is_file())
  assert size < 1e9, size


def test_wrong_python_says_so_in_one_line(tmp_path):
  """make names the versions that fit; nothing is created."""
  for name in ("Makefile", "setup.cfg", "pyproject.toml"):
    shutil.copy(ROOT / name, tmp_path)
  old = tmp_path / "python3.9"
  old.write_text("#!/bin/sh\nexit 1\n")  # answers as a Python that is too old
  old.chmod(0o755)
  done = subprocess.run(["make", "install", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode != 0
  assert done.stderr.startswith("this needs Python 3.11, 3.12 or 3.13") and not (tmp_path / ".venv").exists()
