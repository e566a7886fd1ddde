"""Conventions of this code that ruff does not check."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent


def test_gradients_are_functions_with_names():
  for path in sorted((ROOT / "glmjax").rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "defvjp":
        assert not any(isinstance(argument, ast.Lambda) for argument in node.args), f"{path}:{node.lineno}"


def test_docstrings_of_functions_begin_with_a_verb():
  """As "Returns the ids": third person. A property is described as what it is."""
  for folder in ("glmjax", "tasks", "benchmarks"):
    for path in sorted((ROOT / folder).rglob("*.py")):
      for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and not any("property" in ast.dump(d) for d in node.decorator_list):
          first = (ast.get_docstring(node) or "Does").split()[0].rstrip(",.:;")
          assert first.endswith("s") and first[0].isupper(), f"{path}:{node.lineno}: {node.name} begins with {first!r}"
