"""Notebooks are their sources, run: the same cells, outputs with pictures, and each runs from start to end."""

import importlib.util
import json
import pathlib
import re
import sys
import types

import forked
import nbformat
import pytest
import xla_flags

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
MESHES = {
  "data 8": {"data": 8},
  "fsdp 8": {"data": 1, "fsdp": 8},
  "data 2, tensor 4": {"data": 2, "tensor": 4},
  "data 2, stage 4": {"data": 2, "stage": 4},
}
SMALL = {  # the parameters of a run that takes seconds
  "01_blank_infilling": {"ROWS": 40},
  "02_train_small": {"SAMPLE": False, "VOCABULARY": 600, "LAYERS": 2, "WIDTH": 64, "STEPS": 100, "BLANKS": 200},
  "03_chatglm": {"STEPS": 120},
  "04_plan_hardware": {"LAYERS": 2},
  "05_scaling": {"STEPS": 2, "MESHES": MESHES},
  "06_serve": {"STEPS": 120, "CLIENTS": 4},
  "07_evaluate": {"STEPS": 40},
  "08_finetune": {"STEPS": 40, "TUNING": 20},
  "09_stability": {"SAMPLE": False, "NORMS": {"Pre-LN": "pre"}, "SHRINKS": {"1": (1.0,)}, "RATES": [0.1], "STEPS": 8},
  "10_cards": {"STEPS": 540},
}
DEVICES = {  # virtual ones: fewer take less time
  "02_train_small": 2,
  "03_chatglm": 1,
  "05_scaling": 8,
  "06_serve": 1,
  "07_evaluate": 1,
  "08_finetune": 1,
  "09_stability": 1,
}
PICTURES = {
  "01_blank_infilling": 11,
  "02_train_small": 4,
  "03_chatglm": 3,
  "04_plan_hardware": 9,
  "05_scaling": 8,
  "06_serve": 1,
  "07_evaluate": 2,
  "08_finetune": 3,
  "09_stability": 3,
  "10_cards": 1,
}


def _build():
  spec = importlib.util.spec_from_file_location("build_notebooks", ROOT / "notebooks" / "build.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


build = _build()


def outputs(notebook):
  return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
  return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


@pytest.fixture(params=SOURCES, ids=lambda source: source.stem)
def source(request):
  return request.param


def test_what_is_committed_is_of_the_source_and_small(source):
  path = source.with_suffix(".ipynb")
  committed, wanted = nbformat.read(path, as_version=4), build.read(source)
  nbformat.validate(committed)
  cells = [[(cell.id, cell.cell_type, cell.source) for cell in each.cells] for each in (committed, wanted)]
  assert cells[0] == cells[1], "run `make notebooks`"
  assert not [o for o in outputs(committed) if o.output_type == "error" or o.get("name") == "stderr"]
  counts = [cell.execution_count for cell in committed.cells if cell.cell_type == "code"]
  assert counts == list(range(1, len(counts) + 1))
  assert len(pictures(committed)) == PICTURES[source.stem] and path.stat().st_size < 300_000
  assert not [place for place in (str(ROOT), str(pathlib.Path.home())) if place in json.dumps(outputs(committed))]


def test_it_runs_without_a_warning(source, tmp_path, tmp_path_factory, monkeypatch):
  """At a small size, in an empty folder, with glmjax installed; the asserts in it hold.

  Some train, go on, and measure several models, in part by equal programs, which are compiled once.
  """
  if source.stem in DEVICES:
    monkeypatch.setenv("XLA_FLAGS", xla_flags.on(DEVICES[source.stem]))
    for name, value in forked.compiled_once(tmp_path_factory.mktemp("compiled")).items():
      monkeypatch.setenv(name, value)
  notebook = build.read(source)
  strict = nbformat.v4.new_code_cell("import warnings\nwarnings.simplefilter('error')")
  notebook.cells.insert(0, strict)
  build.execute(notebook, tmp_path, SMALL[source.stem])
  assert not [o for o in outputs(notebook) if o.get("name") == "stderr"]
  assert len(pictures(notebook)) == PICTURES[source.stem]
  assert not list(tmp_path.iterdir())  # nothing is left behind


def test_it_says_what_it_takes_and_what_is_next(source):
  cells = build.read(source).cells
  assert "*Takes*" in cells[0].source and "minute" in cells[0].source
  assert cells[-1].source.startswith("## What to try next")


def test_all_begin_with_the_same_installation():
  """Whoever opens any of them first gets the same environment."""
  first = {next(cell.source for cell in build.read(source).cells if cell.cell_type == "code") for source in SOURCES}
  assert len(first) == 1 and "jax[tpu]" in first.pop()


def test_an_older_jax_that_was_imported_asks_for_a_restart(monkeypatch):
  first = next(cell.source for cell in build.read(SOURCES[0]).cells if cell.cell_type == "code")
  exec(first, {})  # all is installed here
  monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(__version__="0.7.2"))
  with pytest.raises(SystemExit, match="restart the session"):
    exec(first, {})


def test_its_parameters_are_those_of_the_small_size(source):
  """One that is renamed would have the tests run it at full size."""
  [cell] = [cell for cell in build.read(source).cells if "parameters" in cell.metadata.get("tags", ())]
  assert set(SMALL[source.stem]) <= set(re.findall(r"^(\w+)(?:: [^=]+)? = ", cell.source, re.M))
