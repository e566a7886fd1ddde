"""What Orbax itself writes beside arrays, so that it reads folders that glmjax has written: it is asked to save numbers
under their names.
"""

from collections.abc import Sequence
import functools
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from glmjax.checkpoint import arrays
from glmjax.checkpoint import step_folder
from glmjax.io import paths
from glmjax.io import publish
from glmjax.models import params as params_lib


def write(folder: paths.Path, names: Sequence[str]) -> None:
  """Describes the arrays of these names that are in a folder."""
  _put(folder, _beside(tuple(names), None))


def write_step(folder: paths.Path, names: Sequence[str]) -> None:
  """Describes a step's folder, and the arrays of these names in it."""
  _put(folder, _beside(tuple(names), step_folder.STATE))


def _put(folder: paths.Path, files: dict[str, bytes]) -> None:
  for name, content in files.items():
    if isinstance(folder, pathlib.Path):  # a link, or a folder, would be in the way
      publish.remove(folder / name)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


@functools.lru_cache(maxsize=1)
def _beside(names: tuple[str, ...], item: str | None) -> dict[str, bytes]:
  """Returns the files that Orbax writes for arrays of these names, without the arrays; `item`: it is one of several."""
  import orbax.checkpoint as ocp  # here, as reading needs none of it, and it takes long to load

  here = jax.process_index()  # alone: this may be a thread, while others train
  alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
  args: Any = ocp.args.PyTreeSave(params_lib.nest({name: np.zeros((), np.int8) for name in names}))
  handler: Any = arrays.handler(alone)
  if item is not None:
    record = ocp.JsonCheckpointHandler(filename=step_folder.RECORD, multiprocessing_options=alone)
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(composite_options=options, **{item: handler, step_folder.METADATA: record})
    args = ocp.args.Composite(**{item: args, step_folder.METADATA: ocp.args.JsonSave({})})
  # Where a signal ends the saving, Orbax's threads still write there: it is the signal that is to be told of then.
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
    skeleton = pathlib.Path(scratch) / "skeleton"
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
      checkpointer.save(skeleton, args=args)
    files = (path for path in skeleton.rglob("*") if path.is_file() and not (path.parent / ".zarray").exists())
    named = {str(path.relative_to(skeleton)): path.read_bytes() for path in files}
  return {name: content for name, content in named.items() if name != step_folder.MARK}
