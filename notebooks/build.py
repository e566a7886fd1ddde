"""Makes notebooks out of their sources: NAME.ipynb, run from start to end, of NAME.py (jupytext's percent format).

python notebooks/build.py              # all of them, as `make notebooks`
python notebooks/build.py 01_blank_infilling
"""

import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jupytext
import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).parent
_SECONDS = 600  # that a cell may take


def read(source: pathlib.Path) -> nbformat.NotebookNode:
  """Returns the notebook of a source, without outputs; the same each time."""
  notebook = jupytext.read(source)
  for i, cell in enumerate(notebook.cells):
    cell.id = f"cell-{i}"
  notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
  return notebook


def execute(notebook: nbformat.NotebookNode, folder: pathlib.Path, parameters: Mapping[str, Any] = {}) -> None:
  """Runs a notebook's cells in a folder, and keeps what they show; `parameters` are set behind its own.

  Raises:
    nbclient.exceptions.CellExecutionError: for a cell that fails.
  """
  for cell in notebook.cells:
    if parameters and "parameters" in cell.metadata.get("tags", ()):
      cell.source = "\n".join([cell.source, *(f"{name} = {value!r}" for name, value in parameters.items())])
  resources = {"metadata": {"path": str(folder)}}
  settings = {"timeout": _SECONDS, "record_timing": False, "coalesce_streams": True}  # of a bar its last state alone
  nbclient.NotebookClient(notebook, resources=resources, **settings).execute()
  for cell in notebook.cells:
    for output in cell.get("outputs", ()):
      if output.output_type == "stream":
        output.text = re.sub(r"[ \r]+\Z", "", output.text)  # of a bar that was wiped out
  notebook.metadata["language_info"] = {"name": "python"}  # without the version of the Python that ran it


def main(names: Sequence[str]) -> None:
  """Makes the notebooks of these names, or all."""
  for source in sorted(FOLDER.glob("[0-9]*.py")):
    if not names or source.stem in names:
      notebook = read(source)
      execute(notebook, FOLDER)
      nbformat.write(notebook, source.with_suffix(".ipynb"))
      print(f"{source.stem}: {source.with_suffix('.ipynb').stat().st_size:,} bytes")


if __name__ == "__main__":
  main(sys.argv[1:])
