"""A seal is found broken by any change of what it covers, and by none of the layout."""

import json

import pytest

from glmjax.io import seal

CONTENT = {"tokens": 12, "rate": 0.1, "name": "中文", "deep": [{"a": None, "b": [1, 2.5e300]}]}


def test_what_was_sealed_comes_back_however_it_is_written():
  for options in ({}, {"indent": 2, "ensure_ascii": False}, {"sort_keys": True, "separators": (",", ":")}):
    assert seal.unseal(json.loads(json.dumps(seal.seal(CONTENT), **options))) == CONTENT


@pytest.mark.parametrize(
  "change",
  [{"tokens": 13}, {"rate": 0.1000001}, {"name": "中"}, {"more": 1}, {"crc32": "0"}, {"crc32": None}, {"crc32": 5}],
)
def test_changes_are_noticed(change):
  for required in (True, False):
    with pytest.raises(ValueError, match="checksum"):
      seal.unseal(seal.seal(CONTENT) | change, required)


def test_files_of_before_have_none():
  assert seal.unseal(CONTENT, required=False) == CONTENT
  with pytest.raises(ValueError, match="checksum"):
    seal.unseal(CONTENT)
