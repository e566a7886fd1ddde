"""Checkpoints of a training run: saved while training goes on, verified when read, never lost.

A step's folder appears by one rename, when all of it is written, its checksums too; so a process killed at
any moment leaves the last complete step. Reading recomputes every checksum, and a damaged step is passed
over for the newest good one.

  checkpoints/<step>/state/<array>/...   metadata/checksums.json   (Orbax: readable without glmjax)
"""

from collections.abc import Callable, Mapping
import json
import logging
import math
import pathlib
import shutil
import time
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from glmjax import errors
from glmjax.checkpoint import arrays
from glmjax.checkpoint import checksums

STATE, _METADATA, _RECORD = "state", "metadata", "checksums.json"
_ASIDE = "aside"  # suffix of steps that a run went back behind; kept for their owner to look at or delete
_DELETING = "deleting"

_log = logging.getLogger("glmjax")

T = TypeVar("T")


def steps(directory: pathlib.Path) -> list[int]:
  """The complete steps in a checkpoints folder, oldest first."""
  if not directory.is_dir():
    return []
  return sorted(int(child.name) for child in directory.iterdir() if child.name.isdecimal() and child.is_dir())


def read_record(folder: pathlib.Path) -> dict[str, Any]:
  """A step's {"metadata": what the caller of `save` gave, "arrays": Records}.

  Raises:
    arrays.DamagedError: when it is missing or not what was written.
  """
  file = folder / _METADATA / _RECORD
  try:
    return checksums.unseal(file.read_bytes())
  except (OSError, ValueError) as error:
    reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged: {arrays.one_line(error)}"
    raise arrays.DamagedError(f"{file.relative_to(folder)} {reason}") from error


def read_step(folder: pathlib.Path, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads the arrays `wanted`, which must be all that the step has.

  Returns:
    The arrays by name, and the metadata they were saved with.

  Raises:
    arrays.DamagedError: naming what is not as it was written.
    errors.InputError: when the step is from another model.
  """
  record = read_record(folder)
  arrays.check_same_model(wanted, record["arrays"], folder)
  return arrays.read(folder / STATE, wanted, record["arrays"]), record["metadata"]


def read_newest(directory: pathlib.Path, read: Callable[[pathlib.Path], T], step: int | None = None,
                damaged: set[int] | None = None) -> tuple[int, T] | None:
  """Calls `read` with the newest step's folder, or with an older one's when that is damaged, saying so.

  Args:
    directory: holds the steps.
    read: raises DamagedError when the folder is damaged.
    step: this step and no other.
    damaged: receives the steps that were passed over.

  Returns:
    The step and what `read` returned; None when there is no step.

  Raises:
    errors.InputError: when all are damaged, or `step` is or does not exist.
  """
  there = steps(directory)
  if step is not None and step not in there:
    raise errors.InputError(f"{directory} has no step {step}: it has {', '.join(map(str, there)) or 'none'}")
  problems = {}
  for candidate in reversed(there) if step is None else [step]:
    try:
      result = read(directory / str(candidate))
    except arrays.DamagedError as error:
      if step is None and not (directory / str(candidate)).exists():  # a run under way has newer ones
        return read_newest(directory, read, None, damaged)
      problems[candidate] = str(error)
      continue
    for bad, problem in problems.items():
      if jax.process_index() == 0:
        _log.warning("%s is damaged, step %d is used instead: %s", directory / str(bad), candidate, problem)
    if damaged is not None:
      damaged.update(problems)
    return candidate, result
  if problems:
    listed = "; ".join(f"step {bad}: {problem}" for bad, problem in problems.items())
    raise errors.InputError(f"{directory}: no undamaged checkpoint; {listed}; restore a copy, or start again")
  return None


class Manager:
  """Saves and restores the training state of one run.

  Args:
    directory: the checkpoints folder; made when missing.
    keep: how many of the newest steps stay.
    keep_best: name of a number in metadata["metrics"]; the step where it is smallest stays as well.
  """

  def __init__(self, directory: str | pathlib.Path, keep: int = 3, keep_best: str | None = None):
    if keep < 1:
      raise errors.InputError(f"keep is {keep}: at least one checkpoint must stay, so give 1 or more")
    self._directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._keep_best = keep_best
    self._current: int | None = None  # the step that this run saved or restored last
    self._saving: int | None = None
    self._damaged: set[int] = set()
    self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**{
        STATE: arrays.handler(), _METADATA: ocp.JsonCheckpointHandler(filename=_RECORD)}))

  def save(self, step: int, state: Any, metadata: Mapping[str, Any], force: bool = False) -> bool:
    """Starts saving; returns when the caller may change, donate or delete `state`.

    Steps at or after `step`, left by a run that went further and was taken back, are set aside.

    Args:
      step: of the run, 0 or more.
      state: any tree of arrays, PRNG keys and numbers.
      metadata: JSON: data position, metrics, anything that must be read together with the state.
      force: save even if this step is the one saved or restored last, and replace it.

    Returns:
      False when this step was there already, and nothing was written.

    Raises:
      errors.InputError: when this or the previous save could not be written.
    """
    self.wait()
    if step == self._current and not force:
      return False
    tree, records = arrays.prepare(state)
    record = checksums.seal({"metadata": json.loads(json.dumps(metadata)), "arrays": records})
    self._saving = step
    try:
      if jax.process_index() == 0:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._clean()
        self._set_aside(step)
      self._checkpointer.save(self._directory / str(step),
                              args=ocp.args.Composite(**{STATE: tree, _METADATA: ocp.args.JsonSave(record)}))
    except (OSError, ValueError) as error:
      self._failed(error)
    return True

  def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]] | None:
    """The newest good state, or that of `step`, with the metadata it was saved with; None when there is none.

    Args:
      abstract_state: the state's tree with ShapeDtypeStructs (with their shardings, on any mesh) or arrays.
      step: that step and no other.

    Raises:
      errors.InputError: when every step is damaged, naming the arrays, or when they are from another model.
    """
    self.wait()
    wanted = arrays.flatten(abstract_state)
    found = read_newest(self._directory, lambda folder: read_step(folder, wanted), step, self._damaged)
    if found is None:
      return None
    self._current, (leaves, metadata) = found
    treedef = jax.tree_util.tree_structure(abstract_state)
    return jax.tree_util.tree_unflatten(treedef, [leaves[name] for name in wanted]), metadata

  def latest_step(self) -> int | None:
    """The newest complete step on disk."""
    return max(steps(self._directory), default=None)

  def wait(self) -> None:
    """Returns when nothing is being written, and removes the steps that are no longer to be kept.

    Raises:
      errors.InputError: when the last save could not be written.
    """
    if self._saving is None:
      return
    try:
      self._checkpointer.wait_until_finished()
    except Exception as error:  # TensorStore, Orbax and the operating system each raise their own
      self._failed(error)
    self._current, self._saving = self._saving, None
    if jax.process_index() == 0:
      self._prune()

  def close(self) -> None:
    """Waits for the last save and stops the background threads."""
    try:
      self.wait()
    finally:
      self._checkpointer.close()

  def _failed(self, error: BaseException) -> None:
    step, self._saving = self._saving, None
    if jax.process_index() == 0:
      for _ in range(10):  # other files of the failed save may still be on their way
        time.sleep(0.1)
        self._clean()
    last = self.latest_step()
    full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error) or "Disk quota" in str(error)
    advice = "the disk is full, free some space" if full else arrays.one_line(error)
    kept = "there is no earlier one" if last is None else f"step {last} is still there"
    where = self._directory / str(step)
    raise errors.InputError(f"checkpoint {where} could not be written ({advice}); {kept}") from error

  def _clean(self) -> None:
    """Removes what a killed or failed process left: unfinished saves and deletions."""
    for child in self._directory.glob("*"):
      if child.name.split(".")[0].isdecimal() and (
          ".orbax-checkpoint-tmp" in child.name or child.suffix == f".{_DELETING}"):
        shutil.rmtree(child, ignore_errors=True)

  def _set_aside(self, step: int) -> None:
    """Renames the steps that are damaged or belong to a future that will not be."""
    for old in steps(self._directory):
      if old >= step or old in self._damaged:
        name = f"{old}.{_ASIDE}"
        while (self._directory / name).exists():
          name += "+"
        (self._directory / str(old)).rename(self._directory / name)
        _log.warning("%s is set aside as %s", self._directory / str(old), name)
    self._damaged.clear()

  def _prune(self) -> None:
    there = steps(self._directory)
    kept = set(there[-self._keep:])
    metrics = {step: metric for step in there if (metric := self._metric(step)) is not None}
    if metrics:
      kept.add(min(metrics, key=metrics.__getitem__))
    for step in set(there) - kept:
      doomed = self._directory / f"{step}.{_DELETING}"  # renamed first: half a step never passes for one
      (self._directory / str(step)).rename(doomed)
      shutil.rmtree(doomed, ignore_errors=True)

  def _metric(self, step: int) -> float | None:
    if self._keep_best is None:
      return None
    try:
      metadata = read_record(self._directory / str(step))["metadata"]
    except arrays.DamagedError:
      return None
    value = metadata.get("metrics", {}).get(self._keep_best)
    return value if isinstance(value, int | float) and math.isfinite(value) else None
