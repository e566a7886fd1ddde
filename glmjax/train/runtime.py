"""What a run computes with: the loss on its mesh, how batches and the state lie on the devices, the other processes."""

import dataclasses

from glmjax.parallel import peers as peers_lib
from glmjax.train import diagnose
from glmjax.train import feed as feed_lib
from glmjax.train import objective as objective_lib
from glmjax.train import state as state_lib
from glmjax.train.pipeline import stage_layout


@dataclasses.dataclass(frozen=True)
class Runtime:
  """The same for all steps of a run."""

  objective: objective_lib.Objective
  layout: feed_lib.Layout  # of batches; it has the mesh and its rules
  stages: stage_layout.StageLayout  # of the state
  peers: peers_lib.Peers

  def bad_part(self, state: state_lib.TrainState) -> str | None:
    """Names the first part of the state that is not finite, in words; None: all of it can be computed with."""
    return diagnose.bad_part(self.stages, state, self.objective.config.dtype)
