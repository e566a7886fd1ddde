"""Which language a text is in, told by its script alone."""

import numpy as np

from glmjax.data import units

LANGUAGES = ("en", "zh", "other")
_HAN_SHARE = 0.3  # of the letters, at least, in Chinese: a character says about as much as four letters of English
_KANA_SHARE = 0.1  # as many kana as that part of the Han characters make a text Japanese
_LATIN_SHARE = 0.7  # of the letters, at least, in English


def language(classes: np.ndarray) -> str:
  """Returns "zh", "en" or "other", by how many characters of each class of `units` a text has, int [6].

  Chinese: at least 30 % of the letters are Han characters, and kana are less than a tenth of those. English: at least
  70 % are the letters a to z; other languages in them count as English. Other: the rest, and what has no letters.
  """
  latin, han, alone, other = (int(classes[kind]) for kind in (units.LATIN, units.HAN, units.OTHER_ALONE, units.OTHER))
  letters = latin + han + alone + other
  if han >= max(_HAN_SHARE * letters, 1) and alone < _KANA_SHARE * han:
    return "zh"
  return "en" if latin >= max(_LATIN_SHARE * letters, 1) else "other"


def of_text(text: str) -> str:
  """Returns the language of a text."""
  return language(sum((block.classes for block in units.blocks(text)), np.zeros(6, np.int64)))
