"""Pictures of rows: what is written in them, how far a row goes, and that odd text breaks nothing."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from glmjax import display
from glmjax import errors
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


@pytest.fixture
def drawn(monkeypatch):
  """The figures that become pictures."""
  figures, encode = [], display.grey_picture
  monkeypatch.setattr(display, "grey_picture", lambda figure: figures.append(figure) or encode(figure))
  return figures


@pytest.fixture
def one_font(monkeypatch):
  """The pictures' font alone, whatever is installed here."""
  with monkeypatch.context() as patched:
    patched.setattr(display, "fonts", lambda: ["DejaVu Sans"])
    show._fonts.cache_clear()
    yield
  show._fonts.cache_clear()


def texts(axes):
  return [text.get_text() for text in axes.texts]


def legend(axes):
  return [text.get_text() for text in axes.get_legend().get_texts()]


def test_labels_show_what_is_no_letter(one_font):
  ids = [TEXT.index(character) for character in "a 图\n$"]
  assert show._labels(ids, LETTERS) == ["a", "·", f"#{TEXT.index('图')}", "⏎", r"\$"]
  assert show._labels([LETTERS.specials.mask, LETTERS.specials.enc], LETTERS) == ["[MASK]", f"#{LETTERS.specials.enc}"]


def test_a_mask_that_predicts_is_context_all_the_same():
  pairs = [(np.arange(5), np.arange(3)), (np.arange(2), np.arange(4))]
  plain, changed = (
    rows.BlankInfilling(
      24, LETTERS.specials, samples_per_sequence=1, packing="greedy", instruction_sop_loss=sop
    ).instruction_row(pairs)
    for sop in (False, True)
  )
  assert (plain["loss_weights"] != changed["loss_weights"]).sum() == 2
  assert show.attention(plain, LETTERS).png == show.attention(changed, LETTERS).png
  assert show.row(plain, LETTERS).png != show.row(changed, LETTERS).png


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


def test_lengths_are_bars(drawn):
  show.lengths([1, 2, 2, 7], spans.span_length_pmf())
  heights = [bar.get_height() for bar in drawn[0].axes[0].patches]
  assert heights[:7] == [0.25, 0.5, 0, 0, 0, 0, 0.25] and sum(heights) == 1


class Score:
  log_probs, pieces = np.log(np.array([0.5, 0.25, 0.125])), ["The", " cost", "$北"]


def test_scores_of_several_models_are_drawn(drawn, one_font):
  show.scores({"float": Score(), "INT4": Score()})
  axes = drawn[0].axes[0]
  assert legend(axes) == ["float", "INT4"]
  assert all(line.get_ydata() == pytest.approx([1, 2, 3]) for line in axes.lines)
  assert [label.get_text() for label in axes.get_xticklabels()] == ["The", "·cost", "?"]


READ = {"unigram_bits_per_byte": 2.0, "bits_per_byte": 1.5}
BLANKS = {"unigram_accuracy": 0.05, "infill_accuracy_left_only": 0.2, "infill_accuracy": 0.3}


def test_an_evaluation_is_drawn(drawn):
  show.heldout({"en": READ | BLANKS, "zh": READ | BLANKS})
  bits, shares = drawn[0].axes
  assert texts(bits) == ["2.00", "2.00", "1.50", "1.50"] and legend(bits) == ["frequencies alone", "the model"]
  assert texts(shares) == ["5.0", "5.0", "20.0", "20.0", "30.0", "30.0"]
  assert [label.get_text() for label in bits.get_yticklabels()] == ["en", "zh"]


@pytest.mark.parametrize("blanks", [{}, dict.fromkeys(BLANKS)])
def test_what_was_not_measured_is_no_bar(drawn, blanks):
  show.heldout({"en": READ | blanks, "zh": READ | blanks})
  assert len(drawn[0].axes) == 1
  show.heldout({"en": READ | BLANKS, "zh": READ | blanks})
  assert texts(drawn[1].axes[1]) == ["5.0", "20.0", "30.0"]
  assert drawn[1].axes[0].get_ylim() == pytest.approx(drawn[1].axes[1].get_ylim(), abs=0.2)
  show.heldout({"en": READ | BLANKS | {"unigram_accuracy": None}})
  assert legend(drawn[2].axes[1]) == ["the model, left side seen", "the model, both sides seen"]


def test_parts_are_stacked(drawn):
  show.stacked({"data 8": {"parameters": 1.0, "optimizer": 2.0}, "fsdp 8": {"parameters": 0.1}}, "memory, MB")
  axes = drawn[0].axes[0]
  assert legend(axes) == ["parameters", "optimizer"] and texts(axes) == ["3.00", "0.10"]
  assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 1), (0, 0.1), (1, 2), (0.1, 0)]


def test_many_parts_and_none_are_stacked(drawn):
  """No two look alike; all of them zero are drawn as that."""
  show.stacked({"a": {f"part {i}": 1.0 for i in range(15)}}, "memory, MB")
  looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in drawn[0].axes[0].patches}
  assert len(looks) == len(legend(drawn[0].axes[0])) == 15
  show.stacked({"a": {"part": 0.0}}, "memory, MB")
  assert texts(drawn[1].axes[0]) == ["0.00"]


@pytest.mark.parametrize(
  "draw, said",
  [
    (lambda: show.stacked({}, "MB"), "show.stacked: there is nothing to draw"),
    (lambda: show.stacked({"a": {str(i): 1.0 for i in range(21)}}, "MB"), "show.stacked: 21 are more"),
    (lambda: show.scores({}), "show.scores: there is nothing to draw"),
    (lambda: show.scores({str(i): Score() for i in range(5)}), "show.scores: 5 are more .*: give 4 at most"),
    (lambda: show.heldout({}), "show.heldout: there is nothing to draw"),
    (lambda: show.timeline([]), "show.timeline: there is nothing to draw"),
    (lambda: show.tokens([], LETTERS), "show.tokens: there is nothing to draw"),
    (lambda: show.lengths([], spans.span_length_pmf()), "show.lengths: there is nothing to draw"),
    (lambda: show.shards(np.ones((4, 4)), "ab"), "show.shards: ndarray of shape"),
    (lambda: show.shards(jax.numpy.ones(4), "ab"), r"of shape \(4,\): give an array of JAX"),
    (lambda: show.shards(jax.numpy.ones((2, 2, 2, 2)), "ab"), r"of shape \(2, 2, 2, 2\)"),
    (lambda: show.shards(jax.ShapeDtypeStruct((2, 2), "float32"), "ab"), "that is on devices"),
    (lambda: show.shards(jax.numpy.ones((2, 2)), ["mlp"]), r"names of the axes, \['mlp'\], are not 2"),
  ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(draw, said):
  with pytest.raises(errors.InputError, match=said):
    draw()


@pytest.mark.parametrize("numbers, said", [([3, 0, 1, 2], "0-3"), ([0, 4], "0, 4"), ([0, 1, 5], "0-1, 5")])
def test_devices_are_named_in_runs(numbers, said):
  assert show._devices(numbers) == said


@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
def test_schedules_are_drawn(kind, drawn):
  """A box with its micro-batch's number for each turn, at its tick and stage."""
  turns = timeline.of(pipeline.Pipeline(2, 4, 1, 2, kind))
  show.timeline(turns)
  axes = drawn[0].axes[0]
  assert texts(axes) == [str(turn.microbatch) for turn in turns]
  assert [(box.get_x(), int(box.get_y())) for box in axes.patches] == [(turn.tick, turn.stage) for turn in turns]


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
