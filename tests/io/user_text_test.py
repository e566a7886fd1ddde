"""The door for text files that users wrote."""

import io
import os

import pytest

from glmjax import errors
from glmjax.io import user_text


@pytest.mark.parametrize(
  "content, expected",
  [
    (b"", []),
    (b"a", ["a"]),
    (b"a\n\nb\n", ["a", "", "b"]),
    (b"a\r\nb\r\n", ["a", "b"]),
    (b"a\rb\r\rc", ["a", "b", "", "c"]),
    ("\ufeff中\u2028文\x85".encode(), ["中\u2028文\x85"]),
    (b"a\n\rb", ["a", "", "b"]),
  ],
)
def test_all_line_ends(tmp_path, content, expected):
  (tmp_path / "x").write_bytes(content)
  assert list(user_text.lines(tmp_path / "x")) == list(enumerate(expected, 1))
  assert user_text.read(tmp_path / "x") == "".join(f"{line}\n" for line in expected)


def test_long_files_have_line_ends_across_blocks(tmp_path):
  lines = ["中" * 99_999, "", "b" * 3_000_000] * 3
  (tmp_path / "x").write_text("\r\n".join(lines), encoding="utf-8", newline="")
  assert [line for _, line in user_text.lines(tmp_path / "x")] == lines


def test_lines_without_end_are_bounded(tmp_path):
  """A pipe may never end its line: memory does not grow with it."""
  for content, kept in (("a\nbbbb\nc", 3), ("aaaa", 1), ("a\r\nbbbb\r\n", 2), ("漢字漢字", 1)):
    (tmp_path / "x").write_bytes(content.encode())
    assert len(list(user_text.lines(tmp_path / "x", 4))) == kept
  (tmp_path / "x").write_text("a\nbbbbb")
  with pytest.raises(errors.InputError, match="x: line 2 has more than 4 characters"):
    list(user_text.lines(tmp_path / "x", 4))

  class Endless(io.RawIOBase):
    """Gives letters for ever."""

    given = 0

    def readable(self):
      return True

    def readinto(self, buffer):
      self.given += len(buffer)
      buffer[:] = b"x" * len(buffer)
      return len(buffer)

  stream = Endless()
  with pytest.raises(errors.InputError, match="standard input: line 1 has more than 100,000 characters"):
    list(user_text.lines_of(io.BufferedReader(stream), "standard input", 100_000))
  assert stream.given < 1_000_000


@pytest.mark.parametrize("before", ["a\nb\n", "中\r" * 10**6, "x" * 3_000_000 + "\n"])
def test_what_is_not_utf8_is_named(tmp_path, before):
  (tmp_path / "x").write_bytes(before.encode() + b"ab\xe9 c\n")
  byte, line = len(before.encode()) + 2, before.count("\n") + before.count("\r") + 1
  with pytest.raises(errors.InputError, match=rf"byte {byte} \(line {line}\)"):
    list(user_text.lines(tmp_path / "x"))


@pytest.mark.parametrize(
  "content, words",
  [
    ("abc 中".encode("utf-16"), "UTF-16"),
    ("abc".encode("utf-16-le"), "NUL"),
    ("中a".encode("utf-16-be"), "NUL|not UTF-8"),
    (b"ab\0c", "line 1 holds NUL"),
    ("中".encode()[:2], "within a character"),
  ],
)
def test_other_encodings(tmp_path, content, words):
  (tmp_path / "x").write_bytes(content)
  with pytest.raises(errors.InputError, match=words):
    list(user_text.lines(tmp_path / "x"))


def test_what_is_no_file(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  for name in ("fifo", ".", "missing"):
    with pytest.raises(errors.InputError, match="cannot read"):
      list(user_text.lines(tmp_path / name))
  (tmp_path / "x").write_bytes(b"x" * 100)
  with pytest.raises(errors.InputError, match="99 at most"):
    user_text.read(tmp_path / "x", largest=99)
