"""What notebooks show: pictures in one style, readable in grey, and HTML in which all text is escaped."""

import dataclasses
import functools
import html
import io as io_lib
import os
from collections.abc import Iterable, Sequence
from typing import Any

from glmjax import errors
from glmjax.io import paths
from glmjax.io import publish

INK, FAINT = "#333333", "#c9c9c9"
COLOURS = ("#1f6fb4", "#d1701a", "#3a8f5c", "#8a5aa8")  # of lines, in their order,
LINES = ("-", (0, (5, 1.5)), (0, (1, 1)), "-.")  # and how they are dashed, to be told apart in grey
_LONGEST = 100  # characters of a table's cell
# Fonts with Chinese characters: of Linux distributions, macOS and Windows.
_CHINESE = (
  *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei"),
  *("WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Heiti TC", "STHeiti"),
  *("Arial Unicode MS", "Microsoft YaHei", "SimHei", "SimSun"),
)
_MARK = "background:#dddddd;color:#000000;border-bottom:2px solid #000000"
_BOX = "display:inline-block;margin:1px;padding:1px 3px;border:1px solid #999999;white-space:pre;"


@dataclasses.dataclass(frozen=True)
class Picture:
  """A PNG; a notebook shows it where it is a cell's value."""

  png: bytes = dataclasses.field(repr=False)

  def _repr_png_(self) -> bytes:
    return self.png

  def save(self, path: str | os.PathLike) -> None:
    """Writes the file, whole or not at all."""
    with publish.file(paths.named(path, "the picture")) as file:
      file.write(self.png)


class Figures(dict):
  """A dict of figures, by name or by what they are of and name; a notebook shows it as a table."""

  def _repr_html_(self) -> str:
    if self and all(isinstance(value, dict) for value in self.values()):
      names = dict.fromkeys(name for value in self.values() for name in value)
      return table(("", *self), ((name, *(_cell(value.get(name)) for value in self.values())) for name in names))
    return table(("", ""), ((name, _cell(value)) for name, value in self.items()))


def figure(width: float, height: float, dpi: int = 100) -> Any:
  """Returns an empty matplotlib figure of so many inches, which belongs to no window.

  Raises:
    errors.InputError: where matplotlib is not installed.
  """
  try:
    from matplotlib.backends import backend_agg
    from matplotlib import figure as figure_lib
  except ImportError as error:
    raise errors.InputError("pictures need matplotlib; pip install 'glmjax[report]'") from error
  made = figure_lib.Figure(figsize=(width, height), dpi=dpi, layout="constrained")
  backend_agg.FigureCanvasAgg(made)
  return made


@functools.cache
def fonts() -> list[str]:
  """Names the pictures' font and, behind it, an installed one that has Chinese characters, if there is any."""
  from matplotlib import font_manager

  installed = {font.name for font in font_manager.fontManager.ttflist}
  return ["DejaVu Sans", *[name for name in _CHINESE if name in installed][:1]]


def plain(axes: Any) -> None:
  """Leaves of an axes' frame the left and the lower side, faint."""
  axes.set_axisbelow(True)
  axes.tick_params(colors=INK)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  for side in ("left", "bottom"):
    axes.spines[side].set_color(FAINT)


def picture(figure: Any) -> Picture:
  """Returns what is drawn on a figure, in 64 colours: half of the bytes, as notebooks carry their pictures."""
  from PIL import Image  # comes with matplotlib

  with Image.open(io_lib.BytesIO(_png(figure))) as drawn:
    return _written(drawn.convert("RGB").quantize(64, dither=Image.Dither.NONE))


def grey_picture(figure: Any) -> Picture:
  """Returns what is drawn on a figure, in sixteen greys: a third of the bytes."""
  from PIL import Image

  with Image.open(io_lib.BytesIO(_png(figure))) as drawn:
    return _written(drawn.convert("L").quantize(16))


def _png(figure: Any) -> bytes:
  written = io_lib.BytesIO()
  figure.savefig(written, format="png")
  return written.getvalue()


def _written(drawn: Any) -> Picture:
  written = io_lib.BytesIO()
  drawn.save(written, format="png", optimize=True)
  return Picture(written.getvalue())


def marked(text: str, places: Iterable[tuple[int, int]]) -> str:
  """Returns HTML of a text in which [first, end) of each of the places, in order, is marked."""
  parts, done = [], 0
  for first, end in places:
    parts += [html.escape(text[done:first]), f'<mark style="{_MARK}">{html.escape(text[first:end])}</mark>']
    done = end
  return f'<div style="white-space:pre-wrap">{"".join(parts)}{html.escape(text[done:])}</div>'


def shaded(pieces: Sequence[str], shares: Sequence[float], notes: Sequence[str]) -> str:
  """Returns HTML of pieces of a text in a row, each as dark as its share (0 to 1), with a note under the pointer."""
  parts = []
  for piece, share, note in zip(pieces, shares, notes, strict=True):
    grey = round(255 - 175 * min(max(share, 0.0), 1.0))
    ink = "#000000" if grey > 140 else "#ffffff"
    style = f"{_BOX}background:rgb({grey},{grey},{grey});color:{ink}"
    parts.append(f'<span style="{style}" title="{html.escape(note)}">{html.escape(piece)}</span>')
  return f"<div>{''.join(parts)}</div>"


def _cell(value: Any) -> str:
  """Writes a figure for a table: six digits of a number, nothing for None, the beginning of what is long."""
  if value is None:
    return ""
  if isinstance(value, float):
    return f"{value:,.6g}"
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}"
  text = str(value)
  return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """Returns an HTML table."""
  lines = [("th", head), *(("td", row) for row in rows)]
  body = "".join(
    "<tr>" + "".join(f'<{tag} style="text-align:left">{html.escape(str(cell))}</{tag}>' for cell in cells) + "</tr>"
    for tag, cells in lines
  )
  return f"<table>{body}</table>"
