"""A growing batch: one program for all its sizes, and the results of programs made for each size."""

import itertools
import json

import chex
import jax
import numpy as np
import pytest

from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.train import feed
from glmjax.train import loop
from glmjax.train import objective as objective_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib

RAMP = schedules.Batches(24, ramp_start=4, ramp_increment=5, ramp_samples=48)
MICRO = 8  # so that some sizes fill their last micro-batch by half
STEPS = 9
RATE = schedules.Constant(1e-2)


def losses_of_separate_programs(config, source) -> list[float]:
  """The same steps, each compiled for its own number of rows, all at once."""
  optimizer = optimizer_lib.AdamW()
  tx, mesh = optimizer.make(), mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1), jax.devices()[:1])
  losses = []
  with partitioning.use(mesh):
    abstract = state_lib.abstract(config, tx, mesh)
    state = state_lib.create(config, tx, 0, abstract)
    step = step_lib.compile_train_step(
      objective_lib.Objective(config),
      step_lib.Recipe(optimizer, RATE),
      tx,
      jax.tree.map(lambda x: x.sharding, abstract),
    )
    for first, size in itertools.islice(RAMP.plan(), STEPS):
      layout = feed.Layout.make(
        mesh, partitioning.FSDP, size, None, source.seq_length, config.position_kind, config.vocab_size
      )
      info = step_lib.StepInfo(*map(np.uint32, (first, first, size)))
      state, metrics = step(state, layout.put(next(source.batches(iter([(first, size)])))), info)
      losses.append(float(metrics["loss"]))
  return losses


def test_a_ramp_compiles_one_step_and_equals_separate_programs(tmp_path, tiny, source, monkeypatch):
  sizes = [size for _, size in itertools.islice(RAMP.plan(), STEPS)]
  assert sorted(set(sizes)) == [4, 9, 14, 19, 24]
  with monkeypatch.context() as patch:
    chex.clear_trace_counter()
    patch.setattr(step_lib, "train_step", chex.assert_max_traces(step_lib.train_step, n=1))
    loop.train(
      tiny,
      source,
      tmp_path,
      RAMP,
      10**6,
      RATE,
      micro_batch=MICRO,
      mesh=mesh_lib.MeshConfig(data=8),
      intervals=loop.Intervals(save=0),
      stop_at_step=STEPS,
    )
    with pytest.raises(AssertionError, match="traced > 1 times"):  # a program of its own for each size is seen
      losses_of_separate_programs(tiny, source)
  separate = losses_of_separate_programs(tiny, source)
  records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [r["tokens"] // source.seq_length for r in records] == sizes
  np.testing.assert_allclose([r["loss"] for r in records], separate, rtol=2e-5)
