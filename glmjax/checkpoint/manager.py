"""Checkpoints of a training run: saved while training goes on, verified when read, never lost.

A step appears at once, when all of it is written, its checksums too; so a process killed at any moment leaves the last
complete step. Reading recomputes every checksum, and a damaged step is passed over for the newest good one.

  checkpoints/<step>/state/<array>/...   metadata/checksums.json   (Orbax: readable without glmjax)
              metrics.json   (of earlier versions: what was measured of steps once they were saved)
"""

from collections.abc import Callable, Mapping, Sequence
import json
import logging
import math
from typing import Any, TypeVar

import jax

from glmjax import errors
from glmjax.checkpoint import agreement
from glmjax.checkpoint import arrays
from glmjax.checkpoint import checksums
from glmjax.checkpoint import files
from glmjax.checkpoint import in_bucket
from glmjax.checkpoint import on_disk
from glmjax.checkpoint import step_folder
from glmjax.io import bucket
from glmjax.io import bucket_path
from glmjax.io import growing
from glmjax.io import paths
from glmjax.io import seal
from glmjax.parallel import processes

STATE = step_folder.STATE
_NOTED = "metrics.json"  # {step: numbers that came to be known after it was saved}, of earlier versions

_log = logging.getLogger("glmjax")

T = TypeVar("T")


def steps(directory: paths.Path) -> list[int]:
  """Returns the steps in a checkpoints folder, oldest first; each is there once it is complete.

  Raises:
    errors.InputError, OSError: when the folder is no folder, or the system refuses to list it.
  """
  return in_bucket.steps(directory) if isinstance(directory, bucket_path.BucketPath) else on_disk.steps(directory)


def delete_all(directory: paths.Path) -> None:
  """Deletes all steps in a checkpoints folder, those set aside too, the oldest first; none is half there meanwhile."""
  if isinstance(directory, bucket_path.BucketPath):
    in_bucket.delete_all(directory)
  else:
    on_disk.delete_all(directory)


def read_record(folder: paths.Path) -> dict[str, Any]:
  """Reads a step's {"metadata": what the caller of `save` gave, "arrays": Records}.

  Raises:
    files.DamagedError: when it is missing or not what was written.
    errors.InputError, OSError: when the system refuses.
  """
  return checksums.read_sealed(folder / step_folder.MARK, step_folder.MARK, ("metadata", "arrays"))


def newest_metadata(directory: paths.Path) -> dict[str, Any]:
  """Returns what the newest step with a good record was saved with; for one process alone. {} when there is no step.

  Raises:
    errors.InputError: when no record is good.
  """
  problems = []
  for step in reversed(steps(directory)):
    try:
      return read_record(directory / str(step))["metadata"]
    except files.DamagedError as error:
      problems.append(f"step {step}: {error}")
  if problems:
    raise _all_damaged(directory, problems)
  return {}


def read_step(folder: paths.Path, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads the arrays `wanted`, which must be all that the step has.

  Returns:
    The arrays by name, and the metadata they were saved with.

  Raises:
    files.DamagedError: naming what is not as it was written.
    errors.InputError: when the step is from another model, or the system refuses.
  """
  record = agreement.together(lambda: read_record(folder))
  arrays.check_same_model(wanted, record["arrays"], folder)
  return arrays.read(folder / STATE, wanted, record["arrays"]), record["metadata"]


def read_newest(
  directory: paths.Path, read: Callable[[paths.Path], T], step: int | None = None, damaged: set[int] | None = None
) -> tuple[int, T] | None:
  """Calls `read` with the newest step's folder, or with an older one's when that is damaged, saying so.

  All processes of a run call it, and read the steps that process 0 sees.

  Args:
    directory: holds the steps.
    read: raises DamagedError when the folder is damaged, in all processes or in none (`agreement.together`).
    step: this step and no other.
    damaged: receives the steps that were passed over.

  Returns:
    The step and what `read` returned; None when there is no step.

  Raises:
    errors.InputError: when all are damaged, or `step` is or does not exist; when the system refuses.
  """
  tried: dict[int, str | None] = {}  # the problem; None: it has gone meanwhile, a run under way has newer ones
  while word := agreement.of_first(lambda: _next_step(directory, step, tried)):
    candidate = int(word)
    try:
      result = read(directory / word)
    except files.DamagedError as error:
      tried[candidate] = str(error) if _is_there(directory / word) or step is not None else None
      continue
    problems = {bad: problem for bad, problem in tried.items() if problem is not None}
    for bad, problem in problems.items():
      if jax.process_index() == 0:
        _log.warning("%s is damaged, step %d is used instead: %s", directory / str(bad), candidate, problem)
    if damaged is not None:
      damaged.update(problems)
    return candidate, result
  if problems := [f"step {bad}: {problem}" for bad, problem in tried.items() if problem is not None]:
    raise _all_damaged(directory, problems)
  return None


def _is_there(folder: paths.Path) -> bool:
  """Tells whether a step, which may be damaged, has not been deleted."""
  if isinstance(folder, bucket_path.BucketPath):
    return (folder / step_folder.MARK).is_file()
  return folder.exists() or folder.is_symlink()


def _next_step(directory: paths.Path, step: int | None, tried: Mapping[int, Any]) -> str:
  """Returns the newest step that was not tried, or the one that is wanted; "" when there is none."""
  there = steps(directory)
  if step is not None and step not in there:
    raise errors.InputError(f"{directory} has no step {step}: it has {', '.join(map(str, there)) or 'none'}")
  left = [each for each in (there if step is None else [step]) if each not in tried]
  return str(max(left)) if left else ""


def _all_damaged(directory: paths.Path, problems: list[str]) -> errors.InputError:
  return errors.InputError(
    f"{directory}: no undamaged checkpoint; {'; '.join(problems)}; restore a copy, or start again"
  )


class Manager:
  """Saves and restores the training state of one run.

  Args:
    directory: the checkpoints folder; made when missing.
    keep: how many of the newest steps stay.
    keep_best: name of a number in metadata["metrics"]; the step where it is smallest stays as well.
  """

  def __init__(self, directory: paths.Named, keep: int = 3, keep_best: str | None = None):
    if keep < 1:
      raise errors.InputError(f"keep is {keep}: at least one checkpoint must stay, so give 1 or more")
    self._directory = paths.named(directory).absolute()
    self._keep = keep
    self._keep_best = keep_best
    self._current: int | None = None  # the step that this run saved or restored last
    self._saving: int | None = None
    self._damaged: set[int] = set()
    self._steps = (
      in_bucket.Steps(self._directory)
      if isinstance(self._directory, bucket_path.BucketPath)
      else on_disk.Steps(self._directory)
    )

  def save(
    self, step: int, state: Any, metadata: Mapping[str, Any], force: bool = False, lines: Sequence[growing.File] = ()
  ) -> bool:
    """Starts saving; returns when the caller may change, donate or delete `state`.

    Steps at or after `step`, left by a run that went further and was taken back, are set aside.

    Args:
      step: of the run, 0 or more.
      state: any tree of arrays, PRNG keys and numbers.
      metadata: JSON: data position, metrics, anything that must be read together with the state.
      force: save even if this step is the one saved or restored last, and replace it.
      lines: files that must be in the bucket before the step is.

    Returns:
      False when this step was there already, and nothing was written.

    Raises:
      errors.InputError: when this or the previous save could not be written.
    """
    self.wait()
    if step == self._current and not force:
      return False
    stored, records = arrays.prepare(state)
    record = seal.seal({"metadata": json.loads(json.dumps(metadata)), "arrays": records})
    self._saving = step
    try:
      processes.on_first(lambda: self._make_way(step))  # before any process looks whether the step is there
      self._steps.save(step, stored, record, lines)
    except (OSError, ValueError) as error:
      self._failed(error)
    return True

  def _noted(self) -> dict[str, Any]:
    """Reads what earlier versions have noted; nothing where there is none, or it is damaged: the best step then counts
    as one of the others. A refusal of the system is raised: nothing is deleted or written for it.
    """
    try:
      return files.read_json(self._directory / _NOTED, _NOTED)
    except files.DamagedError:
      return {}

  def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]] | None:
    """Restores the newest good state, or that of `step`, with the metadata it was saved with; None when there is none.

    Args:
      abstract_state: the state's tree with ShapeDtypeStructs (with their shardings, on any mesh) or arrays.
      step: that step and no other.

    Raises:
      errors.InputError: when every step is damaged, naming the arrays, or when they are from another model.
    """
    self.wait()
    wanted = arrays.named_leaves(abstract_state)
    found = read_newest(self._directory, lambda folder: read_step(folder, wanted), step, self._damaged)
    if found is None:
      return None
    self._current, (leaves, metadata) = found
    treedef = jax.tree_util.tree_structure(abstract_state)
    return jax.tree_util.tree_unflatten(treedef, [leaves[name] for name in wanted]), metadata

  def latest_step(self) -> int | None:
    """Returns the newest complete step on disk."""
    return max(steps(self._directory), default=None)

  def wait(self) -> None:
    """Returns when nothing is being written, and removes the steps that are no longer to be kept.

    Raises:
      errors.InputError: when the last save could not be written.
    """
    if self._saving is None:
      return
    try:
      self._steps.wait()
    except Exception as error:  # TensorStore, Orbax, buckets and the system each raise their own
      self._failed(error)
    self._current, self._saving = self._saving, None
    if jax.process_index() == 0:
      self._prune()

  def close(self) -> None:
    """Waits for the last save and stops the background threads."""
    try:
      self.wait()
    finally:
      self._steps.close()

  def _make_way(self, step: int) -> None:
    self._directory.mkdir(parents=True, exist_ok=True)
    for old in self._steps.clean():
      if old >= step or old in self._damaged:  # of a future that will not be, or damaged
        name = self._steps.set_aside(old)
        _log.warning("%s is set aside as %s", self._directory / str(old), name)
    self._damaged.clear()

  def _failed(self, error: BaseException) -> None:
    step, self._saving = self._saving, None
    if jax.process_index() == 0:
      self._steps.clean_failed()
    try:
      with bucket.ending():
        last = self.latest_step()
      kept = "there is no earlier one" if last is None else f"step {last} is still there"
    except (errors.InputError, OSError):
      kept = "the earlier ones are still there"
    refused = files.refusal(error)
    advice = (
      "out of memory"
      if isinstance(refused, MemoryError)
      else errors.reason(refused).replace(": ", ", ")
      if refused
      else errors.one_line(error)
    )
    where = self._directory / str(step)
    cause = refused if isinstance(refused, OSError) else error
    raise errors.InputError(f"checkpoint {where} could not be written ({advice}); {kept}") from cause

  def _prune(self) -> None:
    """Deletes steps; none while it cannot be read which is the best."""
    try:
      there = steps(self._directory)
      metrics = {step: metric for step in there if (metric := self._metric(step)) is not None}
    except (errors.InputError, OSError):
      return
    kept = set(there[-self._keep :])
    if metrics:
      kept.add(min(metrics, key=metrics.__getitem__))
    for step in set(there) - kept:
      try:
        self._steps.delete(step)
      except (OSError, errors.InputError) as error:  # what was to be saved is
        reason = errors.reason(error) if isinstance(error, OSError) else errors.one_line(error)
        _log.warning("%s stays for now: %s", self._directory / str(step), reason)

  def _metric(self, step: int) -> float | None:
    if self._keep_best is None:
      return None
    try:
      metadata = read_record(self._directory / str(step))["metadata"]
    except files.DamagedError:
      return None
    noted = self._noted().get(str(step))
    value = (metadata.get("metrics", {}) | (noted if isinstance(noted, dict) else {})).get(self._keep_best)
    return value if isinstance(value, int | float) and math.isfinite(value) else None
