"""The site builds without a warning: every internal link and anchor of the documents and notebooks leads somewhere."""

import html.parser
import pathlib
import subprocess
import sys
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """The built pages, as `make site` has them."""
  folder = tmp_path_factory.mktemp("site")
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  command = makefile.split("\nsite: docs")[1].split("\n\t")[1].split("\n")[0].split()
  assert command[:2] == ["$(BIN)/python", "-m"] and command[-2:] == [".", "build/site"]
  done = subprocess.run(
    [sys.executable, *command[1:-1], str(folder)], cwd=ROOT, check=False, capture_output=True, text=True
  )
  assert (done.returncode, done.stderr) == (0, "")
  return folder


class Page(html.parser.HTMLParser):
  """Where a page's links lead, what it loads, and the places in it that links may name."""

  def __init__(self, file: pathlib.Path):
    super().__init__()
    self.links, self.loads, self.places = [], [], set()
    self.feed(file.read_text(encoding="utf-8"))

  def handle_starttag(self, tag, attrs):
    values = dict(attrs)
    self.places.add(values.get("id"))
    if tag == "a" and "href" in values:
      self.links.append(values["href"])
    self.loads += [values[name] for name in ("src", "srcset") if name in values]
    if tag == "link" and values.get("rel") == "stylesheet":
      self.loads.append(values["href"])


def test_every_document_and_notebook_is_a_page(site):
  documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")]
  names = {str(path.relative_to(ROOT).with_suffix(".html")) for path in documents}
  assert names <= {str(path.relative_to(site)) for path in site.rglob("*.html")}
  assert "docs/index.html" in (site / "index.html").read_text(encoding="utf-8")


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
  pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
  dead = []
  for path, page in pages.items():
    for link in page.links + page.loads:
      parts = urllib.parse.urlsplit(link)
      if parts.scheme:
        dead += [(path.name, link)] if link in page.loads and parts.scheme != "data" else []
        continue
      target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
      there = target.is_file() and (not parts.fragment or target not in pages or parts.fragment in pages[target].places)
      dead += [] if there else [(path.name, link)]
  assert len(pages) > 20 and not dead


def test_notebooks_show_what_is_stored_in_them(site):
  page = Page(site / "notebooks" / "01_blank_infilling.html")
  assert len([source for source in page.loads if source.endswith(".png")]) >= 10
