"""1F1B trains as one device does, in memory that does not grow with the micro-batches, without moving weights."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pipelined
from pipelined import CONFIG, LENGTH, ROWS, Case, change, run
import pytest

from glmjax.parallel import collectives
from glmjax.parallel import hlo
from glmjax.parallel import partitioning
from glmjax.train import feed
from glmjax.train import gradient as gradient_lib
from glmjax.train import objective as objective_lib
from glmjax.train import pipeline as pipeline_lib
from glmjax.train.pipeline import one_f_one_b
from glmjax.train.pipeline import ring as ring_lib
from glmjax.train.pipeline import stage_layout

# An untied head, room for an eighth layer, and the loss in two pieces of 8 tokens.
FOUR = Case(
  (("stage", 4),),
  pipeline_lib.PipelineConfig(8),
  chunk=5,
  config=change(num_layers=7, tie_embeddings=False, remat="dots"),
)
ZERO1 = Case((("data", 2), ("stage", 2), ("tensor", 2)), pipeline_lib.PipelineConfig(), "zero1", change(remat="full"))
CASES = {
  "four": FOUR,
  "zero1": ZERO1,
  "fsdp": Case((("fsdp", 2), ("stage", 2), ("tensor", 2)), pipeline_lib.PipelineConfig(4), "sequence"),
  "fp16": Case((("stage", 2),), pipeline_lib.PipelineConfig(4), config=change(dtype="float16")),
  "context": Case((("data", 2), ("stage", 2), ("context", 2)), pipeline_lib.PipelineConfig(2), "zero1"),
}
LONG = ("fsdp", "fp16", "context")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in CASES])
def test_trains_as_one_device(name: str):
  pipelined.compare(CASES[name])


@pytest.mark.parametrize("case", [FOUR, ZERO1])
def test_activations_move_and_weights_do_not(case: Case):
  found = collectives.of(hlo.read(run(case).program.as_text()), case.mesh)
  shards = partitioning.batch_shards(case.mesh)
  micro_batch = ROWS // case.pipeline.microbatches // shards * LENGTH * CONFIG.embed_dim
  in_ticks = [c for c in found if c.loops[1:]]  # the first loop is that of gradient accumulation
  over_stages = [c for c in in_ticks if "stage" in c.axes]
  assert {c.kind for c in over_stages} == {"collective-permute", "all-to-all"}
  assert {sum(math.prod(shape) for _, shape in c.arrays) for c in over_stages} == {micro_batch}
  assert not [c for c in in_ticks if {*c.axes} & {"data", "fsdp"}]
  assert all(c.bytes <= 4 * micro_batch for c in in_ticks)  # smaller than any kernel
  if case is ZERO1:  # gradients, once a step
    assert not [c for c in found if "data" in c.axes and c.loops]


def test_no_device_holds_the_logits_of_a_micro_batch():
  text = run(FOUR).program.as_text()
  shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([0-9,]+)\]", text)}
  logits = [math.prod(shape) for shape in shapes if CONFIG.vocab_size in shape and CONFIG.embed_dim not in shape]
  assert max(logits) <= FOUR.chunk * CONFIG.vocab_size


def test_memory_does_not_grow_with_the_micro_batches():
  """But for their ring, a share of which lies on each stage: of none does a device keep as much as a layer's input."""
  config = change(embed_dim=128, mlp_dim=256, remat="full", hidden_dropout=0.0, attention_dropout=0.0)
  less, more = (_temporaries(dataclasses.replace(FOUR, config=config), count) for count in (8, 32))
  assert more - less < (32 - 8) * LENGTH * 128 * 4


def _temporaries(case: Case, count: int) -> int:
  """Bytes that the gradient of `count` rows, one at a time, takes on a device."""
  rules, length = partitioning.STRATEGIES[case.strategy], case.config.max_length
  pipeline = pipeline_lib.make(pipeline_lib.PipelineConfig(count), case.config, case.mesh, count)
  layout = feed.Layout.make(case.mesh, rules, count, None, length, case.config.position_kind, case.config.vocab_size)
  objective = objective_lib.Objective(case.config, pipeline=pipeline)
  with partitioning.use(case.mesh, rules):
    params = stage_layout.make(case.config, pipelined.TX, case.mesh, rules, pipeline).in_stages.params
    run = jax.jit(
      functools.partial(gradient_lib.of_step, objective),
      out_shardings=(None, jax.tree.map(lambda x: x.sharding, params)),
    )
    work = objective_lib.Work(layout.abstract(), 1.0, jax.eval_shape(lambda: jax.random.key(0)), 1.0)
    return run.lower(params, {}, work, 1).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("stages, microbatches", [(2, 6), (3, 3), (4, 12)])
def test_every_gradient_is_of_its_own_micro_batch(monkeypatch, stages: int, microbatches: int):
  """A stage's layers as one product, with numbers that tell micro-batches and tokens apart."""

  def layers(config, pipeline, weights, gradient, place, x, features):
    weight, gradient = ring_lib._add_gradient(0, weights[0], gradient)
    return jnp.sin(x * weight + features["start"][:, :, None]), gradient

  monkeypatch.setattr(ring_lib, "layers", layers)
  pipeline = pipeline_lib.Pipeline(stages, microbatches, 1, stages, "1f1b")
  rng = np.random.default_rng(0)

  def make(*rest):
    return jnp.asarray(rng.normal(size=(microbatches * 2, 7, *rest)), jnp.float32)

  x, start, targets = make(3), make(), make()
  weights = jnp.asarray(rng.normal(size=stages), jnp.float32)

  class Behind:
    def add(self, own, parts, targets):
      def value(parts):
        return (jnp.cos(parts) * targets[..., None]).sum(range(1, parts.ndim))

      values, pull = jax.vjp(value, parts)
      return (own[0] + values, ()), pull(jnp.ones_like(values))[0]

  def tick_by_tick(x):
    flow = one_f_one_b._Stages(CONFIG, pipeline, weights[:, None], {"start": pipeline.cut(start)})
    shares = jax.vmap(functools.partial(one_f_one_b._share, pipeline, 2))(pipeline.cut(targets))
    into = (jnp.zeros(stages), ()), jnp.ones((stages, 1))
    ring, gradient, _, total = one_f_one_b._ticks(flow, Behind(), into[0], shares, 2, x, into[1])
    return total, pipeline.from_ring(ring), gradient[:, 0] - 1

  def at_once(x, weights):
    made = functools.reduce(lambda x, weight: jnp.sin(x * weight + start[..., None]), weights, x)
    return (jnp.cos(made) * targets[..., None]).sum()

  total, (dx, d_weights) = jax.value_and_grad(at_once, (0, 1))(x, weights)
  found = jax.jit(tick_by_tick)(pipeline.to_ring(pipeline.spread(x)))
  for have, want in zip(found, (total, pipeline.spread(dx), d_weights)):
    np.testing.assert_allclose(have, want, rtol=2e-5, atol=1e-5)
