"""Steps on a disk: Orbax writes them, and each appears, and goes, by one rename."""

from collections.abc import Mapping, Sequence
import contextlib
import os
import pathlib
import time
from typing import Any

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import files
from glmjax.checkpoint import step_folder
from glmjax.io import growing
from glmjax.io import publish
from glmjax.parallel import processes

_DELETING = "deleting"


def steps(directory: pathlib.Path) -> list[int]:
  """Returns the steps in a checkpoints folder, oldest first; raises as manager.steps."""
  try:
    names = os.listdir(directory)
  except FileNotFoundError:
    if not os.path.islink(directory):
      return []
    raise errors.InputError(
      f"{directory} is a link to what is not there: mount or restore it, or remove the link"
    ) from None
  except NotADirectoryError:
    raise errors.InputError(f"{directory} is no folder, and the checkpoints are kept there: move it away") from None
  except OSError as error:
    files.raise_refusal(error, directory, directory.name)
  return sorted(int(name) for name in names if step_folder.STEP.fullmatch(name))


def delete_all(directory: pathlib.Path) -> None:
  """Deletes all steps, those set aside too, the oldest first."""
  if directory.is_dir():
    ours = [child for child in directory.iterdir() if child.name.split(".")[0].isdecimal()]
    for child in sorted(ours, key=lambda child: int(child.name.split(".")[0])):
      _delete(child)


def _delete(folder: pathlib.Path) -> None:
  doomed = folder.with_name(f"{folder.name}.{_DELETING}")  # renamed first: half a step never passes for one
  folder.rename(doomed)
  publish.remove(doomed)


class Steps:
  """The steps of one run, in a folder that is made when the first is saved."""

  def __init__(self, directory: pathlib.Path):
    import orbax.checkpoint as ocp  # here, as reading needs none of it, and it takes long to load

    self._directory = directory
    self._checkpointer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(
        **{
          step_folder.STATE: arrays.handler(),
          step_folder.METADATA: ocp.JsonCheckpointHandler(filename=step_folder.RECORD),
        }
      )
    )

  def clean(self) -> list[int]:
    """Removes what a killed or failed process left: unfinished saves and deletions; returns the steps there are."""
    for child in self._directory.glob("*"):
      if child.name.split(".")[0].isdecimal() and (
        ".orbax-checkpoint-tmp" in child.name or child.suffix == f".{_DELETING}"
      ):
        publish.remove(child)
    return steps(self._directory)

  def clean_failed(self) -> None:
    """Removes what a save that has just failed left."""
    for _ in range(10):  # other files of it may still be on their way
      time.sleep(0.1)
      with contextlib.suppress(OSError, errors.InputError):  # the next save tries again
        self.clean()

  def set_aside(self, step: int) -> str:
    """Renames a step; returns its new name."""
    name = f"{step}.{step_folder.ASIDE}"
    while os.path.lexists(self._directory / name):
      name += "+"
    (self._directory / str(step)).rename(self._directory / name)
    return name

  def delete(self, step: int) -> None:
    """Deletes the step of that number; a rename takes its name away first."""
    _delete(self._directory / str(step))

  def save(
    self, step: int, stored: Mapping[str, Any], record: Mapping[str, Any], lines: Sequence[growing.File] = ()
  ) -> None:
    """Begins to write a step: its arrays by name, and its record; `lines` are there already."""
    import orbax.checkpoint as ocp

    folder = self._directory / str(step)
    processes.check_same_filesystem(lambda: int(folder.exists()), str(folder))
    items = {step_folder.STATE: arrays.orbax_args(stored), step_folder.METADATA: ocp.args.JsonSave(record)}
    self._checkpointer.save(folder, args=ocp.args.Composite(**items))

  def wait(self) -> None:
    """Returns when what was begun is written; raises what TensorStore, Orbax and the system raise."""
    self._checkpointer.wait_until_finished()

  def close(self) -> None:
    """Stops the threads."""
    self._checkpointer.close()
