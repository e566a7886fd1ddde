"""Documents that are there twice: the same unit for unit (exact), or nearly so (MinHash and bands of it).

The shingles of a document are its runs of five units (`units`: words, Chinese characters). Two documents are near
duplicates where the Jaccard similarity of their sets of shingles, estimated by 120 minima, is THRESHOLD or more. Those
that are compared have six minima in a row in common, in one of 20 bands: of pairs of similarity s that are all but
(1 - s^6)^20, 0.2 % at 0.8. The estimate's standard error is 0.04 there.
"""

from collections.abc import Iterable
import hashlib

import numpy as np

from glmjax.data import units as units_lib

SHINGLE = 5  # units; as "Deduplicating Training Data Makes Language Models Better" (Lee et al., 2022) and later corpora
THRESHOLD = 0.8  # of the same paper
BANDS, ROWS = 20, 6
_SIZE = BANDS * ROWS
BYTES = 4 * _SIZE  # of a document's signature
_NO_MINIMUM = np.uint32(0xFFFFFFFF)  # all of a signature's, of a document without units
_TOGETHER = 512  # shingles that are hashed at once: 0.5 MB of products
_COMPARED = 4096  # pairs at once
_ROUNDS = 8  # documents of a bucket with which the others are compared, at most
_MULTIPLIERS = units_lib.mixed(np.arange(1, _SIZE + 1, dtype=np.uint64)) | np.uint64(1)
_ADDENDS = units_lib.mixed(np.arange(_SIZE + 1, 2 * _SIZE + 1, dtype=np.uint64))


class Sketch:
  """What is kept of one document, block by block."""

  def __init__(self, near: bool = True) -> None:
    """Begins a document; without `near` its signature is not computed."""
    self._digest = hashlib.blake2b(digest_size=8)
    self._units = 0
    self._minima = np.full(_SIZE, ~np.uint64(0)) if near else None
    self._has_shingles = False

  def add(self, block: units_lib.Block) -> None:
    """Takes in the next block, which overlaps the one before by SHINGLE - 1 units or more."""
    fresh = block.fresh()
    self._digest.update(np.ascontiguousarray(fresh, "<u8").data)
    self._units += len(fresh)
    if self._minima is not None and len(grams := block.grams(SHINGLE)):
      self._has_shingles = True
      self._reduce(grams)

  def fingerprint(self) -> int:
    """Returns 64 bits that documents of the same units share; 0 of one without units, which equals no other."""
    return int.from_bytes(self._digest.digest(), "little") if self._units else 0

  def signature(self) -> np.ndarray:
    """Returns the minima, uint32 [120]; a document of fewer units than a shingle has the one that it is, and one
    without units none: its signature equals no other for `near`.
    """
    assert self._minima is not None
    if self._units and not self._has_shingles:
      self._reduce(units_lib.mixed(np.array([self.fingerprint()], np.uint64)))
    return (self._minima >> np.uint64(32)).astype(np.uint32)

  def _reduce(self, grams: np.ndarray) -> None:
    for start in range(0, len(grams), _TOGETHER):
      hashes = grams[start : start + _TOGETHER, None] * _MULTIPLIERS + _ADDENDS
      np.minimum(self._minima, hashes.min(axis=0), out=self._minima)


def sketch(text: str, near: bool = True) -> Sketch:
  """Returns the sketch of a whole text."""
  found = Sketch(near)
  for block in units_lib.blocks(text, SHINGLE - 1):
    found.add(block)
  return found


class Growing:
  """Rows of an array that grows, at most twice as large as what is in it."""

  def __init__(self, dtype: np.typing.DTypeLike, columns: int | None = None) -> None:
    self._columns = () if columns is None else (columns,)
    self._array = np.zeros((1024, *self._columns), dtype)
    self._count = 0

  def __len__(self) -> int:
    return self._count

  def append(self, row: int | np.ndarray) -> None:
    """Puts a row behind the others; the array doubles where it is full."""
    if self._count == len(self._array):
      self._array.resize((2 * self._count, *self._columns), refcheck=False)
    self._array[self._count] = row
    self._count += 1

  def array(self) -> np.ndarray:
    """Returns all rows; valid until the next is added."""
    return self._array[: self._count]


def exact(fingerprints_D: np.ndarray) -> np.ndarray:
  """Returns for each document, uint64 [D], the first of the same fingerprint, int64 [D]; -1 for that one itself."""
  _, first, which = np.unique(fingerprints_D, return_index=True, return_inverse=True)
  found = first[which]
  found[(found == np.arange(len(found))) | (fingerprints_D == 0)] = -1
  return found


def near(signatures_DS: np.ndarray, threshold: float = THRESHOLD) -> tuple[np.ndarray, np.ndarray]:
  """Returns for each document one before it that it nearly is, int64 [D], -1 for none; and how alike, float32 [D].

  Args:
    signatures_DS: uint32 [D, 120].
    threshold: the least similarity.
  """
  count = len(signatures_DS)
  found, alike = np.full(count, -1), np.zeros(count, np.float32)
  for band in range(BANDS):
    _match_band(signatures_DS, _keys(signatures_DS, band), threshold, found, alike)
  without_units = (signatures_DS[:, :ROWS] == _NO_MINIMUM).all(axis=1)  # they are like each other alone
  found[without_units], alike[without_units] = -1, 0
  return found, alike


def _keys(signatures_DS: np.ndarray, band: int) -> np.ndarray:
  """Returns one hash of each document's minima in a band, uint64 [D]."""
  keys = np.zeros(len(signatures_DS), np.uint64)
  for column in range(band * ROWS, (band + 1) * ROWS):
    keys = units_lib.mixed(keys + signatures_DS[:, column])
  return keys


def _match_band(
  signatures_DS: np.ndarray, keys_D: np.ndarray, threshold: float, found_D: np.ndarray, alike_D: np.ndarray
) -> None:
  """Compares the documents of each bucket with its first; those that it is not like with the first of these; so on."""
  order = np.argsort(keys_D, kind="stable")
  bucket = np.cumsum(np.concatenate([[0], keys_D[order][1:] != keys_D[order][:-1]])) if len(order) else order
  for _ in range(_ROUNDS):
    begins = np.concatenate([[True], bucket[1:] != bucket[:-1]])[: len(order)]
    first = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    left = ~begins
    members, others = order[left], first[left]
    if not len(members):
      return
    similar = similarities(signatures_DS, members, others)
    better = (similar >= threshold) & (similar > alike_D[members])
    found_D[members[better]], alike_D[members[better]] = others[better], similar[better]
    apart = similar < threshold
    order, bucket = members[apart], bucket[left][apart]


def similarities(signatures_DS: np.ndarray, some: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Returns the estimated Jaccard similarity of each pair of documents, given by numbers, float32 [P]."""
  parts = [np.zeros(0, np.float32)]
  for start in range(0, len(some), _COMPARED):
    these = slice(start, start + _COMPARED)
    parts.append((signatures_DS[some[these]] == signatures_DS[others[these]]).mean(axis=1, dtype=np.float32))
  return np.concatenate(parts)


def fingerprints(texts: Iterable[str]) -> np.ndarray:
  """Returns the fingerprint of each text, uint64 [D]."""
  return np.array([sketch(text, near=False).fingerprint() for text in texts], np.uint64)
