"""Which items of evaluation sets are in the text that a model is trained on, by runs of 13 units.

As GPT-3's appendix C has it (Brown et al., 2020): an item overlaps where one of its 13-grams is in the training text.
Words are compared without case and punctuation, Chinese by characters. The hashes of the evaluation sets are in memory,
the training text streams by.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from glmjax import errors
from glmjax.data import text
from glmjax.data import units
from glmjax.io import paths
from glmjax.io import user_json

N = 13
_MOST = 1 << 26  # 13-grams of the evaluation sets, 25 bytes each
_EXAMPLES = 10  # items of a file that are named


class Evaluation:
  """The 13-grams of evaluation sets, and which of them the training text has had; G distinct ones."""

  def __init__(self, patterns: text.Patterns) -> None:
    """Reads files of items: each line of a .jsonl file is one, all texts in it; or a document of a .txt file.

    Raises:
      errors.InputError: for what is wrong with the files, and where they have too many 13-grams.
    """
    self.files = text.find_files(patterns)
    self._places: list[str] = []
    self._items_of: list[int] = []  # how many each file has
    hashes, lengths, total = [np.zeros(0, np.uint64)], [], 0
    for path in self.files:
      before = len(self._places)
      for place, strings in _items(path):
        grams = np.concatenate([units.grams(units.units(string), N) for string in strings] or hashes[:1])
        self._places.append(place)
        hashes.append(grams)
        lengths.append(len(grams))
        total += len(grams)
        if total > _MOST:
          raise errors.InputError(f"--against: the files up to {path} have over {_MOST:,} 13-grams: give fewer")
      self._items_of.append(len(self._places) - before)
    self._hashes_G, self._which = np.unique(np.concatenate(hashes), return_inverse=True)
    self._ends = np.cumsum(np.array(lengths, np.int64))
    self._found_G = np.zeros(len(self._hashes_G), bool)

  def meet(self, grams: np.ndarray) -> None:
    """Takes in 13-grams of the training text, uint64."""
    if len(self._hashes_G):
      places = np.searchsorted(self._hashes_G, grams)
      places[places == len(self._hashes_G)] = 0
      self._found_G[places[self._hashes_G[places] == grams]] = True

  def figures(self) -> dict[str, Any]:
    """Returns "n", and for each of the "files" its "items", those "compared" (which are long enough to have a 13-gram),
    those "overlapping" and their "share" of the compared, and the first of them as "examples".
    """
    seen = np.concatenate([[0], np.cumsum(self._found_G[self._which])])
    starts = np.concatenate([[0], self._ends])
    overlaps = np.diff(seen[starts]) > 0
    compared = np.diff(starts) > 0
    figures, first = {}, 0
    for path, count in zip(self.files, self._items_of):
      own = slice(first, first + count)
      num_compared, num_overlapping = int(compared[own].sum()), int(overlaps[own].sum())
      figures[str(path)] = {
        "items": count,
        "compared": num_compared,
        "overlapping": num_overlapping,
        "share": num_overlapping / num_compared if num_compared else None,
        "examples": [self._places[first + i] for i in np.flatnonzero(overlaps[own])[:_EXAMPLES]],
      }
      first += count
    return {"n": N, "files": figures}


def _items(path: paths.Path) -> Iterator[tuple[str, list[str]]]:
  """Yields where each item of a file is, and its texts."""
  if path.suffix == ".jsonl":
    for where, record in text.json_lines(path):
      yield where, list(_strings(record, where))
  else:
    for number, (_, document) in enumerate(text.file_documents(path, 0), 1):
      yield f"{path}, document {number}", [document]


def _strings(value: Any, where: str) -> Iterator[str]:
  """Yields all texts in a record, but not the names of its fields."""
  if isinstance(value, str):
    yield user_json.string({"a text": value}, "a text", where)
  elif isinstance(value, dict | list):
    for each in value.values() if isinstance(value, dict) else value:
      yield from _strings(each, where)
