"""Which text is held out: a pure function of its place, so that every reader of a corpus sees the same split.

Every 50th document is held out. Where that would hold out nothing (one long text, thirty books), documents are cut
into windows and some of those are.
"""

from collections.abc import Iterable, Iterator, Sequence
import itertools
import typing

HELD_OUT_EVERY = 50  # one document in so many is for evaluation only
SPLITS = ("train", "validation")
# Of windows, in characters: a fiftieth of the text, but so much that a window of tokens comes out of a short one.
_LEAST, _LEAST_SHARE, _MOST = 4_000, 10, 16_000


def split_of(document_index: int) -> str:
  """Returns the split of a document: the 50th, 100th, ... are held out.

  A document's index is its place in its file plus its file's place among the files: files can be read
  side by side, and a thousand files of one document each give twenty held out, as one file of a thousand.
  """
  return SPLITS[document_index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]


class Windows(typing.NamedTuple):
  """How a corpus of few documents is cut: all numbers are characters of its documents laid end to end.

  A document is cut into windows of `size` characters or less, at a line's end or a blank where there is one. Held
  out are the windows that reach into the last half window of every `every` windows' length.
  """

  size: int
  every: int
  starts: tuple[int, ...]  # where each file's documents begin

  def pieces(self, documents: Iterable[Iterable[str]], file_number: int) -> Iterator[tuple[str, str]]:
    """Yields (split, text): for every document, given as lines, the longest stretches of one split."""
    place = self.starts[file_number]
    for lines in documents:
      stretch: list[str] = []
      split = ""
      for window in self._cut(lines):
        found = self._split_of(place, place + len(window))
        place += len(window)
        if found != split and stretch:
          yield split, "".join(stretch).strip("\n")
          stretch = []
        split = found
        stretch.append(window)
      if stretch:
        yield split, "".join(stretch).strip("\n")

  def _split_of(self, start: int, stop: int) -> str:
    period = self.every * self.size
    return SPLITS[stop > (start // period + 1) * period - (self.size + 1) // 2]

  def _cut(self, lines: Iterable[str]) -> Iterator[str]:
    """Yields the windows of a document: joined they are its lines, "\n" between them."""
    text, between = "", ""
    for line in lines:
      text += between + line
      between = "\n"
      start = 0
      while len(text) - start > self.size:
        stop = start + self._length(text, start)
        yield text[start:stop]
        start = stop
      text = text[start:]
    if text:
      yield text

  def _length(self, text: str, start: int) -> int:
    """Returns the length of the window that begins there: to the last line's end in its second half, or blank, or
    its whole size.
    """
    for mark in "\n ":
      if (end := text.rfind(mark, start + self.size // 2, start + self.size)) >= 0:
        return end + 1 - start
    return self.size


def windows(sizes: Sequence[int]) -> Windows | None:
  """Returns the windows of a corpus whose files' documents have so many characters; None where two are not to be
  had.
  """
  total = sum(sizes)
  if total < 2:
    return None
  size = min(max(total // HELD_OUT_EVERY, min(_LEAST, total // _LEAST_SHARE), 1), _MOST)
  return Windows(size, min(HELD_OUT_EVERY, total // size), tuple(itertools.accumulate(sizes, initial=0))[:-1])
