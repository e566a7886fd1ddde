"""Which pairs share a row."""

import collections
import itertools

import numpy as np

from glmjax.data import glm10b
from glmjax.data import rows


class Pairs:
  """The pairs of every row."""

  def __init__(self, order: np.ndarray, starts: np.ndarray) -> None:
    """Takes int64 [pairs], the pairs row by row, and [rows + 1], where in it each row begins; the last is its end."""
    self._order, self._starts = order, starts

  def __len__(self) -> int:
    return len(self._starts) - 1

  def of_row(self, number: int) -> list[int]:
    """Returns the pairs of a row, in the order of the split."""
    return self._order[self._starts[number] : self._starts[number + 1]].tolist()

  def runs(self, number: int) -> list[tuple[int, int]]:
    """Returns the same as runs [first, last) of consecutive pairs, to be read at once."""
    pairs = self.of_row(number)
    groups = itertools.groupby(enumerate(pairs), key=lambda place: place[1] - place[0])
    found = [[pair for _, pair in group] for _, group in groups]
    return [(group[0], group[-1] + 1) for group in found]


def pack_pairs(lengths: np.ndarray, infilling: rows.BlankInfilling | glm10b.BlockStrategy) -> Pairs:
  """Says which pairs share a row: consecutive ones, or with packing "best_fit" those that fill it best.

  Args:
    lengths: int64 [pairs, 2], tokens of inputs and targets.
    infilling: gives a pair's length in a row.
  """
  distinct, which = np.unique(lengths, axis=0, return_inverse=True)
  lengths_in_row = [infilling.instruction_length(int(a), int(b)) for a, b in distinct]
  places = np.array(lengths_in_row, np.int64)[which.ravel()]
  if getattr(infilling, "packing", None) == "best_fit":
    return _best_fit(places, infilling.seq_length)
  return _in_order(places, infilling.seq_length)


def _in_order(places: np.ndarray, length: int) -> Pairs:
  """Fills rows one after the other."""
  ends = np.concatenate([[0], np.cumsum(places)])
  # For every pair at once, the first one that no longer fits into a row begun with it; then follow the chain.
  following = (np.searchsorted(ends, ends[:-1] + length, side="right") - 1).tolist()
  starts = [0]
  while starts[-1] < len(places):
    starts.append(following[starts[-1]])
  return Pairs(np.arange(len(places)), np.array(starts))


def _best_fit(places: np.ndarray, length: int) -> Pairs:
  """Puts each pair, the longest first, into the row that has the least room for it, else into a new one.

  At most 11/9 of the fewest rows, and four more (best fit decreasing: Johnson et al., SIAM J. Comput. 3(4), 1974).
  """
  row_of_pair = np.zeros(len(places), np.int64)
  with_room = collections.defaultdict[int, list[int]](list)  # rows by the places that they have left
  rooms = 0  # its bits: the keys of `with_room` that have a row
  count = 0
  for pair in np.argsort(-places, kind="stable").tolist():
    needed = int(places[pair])
    if enough := rooms >> needed:
      room = needed + (enough & -enough).bit_length() - 1
      row = with_room[room].pop()
      if not with_room[room]:
        rooms ^= 1 << room
    else:
      row, room, count = count, length, count + 1
    row_of_pair[pair] = row
    with_room[room - needed].append(row)
    rooms |= 1 << (room - needed)
  order = np.argsort(row_of_pair, kind="stable")
  return Pairs(order, np.concatenate([[0], np.cumsum(np.bincount(row_of_pair, minlength=count))]))
