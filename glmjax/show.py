"""Pictures of what a model is trained on: tokens, samples, spans, and which places see which.

Rows are those of docs/architecture.md, without the batch axis, as data/rows.py makes them. Readable in grey.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from glmjax import display
from glmjax import tokens as tokens_lib
from glmjax.data import rows as rows_lib

_BOTH_SIDES, _LEFT_SIDE, _UNSEEN = 0.25, 0.62, 1.0  # grey of what a place sees; 0 is black
_GREYS = ("#f2f2f2", "#bdbdbd", "#444444")
_LABELLED = 44  # most places whose tokens are written beside a matrix
_CONTEXT, _MASK, _TARGET = "#f2f2f2", "#444444", "#bdbdbd"


class Tokenizer(Protocol):
  """What a picture needs of `glmjax.tokenizer.Tokenizer`."""

  specials: tokens_lib.SpecialTokens

  def decode(self, ids: Sequence[int], show_special: bool = False) -> str: ...


class Score(Protocol):
  """What a picture needs of `glmjax.infer.score.Score`."""

  log_probs: np.ndarray  # natural logarithms

  @property
  def pieces(self) -> list[str]: ...


def tokens(ids: Sequence[int], tokenizer: Tokenizer, across: int = 16) -> display.Picture:
  """Draws tokens in their order, `across` in a line, with the id of each below."""
  lines = -(-len(ids) // across)
  figure = display.figure(10, 0.3 + 0.75 * lines)
  axes = figure.add_subplot()
  for i, (token, label) in enumerate(zip(ids, _labels(ids, tokenizer))):
    x, y = i % across, i // across
    _cell(axes, x, y, label, _MASK if token in tokenizer.specials.masks else _CONTEXT, height=0.55)
    axes.text(x + 0.5, y + 0.75, str(token), ha="center", va="center", fontsize=7, color=display.INK)
  _frame(axes, across, lines)
  return display.grey_picture(figure)


def row(row: rows_lib.Row, tokenizer: Tokenizer, across: int = 16) -> display.Picture:
  """Draws a row place by place: the token that is read, its positions, and what is to be predicted there.

  Context is light, blanks are dark, places that are predicted grey; padding at the end is left out.
  """
  length = _used(row)
  read, wanted = (_labels(row[name][:length], tokenizer) for name in ("tokens", "targets"))
  numbers = np.atleast_2d(row["positions"])[:, :length]
  names = ["place", "token", *(["position", "block position"][: len(numbers)]), "predicts"]
  block = len(names) + 0.6  # lines that a stretch of places takes, with room below
  lines = -(-length // across)
  figure = display.figure(10, 0.2 + 0.28 * block * lines)
  axes = figure.add_subplot()
  for i in range(length):
    x, y = i % across, i // across * block
    counted = row["loss_weights"][i] > 0
    colour = _MASK if row["tokens"][i] in tokenizer.specials.masks else _TARGET if counted else _CONTEXT
    axes.text(x + 0.5, y + 0.5, str(i), ha="center", va="center", fontsize=7, color=display.INK)
    _cell(axes, x, y + 1, read[i], colour)
    for k, number in enumerate(numbers[:, i], 2):
      axes.text(x + 0.5, y + k + 0.5, str(number), ha="center", va="center", fontsize=8, color=display.INK)
    if counted:
      _cell(axes, x, y + len(names) - 1, wanted[i], "#ffffff")
  for line in range(lines):
    for k, name in enumerate(names):
      axes.text(-0.15, line * block + k + 0.5, name, ha="right", va="center", fontsize=8, color=display.INK)
  _frame(axes, across, lines * block, left=2.2)
  return display.grey_picture(figure)


def attention(row: rows_lib.Row, tokenizer: Tokenizer) -> display.Picture:
  """Draws which places (across) each place (down) sees: dark what lies in a context, which is seen from both sides,
  lighter what is predicted and seen from behind alone.
  """
  length = _used(row)
  places = np.arange(length)
  seen = (row["attend_start"][:length, None] <= places) & (places < row["attend_end"][:length, None])
  is_context = row["loss_weights"][:length] == 0
  grey = np.where(seen, np.where(is_context[None, :], _BOTH_SIDES, _LEFT_SIDE), _UNSEEN)
  labelled = length <= _LABELLED
  size = 1.6 + (0.2 * length if labelled else 4.8)
  figure = display.figure(size + 0.4, size)
  axes = figure.add_subplot()
  axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
  if labelled:
    names = _labels(row["tokens"][:length], tokenizer)
    axes.set_xticks(places, names, rotation=90, fontsize=7, fontfamily=display.fonts())
    axes.set_yticks(places, names, fontsize=7, fontfamily=display.fonts())
    axes.set_xticks(places[:-1] + 0.5, minor=True)
    axes.set_yticks(places[:-1] + 0.5, minor=True)
    axes.grid(which="minor", color="#ffffff", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
  unit = "token" if labelled else "place in the row"
  axes.set_xlabel(f"what is seen ({unit})", color=display.INK)
  axes.set_ylabel(f"what sees ({unit})", color=display.INK)
  return display.grey_picture(figure)


def scores(named: Mapping[str, Score]) -> display.Picture:
  """Draws how unexpected each token of one text is, in bits, by each of several models, at most four."""
  first = next(iter(named.values()))
  places = np.arange(len(first.pieces))
  figure = display.figure(1.5 + 0.38 * max(len(places), 12), 3.2)
  axes = figure.add_subplot()
  marks = (("o", display.INK), ("s", "#ffffff"), ("^", _TARGET), ("x", display.INK))
  for i, ((name, score), (mark, colour)) in enumerate(zip(named.items(), marks)):
    bits = -np.asarray(score.log_probs) / np.log(2)
    look = {"markersize": 5 + 4 * (len(named) - i - 1), "markerfacecolor": colour, "markeredgecolor": display.INK}
    axes.plot(places, bits, linestyle="none", marker=mark, label=name, zorder=i + 2, **look)
  names = [piece if _is_drawable(piece) else "?" for piece in map(_visible, first.pieces)]
  axes.set_xticks(places, names, rotation=60, fontsize=8, fontfamily=display.fonts())
  axes.set_xlabel("token", color=display.INK)
  axes.set_ylabel("unexpected by, bits", color=display.INK)
  axes.set_ylim(bottom=0)
  axes.margins(y=0.15)
  axes.legend(frameon=False, labelcolor=display.INK)
  display.plain(axes)
  return display.grey_picture(figure)


def lengths(drawn: Sequence[int], expected: np.ndarray) -> display.Picture:
  """Draws how long spans came out, as bars, beside the shares [n] that lengths 1, 2, ... n should have, as dots."""
  longest = max(max(drawn), int(np.searchsorted(np.cumsum(expected), 0.999)) + 1)
  counts = np.bincount(np.asarray(drawn), minlength=longest + 1)[1:]
  figure = display.figure(7, 3)
  axes = figure.add_subplot()
  places = np.arange(1, longest + 1)
  axes.bar(places, counts / len(drawn), color=_TARGET, width=0.7, label=f"{len(drawn):,} spans drawn")
  shares = np.pad(expected, (0, longest))[:longest]
  axes.plot(places, shares, linestyle="none", marker="o", markersize=4, color=display.INK, label="expected")
  axes.set_xlabel("length of a span, tokens", color=display.INK)
  axes.set_ylabel("share of the spans", color=display.INK)
  axes.legend(frameon=False, labelcolor=display.INK)
  display.plain(axes)
  return display.grey_picture(figure)


def heldout(figures: Mapping[str, Mapping[str, float]]) -> display.Picture:
  """Draws what `glmjax evaluate` found for each language: bits per byte (left; less is better) and the share of hidden
  tokens that are guessed right (right; more is better), each beside what knows only how frequent tokens are.
  """
  bits = {"unigram_bits_per_byte": "frequencies alone", "bits_per_byte": "the model"}
  shares = {
    "unigram_accuracy": "frequencies alone",
    "infill_accuracy_left_only": "the model, left side seen",
    "infill_accuracy": "the model, both sides seen",
  }
  figure = display.figure(10, 0.9 + 0.75 * len(figures))
  for place, (names, unit) in enumerate(((bits, "bits per byte"), (shares, "hidden tokens guessed right, %")), 1):
    axes = figure.add_subplot(1, 2, place)
    factor = 1 if names is bits else 100
    for i, (name, label) in enumerate(names.items()):
      colour = _GREYS[i + len(_GREYS) - len(names)]
      values = [factor * found.get(name, 0.0) for found in figures.values()]
      height = 0.8 / len(names)
      bars = axes.barh(
        [y + i * height for y in range(len(figures))], values, height, color=colour, edgecolor=display.INK, label=label
      )
      axes.bar_label(bars, fmt="%.2f" if names is bits else "%.1f", padding=3, fontsize=8, color=display.INK)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(figures))], list(figures))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(unit, color=display.INK)
    axes.legend(
      frameon=False,
      fontsize=8,
      labelcolor=display.INK,
      loc="lower left",
      bbox_to_anchor=(0, 1),
      ncols=len(names),
      handlelength=1,
      columnspacing=1,
    )
    display.plain(axes)
  return display.grey_picture(figure)


def _used(row: rows_lib.Row) -> int:
  """Counts the places up to the last that is no padding."""
  return int(np.flatnonzero(~rows_lib.padding(row)).max(initial=0)) + 1


def _labels(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
  """Returns what tokens read as, spaces made visible; the number of one that has no glyphs in the pictures' font."""
  labels = []
  for token in map(int, ids):
    text = _visible(tokenizer.decode([token], show_special=True))
    labels.append(text if text and _is_drawable(text) else f"#{token}")
  return labels


def _visible(text: str) -> str:
  """Returns a token's text with its spaces made visible, and nothing that matplotlib takes for a formula."""
  return text.replace(" ", "·").replace("\n", "⏎").replace("$", r"\$")


def _is_drawable(text: str) -> bool:
  """Tells whether the pictures' fonts have a glyph for each character."""
  return all(any(font.get_char_index(ord(character)) for font in _fonts()) for character in text)


@functools.cache
def _fonts() -> list[Any]:
  from matplotlib import font_manager

  return [font_manager.get_font(font_manager.findfont(name)) for name in display.fonts()]


def _font() -> Any:
  from matplotlib import font_manager

  return font_manager.get_font(font_manager.findfont("DejaVu Sans"))


def _cell(axes: Any, x: float, y: float, label: str, colour: str, height: float = 0.92) -> None:
  """Draws a box with a token in it, which is written smaller the longer it is."""
  from matplotlib import patches

  axes.add_patch(patches.Rectangle((x + 0.03, y), 0.94, height, facecolor=colour, edgecolor="#888888", linewidth=0.6))
  ink = "#ffffff" if colour == _MASK else "#000000"
  size = min(9.0, 58 / max(len(label), 1))
  axes.text(
    x + 0.5,
    y + height / 2,
    label,
    ha="center",
    va="center",
    fontsize=size,
    color=ink,
    fontfamily=display.fonts(),
    clip_on=True,
  )


def _frame(axes: Any, across: float, down: float, left: float = 0.0) -> None:
  axes.set_xlim(-left, across)
  axes.set_ylim(down, 0)
  axes.axis("off")
