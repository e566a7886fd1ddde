"""Training steps of one small model on any mesh, for tests that compare pipelines with one device.

One step of AdamW on two micro-batches of packed rows, with dropout.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import packed

from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.train import feed
from glmjax.train import objective as objective_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import pipeline as pipeline_lib
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib
from glmjax.train.pipeline import stage_layout

CONFIG = config_lib.GLMConfig(
  vocab_size=96,
  num_layers=4,
  embed_dim=16,
  num_heads=2,
  mlp_dim=24,
  max_length=16,
  hidden_dropout=0.1,
  attention_dropout=0.1,
)
MICRO, ROWS, LENGTH = 2, 16, 16  # micro-batches of gradient accumulation, rows of each
OPTIMIZER = optimizer_lib.AdamW(clip_norm=1e9, epsilon=1e-3)  # a tiny gradient must not move a weight as a large one
TX = OPTIMIZER.make()


def rows() -> feed.HostBatch:
  return packed.rows(MICRO * ROWS, LENGTH, CONFIG.vocab_size)


@dataclasses.dataclass(frozen=True)
class Case:
  """A model on a mesh."""

  sizes: tuple[tuple[str, int], ...] = ()
  schedule: pipeline_lib.PipelineConfig = pipeline_lib.PipelineConfig()
  strategy: str = "fsdp"
  config: config_lib.GLMConfig = CONFIG
  chunk: int = 24

  @property
  def mesh(self) -> jax.sharding.Mesh:
    sizes = mesh_lib.MeshConfig(**{"data": 1} | dict(self.sizes))
    return mesh_lib.make_mesh(sizes, jax.devices()[: math.prod(dataclasses.astuple(sizes))])

  @property
  def pipeline(self) -> pipeline_lib.Pipeline | None:
    return pipeline_lib.make(self.schedule, self.config, self.mesh, ROWS)

  @property
  def stages(self) -> stage_layout.StageLayout:
    return stage_layout.make(self.config, TX, self.mesh, partitioning.STRATEGIES[self.strategy], self.pipeline)


@dataclasses.dataclass
class Step:
  """One optimizer step: its program, and what came of it, the layers in the model's order."""

  program: Any
  held: state_lib.TrainState
  stored: state_lib.TrainState
  metrics: dict[str, np.ndarray]


@functools.cache
def first_state(config: config_lib.GLMConfig) -> state_lib.TrainState:
  return jax.device_get(state_lib.create(config, TX, 0, Case(config=config).stages.as_checkpointed))


@functools.cache
def run(case: Case) -> Step:
  rules, stages = partitioning.STRATEGIES[case.strategy], case.stages
  layout = feed.Layout.make(case.mesh, rules, MICRO * ROWS, ROWS, LENGTH, CONFIG.position_kind, CONFIG.vocab_size)
  recipe = step_lib.Recipe(OPTIMIZER, schedules.Constant(1e-2), schedules.Constant(0.5))
  objective = objective_lib.Objective(case.config, chunk=case.chunk, pipeline=case.pipeline)
  state = jax.device_put(first_state(case.config), jax.tree.map(lambda x: x.sharding, stages.as_checkpointed))
  with partitioning.use(case.mesh, rules):
    arguments = (
      stages.put_in_stages(state),
      layout.put(rows()),
      step_lib.StepInfo(*map(jnp.uint32, (0, 0, MICRO * ROWS))),
    )
    shardings = jax.tree.map(lambda x: x.sharding, stages.in_stages)
    program = step_lib.compile_train_step(objective, recipe, TX, shardings).lower(*arguments).compile()
    state, metrics = program(*arguments)
    return Step(program, state, stages.put_back(state), jax.device_get(metrics))


def change(**fields: Any) -> config_lib.GLMConfig:
  return dataclasses.replace(CONFIG, **fields)


def compare(case: Case) -> None:
  """The step on the case's mesh is that of one device: losses, norms of the gradient, and the state behind it."""
  one = run(Case(config=dataclasses.replace(case.config, remat="none")))
  many, half = run(case), case.config.dtype == "float16"
  assert many.metrics["applied"]
  for metric in ("loss", "losses", "grad_norm", "grad_norm_embedding", "grad_norm_mlp"):
    np.testing.assert_allclose(many.metrics[metric], one.metrics[metric], rtol=2e-3 if half else 2e-5, err_msg=metric)
  if half:
    assert many.metrics["loss_scale"] == one.metrics["loss_scale"] == state_lib.DynamicLossScale().start
    compare_half(many.stored, one.stored, case.config)
    return
  for have, want in zip(jax.tree.leaves(many.stored), jax.tree.leaves(one.stored), strict=True):
    np.testing.assert_allclose(have, want, atol=1e-5 * max(1e-2, np.abs(want).max()))


def compare_half(many: state_lib.TrainState, one: state_lib.TrainState, config: config_lib.GLMConfig) -> None:
  """Float16 on a mesh is as near to float32 as float16 on one device is: neither rounds as the other does."""
  exact = run(Case(config=dataclasses.replace(config, remat="none", dtype="float32"))).stored

  def errors(state: state_lib.TrainState) -> np.ndarray:
    """Returns the root mean square of each parameter's error."""
    pairs = zip(*(jax.tree.leaves(jax.device_get(each.params)) for each in (state, exact)), strict=True)
    return np.array([np.sqrt(np.mean(np.square(have - want, dtype=np.float64))) for have, want in pairs])

  of_many, of_one = errors(many), errors(one)
  np.testing.assert_array_less(of_many, 4 * of_one)
  np.testing.assert_array_less(np.exp(np.log(of_many / of_one).mean()), 1.3)
