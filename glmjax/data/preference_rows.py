"""Rows of a task of pairs of answers."""

import numpy as np

from glmjax import errors
from glmjax.data import glm10b
from glmjax.data import rows
from glmjax.data import tokenized


class PreferenceRows:
  """Rows of a task of pairs of answers, one of each; a pair whose answers are cut to the same tokens is left out."""

  def __init__(self, reader: tokenized.Split, infilling: rows.BlankInfilling | glm10b.BlockStrategy) -> None:
    if not isinstance(infilling, rows.BlankInfilling):
      raise errors.InputError(f"pairs of answers need rows.BlankInfilling, and not {type(infilling).__name__}")
    self._reader, self._infilling = reader, infilling
    pairs = lengths(reader)
    # There is no preference in those: DPO has no gradient, and ORPO learns the answer as chosen and rejected at once.
    self._numbers = np.array([n for n, each in enumerate(pairs.tolist()) if not self._alike(n, *each)], np.int64)
    self.num_rows = len(self._numbers)
    self.left_out = len(pairs) - self.num_rows

  def row(self, epoch: int, number: int, index: int) -> rows.Row:
    del epoch, index  # nothing in these rows is drawn
    return self._infilling.preference_row(*self._pair(int(self._numbers[number])))

  def _pair(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a pair's question, chosen and rejected answer."""
    chosen, rejected = self._reader.documents_between(2 * number, 2 * number + 2)
    asked = chosen.input_length
    return chosen.tokens[:asked], chosen.tokens[asked:], rejected.tokens[asked:]

  def _alike(self, number: int, n_inputs: int, n_chosen: int, n_rejected: int) -> bool:
    """Tells whether both answers of a pair, with so many tokens, are the same in a row."""
    _, *kept = self._infilling.preference_lengths(n_inputs, n_chosen, n_rejected)
    if kept[0] != kept[1]:
      return False
    _, chosen, rejected = self._pair(number)
    return np.array_equal(chosen[: kept[0]], rejected[: kept[0]])


def lengths(reader: tokenized.Split) -> np.ndarray:
  """Returns int64 [pairs, 3]: tokens of question, chosen and rejected answer."""
  found = reader.document_lengths()
  return np.concatenate([found[::2], found[1::2, 1:]], axis=1)
