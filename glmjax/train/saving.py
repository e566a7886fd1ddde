"""When a run's state is saved, and what with it: each step once, and never a state that is not finite."""

import contextlib
from collections.abc import Sequence

from glmjax import errors
from glmjax.checkpoint import manager as manager_lib
from glmjax.checkpoint import recorded
from glmjax.io import growing
from glmjax.train import divergence
from glmjax.train import feed as feed_lib
from glmjax.train import metrics as metrics_lib
from glmjax.train import runtime as runtime_lib
from glmjax.train import state as state_lib
from glmjax.train import workdir as workdir_lib


class Saving:
  """Checkpoints of one run."""

  def __init__(
    self,
    runtime: runtime_lib.Runtime,
    manager: manager_lib.Manager,
    folder: workdir_lib.Workdir,
    data: feed_lib.DataSource,
    lines: Sequence[growing.File],
    every: int,
    saved_step: int | None,
  ):
    """Saves `every` so many steps (0: at the end alone), the `lines` about its steps before; `saved_step`: that of the
    checkpoint from which the run goes on.
    """
    self._runtime, self._manager, self._folder, self._data = runtime, manager, folder, data
    self._lines, self._every, self._saved_step = lines, every, saved_step

  def is_due(self, step: int) -> bool:
    """Tells whether this step is to be saved, whatever becomes of the run."""
    return bool(self._every) and step % self._every == 0

  def is_saved(self, step: int) -> bool:
    """Tells whether saving of this step has begun."""
    return self._saved_step == step

  @property
  def has_begun(self) -> bool:
    """Whether there is a step to go back to, or one is being saved."""
    return self._saved_step is not None

  def save(self, state: state_lib.TrainState, record: metrics_lib.Record, samples: tuple[int, int]) -> None:
    """Starts saving the state, unless that was done already.

    Args:
      record: the figures of its step.
      samples: the first and the last of its step.

    Raises:
      errors.Diverged: instead, where the state is not finite: what is saved can be gone on from.
    """
    step = record["step"]
    if self.is_saved(step):
      return
    if (part := self._runtime.bad_part(state)) is not None:
      self.settle()
      raise divergence.of_state(step, samples, part, record["learning_rate"], self._folder.checkpoints)
    metadata = {
      "samples_seen": record["samples_seen"],
      "data": self._data.describe(),
      "metrics": {name: record[name] for name in ("loss", "eval_loss") if name in record},
      **recorded.of(self._runtime.objective.config),
    }
    with self._runtime.peers.patient():
      self._manager.save(step, self._runtime.stages.put_back(state.trained()), metadata, lines=self._lines)
    self._saved_step = step

  def wait(self) -> None:
    """Returns when what was begun is saved."""
    with self._runtime.peers.patient():
      self._manager.wait()

  def settle(self) -> None:
    """Waits for the checkpoint that is being written, so that it counts as one that is there."""
    with contextlib.suppress(errors.InputError):
      self.wait()
