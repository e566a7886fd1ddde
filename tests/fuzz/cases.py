"""The inputs of each kind. `KINDS[kind](random, world)` makes one; the same for the same random and world.

A case is a command line with the files that it reads. Its refusal must name one of the case's `places`.
"""

import pathlib
import random

from fuzz import of_gin
from fuzz import of_text
from fuzz import of_weights
from fuzz.case import Case

KINDS = {
  function.__name__: function
  for function in (
    of_gin.gin_values,
    of_gin.gin_files,
    of_text.prompts,
    of_text.instructions,
    of_text.texts,
    of_text.configs,
    of_weights.safetensors,
    of_weights.pickles,
  )
}


def number_of(kind: str, seed: int, number: int, world: pathlib.Path) -> Case:
  """Input `number` of a kind."""
  return KINDS[kind](random.Random(f"{seed}/{kind}/{number}"), world)
