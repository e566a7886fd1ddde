"""Personal data by its form: what is found, what is not, what is left of it, and how long the worst lines take."""

import re
import time

import pytest

from glmjax.data import personal


def found(text: str) -> list[tuple[str, str]]:
  return [(each.kind, text[each.start : each.stop]) for each in personal.find(text)]


@pytest.mark.parametrize(
  "kind, data",
  [
    ("email", "a.b+c@mail.example.com"),
    ("phone_cn", "13812345678"),
    ("phone_cn", "+86 138 1234 5678"),
    ("phone_cn", "86-138-1234-5678"),
    ("phone_cn", "010-62345678"),
    ("phone_cn", "0755-8234567"),
    ("phone_us", "(415) 555-2671"),
    ("phone_us", "+1 212 555 0188"),
    ("phone_us", "415.555.2671"),
    ("id_cn", "11010519491231002X"),  # GB 11643's own example
    ("ip", "192.168.1.20"),
    ("card", "4111 1111 1111 1111"),  # test numbers of card companies
    ("card", "378282246310005"),
    ("card", "6205-5000-0000-0000-004"),
  ],
)
def test_found_and_masked(kind, data):
  for before, behind in (("", ""), ("电话：", "，谢谢"), ("Call ", ", please."), ("(", ")")):
    text = f"{before}{data}{behind}"
    where = found(text)
    assert [each for each, _ in where] == [kind], text
    assert personal.masked(text) == text.replace(where[0][1], f"<{kind}>")
    assert not re.search(r"\w", personal.outline(where[0][1]).replace("*", ""))


@pytest.mark.parametrize(
  "text",
  [
    "2008-08-08 10:20, 1998.01.02",
    "1,234,567.89 元",
    "2005 2006 2007 2008 2009 2010",
    "4111 1111 1111 1112",  # the check digit is wrong
    "110105194912310021",
    "11010519491331002X",  # of a 13th month
    "300.1.1.1 and 1.2.3.4.5 and 127.0.0.1 and 01.02.03.04",
    "12812345678",
    "0000 0000 0000 0000",
    "a@b and @name and x@y.1",
    "ISBN 978-7-111-12345-6",
    "",
  ],
)
def test_not_found(text):
  assert not found(text) and personal.masked(text) == text


def test_several_in_one_text():
  text = "13812345678, 13912345678; me@x.org\n4111111111111111 11010519491231002X"
  assert [kind for kind, _ in found(text)] == ["phone_cn", "phone_cn", "email", "card", "id_cn"]
  assert personal.masked(text) == "<phone_cn>, <phone_cn>; <email>\n<card> <id_cn>"


@pytest.mark.parametrize(
  "piece", ["a", "1", "1 ", "1.", "a@", "b.", "(", "+1-", "1.1.1.1 ", "13812345678 ", "1a ", "a.a@b.", "- 1", "1(("]
)
def test_time_is_in_proportion_to_the_text(piece):
  """A line of one kind of piece takes about twice as long where it is twice as long."""

  def seconds(text: str) -> float:
    start = time.process_time()
    personal.find(text)
    return time.process_time() - start

  short, long = (piece * (size // len(piece)) for size in (20_000, 160_000))
  assert min(seconds(long) for _ in range(2)) < 30 * max(min(seconds(short) for _ in range(3)), 1e-3)
