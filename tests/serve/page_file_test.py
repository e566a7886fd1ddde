"""The chat page's file: what it may not hold, and that its parts know each other."""

import re

from serve import fake_server

PAGE = fake_server.PAGE.read_text(encoding="utf-8")
MARKUP, SCRIPT = PAGE.split("<script", 1)


def words(language):
  """The words of one language: key -> text."""
  block = re.search(rf"^  {language}: {{\n(.*?)^  }},$", PAGE, re.M | re.S)[1]
  return dict(re.findall(r'^    (\w+): "(.*)",$', block, re.M))


def test_the_file_is_whole_and_small():
  assert not re.search(r"https?://\w|@import|url\(|\ssrc\s*=|<iframe|<object|<embed|<base|<meta http-equiv", PAGE)
  assert PAGE.count("<script") == PAGE.count("<style") == 1
  assert re.findall(r'href="(.*?)"', MARKUP) == ["data:,"]
  assert len(PAGE.encode()) < 62_000


def test_nothing_makes_markup_or_code_of_text():
  assert not re.search(r"innerHTML|outerHTML|insertAdjacent|createContextual|document\.write|DOMParser|srcdoc", SCRIPT)
  assert not re.search(r"\beval\b|\bFunction\(|setTimeout\([\"'`]|\bimport\(", SCRIPT)
  assert not re.search(r"\s(on\w+|style)\s*=\s*[\"']", MARKUP)  # a Content-Security-Policy forbids both


def test_both_languages_say_the_same():
  english, chinese = words("en"), words("zh")
  assert list(english) == list(chinese) and len(english) > 50
  for key in english:
    assert re.findall(r"\{\d\}", english[key]) == re.findall(r"\{\d\}", chinese[key]), key


def test_every_word_is_there_and_used():
  used = set(re.findall(r'data-(?:word|label|hint)="(\w+)"', MARKUP))
  used |= set(re.findall(r'(?:say|button|fillState|Problem|word:|label:|hint:|note =|\?|:) ?\(?"(\w+)"', SCRIPT))
  unknown = set(re.findall(r'data-(?:word|label|hint)="(\w+)"', MARKUP)) - set(words("en"))
  assert not unknown and not set(words("en")) - used


def test_every_element_that_is_asked_for_is_there():
  ids = re.findall(r'\bid="([\w-]+)"', MARKUP)
  assert len(ids) == len(set(ids))
  asked = set(re.findall(r'\b(?:byId|on|submits)\("([\w-]+)"', SCRIPT)) | set(
    re.findall(r'(?:for|aria-\w+)="([a-z-]+)"', MARKUP)
  )
  assert asked - {"empty", "true", "false", "polite", "off"} <= set(ids)
