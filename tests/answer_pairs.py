"""Questions with an answer that is preferred and one that is not, for the tests of training by them."""

from collections.abc import Iterator
import dataclasses

import numpy as np

from glmjax import tokens as tokens_lib
from glmjax.data import rows

SPECIALS = tokens_lib.SpecialTokens(
  mask=56, gmask=57, smask=58, sop=59, eop=60, eod=61, eos=62, pad=63, unk=55, enc=54, dblock=53
)
INFILLING = rows.BlankInfilling(16, SPECIALS, samples_per_sequence=1, packing="greedy", instruction_min_inputs=2)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """A DataSource: the answer that repeats the question's token is preferred to one that does not."""

  seq_length: int = 16
  few: int | None = None  # the same samples again and again

  def describe(self) -> dict:
    return {"name": "pairs", "preference": True}

  def row(self, index: int) -> rows.Row:
    r = np.random.default_rng(index % self.few if self.few else index)
    asked = r.integers(2, 50, 2).astype(np.int32)
    other = (asked[:1] + 1) % 50
    chosen, rejected = np.repeat(asked[:1], r.integers(1, 4)), np.repeat(other, r.integers(1, 4))
    return INFILLING.preference_row(asked, chosen, rejected)

  def batches(self, plan, process_index=0, process_count=1) -> Iterator[dict[str, np.ndarray]]:
    for first, size in plan:
      count = size // process_count
      made = [self.row(first + process_index * count + i) for i in range(count)]
      yield {name: np.stack([row[name] for row in made]) for name in made[0]}
