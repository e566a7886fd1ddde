"""How the layers lie over the mesh's `stage` axis, and which rows flow through them at a time.

A stage holds one group of consecutive layers, or with more than one round every S-th group (a circular, or interleaved,
schedule). `ring` has the micro-batches flow through them; `one_f_one_b` has their gradients come back tick by tick;
`stage_layout` puts a training state in the stages' order.

B batch, L length, D model, S stages, K micro-batches, R rounds, J = K / S slots, N layers.
"""

import dataclasses

import jax

from glmjax import errors
from glmjax import ranges
from glmjax.models import config as config_lib
from glmjax.parallel import partitioning

# 1f1b (one_f_one_b.py): training goes backward with a micro-batch as soon as it has come to the end. gpipe: once
# all have.
KINDS = ("1f1b", "gpipe")


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
  """How the rows of a micro-batch of `loop.train` flow through the stages of the mesh."""

  microbatches: int | None = None  # K, into which they are cut; None: one row of every batch shard at a time
  rounds: int = 1  # R, times that a micro-batch goes around; more than one: circular, with a smaller bubble
  kind: str = "1f1b"  # one of KINDS

  def __post_init__(self) -> None:
    ranges.choice("pipeline.PipelineConfig.kind", self.kind, KINDS)
    ranges.whole("pipeline.PipelineConfig.rounds", self.rounds, 1)
    if self.microbatches is not None:
      ranges.whole("pipeline.PipelineConfig.microbatches", self.microbatches, 1)
    if self.kind == "1f1b" and self.rounds > 1:
      raise errors.InputError(
        f'pipeline.PipelineConfig: 1f1b goes around once, rounds is {self.rounds}; use 1, or kind "gpipe"'
      )


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A schedule on the stages of one mesh, for one model."""

  stages: int  # S
  microbatches: int  # K
  rounds: int  # R
  num_layers: int  # N
  kind: str  # one of KINDS

  @property
  def group(self) -> int:
    """The number of layers of a stage in a round; the last groups may hold fewer, and compute as many all the same."""
    return -(-self.num_layers // (self.stages * self.rounds))

  @property
  def ticks(self) -> int:
    """How often all stages compute a group, for all micro-batches."""
    return self.microbatches * self.rounds + self.stages - 1

  @property
  def bubble(self) -> float:
    """The share of the ticks that a stage waits."""
    return (self.stages - 1) / self.ticks

  def order(self) -> list[int]:
    """Returns the layer at each place of the stacked weights in memory, stage by stage; N and more: room without a
    layer.
    """
    return [
      (r * self.stages + s) * self.group + j
      for s in range(self.stages)
      for r in range(self.rounds)
      for j in range(self.group)
    ]

  def spread(self, a: jax.Array) -> jax.Array:
    """Returns rows [B, ...] in the order in which `hidden` has them, each stage's share in one piece on it."""
    shards = partitioning.parts("batch")
    a = a.reshape(shards, self.stages, -1, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)
    with partitioning.rows_over_stages():
      return partitioning.constrain(a, "batch", *[None] * (a.ndim - 1))

  def to_ring(self, a: jax.Array) -> jax.Array:
    """Returns spread rows as [S, J, B / K, ...]."""
    shards, slots = partitioning.parts("batch"), self.microbatches // self.stages
    a = a.reshape(self.stages, shards, slots, -1, *a.shape[1:]).swapaxes(1, 2)
    return a.reshape(self.stages, slots, -1, *a.shape[4:])

  def from_ring(self, a: jax.Array) -> jax.Array:
    """Undoes `to_ring`."""
    shards, slots = partitioning.parts("batch"), self.microbatches // self.stages
    a = a.reshape(self.stages, slots, shards, -1, *a.shape[3:]).swapaxes(1, 2)
    return a.reshape(-1, *a.shape[4:])

  def cut(self, a: jax.Array) -> jax.Array:
    """Cuts rows [B, ...] into micro-batches [K, B / K, ...], the same on all stages."""
    shards = partitioning.parts("batch")
    a = a.reshape(shards, self.microbatches, -1, *a.shape[1:]).swapaxes(0, 1)
    a = a.reshape(self.microbatches, -1, *a.shape[3:])
    return partitioning.constrain(a, None, "batch", *[None] * (a.ndim - 2))


def make(schedule: PipelineConfig, config: config_lib.GLMConfig, mesh: jax.sharding.Mesh, rows: int) -> Pipeline | None:
  """Makes the pipeline that `rows` rows at a time take on this mesh; None where it has one stage.

  Raises:
    errors.InputError: where rows or layers do not divide.
  """
  stages, shards = mesh.shape[partitioning.STAGE_AXIS], partitioning.batch_shards(mesh)
  if stages == 1:
    return None
  if config.prefix_hidden:
    raise errors.InputError(
      f"a prefix that is made by projection does not go through pipelines: train it on a mesh without stage={stages}, "
      "or without projection"
    )
  count = schedule.microbatches or rows // shards
  if count % stages or rows % (count * shards):
    raise errors.InputError(
      f"{rows} rows at a time, {count} pipeline micro-batches: these must be a multiple of the mesh's stage={stages},"
      f" and the rows one of micro-batches x data x fsdp = {count * shards}; change micro_batch, or "
      "pipeline.PipelineConfig.microbatches"
    )
  found = Pipeline(stages, count, schedule.rounds, config.num_layers, schedule.kind)
  if (stages * schedule.rounds - 1) * found.group >= config.num_layers:
    raise errors.InputError(
      f"num_layers {config.num_layers} in groups of {found.group} leaves some of stage={stages} x "
      f"rounds={schedule.rounds} without a layer: choose stages and rounds whose product divides the layers"
    )
  return found
