"""A row of tokens whose blanks are filled one after the other."""

import dataclasses
from collections.abc import Sequence, Set

import numpy as np

from glmjax import tokens as tokens_lib
from glmjax.infer import prompt as prompt_lib
from glmjax.models import config as config_lib


@dataclasses.dataclass(frozen=True)
class Filled:
  """A row of tokens with its blanks filled."""

  tokens: list[int]  # the whole row
  pieces: list[list[int]]  # what each blank took, in the order of filling; without stop tokens
  starts: list[int]  # where in the row each piece begins
  finish_reason: str  # stop: every piece ended by itself; length: one was cut off, or a blank is left


class Filling:
  """A row on its way: `blank` says what to fill next, `take` puts a piece there."""

  def __init__(
    self,
    row: Sequence[int],
    max_tokens: int,
    config: config_lib.GLMConfig,
    specials: tokens_lib.SpecialTokens,
    stops: Set[int],
    adapter: int = 0,
  ) -> None:
    """Begins with a row framed as the model wants it.

    Args:
      row: tokens, masks among them.
      max_tokens: for each blank.
      config: the model's.
      specials: the tokenizer's.
      stops: the tokens that end a piece, and are no part of it.
      adapter: the number of the one that fills it; 0: none.
    """
    self._adapter = adapter
    self._config, self._specials, self._stops, self._most = config, specials, stops, max_tokens
    self._filled = Filled(list(row), [], [], "stop")

  @property
  def turn(self) -> int:
    """How many blanks have been filled."""
    return len(self._filled.pieces)

  def blank(self) -> tuple[prompt_lib.Prompt, int] | None:
    """Returns the prompt that fills the next blank, and its most tokens; None: there is no blank, or no room."""
    tokens = self._filled.tokens
    if prompt_lib.first_mask(tokens, self._specials) is None:
      return None
    room = self._config.max_length - len(tokens) - 1
    if room < 1:
      self._filled = dataclasses.replace(self._filled, finish_reason="length")
      return None
    prompt = prompt_lib.fill(tokens, self._specials, self._config.position_kind)
    return dataclasses.replace(prompt, adapter=self._adapter), min(self._most, room)

  def longest(self) -> tuple[int, int]:
    """Returns how many tokens the prompt of the last blank may come to have, and its most tokens."""
    tokens = self._filled.tokens
    others = sum(token in self._specials.masks for token in tokens) - 1
    prompt = min(len(tokens) + 1 + others * (self._most - 1), self._config.max_length - 1)
    return prompt, min(self._most, self._config.max_length - prompt)

  def take(self, piece: Sequence[int]) -> None:
    """Puts a piece, its stop token included if it has one, in place of the blank it was made for."""
    filled, ended = self._filled, bool(piece) and piece[-1] in self._stops
    new = list(piece[:-1] if ended else piece)
    at = prompt_lib.first_mask(filled.tokens, self._specials)
    self._filled = Filled(
      [*filled.tokens[:at], *new, *filled.tokens[at + 1 :]],
      [*filled.pieces, new],
      [*filled.starts, at],
      filled.finish_reason if ended else "length",
    )

  def filled(self) -> Filled:
    """Returns the row as it is now, without the eos that frames text."""
    if self._filled.tokens[-1:] == [self._specials.eos]:
      return dataclasses.replace(self._filled, tokens=self._filled.tokens[:-1])
    return self._filled


def turn_seed(seed: int, turn: int) -> int:
  """Makes a row's draws for one blank independent of those for the next."""
  return int(np.random.SeedSequence([seed % 2**32, turn]).generate_state(1)[0])
