"""Texts as the rows that are scored: tokens, masks written in a text, blanks, windows, what does not fit."""

import re
from collections.abc import Sequence

from glmjax import errors
from glmjax.infer import prompt as prompt_lib
from glmjax.infer import score as score_lib
from glmjax.infer import vocabulary
from glmjax.models import config as config_lib

MASKS = re.compile(r"(\[[gs]?MASK\])")


class Reader:
  """Makes rows of texts for one model and its tokenizer."""

  def __init__(self, tokenizer: vocabulary.Tokenizer, config: config_lib.GLMConfig):
    self._tokenizer, self._specials = tokenizer, tokenizer.specials
    self._kind, self._length = config.position_kind, config.max_length

  def ids(self, text: str, literal: bool = False) -> list[int]:
    """Returns a text's tokens, not framed; masks written in it count unless `literal`."""
    masks = {"[MASK]": self._specials.mask, "[gMASK]": self._specials.gmask, "[sMASK]": self._specials.smask}
    parts = [text] if literal else MASKS.split(text)
    ids: list[int] = []
    for part in parts:
      if not literal and part in masks:
        ids.append(masks[part])
      elif part:
        ids.extend(self._tokenizer.encode(part))
    return ids

  def text_rows(self, text: str, context: str, stride: int | None) -> list[score_lib.Row]:
    """Returns the rows that score a text, one or several windows, behind its context or as the filling of its blank."""
    specials, kind, length = self._specials, self._kind, self._length
    answer = self._answer(text)
    if not context:
      return score_lib.window_rows(answer, specials, kind, length, stride)
    ids = self._context(context)
    blank = prompt_lib.first_mask(ids, specials)
    if blank is not None and ids[blank:] != [specials.gmask]:
      ids = score_lib.with_blank(ids, specials.gmask, specials, kind)
      if len(ids) + len(answer) > length:
        raise errors.InputError(
          f"a text takes {len(answer)} tokens and its context {len(ids)}, and the model has {length}: shorten them"
        )
      return [score_lib.target_row(ids, answer, specials, kind)]
    ids = [*kind.beginning(specials), *ids[:blank]]
    if len(ids) + 2 > length:
      raise errors.InputError(
        f"a context takes {len(ids)} tokens, and the model has {length} for it and the text: shorten it"
      )
    return score_lib.window_rows([*ids, *answer], specials, kind, length, stride, skip=len(ids))

  def choice_rows(self, context: str, choices: Sequence[str], mask: str) -> tuple[list[score_lib.Row], int]:
    """Returns a row for each choice, and how many of the context's tokens, the oldest, were left out."""
    specials, kind = self._specials, self._kind
    default = specials.gmask if mask == "[gMASK]" else specials.mask
    ids, answers = self._context(context), [self._answer(choice) for choice in choices]
    left_out = max(0, len(ids) - score_lib.room_for_choices(answers, self._length, kind.frame_size))
    ids = score_lib.with_blank(ids[left_out:], default, specials, kind)
    return [score_lib.target_row(ids, answer, specials, kind) for answer in answers], left_out

  def _context(self, text: str) -> list[int]:
    """Returns a context's tokens, with one blank at most."""
    ids = self.ids(text)
    blanks = sum(token in self._specials.masks for token in ids)
    if blanks > 1:
      raise errors.InputError(f"a context has {blanks} blanks ({text[:60]!r}): leave one, which is scored")
    return ids

  def _answer(self, text: str) -> list[int]:
    ids = self._tokenizer.encode(text)
    if not ids:
      raise errors.InputError(f"a text to score is empty ({text[:60]!r}): give at least one character")
    return ids
