"""Which stage works on which micro-batch in each tick, as `ring` and `one_f_one_b` compute them."""

import dataclasses
from collections.abc import Iterator

from glmjax.train import pipeline as pipeline_lib


@dataclasses.dataclass(frozen=True)
class Turn:
  """A stage's work on a micro-batch in a tick, forward or backward; a tick of 1F1B may hold one of each."""

  tick: int
  stage: int
  microbatch: int
  round: int
  backward: bool


def of(pipeline: pipeline_lib.Pipeline) -> list[Turn]:
  """Returns all turns of a training step's micro-batch of `loop.train`, in the order of ticks."""
  return sorted(_turns(pipeline), key=lambda turn: (turn.tick, turn.stage, turn.backward))


def _turns(pipeline: pipeline_lib.Pipeline) -> Iterator[Turn]:
  last = pipeline.stages - 1
  for stage in range(pipeline.stages):
    for turn in range(pipeline.microbatches * pipeline.rounds):
      round, microbatch = divmod(turn, pipeline.microbatches)
      tick = turn + stage
      behind = turn + 2 * last - stage if pipeline.kind == "1f1b" else 2 * pipeline.ticks - 1 - tick
      yield Turn(tick, stage, microbatch, round, backward=False)
      yield Turn(behind, stage, microbatch, round, backward=True)
