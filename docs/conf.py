"""How Sphinx makes the site: `make site`. Pages are plain Markdown, whose links hold on GitHub too.

The source folder is the repository's root, so that README, docs/ and notebooks/ find each other by the same paths.
"""

import pathlib

from sphinx.application import Sphinx

project = "glmjax"
copyright = "the authors of glmjax"
extensions = ["myst_nb"]
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "notebooks/*.ipynb"]
root_doc = "docs/index"

html_theme = "furo"
html_title = "glmjax"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
highlight_language = "none"  # blocks without a language are gin files and what programs print

myst_heading_anchors = 4  # as GitHub has them, so that links to a heading are checked
nb_execution_mode = "off"  # what is stored in notebooks is shown; `make notebooks` makes it

# What stands beside the pages. On GitHub the start page's own links do.
_CONTENTS = {
  "Begin": ["/README", "tutorial", "/notebooks/*"],
  "Use": ["chat", "serving", "api", "import", "evaluation", "evaluation_tasks", "cards"],
  "Train": ["data", "cache", "finetuning", "recipe", "scaling", "launch", "storage", "reliability", "stability"],
  "Hardware": ["hardware", "gpu", "tpu", "kernels"],
  "Develop": ["architecture", "sources", "/CONTRIBUTING", "/CHANGELOG"],
}
_MOVED = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=docs/index.html">\n'


def _add_contents(app: Sphinx, name: str, source: list[str]) -> None:
  """Puts the tables of contents behind the start page's text."""
  if name == root_doc:
    for caption, pages in _CONTENTS.items():
      source[0] += "\n".join(["\n```{toctree}", ":hidden:", ":glob:", f":caption: {caption}", "", *pages, "```\n"])


def _write_first_page(app: Sphinx, error: Exception | None) -> None:
  """Sends who opens the site's folder to the start page."""
  if error is None:
    pathlib.Path(app.outdir, "index.html").write_text(_MOVED, encoding="utf-8")


def setup(app: Sphinx) -> None:
  """Called by Sphinx."""
  app.connect("source-read", _add_contents)
  app.connect("build-finished", _write_first_page)
