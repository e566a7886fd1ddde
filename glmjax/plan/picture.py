"""The picture of a device's memory: a bar for each part, in grey, and what is usable of it."""

from collections.abc import Mapping
from typing import Any

from glmjax import display
from glmjax.plan import targets

_BAR = "#8c8c8c"


def draw(plan: Mapping[str, Any]) -> display.Picture:
  """Draws what fills a device's memory at the program's peak, in GiB."""
  verdict = "fits" if plan["fits"] else "does not fit"
  title = f"{plan['target']}: {verdict}"
  return bars(plan["memory"], plan["peak_bytes_per_device"], plan["usable_memory_bytes"], title)


def bars(parts: Mapping[str, float], total: float, usable: float | None, title: str) -> display.Picture:
  """Draws bytes by what they are for, in GiB, all of them, and, as a line, what is usable of the device."""
  sizes = {name.replace("_", " "): size / targets.GIB for name, size in parts.items()}
  sizes["all of it"] = total / targets.GIB
  figure = display.figure(8, 1.2 + 0.4 * len(sizes))
  axes = figure.add_subplot()
  names = list(sizes)
  colours = [_BAR] * (len(names) - 1) + [display.INK]
  axes.barh(names, list(sizes.values()), color=colours, height=0.6)
  for i, size in enumerate(sizes.values()):
    axes.annotate(f"{size:,.2f}", (size, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
  if usable is not None:
    room = usable / targets.GIB
    axes.axvline(room, color=display.INK, linestyle=(0, (4, 3)), linewidth=1)
    axes.annotate(
      f"usable: {room:,.1f}", (room, -0.5), xytext=(-4, 0), textcoords="offset points", ha="right", fontsize=9
    )
  axes.invert_yaxis()
  axes.set_xlim(0, 1.12 * max(total, usable or 0) / targets.GIB)
  axes.set_xlabel("memory of a device, GiB", color=display.INK)
  axes.set_title(title, loc="left", color=display.INK, fontsize=11)
  display.plain(axes)
  return display.grey_picture(figure)
