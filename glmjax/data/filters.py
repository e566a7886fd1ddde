"""What may be done with the documents of a corpus before they are tokenized: some left out, some changed.

A filter judges a document by itself (`Length`, `Language`, `Words`), changes it (`PersonalData`), or leaves out what
another document has said (`ExactDuplicates`, `NearDuplicates`), for which all are looked through first (`filtering`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import numpy as np

from glmjax import errors
from glmjax import ranges
from glmjax.data import duplicates
from glmjax.data import languages
from glmjax.data import personal
from glmjax.data import units
from glmjax.data import word_list
from glmjax.io import paths


@dataclasses.dataclass(frozen=True)
class Length:
  """Leaves out documents of fewer characters than `least` and, where there is a `most`, of more."""

  least: int = 1
  most: int | None = None

  def __post_init__(self) -> None:
    ranges.whole("Length.least", self.least, 1)
    if self.most is not None:
      ranges.whole("Length.most", self.most, self.least)

  def settings(self) -> Mapping[str, Any]:
    """Returns what a manifest has of it."""
    return {"least": self.least, "most": self.most}

  def keeps(self, document: str) -> bool:
    """Tells whether a document stays."""
    return len(document) >= self.least and (self.most is None or len(document) <= self.most)


@dataclasses.dataclass(frozen=True)
class Language:
  """Leaves out documents that are in another language than those of `keep`: "en", "zh" or "other", as `languages`."""

  keep: Sequence[str]

  def __post_init__(self) -> None:
    for name in ranges.several("Language.keep", self.keep):
      ranges.choice("Language.keep", name, languages.LANGUAGES)

  def settings(self) -> Mapping[str, Any]:
    """Returns what a manifest has of it."""
    return {"keep": sorted(self.keep)}

  def keeps(self, document: str) -> bool:
    """Tells whether a document stays."""
    return languages.of_text(document) in self.keep


@dataclasses.dataclass(frozen=True)
class Words:
  """Leaves out documents that hold an entry of a list, a file of one a line (`word_list`)."""

  path: paths.Named

  @functools.cached_property
  def _list(self) -> word_list.Words:
    return word_list.Words(self.path)

  def settings(self) -> Mapping[str, Any]:
    """Returns what a manifest has of it: the list's name, and a hash of its entries."""
    return {"list": self._list.path.name, "entries": self._list.entries, "hash": self._list.fingerprint}

  def keeps(self, document: str) -> bool:
    """Tells whether a document stays."""
    return not any(self._list.are_in(block) for block in units.blocks(document, self._list.overlap))


@dataclasses.dataclass(frozen=True)
class PersonalData:
  """Writes <email>, <phone_cn> and so on in the place of what `personal` finds of some kinds."""

  kinds: Sequence[str] = personal.KINDS

  def __post_init__(self) -> None:
    for kind in ranges.several("PersonalData.kinds", self.kinds):
      ranges.choice("PersonalData.kinds", kind, personal.KINDS)

  def settings(self) -> Mapping[str, Any]:
    """Returns what a manifest has of it."""
    return {"kinds": sorted(self.kinds)}

  def changed(self, document: str) -> str:
    """Returns a document as it goes on."""
    return personal.masked(document, self.kinds)


@dataclasses.dataclass(frozen=True)
class ExactDuplicates:
  """Leaves out documents of the same words and characters as one that stays, whatever case, blanks and punctuation."""

  def settings(self) -> Mapping[str, Any]:
    """Returns what a manifest has of it."""
    return {}

  def begin(self) -> "Sketches":
    """Returns what documents are put into."""
    return Sketches(None)


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
  """Leaves out documents that are nearly one that stays: of a Jaccard similarity of `threshold` (`duplicates`).

  Of similar documents in a row, each like the next, the first stays. Takes 488 bytes a document.
  """

  threshold: float = duplicates.THRESHOLD

  def __post_init__(self) -> None:
    ranges.number("NearDuplicates.threshold", self.threshold, 0.5, 1)

  def settings(self) -> Mapping[str, Any]:
    """Returns what a manifest has of it."""
    return {"threshold": self.threshold, "shingle": duplicates.SHINGLE}

  def begin(self) -> "Sketches":
    """Returns what documents are put into."""
    return Sketches(self.threshold)


class Sketches:
  """Sketches of the documents that come so far, by their numbers."""

  def __init__(self, threshold: float | None) -> None:
    """Begins; a `threshold` is that of near duplicates, None: exact ones alone."""
    self._threshold = threshold
    self._numbers = duplicates.Growing(np.int64)
    if threshold is None:
      self._rows = duplicates.Growing(np.uint64)
    else:
      self._rows = duplicates.Growing(np.uint32, duplicates.BYTES // 4)

  def add(self, number: int, document: str) -> None:
    """Takes in the document of that number."""
    sketch = duplicates.sketch(document, near=self._threshold is not None)
    self._numbers.append(number)
    self._rows.append(np.uint64(sketch.fingerprint()) if self._threshold is None else sketch.signature())

  def repeated(self, alive_D: np.ndarray, held_out_D: np.ndarray) -> np.ndarray:
    """Returns the numbers of documents that repeat one which stays, among those alive: held-out ones come first, so
    that what is held out is not trained on.
    """
    left = np.flatnonzero(alive_D[self._numbers.array()])
    numbers = self._numbers.array()[left]
    order = np.argsort(~held_out_D[numbers], kind="stable")
    rows = self._rows.array()[left[order]]
    if self._threshold is None:
      of = duplicates.exact(rows)
    else:
      of, _ = duplicates.near(rows, self._threshold)
    return numbers[order][of >= 0]


Filter = Length | Language | Words | PersonalData | ExactDuplicates | NearDuplicates
SINGLE = (Length, Language, Words, PersonalData)  # those that need not know of other documents


def described(filters: Sequence[Filter]) -> list[dict[str, Any]]:
  """Returns names and settings of filters, as plain values."""
  return [{"name": type(each).__name__, "settings": dict(each.settings())} for each in filters]


def check(filters: object, single: bool = False) -> None:
  """Raises InputError where that is no list of filters; `single`: of those that need not know of other documents."""
  for each in ranges.several("filters", filters):
    if not isinstance(each, Filter):
      raise errors.InputError(
        f"filters: {str(each)[:60]} is none: give a list as [filters.Length(...)], in a gin file [@filters.Length()]"
      )
    if single and not isinstance(each, SINGLE):
      raise errors.InputError(
        f"filters: {type(each).__name__} must see all documents first: give it to mixtures.pretraining.filters"
      )
