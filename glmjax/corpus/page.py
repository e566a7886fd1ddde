"""report.md of a report on text."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

from glmjax.data import duplicates
from glmjax.evaluate import markdown

_NAMES = {"en": "English", "zh": "Chinese", "other": "other"}
_PERSONAL = {
  "email": "e-mail addresses",
  "phone_cn": "telephone numbers, Chinese",
  "phone_us": "telephone numbers, North American",
  "id_cn": "Chinese identity numbers (checksum fits)",
  "ip": "IP addresses (version 4)",
  "card": "bank cards (Luhn's checksum fits)",
}
_ROWS = 50  # corpora and evaluation files in a table


def render(report: Mapping[str, Any], samples: Mapping[str, str], pictures: Sequence[str]) -> str:
  """Returns the page.

  Args:
    report: what report.json holds.
    samples: described, by the names of their pictures.
    pictures: names of those that there are.
  """
  drawn = {name.removesuffix(".png"): f"![{name.removesuffix('.png')}]({name})" for name in pictures}
  sections = [
    "# Report: text",
    _corpora(report, drawn.get("languages", "")),
    _lengths(report["lengths"], drawn.get("lengths", "")),
    _duplicates(report["duplicates"]),
    _lines(report["lines"]),
    _personal(report["personal"]),
    _words(report.get("words")),
    _overlap(report.get("overlap")),
    _samples(samples, drawn),
  ]
  return "\n\n".join(section for section in sections if section) + "\n"


def _corpora(report: Mapping[str, Any], picture: str) -> str:
  def row(name: str, found: Mapping[str, Any]) -> list[str]:
    shares = [f"{own['share']:.1%}" for own in found["languages"].values()]
    return [name, f"{found['documents']:,}", f"{found['bytes'] / 1e6:,.2f}", f"{found['characters']:,}", *shares]

  rows = [row(markdown.cell(name), found) for name, found in list(report["corpora"].items())[:_ROWS]]
  head = ["", "documents", "MB", "characters", *_NAMES.values()]
  text = markdown.table(head, [*rows, row("**all**", report)])
  said = (
    "Languages are told by script, document by document: Chinese where at least 30 % of the letters are Han "
    "characters, English where at least 70 % are a to z."
  )
  return "\n\n".join(part for part in ("## What there is", text, said, _more(report["corpora"]), picture) if part)


def _lengths(lengths: Mapping[str, Mapping[str, Any]], picture: str) -> str:
  keys = {"mean": "mean", "p10": "10 %", "p50": "half", "p90": "90 %", "most": "longest"}
  rows = [[unit, *(f"{found[key]:,.0f}" for key in keys)] for unit, found in lengths.items()]
  head = ["of a document", *keys.values()]
  said = "So many documents have that length or less: 10 %, half, 90 %."
  return "\n\n".join(part for part in ("## Lengths", markdown.table(head, rows), said, picture) if part)


def _duplicates(found: Mapping[str, Mapping[str, Any]]) -> str:
  exact, near = found["exact"], found["near"]
  rows = [
    [name, f"{own['documents']:,}", f"{own['share']:.2%}", f"{own['bytes'] / 1e6:,.2f}"]
    for name, own in (("exact", exact), ("near", near))
  ]
  text = markdown.table(["repeat a document before them", "documents", "share", "MB"], rows)
  said = (
    f"Exact: the same words and characters, whatever case, blanks and punctuation. Near, of {near['compared']:,} "
    f"documents: Jaccard similarity of {near['threshold']:g} or more of their runs of {duplicates.SHINGLE} words or "
    "Chinese characters, by MinHash."
  )
  examples = [
    f"- {markdown.cell(each['document'])} as {markdown.cell(each['of'])} ({each['similarity']:.2f})"
    for own in (exact, near)
    for each in own["examples"]
  ]
  return "\n\n".join(part for part in ("## Duplicates", text, said, "\n".join(examples)) if part)


def _lines(found: Mapping[str, Any]) -> str:
  longest = markdown.table(
    ["longest lines", "characters", "begins"],
    [
      [markdown.cell(each["where"]), f"{each['characters']:,}", markdown.cell(each["begins"])]
      for each in found["longest"]
    ],
  )
  if not found["repeated"]:
    return f"## Lines\n\n{longest}\n\nNo line is in five documents or more."
  rows = [[markdown.cell(each["line"]), f"{each['documents']:,}"] for each in found["repeated"]]
  return f"## Lines\n\n{longest}\n\n{markdown.table(['lines of many documents', 'documents'], rows)}"


def _personal(found: Mapping[str, Mapping[str, Any]]) -> str:
  rows = [
    [
      _PERSONAL[kind],
      f"{own['documents']:,}",
      f"{own['found']:,}",
      "<br>".join(f"`{each['form']}` {markdown.cell(each['where'])}" for each in own["examples"]),
    ]
    for kind, own in found.items()
  ]
  text = markdown.table(["", "documents", "found", "the first, masked"], rows)
  return f"## Personal data\n\n{text}\n\nFound by their form alone: names and postal addresses are not looked for."


def _words(found: Mapping[str, Any] | None) -> str:
  if found is None:
    return ""
  return (
    f"## Words of a list\n\n{found['documents']:,} documents ({found['share']:.2%}) have a word of "
    f"{markdown.cell(found['list'])}."
  )


def _overlap(found: Mapping[str, Any] | None) -> str:
  if found is None:
    return ""
  rows = [
    [
      markdown.cell(name),
      f"{own['items']:,}",
      f"{own['compared']:,}",
      f"{own['overlapping']:,}",
      "-" if own["share"] is None else f"{own['share']:.2%}",
    ]
    for name, own in list(found["files"].items())[:_ROWS]
  ]
  text = markdown.table(["evaluation set", "items", "compared", "overlapping", "share"], rows)
  said = (
    f"An item overlaps where {found['n']} words or Chinese characters of it in a row are in the text; shorter ones "
    "are not compared."
  )
  return "\n\n".join(part for part in ("## Overlap", text, said, _more(found["files"])) if part)


def _samples(samples: Mapping[str, str], drawn: Mapping[str, str]) -> str:
  if not samples:
    return ""
  parts = ["## Samples", "As blank infilling cuts them: behind `|` what is seen, behind `>` what is predicted."]
  for name, text in samples.items():
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    parts += [f"{fence}text\n{text}\n{fence}", drawn.get(f"sample_{name}", "")]
  return "\n\n".join(part for part in parts if part)


def _more(named: Mapping[str, Any]) -> str:
  return f"{len(named) - _ROWS:,} more are in report.json." if len(named) > _ROWS else ""
