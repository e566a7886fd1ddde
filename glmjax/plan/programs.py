"""What is compiled: the trainer's own step, and inference's own prefill and decoding."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from glmjax import errors
from glmjax import ranges
from glmjax.infer import cache as cache_lib
from glmjax.infer import decode as decode_lib
from glmjax.infer import offload
from glmjax.infer import sampling
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import pipeline as pipeline_lib
from glmjax.parallel import partitioning
from glmjax.quantize import qarray
from glmjax.quantize import tree
from glmjax.train import feed
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import schedules
from glmjax.train import stages as stages_lib
from glmjax.train import step as step_lib


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
  """

  batch_size: int
  length: int = 2048
  micro_batch: int | None = None
  optimizer: optimizer_lib.AdamW | optimizer_lib.Muon = optimizer_lib.AdamW()
  strategy: str = "fsdp"
  pipeline: pipeline_lib.Schedule = pipeline_lib.Schedule()
  loss_chunk: int = 1024
  predicted: float = 0.8

  def __post_init__(self) -> None:
    for name in ("batch_size", "length", "loss_chunk"):
      ranges.whole(f"Train.{name}", getattr(self, name), 1)
    if self.micro_batch is not None:
      ranges.whole("Train.micro_batch", self.micro_batch, 1)
    ranges.number("Train.predicted", self.predicted, above=0, most=1)

  def program(self, config: config_lib.GLMConfig, mesh: jax.sharding.Mesh) -> Program:
    """The trainer's step under jit, as glmjax.train.loop compiles it."""
    rules = partitioning.strategy(self.strategy)
    layout = feed.Layout.make(mesh, rules, self.batch_size, self.micro_batch, self.length,
                              1 if config.positions == "rotary" else 2, config.vocab_size)
    tx, number = self.optimizer.make(), jax.ShapeDtypeStruct((), jnp.uint32, sharding=_replicated(mesh))
    objective = step_lib.Objective(config, self.loss_chunk,
                                   pipeline=pipeline_lib.make(self.pipeline, config, mesh, layout.rows))
    recipe = step_lib.Recipe(self.optimizer, schedules.Constant(1e-4))
    with partitioning.use(mesh, rules):
      state = stages_lib.make(config, tx, mesh, rules, objective.pipeline).held
      step = step_lib.compile_train_step(objective, recipe, tx, jax.tree.map(lambda x: x.sharding, state))
      traced = step.trace(state, layout.abstract(), step_lib.StepInfo(number, number, number))
      groups = partitioning.parts("groups")
    tokens = self.batch_size * self.length
    rows = layout.rows * self.length // groups  # tokens of a group at a time
    return Program(traced, {"parameters": state.params, "optimizer": state.opt_state}, tokens,
                   tokens * config.train_flops_per_token(self.length),
                   {"micro_batches": layout.num_micro,
                    "loss_chunks": math.ceil(rows * self.predicted / min(self.loss_chunk, rows))})


@dataclasses.dataclass(frozen=True)
class Decode:
  """One token for each of `batch` rows, behind a context of which the last one is the longest.

  Args:
    context: tokens of prompt and answer; the KV cache has a slot for each.
    bits: 8 or 4 for quantized weights.
    prompt: tokens of it that are read at once; more than one makes this a prefill of so many.
    offload_layers: how many layers, the last, have their kernels in the host's memory.
  """

  batch: int = 1
  context: int = 2048
  bits: int | None = None
  prompt: int = 1
  offload_layers: int = 0

  def __post_init__(self) -> None:
    for name in ("batch", "context", "prompt"):
      ranges.whole(f"Decode.{name}", getattr(self, name), 1)
    if self.bits not in (None, 8, 4):
      raise errors.InputError(f"Decode.bits is {self.bits}: give 8, 4 or None")
    ranges.whole("Decode.offload_layers", self.offload_layers)

  def program(self, config: config_lib.GLMConfig, mesh: jax.sharding.Mesh) -> Program:
    """Inference's own loop (or prefill), its layers unrolled as the engine has them."""
    if mesh.shape["stage"] > 1 or mesh.shape["context"] > 1:
      raise errors.InputError("a plan of decoding splits the model over tensor (and fsdp): set stage and context to 1")
    config = dataclasses.replace(config, scan_layers=False, remat="none", hidden_dropout=0.0, attention_dropout=0.0)
    params = inference_params(config, mesh, partitioning.FSDP, self.bits, self.offload_layers)
    rows = _rows(self.batch, self.prompt, _replicated(mesh))
    reads = self.prompt > 1  # a prompt: without logits, each token against the prompt
    weights = config.matmul_parameters() - reads * config.vocab_size * config.embed_dim
    seen = self.prompt if reads else self.context
    options = offload.GPU_OPTIONS if self.offload_layers else {}
    flops = self.batch * self.prompt * (2.0 * weights + 4.0 * config.num_layers * config.embed_dim * seen)
    with partitioning.use(mesh, partitioning.FSDP):
      if reads:
        traced = decode_lib.prefill.trace(config, params, rows, 0, self.context)
        return Program(traced, {"parameters": params}, self.batch * self.prompt, flops, {}, options)
      state = _state(config, mesh, partitioning.FSDP, self.batch, self.context)
      draws = jax.tree.map(functools.partial(_abstract, sharding=_replicated(mesh)),
                           jax.eval_shape(lambda: sampling.draws([sampling.Sampling()] * self.batch, [0] * self.batch)))
      none = jax.ShapeDtypeStruct((config.vocab_size,), bool, sharding=_replicated(mesh))
      until = jax.ShapeDtypeStruct((), jnp.int32, sharding=_replicated(mesh))
      traced = decode_lib.decode.trace(config, params, decode_lib.without_prompts(rows), state, draws, none, none,
                                       until)
    return Program(traced, {"parameters": params, "kv_cache": state.cache}, self.batch, flops, {}, options)


def _replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _abstract(x: Any, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def inference_params(config: config_lib.GLMConfig, mesh: jax.sharding.Mesh, rules: partitioning.Rules, bits: int | None,
                     offload_layers: int = 0) -> Any:
  """Parameters in the compute dtype, or quantized, each split as the rules say of its axes; layers are apart.

  Shardings of those in the host's memory are over the abstract mesh: JAX forgets the memory of devices elsewhere, which
  tell of none.
  """
  offload.check(config.num_layers, offload_layers)
  boxed = jax.eval_shape(lambda: glm.init(dataclasses.replace(config, param_dtype=config.dtype), jax.random.key(0)))
  partitioning.check_divisible(boxed, mesh, rules)

  def leaf(path: tuple[Any, ...], x: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> Any:
    names, at = optimizer_lib.path_names(path), mesh
    axes = tree.kernel_axes(names) if bits else None
    if offload.is_offloaded(names, config.num_layers, offload_layers):
      at = mesh.abstract_mesh
      sharding = jax.sharding.NamedSharding(at, sharding.spec, memory_kind=offload.HOST)
    if axes is None:
      return _abstract(x, sharding)
    quantized = jax.eval_shape(functools.partial(qarray.quantize, bits=bits, axes=axes), x)
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    outputs = jax.sharding.PartitionSpec(*(None if i - x.ndim in axes else axis for i, axis in enumerate(spec)))
    return dataclasses.replace(quantized, values=_abstract(quantized.values, sharding),
                               scale=_abstract(quantized.scale, jax.sharding.NamedSharding(
                                   at, outputs, memory_kind=sharding.memory_kind)))

  return jax.tree_util.tree_map_with_path(leaf, partitioning.unbox(boxed), partitioning.shardings(boxed, mesh, rules))


def _rows(batch: int, prompt: int, sharding: jax.sharding.NamedSharding) -> decode_lib.Rows:
  """A batch of prompts, of `prompt` tokens behind the last."""
  number = lambda *shape: jax.ShapeDtypeStruct((batch, *shape), jnp.int32, sharding=sharding)
  return decode_lib.Rows(number(prompt), number(2, prompt), number(prompt), number(prompt), last_B=number(),
                         position_B2=number(2), stride_B2=number(2), start_B=number(), limit_B=number())


def _state(config: config_lib.GLMConfig, mesh: jax.sharding.Mesh, rules: partitioning.Rules, batch: int, context: int
           ) -> decode_lib.State:
  """Of a batch that decodes: caches split by heads."""
  rows = "batch" if batch % partitioning.batch_shards(mesh) == 0 else None
  heads = partitioning.named(mesh, rules, rows, "act_heads", None, None)
  cache = jax.tree.map(functools.partial(_abstract, sharding=heads),
                       jax.eval_shape(lambda: cache_lib.empty(config, batch, context)))
  number = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=_replicated(mesh))
  return decode_lib.State(cache, number(jnp.int32), number(jnp.int32), number(jnp.int32, batch),
                          number(jnp.int32, batch, context), number(bool, batch), number(bool, batch))
