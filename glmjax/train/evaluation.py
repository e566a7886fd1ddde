"""The loss on the first rows of a validation source, while a run goes on."""

import dataclasses

import jax
import numpy as np

from glmjax.train import feed as feed_lib
from glmjax.train import losses
from glmjax.train import metrics as metrics_lib
from glmjax.train import runtime as runtime_lib
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib


class Evaluation:
  """Evaluates `rows` every so many steps; never, if there are none."""

  def __init__(self, runtime: runtime_lib.Runtime, rows: list[feed_lib.Evaluated], every: int):
    self._runtime, self._rows, self._every = runtime, rows, every
    self._step = step_lib.compile_eval_step(runtime.objective)

  def is_due(self, step: int) -> bool:
    """Tells whether this step is to be evaluated."""
    return bool(self._rows) and step % self._every == 0

  def evaluate(self, state: state_lib.TrainState) -> metrics_lib.Record:
    """Returns the mean loss of all tokens, and per objective."""
    with self._runtime.peers.patient():
      total = self._sums(state)
    record = {"eval_loss": float(total.mean())}
    if total.pairs is not None:
      record["eval_ordered"] = float(total.pairs.ordered / max(total.pairs.count, 1.0))
    return record | metrics_lib.objective_losses(total.loss, total.weight, "eval_loss_")

  def _sums(self, state: state_lib.TrainState) -> losses.Sums:
    layout = dataclasses.replace(self._runtime.layout, num_micro=1)
    total = jax.tree.map(lambda x: np.zeros(x.shape), jax.eval_shape(self._runtime.objective.zeros))
    for part in self._rows:
      sums = jax.device_get(self._step(state.params, state.frozen, layout.put(part.rows)))
      total = jax.tree.map(np.add, total, sums)
    return total
