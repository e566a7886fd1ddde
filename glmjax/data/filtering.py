"""Which documents of a task's files its filters leave, found out by reading all of them once.

Whether a document repeats another is known when all have been seen. So the files are read twice: here, where the
outcome is a bit for each document and, for the manifest, what every filter took in and let through; and where they are
tokenized. In between are 8 bytes a document and filter, and what duplicates take.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.data import duplicates
from glmjax.data import filters as filters_lib
from glmjax.data import splits
from glmjax.data import tokenizing


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What filters leave of a task's files."""

  kept: tuple[np.ndarray, ...]  # of each file a bit for each document, packed
  counts: tuple[int, ...]  # of its documents
  records: tuple[dict[str, Any], ...]  # of each filter, for the manifest

  def passed(
    self, number: int, name: str, documents: Iterable[tuple[str, str]], filters: Sequence[filters_lib.Filter]
  ) -> Iterator[tuple[str, str]]:
    """Yields (split, document) of those of the `number`-th file, called `name`, that stay, as filters change them.

    Raises:
      errors.InputError: where the file has another number of documents than before.
    """
    kept = np.unpackbits(self.kept[number], count=self.counts[number])
    i = -1
    for i, (split, document) in enumerate(documents):
      if i < len(kept) and kept[i]:
        yield split, changed(filters, document)
    if i + 1 != len(kept):
      raise errors.InputError(
        f"{name} had {len(kept):,} documents when it was filtered, and has {i + 1:,}: it was changed meanwhile"
      )


def changed(filters: Sequence[filters_lib.Filter], document: str) -> str:
  """Returns a document that stays as filters change it."""
  for each in filters:
    if isinstance(each, filters_lib.PersonalData):
      document = each.changed(document)
  return document


def judged(filters: Sequence[filters_lib.Filter], document: str) -> str | None:
  """Returns a document as filters of SINGLE change it; None where one of them leaves it out."""
  for each in filters:
    if isinstance(each, filters_lib.PersonalData):
      document = each.changed(document)
    elif not each.keeps(document):
      return None
  return document


def outcome(filters: Sequence[filters_lib.Filter], files: Iterable[Iterable[tuple[str, str]]]) -> Outcome:
  """Reads (split, document) of every file, and finds out what filters leave."""
  reading = _Reading(filters)
  counts = []
  for documents in files:
    before = len(reading.dropped)
    for split, document in documents:
      reading.add(document, held_out=split != splits.SPLITS[0])
    counts.append(len(reading.dropped) - before)
  alive, records = reading.judge()
  ends = np.cumsum(counts)[:-1]
  return Outcome(tuple(np.packbits(own) for own in np.split(alive, ends)), tuple(counts), tuple(records))


class _Reading:
  """What is noted of each document, D of them, while all are read once; F filters."""

  def __init__(self, filters: Sequence[filters_lib.Filter]) -> None:
    self._filters = filters
    self.dropped = duplicates.Growing(np.uint8)  # by which filter, by itself; F where by none
    self._held_out = duplicates.Growing(np.uint8)
    self._bytes = duplicates.Growing(
      np.int64, len(filters) + 1
    )  # of a document as it comes to each filter, and at last
    self._sketches = {
      place: each.begin()
      for place, each in enumerate(filters)
      if isinstance(each, filters_lib.ExactDuplicates | filters_lib.NearDuplicates)
    }

  def add(self, document: str, held_out: bool) -> None:
    """Takes in the next document."""
    number, size = len(self.dropped), tokenizing.utf8_bytes(document)
    sizes, by = np.zeros(len(self._filters) + 1, np.int64), len(self._filters)
    sizes[0] = size
    for place, each in enumerate(self._filters):
      if place in self._sketches:
        self._sketches[place].add(number, document)
      elif (left := judged([each], document)) is None:
        by = place
        break
      elif left is not document:
        document, size = left, tokenizing.utf8_bytes(left)
      sizes[place + 1] = size
    self.dropped.append(by)
    self._held_out.append(held_out)
    self._bytes.append(sizes)

  def judge(self) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Returns which documents stay, bool [D], and each filter's name, settings, and what came in and out."""
    dropped_D, bytes_DF = self.dropped.array(), self._bytes.array()
    held_out_D = self._held_out.array().astype(bool)
    alive_D = np.ones(len(dropped_D), bool)
    records = []
    for place, about in enumerate(filters_lib.described(self._filters)):
      before = _counted(alive_D, bytes_DF[:, place], "in")
      if (sketches := self._sketches.get(place)) is not None:
        alive_D[sketches.repeated(alive_D, held_out_D)] = False
      alive_D &= dropped_D != place
      records.append(about | before | _counted(alive_D, bytes_DF[:, place + 1], "out"))
    return alive_D, records


def _counted(alive_D: np.ndarray, bytes_D: np.ndarray, which: str) -> dict[str, int]:
  return {f"documents_{which}": int(alive_D.sum()), f"bytes_{which}": int(bytes_D[alive_D].sum())}
