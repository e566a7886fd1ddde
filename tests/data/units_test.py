"""Units of text: what counts, what does not, and that blocks of long texts give what the whole gives."""

import subprocess
import sys

import numpy as np
import pytest

from glmjax.data import languages, units


def same(a: str, b: str) -> bool:
  return units.units(a).tolist() == units.units(b).tolist()


def test_case_blanks_punctuation_and_width_do_not_count():
  assert same("The quick, brown FOX!", " the\nquick brown-fox ")
  assert same("中国政府。发展 经济", "中国政府，发展经济！")
  assert same("ＡＢＣ１２３", "abc123")
  assert not same("the fox", "thefox") and not same("ab c", "a bc") and not same("中国", "国中")
  assert len(units.units("两 words，and 3 中文")) == 6
  assert len(units.units(" ,.!，。\n")) == len(units.units("")) == 0


def test_no_two_words_share_a_hash():
  words = {f"{a}{b}" for a in "abcdefghij" for b in range(3000)} | {"a" * n for n in range(1, 2000)}
  found = units.units(" ".join(words))
  assert len({*found.tolist()}) == len(found) == len(words)
  pairs = units.grams(units.units(" ".join(f"{a} {b}" for a in "abcdefgh" for b in "abcdefgh")), 2)[::2]
  assert len({*pairs.tolist()}) == 64


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_blocks_have_the_n_grams_of_the_whole(n, monkeypatch):
  monkeypatch.setattr(units, "_BACK", 20)
  text = "A long text, of words and 一些中文字符 and more. " * 30
  whole = units.units(text)
  for size in (64, 100, 1000, 10_000):
    monkeypatch.setattr(units, "BLOCK", size)
    blocks = list(units.blocks(text, 12))
    assert np.concatenate([block.fresh() for block in blocks]).tolist() == whole.tolist()
    grams = np.concatenate([block.grams(n) for block in blocks])
    assert grams.tolist() == units.grams(whole, n).tolist() and len(grams) == len(whole) - n + 1
    assert sum(block.classes.sum() for block in blocks) == len(text)


def test_hashes_are_the_same_in_every_process():
  code = "from glmjax.data import units; print(units.units('The fox, 中文').tolist())"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == str(units.units("The fox, 中文").tolist())


@pytest.mark.parametrize(
  "text, language",
  [
    ("The company said it would.", "en"),
    ("中国政府说 OK", "zh"),
    ("这款 Windows XP 电脑不错", "zh"),
    ("He said 你好 to the others in the room.", "en"),
    ("これは日本語の文です", "other"),
    ("Привет, мир", "other"),
    ("12345 ... !", "other"),
    ("", "other"),
  ],
)
def test_languages(text, language):
  assert languages.of_text(text) == language
