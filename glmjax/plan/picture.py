"""The picture of a plan's memory: a bar for each part, in grey, and what is usable of a device."""

from collections.abc import Mapping
from typing import Any

from glmjax import display
from glmjax.plan import targets

_BAR = "#8c8c8c"


def draw(plan: Mapping[str, Any]) -> display.Picture:
  """Draws what fills a device's memory at the program's peak, in GiB."""
  sizes = {name.replace("_", " "): size / targets.GIB for name, size in plan["memory"].items()}
  peak, usable = (plan[name] / targets.GIB for name in ("peak_bytes_per_device", "usable_memory_bytes"))
  sizes["all of it"] = peak
  figure = display.figure(8, 1.2 + 0.4 * len(sizes))
  axes = figure.add_subplot()
  names = list(sizes)
  colours = [_BAR] * (len(names) - 1) + [display.INK]
  axes.barh(names, list(sizes.values()), color=colours, height=0.6)
  for i, size in enumerate(sizes.values()):
    axes.annotate(f"{size:,.2f}", (size, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
  axes.axvline(usable, color=display.INK, linestyle=(0, (4, 3)), linewidth=1)
  axes.annotate(
    f"usable: {usable:,.1f}", (usable, -0.5), xytext=(-4, 0), textcoords="offset points", ha="right", fontsize=9
  )
  axes.invert_yaxis()
  axes.set_xlim(0, 1.12 * max(peak, usable))
  axes.set_xlabel("memory of a device, GiB", color=display.INK)
  verdict = "fits" if plan["fits"] else "does not fit"
  axes.set_title(f"{plan['target']}: {verdict}", loc="left", color=display.INK, fontsize=11)
  display.plain(axes)
  return display.grey_picture(figure)
