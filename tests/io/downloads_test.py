"""What failed downloads leave is told from files, and named."""

import pytest

from glmjax import errors
from glmjax.io import downloads
from glmjax.io import printable
from glmjax.io import user_json
from glmjax.io import user_text

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1815217640\n"


@pytest.mark.parametrize(
  "start, words",
  [
    (POINTER, "is a Git LFS pointer to 1,815,217,640 bytes, not the file itself: fetch it with git lfs pull"),
    (POINTER[:50], "is a Git LFS pointer, not"),
    (b"\xef\xbb\xbf \n<!DOCTYPE HTML><html>", "is a web page"),
    (b"<html lang=en>", "is a web page"),
    (b'<?xml version="1.0"?><Error>', "is a web page"),
    (b"Entry not found", "holds a server's answer ('Entry not found')"),
    (b"Repository not found", "answer"),
    (b"Invalid username or password.", "answer"),
    (b"404: Not Found\n", "answer ('404: Not Found')"),
  ],
)
def test_names_them(start, words):
  with pytest.raises(errors.InputError) as caught:
    downloads.check(start, "x.bin")
  assert str(caught.value).startswith("x.bin ") and words in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("start", [b"", b"PK\3\4", b"\x80\x02}", b'{"a": 1}', b"version 3", b"\0" * 600, b"a <html>"])
def test_takes_all_others(start):
  downloads.check(start, "x.bin")


def test_texts_may_be_web_pages_but_no_pointers(tmp_path):
  (tmp_path / "page.txt").write_text("<html>\n")
  assert user_text.read(tmp_path / "page.txt") == "<html>\n"
  (tmp_path / "pointer.txt").write_bytes(POINTER)
  for read in (user_text.read, user_json.read):
    with pytest.raises(errors.InputError, match="git lfs pull"):
      read(tmp_path / "pointer.txt")


def test_terminals_obey_no_names():
  assert printable.line("layers.0 中文\u3000x") == "layers.0 中文\u3000x"
  shown = printable.line("\x1b]0;owned\x07\r\n\x9b\u202e\ud800\u2028" + "x" * 2000, 100)
  assert shown.startswith("\\x1b]0;owned\\x07\\r\\n\\x9b\\u202e\\ud800\\u2028xxx") and shown.endswith("x...")
  assert shown.isprintable() and len(shown) < 160
