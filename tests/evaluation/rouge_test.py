"""ROUGE against figures counted by hand."""

import pytest

from glmjax.harness import metrics
from glmjax.harness import rouge


def test_units_are_words_and_characters() -> None:
  assert rouge.units("The ferry's 9 o'clock, ICE_T!") == ["the", "ferry", "s", "9", "o", "clock", "ice", "t"]
  assert rouge.units("船 ferry2九点，开。") == ["船", "ferry2", "九", "点", "开"]
  assert rouge.units("Fährе") == ["fährе"] and rouge.units(" ,.!") == []


def test_runs() -> None:
  """police killed the gunman / police kill the gunman: 3 of 4 and 4 words, 1 of 3 and 3 pairs."""
  answer, target = "police killed the gunman", "police kill the gunman"
  assert rouge.of_runs(answer, [target], 1) == pytest.approx(3 / 4)
  assert rouge.of_runs(answer, [target], 2) == pytest.approx(1 / 3)
  assert rouge.of_runs("the the the", ["the cat"], 1) == pytest.approx(2 * 1 / (3 + 2))


def test_order() -> None:
  """the gunman kill police has two words in the target's order: the gunman."""
  assert rouge.of_order("the gunman kill police", ["police kill the gunman"]) == pytest.approx(2 / 4)
  assert rouge.of_order("police the gunman killed", ["police kill the gunman"]) == pytest.approx(3 / 4)
  assert rouge.longest_common("abcbdab", "bdcaba") == 4
  assert rouge.longest_common("", "abc") == rouge.longest_common("abc", "") == 0


def test_chinese_is_counted_by_characters() -> None:
  assert rouge.of_runs("船九点开", ["船十点开"], 1) == pytest.approx(3 / 4)
  assert rouge.of_runs("船九点开", ["船十点开"], 2) == pytest.approx(1 / 3)
  assert rouge.of_order("船九点开", ["船十点开"]) == pytest.approx(3 / 4)


@pytest.mark.parametrize("name", ["ROUGE-1", "ROUGE-2", "ROUGE-L"])
def test_bounds(name: str) -> None:
  """1 of a text itself, whatever its case and marks; the best target counts; 0 of what has nothing in common."""
  score = metrics.OF_ANSWER[name]
  assert score("A ferry, late.", ["nothing here", "a Ferry late"]) == 1.0
  assert score("A ferry", ["nothing here"]) == score("", ["a ferry"]) == score("a ferry", []) == score("", [""]) == 0.0
