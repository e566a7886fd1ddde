"""ROUGE: how much of a text another one has (Lin, 2004), as F1 of units that both have.

Units are words in lower case, without punctuation, and of Chinese, Japanese kana and such each character; there is no
stemming.
"""

from collections.abc import Sequence
import collections
import re

# A character of a script that puts no spaces between words (ideographs, kana), or a run of other letters and digits.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_UNIT = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")


def units(text: str) -> list[str]:
  """Returns what of a text is counted."""
  return _UNIT.findall(text.lower())


def of_runs(answer: str, targets: Sequence[str], size: int) -> float:
  """Returns ROUGE-N: the best F1, over targets, of runs of `size` units; one counts as often as both have it."""
  own = _runs(units(answer), size)
  return max((_f1((own & other).total(), own.total(), other.total()) for other in _all(targets, size)), default=0.0)


def of_order(answer: str, targets: Sequence[str]) -> float:
  """Returns ROUGE-L: the best F1, over targets, of the longest sequence of units that both have in this order."""
  own = units(answer)
  others = [units(target) for target in targets]
  return max((_f1(longest_common(own, other), len(own), len(other)) for other in others), default=0.0)


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
  """Returns the length of the longest sequence that both have in order, with gaps."""
  best = [0] * (len(b) + 1)  # of what is read of a, with the first so many of b
  for unit in a:
    before = 0  # best[j] without this unit
    for j, other in enumerate(b, 1):
      before, best[j] = best[j], before + 1 if unit == other else max(best[j], best[j - 1])
  return best[-1]


def _all(targets: Sequence[str], size: int) -> list[collections.Counter]:
  return [_runs(units(target), size) for target in targets]


def _runs(found: Sequence[str], size: int) -> collections.Counter:
  return collections.Counter(tuple(found[i : i + size]) for i in range(len(found) - size + 1))


def _f1(common: int, own: int, other: int) -> float:
  return 2 * common / (own + other) if common else 0.0
