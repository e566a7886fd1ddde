"""The three kinds of positions: what each decides about rows, prompts and heads.

| | position | block position | of a head |
|---|---|---|---|
| rotary (GLM-130B) | 0, 1, 2, ... or, in a blank, its mask's | - | all of it is rotated |
| rotary_2d (ChatGLM-6B) | 0, 1, 2, ...; in a blank its mask's | 0; in a blank 1, 2, ... | a half is rotated by each |
| learned_2d (GLM-10B) | same | same | none: rows of two learned tables are added to the embedding |
"""

from collections.abc import Sequence
import dataclasses
import enum
from typing import Any

from glmjax import tokens as tokens_lib


class Counting(enum.Enum):
  """How the one number of a token goes on in what is to be predicted, where a model takes one."""

  AT_MASK = "at_mask"  # stays at the mask's place
  FROM_MASK = "from_mask"  # begins there, and goes on
  ON = "on"  # goes on from the token before


@dataclasses.dataclass(frozen=True)
class Positions:
  """One kind of positions.

  What is numbered has always two rows here, [2, ...]: position and block position. `of_model` is what a model takes.
  """

  name: str
  axes: int  # numbers of a token that the model takes: 1 or 2
  rotary_parts: int  # equal pieces of a head, each rotated by one of them; 0: learned tables
  ends_text: bool = True  # the original puts eos behind a text that does not end in a mask
  begins_text: bool = False  # ... and ENC in front of every text

  @property
  def head_multiple(self) -> int:
    """The head dimension must divide by it: every piece is rotated in halves."""
    return max(1, 2 * self.rotary_parts)

  def shape(self, length: int) -> tuple[int, ...]:
    """Returns the shape of a row's positions as the model takes them."""
    return (length,) if self.axes == 1 else (2, length)

  def of_model(self, numbers: Any, axis: int = -2) -> Any:
    """Returns [..., 2, L] (the two at `axis`) as the model takes it: [..., L], or as it is."""
    return numbers.take(0, axis) if self.axes == 1 else numbers

  def of_sample(self, numbers: Any, places: Any, counting: Counting) -> Any:
    """Returns what a model is trained with, [L] or [2, L], from a sample's two [L] and places 0, 1, ... [L]."""
    if self.axes == 2:
      return numbers
    if counting is Counting.AT_MASK:
      return numbers[0]
    if counting is Counting.FROM_MASK:
      return numbers[0] + (numbers[1] - 1).clip(0)
    return places

  def frame(self, tokens: Sequence[int], specials: tokens_lib.SpecialTokens) -> list[int]:
    """Returns a user's tokens with what the original code puts around them; without a mask, [gMASK] at the end."""
    tokens = list(tokens)
    if not any(token in specials.masks for token in tokens):
      tokens.append(specials.gmask)
    if self.ends_text and tokens[-1] not in specials.masks:
      tokens.append(specials.eos)
    return [*self.beginning(specials), *tokens]

  def beginning(self, specials: tokens_lib.SpecialTokens) -> list[int]:
    """Returns what the original code puts in front of every text."""
    return [specials.enc] if self.begins_text else []

  @property
  def frame_size(self) -> int:
    """Counts the most tokens that the family's own evaluation puts around a context; GLM-130B's puts none."""
    return self.begins_text + self.ends_text if self.axes == 2 else 0

  def blank(self, mask: int, sop: int, runs_on: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Numbers the sop at place `sop` that begins the filling of the mask at place `mask`; returns that and each token's
    step.

    `runs_on`: the mask is a [gMASK], whose filling is the text's continuation. With one number a token it goes on
    counting there, and stays at the mask's place in any other blank: the causal mask alone tells those tokens apart.
    """
    if self.axes == 1 and runs_on:
      return (sop, 0), (1, 0)
    return (mask, 1), (0, 1)


ROTARY = Positions("rotary", axes=1, rotary_parts=1)
ROTARY_2D = Positions("rotary_2d", axes=2, rotary_parts=2, ends_text=False)
LEARNED_2D = Positions("learned_2d", axes=2, rotary_parts=0, begins_text=True)
KINDS = {kind.name: kind for kind in (ROTARY, ROTARY_2D, LEARNED_2D)}
