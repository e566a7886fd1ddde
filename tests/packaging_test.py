"""The wheel holds every module, task and gin file, and works in an empty environment elsewhere."""

import configparser
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import glmjax

ROOT = pathlib.Path(__file__).parent.parent
TREE = ("benchmarks", "docs", "gin", "glmjax", "launch", "notebooks", "tasks", "tests")
FILES = "CHANGELOG.md CONTRIBUTING.md LICENSE MANIFEST.in Makefile README.md pyproject.toml setup.cfg setup.py".split()
FILES.append("requirements-lock.txt")
# With the packages that are here; the jaxlib that pyproject.toml names is the oldest, and any will do.
BUILD = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
  """The folder of an sdist and the wheel that is made of it: the one that `make dist` names, or of this tree."""
  if os.environ.get("GLMJAX_DIST"):
    return pathlib.Path(os.environ["GLMJAX_DIST"])
  folder = tmp_path_factory.mktemp("source")
  for name in TREE:  # a copy, so that no build/ of an earlier state gets into it
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
  for name in FILES:
    shutil.copy(ROOT / name, folder)
  subprocess.run([*BUILD, "--outdir=dist", "."], cwd=folder, check=True, capture_output=True)
  return folder / "dist"


LIBRARY = "glmjax/kernels/cpu/libglmjax_cpu.so"


def wheel_of(dist):
  [path] = dist.glob("*.whl")
  return path


def test_wheel_holds_everything(dist):
  names = set(zipfile.ZipFile(wheel_of(dist)).namelist())
  expected = {f"glmjax/{path.relative_to(ROOT / 'glmjax')}" for path in (ROOT / "glmjax").rglob("*.py")}
  expected |= {f"glmjax/tasks/{path.relative_to(ROOT / 'tasks')}" for path in (ROOT / "tasks").rglob("*.py")}
  expected |= {f"glmjax/tasks/evaluation/{path.name}" for path in (ROOT / "tasks" / "evaluation").iterdir()}
  gin = ROOT / "gin"
  expected |= {f"glmjax/gin_configs/{path.relative_to(gin)}" for path in gin.rglob("*.gin")}
  expected |= {f"glmjax/launch_scripts/{path.name}" for path in (ROOT / "launch").iterdir()} | {"glmjax/py.typed"}
  expected |= {"glmjax/serve/page.html", "glmjax/plan/calculator.html", "glmjax/plan/compiled.json"}
  assert expected <= names, expected - names
  assert not any(name.startswith(("gin/", "tests/", "tasks/", "launch/")) for name in names)
  assert any(name.endswith("LICENSE") for name in names)


def test_wheel_carries_the_library_of_this_machine(dist):
  """One file for all Pythons, where there is a compiler; a wheel with it is not any platform's."""
  path = wheel_of(dist)
  built = LIBRARY in zipfile.ZipFile(path).namelist()
  assert built == bool(shutil.which("g++")), "was it built?"
  assert re.search(r"-py3-none-linux_\w+\.whl$" if built else "-py3-none-any.whl$", path.name)


def test_a_wheel_is_built_without_a_compiler(tmp_path):
  for name in ("glmjax", "gin", "launch", "tasks"):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
  for name in FILES:
    shutil.copy(ROOT / name, tmp_path)
  command = [*BUILD, "--wheel", "--outdir=dist", "."]
  environment = {**os.environ, "CXX": "no-such-compiler"}
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
  assert "for want of a C++ compiler (no-such-compiler)" in done.stdout + done.stderr
  path = wheel_of(tmp_path / "dist")
  assert path.name.endswith("-py3-none-any.whl") and LIBRARY not in zipfile.ZipFile(path).namelist()


def test_sdist_is_the_tree(dist):
  """Tests and documents included, so that whoever packages it can run them."""
  [path] = dist.glob("*.tar.gz")
  names = {name.partition("/")[2] for name in tarfile.open(path).getnames()}
  tree = {path for name in TREE for path in (ROOT / name).rglob("*") if path.suffix not in (".pyc", ".so")}
  expected = {str(path.relative_to(ROOT)) for path in tree if path.is_file()} | set(FILES)
  assert expected <= names, expected - names


def test_the_newest_entry_of_the_changes_is_of_this_version():
  version = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
  assert version == glmjax.__version__ and re.fullmatch(r"\d+\.\d+\.\d+", version)


def test_every_package_is_listed():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  listed = set(setup["options"]["packages"].split())
  found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "glmjax").rglob("__init__.py")}
  assert listed == found | {"glmjax.tasks", "glmjax.gin_configs", "glmjax.launch_scripts"}


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


@pytest.fixture(scope="module", params=os.environ.get("GLMJAX_PYTHONS", sys.executable).split())
def installed(request, dist, tmp_path_factory):
  """An environment of each Python with nothing but the wheel, and what pictures need, from the package index."""
  folder = tmp_path_factory.mktemp("installed")
  subprocess.run([request.param, "-m", "venv", folder / "env"], check=True)
  wheel = f"{wheel_of(dist)}[report]"
  subprocess.run([folder / "env" / "bin" / "python", "-m", "pip", "install", "--quiet", wheel], check=True)
  return folder / "env"


def used(environment, folder, *command):
  """What a command of the environment prints, far from the checkout and its settings."""
  bare = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
  program, *arguments = command
  done = subprocess.run(
    [environment / "bin" / program, *arguments], cwd=folder, env=bare, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, (command, done.stderr)
  return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_brings_its_files(installed, tmp_path):
  code = """
import importlib.util
import glmjax
from glmjax.config import gin_files
assert "site-packages" in glmjax.__file__, glmjax.__file__
for path in gin_files.packaged_folder().rglob("*.gin"):
  assert gin_files.find(str(path.relative_to(gin_files.packaged_folder()))) == path
  print(path.name)
for name in ("tensorflow", "seqio", "torch"):
  assert importlib.util.find_spec(name) is None, name
"""
  assert set(used(installed, tmp_path, "python", "-c", code).split()) == {p.name for p in (ROOT / "gin").rglob("*.gin")}
  assert used(installed, tmp_path, "glmjax", "--version") == f"glmjax {glmjax.__version__}\n"
  assert "jax" in used(installed, tmp_path, "glmjax", "doctor")
  if shutil.which("g++"):
    code = "from glmjax.kernels.cpu import library; print(library.status().words)"
    assert "generic" in used(installed, tmp_path, "python", "-c", code)
  used(installed, tmp_path, "glmjax", "launch", "--out=launch")
  assert {path.name for path in (tmp_path / "launch").iterdir()} == {path.name for path in (ROOT / "launch").iterdir()}
  size = sum(path.stat().st_size for path in installed.rglob("*") if path.is_file())
  assert size < 1e9, size


@pytest.mark.slow
def test_an_installed_wheel_makes_a_model_of_text(installed, tmp_path):
  """The quickstart's path in small, without TensorFlow."""
  shutil.copy(ROOT / "tests" / "fixtures" / "en.txt", tmp_path)
  shutil.copy(ROOT / "tests" / "fixtures" / "zh.jsonl", tmp_path)
  (tmp_path / "mine.gin").write_text("""
include "runs/quickstart.gin"
TEXT_FILES = {"en": "en.txt", "zh": "zh.jsonl"}
TOKENIZER = "tokenizer"
CACHE = "cache"
WORKDIR = "train"
VOCAB_SIZE = 512
TOTAL_SAMPLES = 48
""")
  gin = "--gin_file=mine.gin"
  for command in ("tokenizer", "cache"):
    used(installed, tmp_path, "glmjax", command, gin)
  used(installed, tmp_path, "glmjax", "train", gin, "--gin.schedules.LearningRate.warmup_samples=24")
  used(installed, tmp_path, "glmjax", "export", gin, "--bits=4", "--out=int4")
  said = used(installed, tmp_path, "glmjax", "generate", gin, "--checkpoint=int4", "--prompt=The [MASK] is", "--json")
  assert json.loads(said)
  measured = json.loads(used(installed, tmp_path, "glmjax", "evaluate", gin, "--checkpoint=train", "--json"))
  assert {"en", "zh"} <= measured.keys()


def test_wrong_python_says_so_in_one_line(tmp_path):
  """make names the versions that fit; nothing is created."""
  for name in ("Makefile", "setup.cfg", "setup.py", "pyproject.toml"):
    shutil.copy(ROOT / name, tmp_path)
  old = tmp_path / "python3.9"
  old.write_text("#!/bin/sh\nexit 1\n")  # answers as a Python that is too old
  old.chmod(0o755)
  done = subprocess.run(["make", "install", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode != 0
  assert done.stderr.startswith("this needs Python 3.11, 3.12 or 3.13") and not (tmp_path / ".venv").exists()
