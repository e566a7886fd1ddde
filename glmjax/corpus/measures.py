"""What is counted of documents as they stream by, in bounded memory but for a few bytes a document."""

import bisect
import heapq
from typing import Any

import numpy as np

from glmjax.data import duplicates
from glmjax.data import languages
from glmjax.data import personal

_LEAST_LINE = 10  # characters of a line that counts as repeated
_REPEATED, _LEAST_REPEATED = 20, 5  # lines that are shown, and in how many documents they must be
_WIDTH = 100_000  # lines after which rare ones are forgotten
_LONGEST = 5  # lines that are shown
_SHOWN = 80  # characters of a line
_EXAMPLES = 3  # of each kind of personal data, and of duplicates
_LEAST_SAMPLE, _SAMPLE = 40, 400  # characters of a document that is shown as a sample, and those of it that are


def shown(text: str, most: int = _SHOWN) -> str:
  """Returns the beginning of a text with personal data masked: the one way in which text gets into a report."""
  begins = personal.masked(text[: most + 2000])  # masked before it is cut, so that no number is shown by half
  return begins[:most] + ("..." if len(begins) > most else "")


class Places:
  """Where documents are, by their numbers."""

  def __init__(self) -> None:
    self._names: list[str] = []
    self._firsts: list[int] = []

  def begin(self, name: str, first: int) -> None:
    """Notes that documents from the number `first` on are in the file `name`."""
    self._names.append(name)
    self._firsts.append(first)

  def place(self, document: int) -> str:
    """Returns file and number within it, from 1."""
    file = bisect.bisect_right(self._firsts, document) - 1
    return f"{self._names[file]}, document {document - self._firsts[file] + 1}"


class Totals:
  """Documents, bytes and characters, by language."""

  def __init__(self) -> None:
    self._counts = {name: {"documents": 0, "bytes": 0, "characters": 0} for name in languages.LANGUAGES}

  def add(self, language: str, utf8_bytes: int, characters: int) -> None:
    """Counts a document."""
    own = self._counts[language]
    own["documents"] += 1
    own["bytes"] += utf8_bytes
    own["characters"] += characters

  def figures(self) -> dict[str, Any]:
    """Returns what all have together, and each of the "languages" with its "share" of the documents."""
    whole = {key: sum(own[key] for own in self._counts.values()) for key in ("documents", "bytes", "characters")}
    documents = max(whole["documents"], 1)
    return whole | {
      "languages": {name: {**own, "share": own["documents"] / documents} for name, own in self._counts.items()}
    }


class Lengths:
  """How long documents are; 9 bytes each."""

  def __init__(self) -> None:
    self._lengths, self._languages = duplicates.Growing(np.int64), duplicates.Growing(np.uint8)

  def add(self, length: int, language: str) -> None:
    """Counts a document."""
    self._lengths.append(length)
    self._languages.append(languages.LANGUAGES.index(language))

  def figures(self) -> dict[str, Any]:
    """Returns mean, percentiles and most; and for each language how many have 1, 2 to 3, 4 to 7, ... : "histogram"."""
    lengths, kinds = self._lengths.array(), self._languages.array()
    buckets = np.log2(np.maximum(lengths, 1)).astype(np.int64)
    p10, p50, p90 = np.quantile(lengths, (0.1, 0.5, 0.9), method="inverted_cdf").tolist()
    return {
      "mean": float(lengths.mean()),
      "p10": p10,
      "p50": p50,
      "p90": p90,
      "most": int(lengths.max()),
      "histogram": {
        name: np.bincount(buckets[kinds == i], minlength=int(buckets.max()) + 1).tolist()
        for i, name in enumerate(languages.LANGUAGES)
      },
    }


class Lines:
  """The longest lines, and those that are in many documents.

  Counted as Manku and Motwani's lossy counting does (2002): of every 100,000 lines one is what a count may lack.
  """

  def __init__(self) -> None:
    self._longest: list[tuple[int, int, str, str]] = []  # a heap of (characters, -order, place, beginning)
    self._counts: dict[int, list[Any]] = {}  # by hash: documents, windows before the first, what is shown of the line
    self._lines = self._order = 0

  def add(self, document: str, place: str) -> None:
    """Takes in a document's lines."""
    lines = document.split("\n")
    seen: set[int] = set()
    for line in lines:
      if len(self._longest) < _LONGEST or len(line) > self._longest[0][0]:
        self._keep(line, place)
      if len(lines) > 1 and len(line) >= _LEAST_LINE and (key := hash(line.strip())) not in seen:
        seen.add(key)
        self._count(key, line)

  def _keep(self, line: str, place: str) -> None:
    heapq.heappush(self._longest, (len(line), -self._order, place, shown(line)))
    self._order += 1
    if len(self._longest) > _LONGEST:
      heapq.heappop(self._longest)

  def _count(self, key: int, line: str) -> None:
    if (own := self._counts.get(key)) is not None:
      own[0] += 1
    elif len(line.strip()) >= _LEAST_LINE:
      self._counts[key] = [1, self._lines // _WIDTH, shown(line.strip())]
    self._lines += 1
    if self._lines % _WIDTH == 0:
      window = self._lines // _WIDTH
      self._counts = {key: own for key, own in self._counts.items() if own[0] + own[1] > window}

  def figures(self) -> dict[str, Any]:
    """Returns the "longest" lines, and the "repeated" ones with how many "documents" have them, or a few more."""
    often = [(own[0], own[2]) for own in self._counts.values() if own[0] >= _LEAST_REPEATED]
    return {
      "longest": [
        {"characters": characters, "where": place, "begins": begins}
        for characters, _, place, begins in sorted(self._longest, reverse=True)
      ],
      "repeated": [
        {"documents": documents, "line": line}
        for documents, line in sorted(often, key=lambda each: (-each[0], each[1]))[:_REPEATED]
      ],
    }


class Personal:
  """How much personal data there is, of each kind."""

  def __init__(self) -> None:
    self._counts: dict[str, dict[str, Any]] = {
      kind: {"documents": 0, "found": 0, "examples": []} for kind in personal.KINDS
    }

  def add(self, document: str, place: str) -> None:
    """Looks through a document; of what is found the form alone is kept, letters and digits as *."""
    found = personal.find(document)
    for kind in {each.kind for each in found}:
      self._counts[kind]["documents"] += 1
    for each in found:
      own = self._counts[each.kind]
      own["found"] += 1
      if len(own["examples"]) < _EXAMPLES:
        own["examples"].append({"where": place, "form": personal.outline(document[each.start : each.stop])})

  def figures(self) -> dict[str, dict[str, Any]]:
    """Returns for each kind in how many "documents" it was "found" how often, and "examples"."""
    return self._counts


class Duplicates:
  """The sketches of documents: 8 bytes each, and 480 of the first `most` that are compared for being near."""

  def __init__(self, most: int) -> None:
    self._fingerprints = duplicates.Growing(np.uint64)
    self._signatures = duplicates.Growing(np.uint32, duplicates.BYTES // 4)
    self._sizes = duplicates.Growing(np.int64)
    self._most = most

  def begin(self) -> duplicates.Sketch:
    """Returns the sketch of the next document."""
    return duplicates.Sketch(near=len(self._signatures) < self._most)

  def add(self, sketch: duplicates.Sketch, utf8_bytes: int) -> None:
    """Takes in a document's sketch."""
    self._fingerprints.append(np.uint64(sketch.fingerprint()))
    self._sizes.append(utf8_bytes)
    if len(self._signatures) < self._most:
      self._signatures.append(sketch.signature())

  def figures(self, places: Places) -> dict[str, Any]:
    """Returns how many documents repeat one before them, "exact" ones and others that are "near"."""
    exact = duplicates.exact(self._fingerprints.array())
    near, alike = duplicates.near(self._signatures.array())
    near[exact[: len(near)] >= 0] = -1
    sizes = self._sizes.array()
    return {
      "exact": self._described(exact, sizes, places, np.ones(len(exact))),
      "near": {**self._described(near, sizes, places, alike), "threshold": duplicates.THRESHOLD, "compared": len(near)},
    }

  def _described(self, of: np.ndarray, sizes: np.ndarray, places: Places, alike: np.ndarray) -> dict[str, Any]:
    found = np.flatnonzero(of >= 0)
    return {
      "documents": len(found),
      "share": len(found) / max(len(of), 1),
      "bytes": int(sizes[found].sum()),
      "examples": [
        {"document": places.place(i), "of": places.place(int(of[i])), "similarity": round(float(alike[i]), 3)}
        for i in found[:_EXAMPLES].tolist()
      ],
    }


class Samples:
  """The beginning of a document of each language, to be masked as training masks it."""

  def __init__(self) -> None:
    self.texts: dict[str, str] = {}

  def add(self, document: str, language: str) -> None:
    """Keeps a document's beginning where it is the first that is long enough."""
    if language not in self.texts and len(document) >= _LEAST_SAMPLE:
      self.texts[language] = shown(document, _SAMPLE)
