"""Pictures of rows: what is written in them, how far a row goes, and that odd text breaks nothing."""

import io

import numpy as np
import pytest
from PIL import Image

from glmjax import display
from glmjax import positions
from glmjax import show
from glmjax import tokens
from glmjax.data import rows
from glmjax.data import spans
from glmjax.train import pipeline
from glmjax.train.pipeline import timeline

TEXT = "ab $_^{}\\%图\n"


class Letters:
  """A letter a token."""

  specials = tokens.icetk(0, 20)

  def decode(self, ids, show_special=False):
    names = {self.specials.mask: "[MASK]", self.specials.sop: "<sop>", self.specials.eop: "<eop>"}
    return "".join(TEXT[i] if i < len(TEXT) else names.get(i, "") * show_special for i in ids)


LETTERS = Letters()


def row(kind=positions.ROTARY, length=24):
  """Two samples and padding."""
  first = spans.corrupt(np.arange(8), np.array([[2, 4], [6, 7]]), LETTERS.specials.mask, LETTERS.specials)
  second = spans.corrupt_suffix(np.arange(3), 2, LETTERS.specials.mask, LETTERS.specials)
  return rows.pack([first, second], kind, positions.Counting.AT_MASK, length, LETTERS.specials.pad)


def pixels(picture):
  return np.asarray(Image.open(io.BytesIO(picture.png)).convert("L"))


def test_labels_show_what_is_no_letter(monkeypatch):
  monkeypatch.setattr(display, "fonts", lambda: ["DejaVu Sans"])  # whatever is installed here
  show._fonts.cache_clear()
  ids = [TEXT.index(character) for character in "a 图\n$"]
  assert show._labels(ids, LETTERS) == ["a", "·", f"#{TEXT.index('图')}", "⏎", r"\$"]
  assert show._labels([LETTERS.specials.mask, LETTERS.specials.enc], LETTERS) == ["[MASK]", f"#{LETTERS.specials.enc}"]


def test_padding_is_left_out():
  made = row()
  used = show._used(made)
  assert used == 16 and (rows.padding(made) == (np.arange(24) >= used)).all()
  assert (pixels(show.attention(made, LETTERS)) == pixels(show.attention(row(length=60), LETTERS))).all()


@pytest.mark.parametrize("kind", positions.KINDS.values(), ids=list(positions.KINDS))
def test_every_kind_of_row_is_drawn_in_sixteen_greys(kind):
  made = row(kind)
  tall = pixels(show.row(made, LETTERS)).shape[0]
  assert tall == pytest.approx(100 * (0.2 + 0.28 * (4.6 + (kind.axes == 2))), abs=2)
  for picture in (show.row(made, LETTERS), show.attention(made, LETTERS), show.tokens(made["tokens"], LETTERS)):
    assert len(np.unique(pixels(picture))) <= 16 and len(picture.png) < 30_000


def test_a_matrix_has_the_greys_of_what_is_seen():
  """Those of `row`: light for the context, darker for what is predicted, white for the rest, in their shares."""
  made, length = row(), 16
  is_context = made["loss_weights"][:length] == 0
  places = np.arange(length)
  seen = (made["attend_start"][:length, None] <= places) & (places < made["attend_end"][:length, None])
  found = pixels(show.attention(made, LETTERS))
  light, dark = (np.sum(abs(found.astype(int) - int(grey[1:3], 16)) < 8) for grey in (show._CONTEXT, show._TARGET))
  assert light / dark == pytest.approx((seen & is_context).sum() / (seen & ~is_context).sum(), rel=0.05)


def test_lengths_are_bars():
  assert len(show.lengths([1, 2, 2, 7], spans.span_length_pmf()).png) > 1000


def test_scores_of_several_models_are_drawn():
  class Score:
    log_probs, pieces = np.array([-0.1, -2.0, -9.0], np.float32), ["The", " cost", "$北"]

  assert show.scores({"float": Score(), "INT4": Score()}).png != show.scores({"float": Score()}).png


def test_an_evaluation_is_drawn_with_and_without_blanks():
  read = {"unigram_bits_per_byte": 2.0, "bits_per_byte": 1.5}
  blanks = {"unigram_accuracy": 0.05, "infill_accuracy_left_only": 0.2, "infill_accuracy": 0.3}
  with_blanks = show.heldout({"en": read | blanks, "zh": read | blanks})
  assert with_blanks.png != show.heldout({"en": read, "zh": read}).png


def test_parts_are_stacked():
  sizes = {"data 8": {"parameters": 1.0, "optimizer": 2.0}, "fsdp 8": {"parameters": 0.1}}
  assert show.stacked(sizes, "memory, MB").png != show.stacked({"data 8": sizes["data 8"]}, "memory, MB").png


@pytest.mark.parametrize("numbers, said", [([3, 0, 1, 2], "0-3"), ([0, 4], "0, 4"), ([0, 1, 5], "0-1, 5")])
def test_devices_are_named_in_runs(numbers, said):
  assert show._devices(numbers) == said


@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
def test_schedules_are_drawn(kind):
  few, many = (timeline.of(pipeline.Pipeline(2, count, 1, 2, kind)) for count in (2, 4))
  assert show.timeline(few).png != show.timeline(many).png


def test_chinese_is_written_where_a_font_has_it(monkeypatch):
  """Here with fonts made up."""
  monkeypatch.setattr(show, "_fonts", lambda: [Glyphs("ab"), Glyphs("图")])
  assert show._labels([TEXT.index(character) for character in "a图%"], LETTERS) == ["a", "图", f"#{TEXT.index('%')}"]


class Glyphs:
  """A font that has these characters."""

  def __init__(self, characters):
    self._characters = characters

  def get_char_index(self, code):
    return self._characters.find(chr(code)) + 1
