"""What is compiled: the trainer's own step, and inference's own prefill, scoring and decoding."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from glmjax import errors
from glmjax import ranges
from glmjax.infer import decode as decode_lib
from glmjax.infer import offload
from glmjax.infer import placement as placement_lib
from glmjax.infer import scoring
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import partitioning
from glmjax.train import feed
from glmjax.train import objective as objective_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import pipeline as pipeline_lib
from glmjax.train import schedules
from glmjax.train import scopes
from glmjax.train import step as step_lib
from glmjax.train import trainable as trainable_lib
from glmjax.train.pipeline import stage_layout


@dataclasses.dataclass(frozen=True)
class Program:
  """A program, lowered for its devices, and what its arguments are."""

  traced: Any  # jax.stages.Traced
  parts: dict[str, Any]  # what memory is for -> the arguments' abstract arrays
  tokens: int  # that a run of it trains on, reads, or adds
  model_flops: float  # of these tokens, recomputation not counted
  trips: dict[str, int]  # named scope of a loop -> how often it runs, where the compiler cannot know
  gpu_options: dict[str, bool] = dataclasses.field(default_factory=dict)  # of the compiler


@dataclasses.dataclass(frozen=True)
class Train:
  """A training step of `batch_size` rows.

  Args:
    batch_size: rows of a step, over all devices.
    length: tokens of a row.
    micro_batch: rows computed at a time, over all devices; None: all.
    strategy, pipeline, loss_chunk: as in glmjax.train.loop.train.
    predicted: share of the tokens that the loss counts; [gMASK] rows predict four fifths at most (paper, 2.2).
    trainable: an adapter beside the model, which is frozen; None: all trains.
    base_bits: 8 or 4 for a frozen model that is quantized.
  """

  batch_size: int
  length: int = 2048
  micro_batch: int | None = None
  optimizer: optimizer_lib.AdamW | optimizer_lib.Muon = optimizer_lib.AdamW()
  strategy: str = "fsdp"
  pipeline: pipeline_lib.PipelineConfig = pipeline_lib.PipelineConfig()
  loss_chunk: int = 1024
  predicted: float = 0.8
  trainable: trainable_lib.Trainable | None = None
  base_bits: int | None = None

  def __post_init__(self) -> None:
    if self.base_bits not in (None, 8, 4):
      raise errors.InputError(f"Train.base_bits is {self.base_bits}: give 8, 4 or None")
    if self.base_bits and self.trainable is None:
      raise errors.InputError("Train.base_bits is of a frozen model: give Train.trainable, which trains beside it")
    for name in ("batch_size", "length", "loss_chunk"):
      ranges.whole(f"Train.{name}", getattr(self, name), 1)
    if self.micro_batch is not None:
      ranges.whole("Train.micro_batch", self.micro_batch, 1)
    ranges.number("Train.predicted", self.predicted, above=0, most=1)

  def model(self, config: config_lib.GLMConfig) -> config_lib.GLMConfig:
    """Returns the model with what trains beside it."""
    return config if self.trainable is None else self.trainable.adapt(config)

  def is_trained(self, path: str, param: params_lib.Param) -> bool:
    """Tells whether a parameter of it is trained."""
    return self.trainable is None or self.trainable.is_trained(path, param)

  def program(self, config: config_lib.GLMConfig, mesh: jax.sharding.Mesh) -> Program:
    """Lowers the trainer's step under jit, as glmjax.train.loop compiles it."""
    config = self.model(config)
    rules = partitioning.strategy(self.strategy)
    layout = feed.Layout.make(
      mesh, rules, self.batch_size, self.micro_batch, self.length, config.position_kind, config.vocab_size
    )
    tx, number = self.optimizer.make(), jax.ShapeDtypeStruct((), jnp.uint32, sharding=_replicated(mesh))
    objective = objective_lib.Objective(
      config, self.loss_chunk, pipeline=pipeline_lib.make(self.pipeline, config, mesh, layout.rows)
    )
    recipe = step_lib.Recipe(self.optimizer, schedules.Constant(1e-4))
    with partitioning.use(mesh, rules):
      layouts = stage_layout.make(config, tx, mesh, rules, objective.pipeline, self.is_trained, self.base_bits)
      state = layouts.in_stages
      step = step_lib.compile_train_step(objective, recipe, tx, jax.tree.map(lambda x: x.sharding, state))
      traced = step.trace(state, layout.abstract(), step_lib.StepInfo(number, number, number))
      groups = partitioning.parts("groups")
    tokens = self.batch_size * self.length
    rows = layout.rows * self.length // groups  # tokens of a group at a time
    return Program(
      traced,
      {"parameters": state.params, "optimizer": state.opt_state} | ({"frozen": state.frozen} if state.frozen else {}),
      tokens,
      tokens * params_lib.train_flops_per_token(config, self.length, self.is_trained),
      {
        scopes.MICRO_BATCHES: layout.num_micro,
        scopes.LOSS_CHUNKS: math.ceil(rows * self.predicted / min(self.loss_chunk, rows)),
      },
    )


@dataclasses.dataclass(frozen=True)
class Decode:
  """One token for each of `batch` rows, behind a context of which the last one is the longest.

  Args:
    context: tokens of prompt and answer; the KV cache has a slot for each.
    bits: 8 or 4 for quantized weights.
    prompt: tokens of it that are read at once; more than one makes this a prefill of so many.
    scored: how many log-probabilities are taken behind the prompt's tokens, as those of choices; it is then read for
      them alone.
    offload_layers: how many layers, the last, have their kernels in the host's memory.
  """

  batch: int = 1
  context: int = 2048
  bits: int | None = None
  prompt: int = 1
  scored: int = 0
  offload_layers: int = 0

  def __post_init__(self) -> None:
    for name in ("batch", "context", "prompt"):
      ranges.whole(f"Decode.{name}", getattr(self, name), 1)
    if self.bits not in (None, 8, 4):
      raise errors.InputError(f"Decode.bits is {self.bits}: give 8, 4 or None")
    ranges.whole("Decode.scored", self.scored)
    if self.scored and self.prompt == 1:
      raise errors.InputError("Decode.scored is of prompts: give Decode.prompt, the tokens that are read, too")
    ranges.whole("Decode.offload_layers", self.offload_layers)

  def program(self, config: config_lib.GLMConfig, mesh: jax.sharding.Mesh) -> Program:
    """Lowers inference's own loop (or prefill, or scoring), its layers unrolled as the engine has them."""
    place = placement_lib.Placement(mesh)
    with place.scope():
      config = placement_lib.inference_config(dataclasses.replace(config, param_dtype=config.dtype), place.target)
      params = place.laid_out(config, self.bits, self.offload_layers)
      reads = self.prompt > 1  # a prompt: logits in scored places alone, each token against the prompt
      head = config.vocab_size * config.embed_dim
      weights = params_lib.count_of_matmuls(config) - reads * head
      seen = self.prompt if reads else self.context
      options = offload.GPU_OPTIONS if self.offload_layers else {}
      flops = self.batch * self.prompt * (2.0 * weights + 4.0 * config.num_layers * config.embed_dim * seen)
      flops += 2.0 * self.batch * self.scored * head
      rows = place.rows(self.batch)
      if self.scored:
        entries, prompts = place.scored(self.batch, self.scored), place.prompts(self.batch, self.prompt)
        scored = scoring.Scored(entries, entries)
        traced = scoring.log_probs.trace(config, params, prompts, scored, place.ids_mask(config))
        return Program(traced, {"parameters": params}, self.batch * self.prompt, flops, {}, options)
      if reads:
        traced = decode_lib.prefill.trace(
          config, params, place.prompts(self.batch, self.prompt), rows, new_tokens=1, all_slots=self.context
        )
        return Program(traced, {"parameters": params}, self.batch * self.prompt, flops, {}, options)
      state = place.state(config, self.batch, self.context, self.context)
      traced = decode_lib.decode.trace(
        config,
        params,
        rows,
        state,
        place.draws(self.batch),
        place.ids_mask(config),
        place.ids_mask(config),
        place.number(),
      )
    return Program(traced, {"parameters": params, "kv_cache": state.cache}, self.batch, flops, {}, options)


def _replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
