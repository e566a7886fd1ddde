"""Pictures of what a model is trained on: tokens, samples, spans, and which places see which.

Rows are those of docs/architecture.md, without the batch axis, as data/rows.py makes them. Readable in grey.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from glmjax import display
from glmjax import errors
from glmjax import tokens as tokens_lib
from glmjax.data import rows as rows_lib

_LABELLED = 44  # most places whose tokens are written beside a matrix
_CONTEXT, _MASK, _TARGET, _UNSEEN = "#e0e0e0", "#444444", "#a0a0a0", "#ffffff"  # the same in all pictures
_GREYS = (_CONTEXT, _TARGET, _MASK)  # from light to dark


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
  _check("tokens", ids)
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
  """Draws which places (across) each place (down) sees, in the greys of `row`: contexts, which are seen by all of their
  sample, light; spans, which are seen by what comes after them, darker; white what is not seen.
  """
  from matplotlib import colors, patches

  length = _used(row)
  places = np.arange(length)
  seen = (row["attend_start"][:length, None] <= places) & (places < row["attend_end"][:length, None])
  is_context = np.zeros(length, bool)
  for first, context_end, _ in rows_lib.places_of_samples(row):
    is_context[first:context_end] = True
  kinds = np.where(seen, np.where(is_context[None, :], 0, 1), 2)
  labelled = length <= _LABELLED
  size = 1.6 + (0.2 * length if labelled else 4.8)
  figure = display.figure(size + 0.4, size + 0.3)
  axes = figure.add_subplot()
  axes.imshow(kinds, cmap=colors.ListedColormap((_CONTEXT, _TARGET, _UNSEEN)), vmin=0, vmax=2, interpolation="nearest")
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
  legend = {"context": _CONTEXT, "span": _TARGET, "not seen": _UNSEEN}
  figure.legend(
    handles=[patches.Patch(facecolor=grey, edgecolor="#888888", label=name) for name, grey in legend.items()],
    frameon=False,
    fontsize=8,
    labelcolor=display.INK,
    loc="outside upper center",
    ncols=len(legend),
  )
  return display.grey_picture(figure)


def scores(named: Mapping[str, Score]) -> display.Picture:
  """Draws how unexpected each token of one text is, in bits, by each of several models, at most four."""
  marks = (("o", display.INK), ("s", "#ffffff"), ("^", _TARGET), ("x", display.INK))
  _check("scores", named, most=len(marks))
  first = next(iter(named.values()))
  places = np.arange(len(first.pieces))
  figure = display.figure(1.5 + 0.38 * max(len(places), 12), 3.2)
  axes = figure.add_subplot()
  for i, ((name, score), (mark, colour)) in enumerate(zip(named.items(), marks)):
    bits = -np.asarray(score.log_probs) / np.log(2)
    look = {"markersize": 5 + 4 * (len(named) - i - 1), "markerfacecolor": colour, "markeredgecolor": display.INK}
    axes.plot(places, bits, linestyle="none", marker=mark, label=name, zorder=i + 2, clip_on=False, **look)
  names = [piece if _is_drawable(piece) else "?" for piece in map(_visible, first.pieces)]
  axes.set_xticks(places, names, rotation=60, fontsize=8, fontfamily=display.fonts())
  axes.set_xlabel("token", color=display.INK)
  axes.set_ylabel("unexpected by, bits", color=display.INK)
  axes.set_ylim(bottom=0)
  axes.margins(y=0.15)
  axes.legend(frameon=False, labelcolor=display.INK, loc="upper left", bbox_to_anchor=(1, 1))
  display.plain(axes)
  return display.grey_picture(figure)


def lengths(drawn: Sequence[int], expected: np.ndarray) -> display.Picture:
  """Draws how long spans came out, as bars, beside the shares [n] that lengths 1, 2, ... n should have, as dots."""
  _check("lengths", drawn)
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


def heldout(figures: Mapping[str, Mapping[str, float | None]]) -> display.Picture:
  """Draws what `glmjax evaluate` found for each language: bits per byte (left; less is better) and the share of hidden
  tokens that are guessed right (right; more is better), each beside what knows only how frequent tokens are.

  What was not measured is left out.
  """
  bits = {"unigram_bits_per_byte": "frequencies alone", "bits_per_byte": "the model"}
  shares = {
    "unigram_accuracy": "frequencies alone",
    "infill_accuracy_left_only": "the model, left side seen",
    "infill_accuracy": "the model, both sides seen",
  }
  panels = [
    (dict(zip(names, zip(names.values(), _GREYS[-len(names) :]))), unit, factor, digits)
    for names, unit, factor, digits in (
      (bits, "bits per byte", 1, "%.2f"),
      (shares, "hidden tokens guessed right, %", 100, "%.1f"),
    )
    if any(found.get(name) is not None for found in figures.values() for name in names)
  ]
  _check("heldout", panels)
  figure = display.figure(5 * len(panels), 0.9 + 0.75 * len(figures))
  for place, (names, unit, factor, digits) in enumerate(panels, 1):
    axes = figure.add_subplot(1, len(panels), place)
    height = 0.8 / len(names)
    for i, (name, (label, colour)) in enumerate(names.items()):
      sizes = {y: found[name] for y, found in enumerate(figures.values()) if found.get(name) is not None}
      if sizes:
        values, places = [factor * size for size in sizes.values()], [y + i * height for y in sizes]
        bars = axes.barh(places, values, height, color=colour, edgecolor=display.INK, label=label)
        axes.bar_label(bars, fmt=digits, padding=3, fontsize=8, color=display.INK)
    axes.update_datalim([(0, -height / 2), (0, len(figures) - 0.2 - height / 2)])  # those without a bar too
    axes.autoscale_view(scalex=False)
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


def stacked(named: Mapping[str, Mapping[str, float]], unit: str) -> display.Picture:
  """Draws a bar for each name, of parts that add up, as memory by what it is for; `unit` says what of, and in what."""
  looks = list(itertools.product(("", "////", "....", "xxxx", "----"), ("#f2f2f2", "#bdbdbd", "#777777", "#333333")))
  parts = list(dict.fromkeys(part for sizes in named.values() for part in sizes))
  _check("stacked", parts, most=len(looks))
  figure = display.figure(9, max(1.3 + 0.38 * len(named), 0.3 + 0.19 * len(parts)))
  axes = figure.add_subplot()
  begin = np.zeros(len(named))
  for part, (hatch, colour) in zip(parts, looks):
    sizes = np.array([each.get(part, 0.0) for each in named.values()])
    look = {"color": colour, "edgecolor": display.INK if colour != "#333333" else "#999999", "linewidth": 0.6}
    axes.barh(list(named), sizes, left=begin, height=0.65, hatch=hatch, label=part, **look)
    begin += sizes
  for i, total in enumerate(begin):
    axes.annotate(f"{total:,.2f}", (total, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
  axes.invert_yaxis()
  axes.set_xlim(0, 1.12 * begin.max() or 1)
  axes.set_xlabel(unit, color=display.INK)
  axes.legend(frameon=False, fontsize=8, labelcolor=display.INK, loc="center left", bbox_to_anchor=(1, 0.5))
  display.plain(axes)
  return display.grey_picture(figure)


def shards(array: Any, names: Sequence[str]) -> display.Picture:
  """Draws which devices hold which part of an array: one panel for each entry of the first of three axes.

  Args:
    array: a jax.Array, or a jax.ShapeDtypeStruct with a sharding, of two or three axes.
    names: of its axes.
  """
  shape = getattr(array, "shape", ())
  if getattr(array, "sharding", None) is None or len(shape) not in (2, 3):
    raise errors.InputError(
      f"show.shards: {type(array).__name__} of shape {shape}: give an array of JAX, of two or three axes, that is on "
      "devices"
    )
  if len(names) != len(shape):
    raise errors.InputError(f"show.shards: names of the axes, {names}, are not {len(shape)}")
  panels, down, across = (1, *array.shape) if len(array.shape) == 2 else array.shape
  holders: dict[tuple[tuple[int, int], ...], list[int]] = {}
  for device, index in array.sharding.devices_indices_map(array.shape).items():
    part = tuple(each.indices(size)[:2] for each, size in zip(index, array.shape))
    holders.setdefault(part, []).append(device.id)
  figure = display.figure(1 + 2.2 * panels, 2.6)
  for panel in range(panels):
    axes = figure.add_subplot(1, panels, panel + 1)
    for n, (part, devices) in enumerate(sorted(holders.items())):
      (first, behind), (top, bottom), (left, right) = ((0, 1), *part) if len(part) == 2 else part
      if first <= panel < behind:
        colour, held_by = (_CONTEXT, _TARGET)[n % 2], _devices(devices)
        _box(axes, (left, top, right - left, bottom - top), colour, held_by, size=min(9, 70 / len(held_by)))
    axes.set_xlim(0, across)
    axes.set_ylim(down, 0)
    axes.set_xticks([0, across])
    axes.set_yticks([0, down])
    axes.set_title(f"{names[0]} {panel}" if panels > 1 else "", fontsize=9, color=display.INK)
    display.plain(axes)
  figure.supxlabel(f"{names[-1]} (in each part: the numbers of its devices)", fontsize=9, color=display.INK)
  figure.supylabel(names[-2], fontsize=9, color=display.INK)
  return display.grey_picture(figure)


def _devices(numbers: Sequence[int]) -> str:
  """Writes numbers of devices, those that follow one another as 0-3."""
  found: list[list[int]] = []
  for number in sorted(numbers):
    if found and found[-1][-1] == number - 1:
      found[-1].append(number)
    else:
      found.append([number])
  return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


class Turn(Protocol):
  """What a picture needs of `glmjax.train.pipeline.timeline.Turn`."""

  tick: int
  stage: int
  microbatch: int
  backward: bool


def timeline(turns: Sequence[Turn]) -> display.Picture:
  """Draws a pipeline's schedule: stages down, ticks across, micro-batches as numbers; forward light, backward dark.

  In a tick with both the forward one is drawn above the other.
  """
  _check("timeline", turns)
  ticks, stages = (max(getattr(turn, name) for turn in turns) + 1 for name in ("tick", "stage"))
  both = len({(turn.tick, turn.stage) for turn in turns}) < len(turns)
  figure = display.figure(1 + 9 * min(1.0, ticks / 24), 0.9 + (0.55 if both else 0.35) * stages)
  axes = figure.add_subplot()
  for turn in turns:
    colour, half = (_MASK if turn.backward else _CONTEXT), (0.5 if both else 1.0)
    top = turn.stage + (half if both and turn.backward else 0)
    _box(axes, (turn.tick, top, 1, half), colour, str(turn.microbatch), size=8)
  for stage in range(stages + 1):
    axes.axhline(stage, color=display.INK, linewidth=0.8)
  axes.set_xlim(0, ticks)
  axes.set_ylim(stages, 0)
  axes.set_xticks(np.arange(0, ticks, 2 if ticks > 16 else 1) + 0.5, range(0, ticks, 2 if ticks > 16 else 1))
  axes.set_yticks(np.arange(stages) + 0.5, range(stages))
  axes.set_xlabel("tick (number in a box: micro-batch; light: forward, dark: backward)", color=display.INK)
  axes.set_ylabel("stage", color=display.INK)
  display.plain(axes)
  return display.grey_picture(figure)


def _check(name: str, given: Any, most: int | None = None) -> None:
  """Raises InputError where there is nothing to draw, or more than can be told apart."""
  if len(given) == 0:
    raise errors.InputError(f"show.{name}: there is nothing to draw: what was given is empty")
  if most is not None and len(given) > most:
    raise errors.InputError(f"show.{name}: {len(given)} are more than can be told apart: give {most} at most")


def _box(axes: Any, place: tuple[float, float, float, float], colour: str, label: str, size: float) -> None:
  """Draws a box at (left, top, width, height) with a label in it."""
  from matplotlib import patches

  left, top, width, height = place
  axes.add_patch(patches.Rectangle((left, top), width, height, facecolor=colour, edgecolor="#888888", linewidth=0.6))
  ink = "#ffffff" if colour == _MASK else "#000000"
  axes.text(
    left + width / 2,
    top + height / 2,
    label,
    ha="center",
    va="center",
    fontsize=size,
    color=ink,
    fontfamily=display.fonts(),
    clip_on=True,
  )


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


def _cell(axes: Any, x: float, y: float, label: str, colour: str, height: float = 0.92) -> None:
  """Draws a box with a token in it, which is written smaller the longer it is."""
  _box(axes, (x + 0.03, y, 0.94, height), colour, label, size=min(9.0, 58 / max(len(label), 1)))


def _frame(axes: Any, across: float, down: float, left: float = 0.0) -> None:
  axes.set_xlim(-left, across)
  axes.set_ylim(down, 0)
  axes.axis("off")
