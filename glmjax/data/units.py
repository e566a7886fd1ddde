"""Text as units, which are words and single Chinese characters, each a hash of 64 bits; n-grams of them.

Case, blanks and punctuation do not count, so that two texts are the same where they say the same. English and Chinese
have one rule, and about as much is said by five words as by five characters. A text of any length goes through in
blocks; the same text has the same hashes in every process.
"""

from collections.abc import Iterator
import functools
import typing

import numpy as np

BLOCK = 1 << 17  # characters that are looked at together
_BACK = 4096  # characters before a block's end in which a blank is looked for
_POWERS = 1024  # of a character's place in its word; longer words go round
# Classes of characters. A word is a run of what is neither BETWEEN nor alone.
BETWEEN, LATIN, HAN, OTHER_ALONE, OTHER, DIGIT = range(6)
_CLASSES = 6
_HAN = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x323B0))  # Unicode 16, blocks of ideographs
_KANA = ((0x3041, 0x3100), (0x31F0, 0x3200))  # written without blanks, as Han is
_LAST = 0x323B0
_WIDE = 0xFF01  # the full-width form of "!", before those of all that ASCII has: they count as those
_ODD = np.uint64(0x9E3779B97F4A7C15)  # an odd number near 2^64 / golden ratio: powers of it spread over all bits


class Block(typing.NamedTuple):
  """The units of a block of a text, U of them."""

  units_U: np.ndarray  # uint64; first those that the block before has had as well
  old: int  # how many those are
  classes: np.ndarray  # int64 [6]: how many characters of each class are new

  def fresh(self) -> np.ndarray:
    """Returns the units that no block before has had, uint64."""
    return self.units_U[self.old :]

  def grams(self, n: int) -> np.ndarray:
    """Returns the hashes of the n-grams that end in new units, uint64; n is at most the overlap and one."""
    return grams(self.units_U[max(self.old - n + 1, 0) :], n)


def blocks(text: str, overlap: int = 0) -> Iterator[Block]:
  """Yields a text's blocks of units; each begins with the last `overlap` units before it, as far as there are any."""
  before = np.zeros(0, np.uint64)
  start = 0
  while start < len(text):
    stop = _stop(text, start)
    found, classes = _units(text[start:stop])
    start = stop
    units = np.concatenate([before, found])
    yield Block(units, len(before), classes)
    before = units[max(len(units) - overlap, 0) :]


def units(text: str) -> np.ndarray:
  """Returns all units of a text, uint64."""
  return np.concatenate([np.zeros(0, np.uint64), *(block.units_U for block in blocks(text))])


def grams(units_U: np.ndarray, n: int) -> np.ndarray:
  """Returns the hash of every run of n units, uint64 [max(U - n + 1, 0)]."""
  count = max(len(units_U) - n + 1, 0)
  found = np.zeros(count, np.uint64)
  for k in range(n):
    found *= _ODD
    found += units_U[k : k + count]
  return mixed(found)


def mixed(values: np.ndarray) -> np.ndarray:
  """Returns uint64 in which every bit depends on every bit of the given (the finalizer of splitmix64)."""
  values = values ^ (values >> np.uint64(30))
  values *= np.uint64(0xBF58476D1CE4E5B9)
  values ^= values >> np.uint64(27)
  values *= np.uint64(0x94D049BB133111EB)
  values ^= values >> np.uint64(31)
  return values


def _stop(text: str, start: int) -> int:
  """Returns where the block that begins there ends: behind a blank, where there is one, so that words stay whole."""
  stop = start + BLOCK
  if stop >= len(text):
    return len(text)
  for blank in "\n ":
    if (place := text.rfind(blank, stop - _BACK, stop)) >= 0:
      return place + 1
  return stop


def _units(text: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the units of a text, uint64 [U], and how many characters of each class it has, int64 [6]."""
  codes = np.frombuffer(text.casefold().encode("utf-32-le", "surrogatepass"), "<u4")
  codes = codes - (np.uint32(_WIDE - ord("!")) * ((codes >= _WIDE) & (codes < _WIDE + 94)))
  classes = _class_table()[np.minimum(codes, _LAST)]
  counts = np.bincount(classes, minlength=_CLASSES)
  inside = np.flatnonzero(classes)
  if not len(inside):
    return np.zeros(0, np.uint64), counts
  codes, classes = codes[inside], classes[inside]
  alone = (classes == HAN) | (classes == OTHER_ALONE)
  begins = alone.copy()
  begins[0] = True
  begins[1:] |= alone[:-1] | (np.diff(inside) > 1)
  first = np.flatnonzero(begins)
  place = np.arange(len(codes)) - np.repeat(first, np.diff(first, append=len(codes)))
  hashes = mixed(codes.astype(np.uint64) + _ODD)
  hashes *= _powers()[place % _POWERS]
  return mixed(np.add.reduceat(hashes, first)), counts


@functools.cache
def _powers() -> np.ndarray:
  return np.cumprod(np.full(_POWERS, _ODD))


@functools.cache
def _class_table() -> np.ndarray:
  """Returns the class of every character up to the last ideograph, uint8; what is beyond counts as that one does."""
  table = np.zeros(_LAST + 1, np.uint8)
  table[:0x20000] = [OTHER if chr(code).isalnum() else BETWEEN for code in range(0x20000)]
  table[[code for code in range(0x20000) if chr(code).isdecimal()]] = DIGIT
  table[ord("a") : ord("z") + 1] = LATIN
  for ranges, kind in ((_HAN, HAN), (_KANA, OTHER_ALONE)):
    for first, behind in ranges:
      table[first:behind] = kind
  return table
