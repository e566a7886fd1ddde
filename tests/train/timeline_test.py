"""A schedule as it is told: each stage once with each micro-batch, in order, and the bubble that is known."""

import collections

import pytest

from glmjax.train import pipeline as pipeline_lib
from glmjax.train.pipeline import timeline

CASES = [
  pipeline_lib.Pipeline(4, 8, 1, 4, "1f1b"),
  pipeline_lib.Pipeline(2, 6, 1, 4, "1f1b"),
  pipeline_lib.Pipeline(4, 8, 1, 4, "gpipe"),
  pipeline_lib.Pipeline(4, 8, 2, 8, "gpipe"),
]


@pytest.mark.parametrize("pipeline", CASES, ids=str)
def test_every_micro_batch_goes_through_all_groups_and_back(pipeline):
  turns = timeline.of(pipeline)
  assert set(collections.Counter((turn.tick, turn.stage, turn.backward) for turn in turns).values()) == {1}
  for microbatch in range(pipeline.microbatches):
    mine = [turn for turn in turns if turn.microbatch == microbatch]
    forward = [(turn.round, turn.stage) for turn in mine if not turn.backward]
    backward = [(turn.round, turn.stage) for turn in mine if turn.backward]
    assert forward == [(r, s) for r in range(pipeline.rounds) for s in range(pipeline.stages)]
    assert backward == forward[::-1]
    ticks = [turn.tick for turn in mine if not turn.backward]
    assert ticks[: pipeline.stages] == list(range(microbatch, microbatch + pipeline.stages))


@pytest.mark.parametrize("pipeline", CASES, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_stages_wait_for_the_bubble(pipeline, backward):
  turns = [turn for turn in timeline.of(pipeline) if turn.backward is backward]
  ticks = len({turn.tick for turn in turns})
  assert ticks == pipeline.ticks
  assert 1 - len(turns) / (pipeline.stages * ticks) == pytest.approx(pipeline.bubble)


def test_1f1b_keeps_few_micro_batches_and_gpipe_all():
  def waiting(pipeline, tick):
    """Counts the first stage's micro-batches that went forward and have not come back."""
    mine = [turn for turn in timeline.of(pipeline) if turn.stage == 0 and turn.tick <= tick]
    return sum(-1 if turn.backward else 1 for turn in mine)

  most = [max(waiting(pipeline, tick) for tick in range(3 * pipeline.ticks)) for pipeline in (CASES[0], CASES[2])]
  assert most == [2 * CASES[0].stages - 2, CASES[2].microbatches]
