"""`glmjax plan --fits --html`: a page that says what runs on which cards, of the compiled table, without compiling.

The page is calculator.html beside this file with the table in it. It asks for nothing from elsewhere, so that it can be
opened from a disk, and its arithmetic is that of compiled.py and footprint.py.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

from glmjax.io import folders, paths, publish
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import compiled
from glmjax.plan import fits
from glmjax.plan import footprint
from glmjax.plan import memory
from glmjax.plan import programs
from glmjax.plan import targets

_PAGE = pathlib.Path(__file__).with_name("calculator.html")
_PLACE = '<script type="application/json" id="data">{}</script>'
_NOT_SAID = r"NVIDIA|Tesla|GeForce|-SXM\d-?|HBM\d"  # of a card's name: what people leave out
_TITLES = {"6b": "ChatGLM-6B", "10b": "GLM-10B", "130b": "GLM-130B"}


def write(html: paths.Named) -> list[dict[str, Any]]:
  """Writes the page, and returns the smallest sets for one row that are compiled, as `fits.smallest` has them.

  Args:
    html: the file.
  """
  table = compiled.shipped()
  publish.write_text(folders.claim_file(html, "--html"), page(table))
  return fits.rows_of(table)


def page(table: compiled.Table) -> str:
  """Returns the page with a table in it."""
  text = json.dumps(data(table)).replace("<", "\\u003c")
  return _PAGE.read_text(encoding="utf-8").replace(_PLACE, _PLACE.replace("{}", text))


def data(table: compiled.Table) -> dict[str, Any]:
  """Returns what the page's arithmetic needs: bytes of weights, and of a token's cache, on each card of every set."""
  return {
    "jax": table.jax,
    "models": {
      name: _model(name, config)
      for name, config in sorted(table.models.items(), key=lambda each: params_lib.count(each[1]))
    },
    "cards": {
      name: {
        "title": re.sub(_NOT_SAID, " ", targets.CHIPS[name].kind).strip(),
        "architecture": compiled.architecture(name),
        "memory": targets.CHIPS[name].memory_bytes,
        "usable": targets.room(targets.CHIPS[name]),
      }
      for name in footprint.CARDS
    },
    "points": {
      "/".join(map(str, dataclasses.astuple(cell))): [dataclasses.asdict(point) for point in points]
      for cell, points in table.cells.items()
    },
  }


def _model(name: str, config: config_lib.GLMConfig) -> dict[str, Any]:
  sets = memory.sets(config)
  weights: dict[int, dict[int, int]] = {}
  cache: dict[int, int] = {}
  for bits in footprint.BITS:
    workload = programs.Decode(1, 1, None if bits == 16 else bits)
    for count in sets:
      parts = memory.decoding(config, workload, mesh_lib.MeshConfig(data=1, tensor=count)).parts
      cache[count] = round(parts["KV cache"])
      weights.setdefault(bits, {})[count] = round(sum(parts.values())) - cache[count]
  return {
    "title": _TITLES.get(name, name),
    "longest": config.max_length,
    "sets": sets,
    "weights": weights,
    "cache": cache,
  }
