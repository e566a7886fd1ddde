"""What is read so that rows can be scored: equal prompts once, and a context once that several rows have in common.

Only a whole context is shared: of what is seen from both sides every token depends on all the others.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from glmjax.infer import prompt as prompt_lib
from glmjax.infer import score


@dataclasses.dataclass(frozen=True)
class Reading:
  """A prompt, and the rows that are scored when it has been read."""

  prompt: prompt_lib.Prompt
  rows: list[tuple[int, Sequence[int]]]  # the number of each, and its targets

  @property
  def length(self) -> int:
    """The number of tokens."""
    return len(self.prompt.tokens)

  @property
  def answer(self) -> int:
    """How many tokens, the last, are scored."""
    return max(len(targets) for _, targets in self.rows)

  @property
  def context(self) -> int:
    """How many tokens come before those that are scored."""
    return self.length - self.answer

  @property
  def scored(self) -> int:
    """The number of targets, of all rows."""
    return sum(len(targets) for _, targets in self.rows)

  @property
  def head(self) -> prompt_lib.Prompt:
    """The context alone, as a prompt that nothing continues."""
    tokens, positions = self.prompt.tokens[: self.context], self.prompt.positions[:, : self.context]
    return dataclasses.replace(self.prompt, tokens=tokens, positions=positions)

  def targets(self) -> Iterator[tuple[Sequence[int], slice]]:
    """Yields each row's targets, and where they stand among all that are scored."""
    first = 0
    for _, targets in self.rows:
      yield targets, slice(first, first + len(targets))
      first += len(targets)


def of(rows: Sequence[score.Row]) -> tuple[list[Reading], list[list[Reading]]]:
  """Returns the readings that stand alone, and those that have a context in common, two or more together."""
  unique: dict[tuple[bytes, int], Reading] = {}
  for i, row in enumerate(rows):
    key = _key(row.prompt, len(row.prompt.tokens)), row.prompt.context_length
    unique.setdefault(key, Reading(row.prompt, [])).rows.append((i, row.targets))
  families: dict[tuple[bytes, int], list[Reading]] = {}
  for i, reading in enumerate(unique.values()):
    whole = reading.answer <= reading.context == reading.prompt.context_length  # and long enough to pay
    key = (_key(reading.prompt, reading.context), -1) if whole else (b"", i)
    families.setdefault(key, []).append(reading)
  alone = [members[0] for members in families.values() if len(members) == 1]
  return alone, [members for members in families.values() if len(members) > 1]


def _key(prompt: prompt_lib.Prompt, length: int) -> bytes:
  numbers = [prompt.adapter, *prompt.tokens[:length]]
  return np.array(numbers, np.int64).tobytes() + prompt.positions[:, :length].tobytes()
