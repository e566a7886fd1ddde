"""Conventions of this code that ruff does not check."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent


def test_gradients_are_functions_with_names():
  for path in sorted((ROOT / "glmjax").rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "defvjp":
        assert not any(isinstance(argument, ast.Lambda) for argument in node.args), f"{path}:{node.lineno}"
