"""The figures of models' weights, as tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from glmjax.evaluate import markdown
from glmjax.study import kernels


def page(result: Mapping[str, Any], picture: str) -> str:
  """Returns the page of what `weights.measure` found, with its picture, a file beside it."""
  title = f"# Weights: {', '.join(result['checkpoints'])}"
  image = f"![How the weights are spread, and what rounding changes]({picture})"
  return "\n\n".join([title, image, tables(result)]) + "\n"


def tables(result: Mapping[str, Any]) -> str:
  """Returns the tables of what `weights.measure` found."""
  sections = ["## Kernels", _kernels(result)]
  if "held_out" in result:
    sections += ["## Held-out text", _held_out(result)]
  return "\n\n".join(sections)


def _kernels(result: Mapping[str, Any]) -> str:
  """Tabulates how each kind of kernel is spread, and the errors of the schemes, a line for each checkpoint."""
  found = result["checkpoints"]
  kinds = [kind for kind in kernels.KINDS if any(kind in each["kinds"] for each in found.values())]
  header = ["kernels", "of", "excess kurtosis", f"beyond {kernels.OUTLIER:g} σ", "largest / rms"]
  rows = []
  for kind in kinds:
    for name, each in found.items():
      if kind not in each["kinds"]:
        continue
      own = each["kinds"][kind]
      errors = [f"{own['errors'][scheme]:.2%}" for scheme in result["schemes"]]
      rows.append([kind, name, f"{own['kurtosis']:.2f}", f"{own['outliers']:.1e}", f"{own['largest']:.1f}", *errors])
  return (
    "Kurtosis (0: normal values) and outliers are means over layers; of a scheme ‖w − rounded‖ / ‖w‖. Embedding and\n"
    "head are left alone by the schemes: their errors say what rounding them as a head would change.\n\n"
    + markdown.table([*header, *result["schemes"].values()], rows)
  )


def _held_out(result: Mapping[str, Any]) -> str:
  """Tabulates bits per byte of the floats, and what each scheme adds to them."""
  names, rows = list(result["checkpoints"]), []
  for language, models in result["held_out"].items():
    rows.append([language, "float", *(f"{models[name]['float']['bits_per_byte']:.4f}" for name in names), *names[1:]])
    rows[-1][2 + len(names) :] = ["" for _ in names[1:]]
    for scheme, label in result["schemes"].items():
      figures = [models[name][scheme] for name in names]
      rows.append(
        [
          language,
          label,
          *(_interval(each["change"]) for each in figures),
          *(_interval(each["beside_first"]) for each in figures[1:]),
        ]
      )
  header = ["text", "kernels", *names, *(f"{name} over {names[0]}" for name in names[1:])]
  return (
    "Bits per byte, left to right: of the floats all, of a scheme what it adds, with the 95 % interval over windows\n"
    "(paired bootstrap).\n\n" + markdown.table(header, rows)
  )


def _interval(figures: Sequence[float]) -> str:
  value, low, high = figures
  return f"{value:+.4f} ({low:+.4f} to {high:+.4f})"
