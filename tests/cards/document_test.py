"""Pages: what a user wrote is shown as it is, whatever it looks like."""

import html.parser

import pytest

from glmjax.cards import document

HOSTILE = [
  "<script>alert(1)</script>",
  "a | b | c",
  "# no heading",
  "![x](http://example.org/x.png)",
  "two\nlines",
  "`code` *stars* _under_ ~x~ $m$",
  "\"quotes\" & 'more'",
  "&lt;b&gt; &copy;",
  "- [ ] done",
  "1. first",
]


class _Texts(html.parser.HTMLParser):
  def __init__(self) -> None:
    super().__init__()
    self.tags, self.texts = [], []

  def handle_starttag(self, tag: str, attrs: list) -> None:
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data: str) -> None:
    self.texts.append(data)


def page_of(text: str) -> document.Document:
  blocks = (document.Paragraph(text), document.Items([text]), document.Table((text, text), [(text, text)]))
  code = document.Code(text)
  return document.Document(
    text, text, [document.Section(text, [*blocks, code, document.Picture("a.png", b"png", text)])]
  )


@pytest.mark.parametrize("text", HOSTILE)
def test_html_has_no_markup_of_users(text: str) -> None:
  plain, hostile = _Texts(), _Texts()
  plain.feed(document.page(page_of("x")))
  hostile.feed(document.page(page_of(text)))
  assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
  assert hostile.texts.count(text) == plain.texts.count("x")


def test_html_loads_nothing() -> None:
  found = _Texts()
  found.feed(document.page(page_of("x")))
  addresses = [value for _, attrs in found.tags for name, value in attrs.items() if name in ("src", "href")]
  assert addresses and all(address.startswith("data:") for address in addresses)


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_keeps_its_lines_and_columns(text: str) -> None:
  plain, hostile = (document.markdown(page_of(each)).splitlines() for each in ("x", text))
  assert len(hostile) == len(plain) + text.count("\n")  # of the code alone
  rows = [line for line in hostile if line.startswith("| ")]
  assert len(rows) == 3 and all(line.replace(r"\|", "").count("|") == 3 for line in rows)
  assert not any("<script" in line.replace(r"\<", "") for line in hostile if line != text)


def test_code_keeps_fences_that_are_in_it() -> None:
  written = document.markdown(page_of("```\nrm\n```"))
  assert "````sh\n```\nrm\n```\n````" in written


@pytest.mark.parametrize(
  "text,written",
  [
    ("&lt;", r"\&lt;"),
    ("1. a", r"1\. a"),
    ("- a", r"\- a"),
    ("2026", "2026"),
    ("-1.5 a", "-1.5 a"),
    ("1.5 a", "1.5 a"),
    ("-", r"\-"),
  ],
)
def test_markdown_is_escaped(text: str, written: str) -> None:
  assert document.markdown(document.Document("t", text, [])).splitlines()[2] == written
