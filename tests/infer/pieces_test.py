"""Text as its tokens come: stop strings cut anywhere, characters of several tokens."""

import random

import pytest

from glmjax import errors
from glmjax.infer import pieces


def shown(stops: list[str], parts: list[str]) -> tuple[str, list[str]]:
  filter = pieces.Stops(stops)
  out = [filter.add(part) for part in parts]
  return "".join([*out, filter.end()]), out


def test_ends_before_the_stop_string_that_is_whole_first_however_the_text_is_cut():
  r = random.Random(0)
  for _ in range(2000):
    text = "".join(r.choice("ab\n") for _ in range(r.randrange(20)))
    stops = ["".join(r.choice("ab\n") for _ in range(r.randrange(1, 5))) for _ in range(r.randrange(4))]
    cuts = sorted(r.randrange(len(text) + 1) for _ in range(r.randrange(5)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    expected = text[: min(ends, default=(0, len(text)))[1]]
    assert shown(stops, parts)[0] == expected, (text, stops, parts)


def test_shows_at_once_what_begins_no_stop_string():
  assert shown(["</end>"], ["a<", "/b", "<", "/end>", "c"]) == ("a</b", ["a", "</b", "", "", ""])


def test_characters_come_whole():
  characters = pieces.Characters()
  assert [characters.add(bytes([byte])) for byte in "中a".encode()] == ["", "", "中", "a"]
  assert characters.add("中".encode()[:2]) == "" and characters.end() == "\ufffd"


@pytest.mark.parametrize("stops", [[""], ["a"] * 17, ["a" * 257]])
def test_odd_stop_strings(stops: list[str]):
  with pytest.raises(errors.InputError, match="stop: give up to 16 strings of 1 to 256 characters"):
    pieces.Stops(stops)
