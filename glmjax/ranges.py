"""Ranges of settings: one check, and one sentence, for every number that a user may give.

Not a number and infinity lie outside of every range, and so does what float32 cannot hold: devices compute with that.
"""

from collections.abc import Sequence
import math
import numbers
from typing import Any

from glmjax import errors

LARGEST = 3.4028235e38  # of float32
SMALLEST = 1.1754944e-38  # above 0 that devices tell from 0
MOST_SAMPLES = 2**32 - 1  # samples are counted in uint32
MOST_SHARDS, MOST_WORKERS = 100_000, 10_000  # of a token cache: a mistake, not a wish, lies beyond
_MOST_WHOLE = 2**31 - 1  # sizes and counts of steps are int32


def number(
  name: str,
  value: Any,
  least: float = -LARGEST,
  most: float = LARGEST,
  *,
  above: float | None = None,
  below: float | None = None,
) -> None:
  """Checks that a setting is a finite number within a range.

  Args:
    name: of the setting, as a user writes it: AdamW.b2.
    least, most: the range, its ends included.
    above, below: its ends where they are not included, in place of least and most.

  Raises:
    errors.InputError: in one line that names setting, value and range.
  """
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  try:
    fits = is_number and math.isfinite(value) and abs(value) <= LARGEST
  except OverflowError:  # an integer beyond float64
    fits = False
  if fits:
    fits = value >= max(least, SMALLEST) if above == 0 else value > above if above is not None else value >= least
    fits = fits and (value < below if below is not None else value <= most)
  if not fits:
    beyond = " (float32 ends at 3.4e38)" if is_number and LARGEST < abs(value) < math.inf else ""
    raise errors.InputError(
      f"{name} is {_shown(value)}: give {_described('a number', least, most, above, below)}{beyond}"
    )


def whole(name: str, value: Any, least: int = 0, most: int = _MOST_WHOLE) -> None:
  """Checks that a setting is a whole number from `least` to `most`.

  Raises:
    errors.InputError: in one line that names setting, value and range.
  """
  if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not least <= value <= most:
    raise errors.InputError(f"{name} is {_shown(value)}: give {_described('a whole number', least, most)}")


def one_of(name: str, value: Any, choices: Sequence[int]) -> None:
  """Checks that a setting is one of some whole numbers.

  Raises:
    errors.InputError: in one line that lists them.
  """
  if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value not in choices:
    raise errors.InputError(f"{name} is {_shown(value)}: give {' or '.join(map(str, choices))}, or None")


def flag(name: str, value: Any) -> None:
  """Checks that a setting is True or False: any other word would count as True.

  Raises:
    errors.InputError: in one line.
  """
  if not isinstance(value, bool):
    raise errors.InputError(f"{name} is {_shown(value)}: give True or False")


def choice(name: str, value: Any, choices: Sequence[str]) -> None:
  """Checks that a setting is one of some words.

  Raises:
    errors.InputError: in one line that lists them.
  """
  if not isinstance(value, str) or value not in choices:
    raise errors.InputError(f"{name} is {_shown(value)}: choose one of {', '.join(choices)}")


def several(name: str, values: Any) -> Sequence[Any]:
  """Returns a list or tuple of settings.

  Raises:
    errors.InputError: when it is anything else: a text would count letter by letter.
  """
  if not isinstance(values, list | tuple):
    raise errors.InputError(f"{name} is {_shown(values)}: give a list, such as [{_shown(values)}]")
  return values


def pairs(name: str, values: Any) -> None:
  """Checks that a setting is a list of (first, last) sample numbers.

  Raises:
    errors.InputError: in one line that names setting and value.
  """
  for i, each in enumerate(several(name, values)):
    is_pair = isinstance(each, list | tuple) and len(each) == 2
    for value in each if is_pair else ():
      whole(f"{name}[{i}]", value, 0, MOST_SAMPLES)
    if not is_pair or each[0] > each[1]:
      raise errors.InputError(f"{name}[{i}] is {each!r}: each range is (first, last) with 0 <= first <= last")


def _described(what: str, least: float, most: float, above: float | None = None, below: float | None = None) -> str:
  """Describes a range in words: "a number from 0 to below 1", "a number above 0", "a whole number, 1 or more"."""
  if below is not None:
    end = f" to below {below:g}"
  elif most < (_MOST_WHOLE if what == "a whole number" else LARGEST):
    end = f" to {_shown(most)}"
  else:
    end = ""
  if above is not None:
    return f"{what} above {above:g}{end.replace(' to below', ' and below').replace(' to ', ', up to ')}"
  if least <= -LARGEST:
    return f"a finite number{end}"
  return f"{what} from {_shown(least)}{end}" if end else f"{what}, {_shown(least)} or more"


def _shown(value: Any) -> str:
  """Writes a value as text of bounded length."""
  if isinstance(value, numbers.Real) and not isinstance(value, bool):
    if isinstance(value, numbers.Integral):
      value = int(value)
      return str(value) if abs(value) < 10**30 else f"a number of {int(value.bit_length() * math.log10(2)) + 1} digits"
    return repr(float(value))
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
