"""Whether documents hold words of a list, as those of toxicity lists."""

import hashlib

import numpy as np

from glmjax import errors
from glmjax.data import units
from glmjax.io import paths
from glmjax.io import user_text

MOST_UNITS = 13  # of one entry: English words, Chinese characters
_MOST = 1_000_000  # entries


class Words:
  """A list of words and phrases, found whatever their case: English ones whole, Chinese ones anywhere."""

  def __init__(self, path: paths.Named) -> None:
    """Reads the list: one entry a line.

    Raises:
      errors.InputError: for an entry of no unit or more than 13, a list without any, and one of over a million.
    """
    self.path = paths.named(path, "--words")
    found: dict[int, set[int]] = {}
    for number, line in user_text.lines(self.path, longest=1000):
      own = units.units(line)
      if line.strip() and not 1 <= len(own) <= MOST_UNITS:
        raise errors.InputError(
          f"{self.path}:{number}: an entry of {len(own)} words or Chinese characters: give 1 to {MOST_UNITS}"
        )
      if len(own):
        found.setdefault(len(own), set()).add(int(units.grams(own, len(own))[0]))
      if number > _MOST:
        raise errors.InputError(f"{self.path} has more than {_MOST:,} lines: give a shorter list")
    if not found:
      raise errors.InputError(f"{self.path} holds no words: give one a line")
    self._hashes = {n: np.array(sorted(hashes), np.uint64) for n, hashes in sorted(found.items())}

  @property
  def entries(self) -> int:
    """How many different entries there are."""
    return sum(map(len, self._hashes.values()))

  @property
  def fingerprint(self) -> str:
    """A hash of the entries, whatever their order and how they are written."""
    return hashlib.sha256(np.sort(np.concatenate([*self._hashes.values()])).astype("<u8").tobytes()).hexdigest()

  @property
  def overlap(self) -> int:
    """By how many units blocks of text must overlap."""
    return max(self._hashes) - 1

  def are_in(self, block: units.Block) -> bool:
    """Tells whether an entry ends in the new units of a block."""
    return any(bool(np.isin(block.grams(n), hashes).any()) for n, hashes in self._hashes.items())
