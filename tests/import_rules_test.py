"""Who may import whom, as docs/architecture.md has it, and what importing each part must not load."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LM_EVAL = "glmjax.harness.lm_eval"  # for processes of lm_eval, which is an environment's own matter
SEQIO_HALF = ("glmjax.data.seqio_tasks", "glmjax.data.feature_converter")  # of data; the rest is its numpy half

CLI = ("cli", "__main__")  # its modules
# What only some parts may import.
THIRD_PARTY = {
  "gin": ("config",),
  "seqio": ("tasks", "data"),
  "tensorflow": ("tasks", "data"),
  "tensorflow_text": ("tasks", "data"),
  "jax": (
    "target",
    "kernels",
    "kernels.cpu",
    "quantize",
    "parallel",
    "models",
    "train",
    "checkpoint",
    "infer",
    "evaluate",
    "study",
    "plan",
    "doctor",
    "programs",
  ),
  "flax": ("parallel", "models"),
  "optax": ("train",),
  "orbax": ("checkpoint",),
  "sentencepiece": ("tokenizer",),
  "torch": (),
}


def table():
  """part -> the parts that docs/architecture.md lets it import (None: all); a part is the longest prefix of a name."""
  rows = {}
  text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Contracts")[0]
  for parts, allowed in re.findall(r"^- (`.*?): .*?\*May\s+import\*\s(.*?)\.$", text, re.DOTALL | re.MULTILINE):
    parts, allowed = (re.sub(r"\(.*?\)|\s", "", cell) for cell in (parts, allowed))
    for part in parts.split(","):
      rows[part.strip("`/").replace("/", ".")] = None if "everything" in allowed else allowed.split(",")
  return {part: None if row is None else {*row, "ranges"} - {"nothing"} for part, row in rows.items()}


ALLOWED = table()


def modules():
  """(full name, path) of every module of the package."""
  for folder, package in ((ROOT / "glmjax", "glmjax"), (ROOT / "tasks", "glmjax.tasks")):
    for path in sorted(folder.rglob("*.py")):
      parts = path.relative_to(folder).with_suffix("").parts
      yield ".".join([package, *parts]).removesuffix(".__init__"), path


MODULES = dict(modules())


def part_of(module):
  """The part of the table that a module belongs to; None for the bare package."""
  name = module.removeprefix("glmjax").removeprefix(".")
  if name.split(".")[0] in CLI:
    return "cli"
  prefixes = [part for part in ALLOWED if name == part or name.startswith(f"{part}.")]
  return max(prefixes, key=len, default=name or None)


def imports(module, path):
  """Full names that a module's import statements name, those inside functions too."""
  package = module if path.name == "__init__.py" else module.rpartition(".")[0]
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])])
      for alias in node.names:
        whole = f"{base}.{alias.name}"
        yield whole if whole in MODULES or not base.startswith("glmjax") else base


def is_allowed(module, imported):
  """Whether one import edge agrees with the tables."""
  part, top = part_of(module), imported.split(".")[0]
  if top != "glmjax":
    return top not in THIRD_PARTY or part in THIRD_PARTY[top]
  target = part_of(imported)
  if part is None:  # the package itself
    return target in ("api", "errors", "show")
  return target in (None, part) or ALLOWED[part] is None or target in ALLOWED[part]


@pytest.mark.parametrize("module", MODULES)
def test_imports_agree_with_the_table(module):
  wrong = [imported for imported in imports(module, MODULES[module]) if not is_allowed(module, imported)]
  assert not wrong, f"{module} may not import {', '.join(wrong)} (docs/architecture.md)"


def test_rules_tell_right_from_wrong():
  assert is_allowed("glmjax.models.glm", "glmjax.quantize.qarray") and is_allowed(
    "glmjax.checkpoint.x", "glmjax.models.config"
  )
  for module, imported in (
    ("glmjax.models.glm", "glmjax.train.loop"),
    ("glmjax.checkpoint.x", "glmjax.train.state"),
    ("glmjax.quantize.qarray", "glmjax.models.glm"),
    ("glmjax.data.loader", "jax"),
    ("glmjax.train.loop", "gin"),
    ("glmjax.train.loop", "flax.linen"),
    ("glmjax.parallel.mesh", "glmjax.models.config"),
    ("glmjax.evaluate.a", "glmjax.tasks.b"),
    ("glmjax", "glmjax.train.loop"),
    ("glmjax.train.loop", "glmjax.api"),
  ):
    assert not is_allowed(module, imported), (module, imported)


def test_every_part_is_in_the_architecture():
  assert {part_of(module) for module in MODULES} - {None} == set(ALLOWED)


def test_the_table_lists_what_there_is_and_what_is_used():
  """No row names an unknown part or package, and none allows more than the part imports."""
  used = {part: {"ranges"} for part in ALLOWED}
  for module, path in MODULES.items():
    for imported in imports(module, path):
      top = imported.split(".")[0]
      used.get(part_of(module), set()).add(part_of(imported) if top == "glmjax" else top)
  for part, allowed in ALLOWED.items():
    assert allowed is None or allowed <= {*ALLOWED, *THIRD_PARTY}
    assert allowed is None or allowed <= used[part], (part, allowed - used[part])


def test_only_the_seqio_half_of_data_imports_seqio():
  heavy = {"seqio", "tensorflow", "tensorflow_text"}
  found = [
    module
    for module, path in MODULES.items()
    if part_of(module) == "data" and heavy & {name.split(".")[0] for name in imports(module, path)}
  ]
  assert set(found) <= set(SEQIO_HALF)


def loads(names, forbidden):
  """Imports the modules one after another in a new process; which of them loaded what is forbidden."""
  code = (
    f"import importlib, sys\nfor name in {names!r}:\n"
    f"  importlib.import_module(name)\n"
    f"  found = [m for m in {forbidden!r} if m in sys.modules]\n"
    f"  if found: sys.exit(f'{{name}} loads {{found}}')\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_library_loads_neither_tensorflow_nor_seqio():
  names = [
    name
    for name in MODULES
    if part_of(name) not in ("api", "cli", "config", "tasks", None) and name not in (*SEQIO_HALF, LM_EVAL)
  ]
  assert not loads(names, ["tensorflow", "seqio", "gin", "torch", "glmjax.tasks"])


def test_data_and_tokenizer_load_without_jax():
  names = [
    name
    for name in MODULES
    if part_of(name) in ("errors", "tokens", "tokenizer", "models.config", "data")
    and name not in SEQIO_HALF
    and name != "glmjax.models"
  ]
  assert not loads(names, ["jax", "tensorflow", "seqio", "gin"])


def test_command_line_loads_nothing_heavy():
  names = [name for name in MODULES if part_of(name) in ("api", "cli", "config", None) and name != "glmjax.__main__"]
  assert not loads(names, ["jax", "numpy", "tensorflow", "seqio", "sentencepiece"])


def test_gin_folder_does_not_shadow_gin_config():
  assert not (ROOT / "gin" / "__init__.py").exists()
  done = subprocess.run(
    [sys.executable, "-c", "import gin; gin.parse_config"], cwd=ROOT, capture_output=True, check=False
  )
  assert done.returncode == 0, done.stderr


def test_importlib_mode_and_strict_warnings():
  """What the tests rely on: no __init__.py in tests, warnings are errors."""
  options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
  assert "--import-mode=importlib" in options["addopts"] and options["filterwarnings"][0] == "error"
  assert not list((ROOT / "tests").rglob("__init__.py"))
