"""Pictures of a report on text: how much of each language, and how long the documents are."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from glmjax import display
from glmjax import show
from glmjax.data import languages

LANGUAGES, LENGTHS = FILES = ("languages.png", "lengths.png")
_MOST = 20  # corpora in a picture, those with most bytes
_LONGEST = 40  # characters of a corpus's name
_NAMES = {"en": "English", "zh": "Chinese", "other": "other"}


def draw(report: Mapping[str, Any]) -> dict[str, display.Picture]:
  """Draws what `survey` found, by names of files."""
  return {LANGUAGES: _languages(report["corpora"]), LENGTHS: _lengths(report["lengths"])}


def _languages(corpora: Mapping[str, Mapping[str, Any]]) -> display.Picture:
  """Draws the megabytes of each corpus by language."""
  largest = sorted(corpora.items(), key=lambda each: -each[1]["bytes"])[:_MOST]
  sizes = {
    name if len(name) <= _LONGEST else f"...{name[-_LONGEST:]}": {
      _NAMES[language]: own["bytes"] / 1e6 for language, own in found["languages"].items()
    }
    for name, found in largest
  }
  return show.stacked(sizes, "MB of text, by the language of its documents")


def _lengths(lengths: Mapping[str, Mapping[str, Any]]) -> display.Picture:
  """Draws how many documents are how long, in each unit, by language."""
  figure = display.figure(5 * len(lengths), 3)
  panels = figure.subplots(1, len(lengths), squeeze=False)[0]
  for axes, (unit, found) in zip(panels, lengths.items()):
    buckets = len(next(iter(found["histogram"].values())))
    edges = 2.0 ** np.arange(buckets + 1)
    for name, colour, line in zip(languages.LANGUAGES, display.COLOURS, display.LINES):
      if any(counts := found["histogram"][name]):
        axes.stairs(counts, edges, color=colour, linestyle=line, linewidth=1.6, label=_NAMES[name])
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{unit} of a document", color=display.INK)
    axes.set_ylabel("documents", color=display.INK)
    axes.legend(frameon=False, fontsize=8, labelcolor=display.INK)
    display.plain(axes)
  return display.picture(figure)
