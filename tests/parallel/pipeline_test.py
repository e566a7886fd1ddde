"""A pipeline trains as one device does: the same losses, gradients, dropout and checkpoints, without moving weights.

This is of schedules that go backward once all micro-batches are through (one_f_one_b_test.py: the other), and of what
all share.
"""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pipelined
from pipelined import CONFIG, LENGTH, ROWS, Case, change, run
import pytest

from glmjax import errors
from glmjax.checkpoint import manager as manager_lib
from glmjax.parallel import collectives
from glmjax.parallel import hlo
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.train import loop
from glmjax.train import pipeline as pipeline_lib
from glmjax.train import schedules
from glmjax.train.pipeline import ring as ring_lib


def gpipe(microbatches: int | None = None, rounds: int = 1) -> pipeline_lib.PipelineConfig:
  return pipeline_lib.PipelineConfig(microbatches, rounds, "gpipe")


CIRCULAR = Case((("data", 2), ("stage", 2), ("tensor", 2)), gpipe(4, rounds=2), config=change(remat="dots"))
PADDED = Case((("fsdp", 2), ("stage", 2)), gpipe(2), config=change(num_layers=3))
CASES = {
  "circular": CIRCULAR,
  "padded": PADDED,
  "four": Case((("stage", 4),), gpipe(8), config=change(remat="full")),
  "fp16": Case((("stage", 2),), gpipe(4), config=change(dtype="float16")),
  "context": Case((("data", 2), ("stage", 2), ("context", 2)), gpipe(2, rounds=2), "zero1"),
  "one slot": Case((("stage", 2), ("tensor", 2), ("context", 2)), gpipe(2), "zero1"),
}
LONG = ("four", "fp16", "context", "one slot")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in CASES])
def test_trains_as_one_device(name: str):
  pipelined.compare(CASES[name])


def test_activations_move_and_weights_do_not():
  case = CIRCULAR
  found = collectives.of(hlo.read(run(case).program.as_text()), case.mesh)
  over_stages = [c for c in found if "stage" in c.axes]
  permutes = [c for c in over_stages if c.kind == "collective-permute"]
  rows_at_a_time = ROWS // case.pipeline.microbatches // partitioning.batch_shards(case.mesh)
  micro_batch = (1, rows_at_a_time, LENGTH, CONFIG.embed_dim)
  assert any(shape == micro_batch and c.loops for c in permutes for _, shape in c.arrays)
  for c in over_stages:
    if c.kind in ("all-gather", "all-to-all"):  # numbers of rows and tokens; what embeddings' rows have for gradients
      rows = ROWS // partitioning.batch_shards(case.mesh) * LENGTH * CONFIG.embed_dim
      embedded = not c.loops[1:] and {math.prod(shape) for _, shape in c.arrays} == {rows}  # nameless in jax 0.11
      assert "GLM.embed" in c.source or embedded or all(dtype in ("s32", "u32", "pred") for dtype, _ in c.arrays), c
    assert c.kind == "collective-permute" or case.pipeline.ticks not in c.loops, c


def test_no_device_holds_the_logits_of_all_rows():
  """A stage makes those of its share of the rows, a chunk at a time."""
  text = run(CIRCULAR).program.as_text()
  shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([0-9,]+)\]", text)}
  part = CONFIG.vocab_size // 2  # over tensor
  assert max(math.prod(shape) for shape in shapes if part in shape) == CIRCULAR.chunk * part


@pytest.mark.parametrize("case", [CIRCULAR, PADDED])
def test_checkpoints_load_on_any_mesh(case: Case, tmp_path):
  there = run(case)
  manager = manager_lib.Manager(tmp_path)
  manager.save(1, there.stored, {})
  plain = Case((("data", 2), ("tensor", 2)), config=case.config)
  for other in (plain, case):
    state, _ = manager.restore(other.stages.as_checkpointed)
    chex.assert_trees_all_equal(state, there.stored)
    again = other.stages.put_in_stages(state)
  chex.assert_trees_all_equal(again, there.held)
  assert [x.sharding for x in jax.tree.leaves(again)] == [x.sharding for x in jax.tree.leaves(case.stages.in_stages)]
  manager.close()


class Source:
  """The rows as a data source, over and over."""

  seq_length = LENGTH

  def describe(self) -> dict:
    return {"name": "rows"}

  def batches(self, plan, process_index=0, process_count=1):
    for first, size in plan:
      yield {name: np.take(a, np.arange(first, first + size), 0, mode="wrap") for name, a in pipelined.rows().items()}


@pytest.mark.slow
def test_a_run_goes_on_with_and_without_stages(tmp_path):
  config = change(num_layers=7)  # circular, with room for an eighth: the state changes places on the way in and out

  def train(folder: str, stop: int, pipelined: bool) -> dict:
    sizes = mesh_lib.MeshConfig(data=2, stage=2, tensor=2) if pipelined else mesh_lib.MeshConfig(data=4, tensor=2)
    return loop.train(
      config,
      Source(),
      tmp_path / folder,
      schedules.Batches(size=ROWS),
      6 * ROWS,
      schedules.Constant(1e-2),
      validation=Source(),
      micro_batch=ROWS // 2,
      mesh=sizes,
      intervals=loop.Intervals(evaluate=1, eval_samples=ROWS),
      stop_at_step=stop,
      pipeline=gpipe(2, rounds=2),
    )

  plain = [train("plain", stop, False) for stop in (2, 4, 6)]
  mixed = [train("mixed", stop, pipelined) for stop, pipelined in ((2, True), (4, False), (6, True))]
  for name in ("loss", "eval_loss", "grad_norm"):
    assert [m[name] for m in mixed] == pytest.approx([p[name] for p in plain], rel=1e-4)


@pytest.mark.parametrize(
  "stages, microbatches, rounds",
  [(1, 2, 1), (1, 2, 3), (2, 2, 1), (3, 3, 2), (3, 6, 3), (4, 12, 1), (5, 5, 2), (2, 8, 2)],
)
def test_every_micro_batch_passes_all_layers_in_order(monkeypatch, stages: int, microbatches: int, rounds: int):
  pipeline = pipeline_lib.Pipeline(stages, microbatches, rounds, stages * rounds, "gpipe")

  def stage(config, pipeline, weights, place, turn, x, features):
    weight = weights["w"][0][turn, 0]
    return jnp.where(jnp.abs(x).sum() > 0, x * 2 + weight * features["start"][:, :, None], jnp.nan)  # nan: the bubble

  monkeypatch.setattr(ring_lib, "_stage", stage)
  x = jnp.arange(1.0, 1 + microbatches * 2 * 3).reshape(microbatches * 2, 3, 1)
  start = jnp.asarray(np.random.default_rng(0).integers(1, 9, (microbatches * 2, 3)), jnp.float32)
  weights = jnp.arange(1.0, 1 + stages * rounds)
  held = {"w": weights[np.array(pipeline.order())]}
  ring = jax.jit(lambda x: ring_lib._flow(CONFIG, pipeline, held, pipeline.to_ring(x), {"start": pipeline.cut(start)}))(
    pipeline.spread(x)
  )
  wanted = functools.reduce(lambda x, weight: x * 2 + weight * start[..., None], weights, x)
  np.testing.assert_allclose(pipeline.from_ring(ring), pipeline.spread(wanted))
  assert pipeline.ticks == microbatches * rounds + stages - 1
  assert sorted(pipeline.order()) == list(range(stages * rounds))


def test_gradients_of_half_precision_weights_are_summed_in_float32():
  def total(w: jax.Array) -> jax.Array:
    pair = jax.lax.stop_gradient(w), ring_lib._gather_gradient(w)
    return jax.lax.scan(lambda s, _: (s + ring_lib._read(*pair).sum(), None), jnp.bfloat16(0), None, 1000)[0]

  gradient = jax.grad(total)(jnp.ones(3, jnp.bfloat16))
  assert gradient.dtype == jnp.bfloat16 and gradient.tolist() == [1000] * 3  # bfloat16's own sums end at 256


def test_what_does_not_divide_is_said():
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, stage=4))

  def make(schedule, rows=32, layers=8):
    return pipeline_lib.make(schedule, change(num_layers=layers), mesh, rows)

  assert make(pipeline_lib.PipelineConfig()).microbatches == 16
  with pytest.raises(errors.InputError, match="6 pipeline micro-batches.*multiple of the mesh's stage=4"):
    make(pipeline_lib.PipelineConfig(6), 24)
  with pytest.raises(errors.InputError, match="20 rows at a time.*micro-batches x data x fsdp = 8"):
    make(pipeline_lib.PipelineConfig(4), 20)
  with pytest.raises(errors.InputError, match="num_layers 9 in groups of 3 leaves some of stage=4 x rounds=1"):
    make(pipeline_lib.PipelineConfig(4), layers=9)
  with pytest.raises(errors.InputError, match="pipeline.PipelineConfig.rounds is 0"):
    pipeline_lib.PipelineConfig(rounds=0)
  with pytest.raises(errors.InputError, match='1f1b goes around once, rounds is 2; use 1, or kind "gpipe"'):
    pipeline_lib.PipelineConfig(rounds=2)
  with pytest.raises(errors.InputError, match="pipeline.PipelineConfig.kind is 'zigzag': choose one of 1f1b, gpipe"):
    pipeline_lib.PipelineConfig(kind="zigzag")
  assert pipeline_lib.make(pipeline_lib.PipelineConfig(), CONFIG, Case().mesh, 7) is None
