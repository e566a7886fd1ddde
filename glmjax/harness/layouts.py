"""Items as the rows that a model reads, laid out as GLM-130B's evaluation lays them out (evaluation/dataset.py there).

A context that is too long loses its oldest tokens, as many as the original would take away, which put all choices of a
question into one row. A task with a prompt has data sets' own records, which the original does not read: there the
longest choice alone takes room, and a blank within is kept.

A causal model (GLMConfig.causal), which the original does not know, reads everything from left to right behind a
[gMASK]. Choices are compared with what follows the blank: a sentence with one against the same with another. An answer
is written from what is before the blank alone.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from glmjax import errors
from glmjax import positions as positions_lib
from glmjax import tokens as tokens_lib
from glmjax.harness import items as items_lib
from glmjax.harness import task as task_lib
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import score as score_lib
from glmjax.models import config as config_lib

_STEP = 32  # places: the original pads batches to multiples of it


@dataclasses.dataclass(frozen=True)
class Layout:
  """How one task's items become rows of one model, which has room for the task's max_seq_length."""

  task: task_lib.Task
  config: config_lib.GLMConfig
  specials: tokens_lib.SpecialTokens

  @property
  def kind(self) -> positions_lib.Positions:
    """The model's kind of positions."""
    return self.config.position_kind

  @property
  def mask(self) -> int:
    """The mask that stands at a context's end, or for which one within is looked."""
    return self.specials.gmask if self.task.use_task_mask else self.specials.mask

  def question(self, item: items_lib.Question) -> list[score_lib.Row]:
    """Returns a row for each choice."""
    taking = item.choices if self.task.prompt is None else [max(item.choices, key=len)]
    room = score_lib.room_for_choices(taking, self.task.max_seq_length, self.kind.frame_size)
    tokens = self._kept(item.context, room)
    if self.config.causal:
      before, behind = self._parted(tokens)
      return [self._left_to_right(before, [*choice, *behind]) for choice in item.choices]
    inner = self.mask in tokens
    if not inner:
      tokens = [*tokens, self.mask]
    tokens = self._framed(tokens)
    prompt = self._prompt(tokens, tokens.index(self.mask), self.task.use_task_mask)
    if self.task.use_multitask_encoding and self.kind.axes == 1 and not self.task.use_task_mask and not inner:
      prompt = dataclasses.replace(prompt, stride=(1, 0))
    return [score_lib.Row(prompt_lib.extend(prompt, choice[:-1]), choice) for choice in item.choices]

  def blank(self, item: items_lib.Blank) -> prompt_lib.Prompt:
    """Returns the prompt whose continuation fills the blank.

    Raises:
      errors.InputError: where there is a [gMASK] in the context already, or the limit leaves no place for it.
    """
    room = self.task.max_seq_length - self.task.max_gen_length - 2 - self.kind.frame_size
    if room < 0:
      raise errors.InputError(
        f"task {self.task.name}: max_gen_length {self.task.max_gen_length} does not fit into "
        f"{self.task.max_seq_length} places"
      )
    tokens = self._kept(item.context, room)
    if self.task.use_task_mask and self.specials.gmask in tokens:
      raise errors.InputError(f"task {self.task.name}: a context holds [gMASK] already: leave use_task_mask out")
    if self.config.causal or self.task.unidirectional:
      return prompt_lib.left_to_right(self._parted(tokens)[0], self.specials, self.kind)
    if self.mask not in tokens:
      tokens = [*tokens, self.mask]
    tokens = self._framed(tokens)
    return self._prompt(tokens, tokens.index(self.mask), self.task.use_task_mask)

  def end(self, item: items_lib.Blank) -> list[int]:
    """Returns the tokens at which an answer ends: what is behind the blank, where the model does not see that."""
    return self._parted(item.context)[1] if self.config.causal else []

  def window(self, item: items_lib.Window) -> score_lib.Row:
    """Returns the row that scores a window's text."""
    if self.config.causal:
      return self._left_to_right(item.before, item.text)
    tokens = [*item.before, self.mask]
    # Places go on whatever the mask is, where a token has one: as in the original.
    prompt = self._prompt(tokens, len(item.before), runs_on=True)
    return score_lib.Row(prompt_lib.extend(prompt, item.text[:-1]), item.text)

  def tokens(self, item: items_lib.Item) -> int:
    """Returns how many tokens the model reads for an item, once what does not fit is taken away.

    Raises:
      errors.InputError: for one that does not fit whatever is taken away.
    """
    if isinstance(item, items_lib.Question):
      return sum(len(row.prompt.tokens) for row in self.question(item))
    return len((self.window(item).prompt if isinstance(item, items_lib.Window) else self.blank(item)).tokens)

  def _kept(self, context: list[int], room: int) -> list[int]:
    """Returns what of a context there is room for."""
    first = max(0, len(context) - room)
    if self.task.prompt is not None and self.mask in context[:first]:
      first = max(0, context.index(self.mask) - room // 2)
    return context[first : first + room]

  def _parted(self, tokens: list[int]) -> tuple[list[int], list[int]]:
    """Returns what is before the blank, and behind it."""
    blank = tokens.index(self.mask) if self.mask in tokens else len(tokens)
    return tokens[:blank], tokens[blank + 1 :]

  def _left_to_right(self, before: Sequence[int], text: list[int]) -> score_lib.Row:
    """Returns the row that scores a text behind another as a causal model reads it."""
    return score_lib.Row(prompt_lib.left_to_right([*before, *text[:-1]], self.specials, self.kind), text)

  def _framed(self, tokens: list[int]) -> list[int]:
    return self.kind.frame(tokens, self.specials) if self.kind.frame_size else tokens

  def _prompt(self, tokens: Sequence[int], mask: int, runs_on: bool) -> prompt_lib.Prompt:
    return prompt_lib.fill_at(tokens, mask, self.specials, self.kind, runs_on)


def padded(prompts: Sequence[prompt_lib.Prompt], batch: int) -> list[list[int]]:
  """Returns prompts' tokens as the original had them in batches of so many, filled up with zeros.

  Beam search there counts the filling, too: in lengths, and in n-grams.
  """
  found = []
  for first in range(0, len(prompts), batch):
    some = prompts[first : first + batch]
    longest = max(len(prompt.tokens) for prompt in some)
    size = -(-longest // _STEP) * _STEP
    found += [np.pad(prompt.tokens, (0, size - len(prompt.tokens))).tolist() for prompt in some]
  return found
