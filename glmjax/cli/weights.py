"""The export command's other formats, and what the inspect and weights commands print."""

import argparse
from typing import Any

from glmjax import errors
from glmjax.io import paths


def export_format(options: argparse.Namespace) -> dict[str, Any]:
  """Returns export's `write_format`; of our own format its layout, where it is another than Orbax's."""
  if options.format in (None, "orbax", "cpu"):
    if options.tensor_parallel is not None:
      raise errors.InputError("--tensor_parallel is for --format=glm130b-sat; our own format loads on any mesh")
    return {"layout": "cpu"} if options.format == "cpu" else {}

  def write(content: Any, folder: paths.Path) -> None:
    from glmjax.thudm import write as write_lib  # here, as flags are looked at before JAX is loaded

    write_lib.write_format(options.format, options.tensor_parallel)(content, folder)

  return {"write_format": write}


def show_inspection(report: dict[str, Any]) -> None:
  """Prints what glmjax.thudm.inspection found."""
  from glmjax.thudm import inspection

  inspection.show(report)


def status_of_inspection(report: dict[str, Any]) -> int:
  """Returns the exit status of the inspect command: 2, that of mistakes to mend, where there is a problem."""
  return 2 if report["problem"] else 0


def show_tables(result: dict[str, Any]) -> None:
  """Prints what glmjax.study.weights found as tables in Markdown."""
  from glmjax.study import weights_table

  print(weights_table.tables(result))
