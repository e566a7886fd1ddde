"""Writes the lower part of docs/api.md: signatures, fields and docstrings of what people call, read from the source.

python docs/make_api.py
"""

import ast
import inspect
import pathlib
import re
import textwrap
from collections.abc import Iterator

FOLDER = pathlib.Path(__file__).parent
PAGE = FOLDER / "api.md"
MARK = "<!-- What follows is taken from the source: python docs/make_api.py -->\n"
# heading -> module, and the names in it; "Class.method" for a method
PARTS = {
  "glmjax": ("api", "load train Training Training.metrics Training.plot run plan Plan Plan.fits Plan.plot"),
  "A loaded model": (
    "infer/engine",
    "Engine Engine.adapters Engine.generate Engine.fill Engine.chat Engine.score Engine.score_choices",
  ),
  "What it answers": ("infer/engine", "Generation"),
  "Scores": ("infer/score", "Score Score.total Score.count Choices Choices.best"),
  "How tokens are drawn": ("infer/sampling", "Sampling"),
  "Beam search": ("infer/beam", "BeamSearch"),
  "A conversation": ("infer/chat", "Session Session.__init__ Session.ask Session.use Session.clear Round"),
  "Memory by arithmetic": ("plan/memory", "Memory Memory.total Memory.plot decoding training smallest"),
  "What answering takes, and on which GPUs": (
    "plan/footprint",
    "footprint Footprint Footprint.recommended CardSet CardSet.peak_bytes CardSet.fits",
  ),
  "Pictures of rows": ("show", "tokens row attention lengths scores heldout stacked shards timeline"),
  "A step on devices that are here": ("plan/here", "step Step Step.sent Exchange"),
  "A pipeline's schedule": ("train/pipeline/timeline", "of Turn"),
  "Pictures and tables": ("display", "Picture Picture.save Figures figure plain grey_picture"),
}


def page() -> str:
  """Returns the page as it should be: its head as it is, the rest anew."""
  head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
  lines = [line for heading, (module, names) in PARTS.items() for line in _part(heading, module, names.split())]
  return head + MARK + "\n" + "\n".join(lines)


def _part(heading: str, module: str, names: list[str]) -> Iterator[str]:
  source = (FOLDER.parent / "glmjax" / f"{module}.py").read_text(encoding="utf-8")
  yield f"## {heading}\n"
  if heading != "glmjax":
    package, _, name = f"glmjax/{module}".replace("/", ".").rpartition(".")
    yield f"`from {package} import {name}`\n"
  for name in names:
    node = _find(ast.parse(source), name.split("."))
    yield f"### `{name}`\n"
    yield f"```python\n{_declared(source.splitlines(), node)}\n```\n"
    if docstring := ast.get_docstring(node, clean=False):
      yield _markdown(inspect.cleandoc(docstring))


def _find(node: ast.AST, names: list[str]) -> ast.FunctionDef | ast.ClassDef:
  for name in names:
    node = next(each for each in node.body if getattr(each, "name", None) == name)
  return node


def _declared(lines: list[str], node: ast.FunctionDef | ast.ClassDef) -> str:
  """Returns the source of a function's head, or of a class's with its fields, comments included."""
  first = min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1
  fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
  if isinstance(node, ast.FunctionDef) or not fields:
    shown = lines[first : node.body[0].lineno - 1]
  else:
    shown = lines[first : node.lineno] + lines[fields[0].lineno - 1 : fields[-1].end_lineno]
  return textwrap.dedent("\n".join(shown)).rstrip()


def _markdown(docstring: str) -> str:
  """Returns a docstring in Markdown: what stands below "Args:" and the like becomes a list."""
  out = []
  for block in docstring.split("\n\n"):
    head, _, items = block.partition("\n")
    if re.fullmatch(r"(Args|Raises|Returns):", head):
      out.append(f"{ {'Args:': 'Arguments:'}.get(head, head) }\n")
      out += [_item(item) for item in re.split(r"\n(?=  \S)", "\n" + items)[1:]]
      out.append("")
    else:
      out.append(f"{block}\n")
  return "\n".join(out)


def _item(text: str) -> str:
  name, _, rest = " ".join(text.split()).partition(": ")
  return textwrap.fill(
    f"- `{name}`: {rest}", 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
  )


if __name__ == "__main__":
  PAGE.write_text(page(), encoding="utf-8")
