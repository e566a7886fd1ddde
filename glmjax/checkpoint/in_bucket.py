"""Steps in a bucket, where nothing can be renamed: a step is whole once its record is there, which is written last, and
which goes first.
"""

from collections.abc import Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import re
import threading
from typing import Any

from glmjax import errors
from glmjax.checkpoint import files
from glmjax.checkpoint import objects
from glmjax.checkpoint import step_folder
from glmjax.io import bucket
from glmjax.io import bucket_path
from glmjax.io import growing
from glmjax.io import lease

_OURS = re.compile(rf"({step_folder.STEP.pattern})(\.{step_folder.ASIDE}\+*)?")


def steps(directory: bucket_path.BucketPath) -> list[int]:
  """Returns the whole steps in a checkpoints folder, oldest first; raises as manager.steps."""
  try:
    ours = [child for child in _children(directory) if step_folder.STEP.fullmatch(child.name)]
    return sorted(int(child.name) for child in ours if (child / step_folder.MARK).is_file())
  except OSError as error:
    files.raise_refusal(error, directory, directory.name)


def clean(directory: bucket_path.BucketPath) -> list[int]:
  """Removes what killed or failed processes left of steps; returns those that are whole."""
  whole = []
  for child in _children(directory):
    if not (child / step_folder.MARK).is_file():
      _delete(child)
    elif step_folder.STEP.fullmatch(child.name):
      whole.append(int(child.name))
  return sorted(whole)


def delete_all(directory: bucket_path.BucketPath) -> None:
  """Deletes all steps, those set aside and unfinished too, the oldest first."""
  for child in sorted(_children(directory), key=lambda child: int(child.name.split(".")[0])):
    _delete(child)


def _children(directory: bucket_path.BucketPath) -> Iterator[bucket_path.BucketPath]:
  try:
    yield from (child for child in directory.iterdir() if _OURS.fullmatch(child.name))
  except FileNotFoundError:
    return


def _delete(folder: bucket_path.BucketPath) -> None:
  lease.check()
  folder.remove_tree(step_folder.MARK)


def _remove(folder: bucket_path.BucketPath) -> None:
  with contextlib.suppress(OSError, errors.InputError):  # the next save removes what is left
    folder.remove_tree()


class Steps:
  """The steps of one run."""

  def __init__(self, directory: bucket_path.BucketPath):
    self._directory = directory
    self._saving: objects.Saving | None = None
    self._deleting: list[threading.Thread] = []

  def clean(self) -> list[int]:
    """Removes what killed or failed processes left of steps; returns those that are whole."""
    self._wait_deleted()
    return clean(self._directory)

  def clean_failed(self) -> None:
    """Leaves what a save that has just failed left: a bucket that has refused it answers no better now."""

  def set_aside(self, step: int) -> str:
    """Copies a step within the bucket, its record last, and deletes it; returns the copy's name."""
    lease.check()
    source, name = self._directory / str(step), f"{step}.{step_folder.ASIDE}"
    while (self._directory / name / step_folder.MARK).is_file():
      name += "+"
    inside = [str(path.relative_to(source)) for path in source.rglob("*")]
    with concurrent.futures.ThreadPoolExecutor(objects.AT_ONCE) as pool:
      others = [each for each in inside if each != step_folder.MARK]
      list(pool.map(lambda each: source.bucket.copy((source / each).key, (self._directory / name / each).key), others))
    lease.check()
    source.bucket.copy((source / step_folder.MARK).key, (self._directory / name / step_folder.MARK).key)
    _delete(source)
    return name

  def delete(self, step: int) -> None:
    """Deletes a step: it is none at once, and its objects, of which there may be many, go in a thread."""
    lease.check()
    folder = self._directory / str(step)
    (folder / step_folder.MARK).unlink()
    self._deleting.append(threading.Thread(target=_remove, args=(folder,), daemon=True))
    self._deleting[-1].start()

  def _wait_deleted(self) -> None:
    while self._deleting:
      self._deleting.pop().join()

  def save(
    self, step: int, stored: Mapping[str, Any], record: Mapping[str, Any], lines: Sequence[growing.File] = ()
  ) -> None:
    """Begins to write a step: its arrays by name, and its record; `lines` are put before it is there."""
    self._saving = objects.Saving(self._directory / str(step), stored, record, lines)

  def wait(self) -> None:
    """Returns when what was begun is published; raises what objects.Saving raises."""
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.wait()

  def close(self) -> None:
    """Waits until what was deleted is gone, or there is no answer; the next save removes what is left."""
    for thread in self._deleting:
      thread.join(bucket.left())
