"""A page as data: sections of paragraphs, lists, tables, code and pictures, written as Markdown and as HTML.

All text is plain: what a user wrote is shown as it is, and never becomes markup.
"""

import base64
import dataclasses
import html
import re
from collections.abc import Sequence

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the page loads nothing
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|!~$&])")
_LIST = re.compile(r"^([-+]|\d+(?=[.)]))(?=[.)]?(\s|$))")  # that begins a list's entry


@dataclasses.dataclass(frozen=True)
class Paragraph:
  """A sentence or several."""

  text: str


@dataclasses.dataclass(frozen=True)
class Items:
  """A list has an entry for each text."""

  texts: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows under a head; the first column is text, the others are numbers where `numbers` says so."""

  head: Sequence[str]
  rows: Sequence[Sequence[str]]
  numbers: bool = False


@dataclasses.dataclass(frozen=True)
class Code:
  """Lines for a shell."""

  text: str


@dataclasses.dataclass(frozen=True)
class Picture:
  """A PNG, by the name of its file beside the page."""

  file: str
  png: bytes = dataclasses.field(repr=False)
  says: str  # to those who do not see it


Block = Paragraph | Items | Table | Code | Picture


@dataclasses.dataclass(frozen=True)
class Section:
  """Blocks under a heading."""

  title: str
  blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Document:
  """A page has a title, a lead below it, and sections."""

  title: str
  lead: str
  sections: Sequence[Section]

  @property
  def pictures(self) -> list[Picture]:
    """All pictures, in their order."""
    return [block for section in self.sections for block in section.blocks if isinstance(block, Picture)]


def markdown(document: Document) -> str:
  """Returns the page in GitHub's Markdown; pictures by the names of their files."""
  parts = [f"# {_plain(document.title)}", _line(document.lead)]
  for section in document.sections:
    parts += [f"## {_plain(section.title)}", *map(_markdown, section.blocks)]
  return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: Block) -> str:
  match block:
    case Paragraph(text):
      return _line(text)
    case Items(texts):
      return "\n".join(f"- {_line(text)}" for text in texts)
    case Table(head, rows, numbers):
      align = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
      lines = [[_plain(cell) for cell in head], align, *([_plain(cell) for cell in row] for row in rows)]
      return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    case Code(text):
      fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
      return f"{fence}sh\n{text}\n{fence}"
    case Picture(file, _, says):
      return f"![{_plain(says)}]({file})"


def _plain(text: str) -> str:
  """Returns a text of one line that Markdown shows as it is."""
  return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def _line(text: str) -> str:
  """Returns a text that begins no list where it begins a line."""
  return _LIST.sub(lambda found: f"\\{found[1]}" if found[1] in "-+" else f"{found[1]}\\", _plain(text))


def page(document: Document, badges: str = "") -> str:
  """Returns the page as one HTML file that loads nothing; `badges` is HTML below its lead."""
  body = [f"<h1>{_escaped(document.title)}</h1>", f'<p class="lead">{_escaped(document.lead)}</p>', badges]
  for section in document.sections:
    body += ["<section>", f"<h2>{_escaped(section.title)}</h2>", *map(_html, section.blocks), "</section>"]
  head = [
    "<!doctype html>",
    '<html lang="en">',
    "<head>",
    '<meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
    f"<title>{_escaped(document.title)}</title>",
    f"<style>\n{_STYLE}\n</style>",
    "</head>",
  ]
  return "\n".join([*head, "<body>", "<main>", *body, "</main>", "</body>", "</html>", ""])


def _html(block: Block) -> str:
  match block:
    case Paragraph(text):
      return f"<p>{_escaped(text)}</p>"
    case Items(texts):
      return "<ul>" + "".join(f"<li>{_escaped(text)}</li>" for text in texts) + "</ul>"
    case Table(head, rows, numbers):
      kind = ' class="numbers"' if numbers else ""
      cells = "".join(f'<th scope="col">{_escaped(cell)}</th>' for cell in head)
      top = f"<thead><tr>{cells}</tr></thead>" if any(head) else ""
      lines = "".join("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
      return f'<div class="wide"><table{kind}>{top}<tbody>{lines}</tbody></table></div>'
    case Code(text):
      return f"<pre>{_escaped(text)}</pre>"
    case Picture(_, png, says):
      data = base64.b64encode(png).decode()
      return f'<img src="data:image/png;base64,{data}" alt="{_escaped(says)}">'


def _escaped(text: str) -> str:
  return html.escape(text)


_STYLE = """\
:root { color-scheme: light dark; --ink: #1f2328; --faint: #59636e; --line: #d1d9e0; --back: #ffffff; --box: #f6f8fa;
  --good: #1a7f37; --part: #9a6700; --none: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --faint: #9aa4af; --line: #3a424b; --back: #14181d;
  --box: #1c2229; --good: #56d364; --part: #e3b341; --none: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { margin: .6rem 0; } ul { padding-left: 1.3rem; } li { margin: .2rem 0; }
.lead { font-size: 1.1rem; color: var(--faint); }
.badges { display: grid; gap: .5rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.badge { background: var(--box); border: 1px solid var(--line); border-left: 4px solid var(--none);
  padding: .4rem .6rem;
  border-radius: .3rem; font-size: .85rem; line-height: 1.3; }
.badge b { display: block; } .badge.evidenced { border-left-color: var(--good); }
.badge.partial { border-left-color: var(--part); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .93rem; margin: .8rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; } td { overflow-wrap: break-word; }
td:first-child { min-width: 7rem; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: .3rem;
  padding: .7rem .9rem; overflow-x: auto; font: .88rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: .3rem; }"""
