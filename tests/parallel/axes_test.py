"""Every mesh and strategy trains as one device does, and its program moves what the rules say, no more.

One step of AdamW on two micro-batches of packed rows, with dropout: the loss, the gradients (Adam's first moment holds
them after one step) and the parameters behind it.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import packed
import pytest

from glmjax import errors
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.parallel import collectives
from glmjax.parallel import hlo
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.train import feed
from glmjax.train import objective as objective_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib

CONFIG = config_lib.GLMConfig(
  vocab_size=80,
  num_layers=2,
  embed_dim=32,
  num_heads=8,
  mlp_dim=48,
  max_length=16,
  hidden_dropout=0.1,
  attention_dropout=0.1,
)
MICRO, ROWS, LENGTH = 2, 8, 16
MIXES = [
  dict(data=2, fsdp=2, tensor=2),
  dict(data=2, tensor=2, context=2),
  dict(fsdp=2, tensor=2, context=2),
  dict(data=2, fsdp=2, context=2),
]
CASES = [("fsdp", {axis: 8}) for axis in ("fsdp", "tensor", "context")] + [
  *(("fsdp", sizes) for sizes in MIXES[:3]),
  *(("zero1", sizes) for sizes in [dict(fsdp=8), *MIXES[:2]]),
  *(("sequence", sizes) for sizes in [dict(tensor=8), MIXES[1]]),
]
LONG = [("fsdp", {axis: size}) for axis in ("data", "fsdp", "tensor", "context") for size in (2, 4)] + [
  ("fsdp", dict(data=8)),
  ("fsdp", MIXES[3]),
  *(("zero1", sizes) for sizes in [dict(data=4), *MIXES[2:]]),
]
OPTIMIZER = optimizer_lib.AdamW(clip_norm=1e9)  # or the clipped gradient's error would be the norm's
ADAM_EPSILON = 1e-3  # or a gradient of 1e-9 would move a weight as one of 1


def _rows() -> feed.HostBatch:
  return packed.rows(MICRO * ROWS, LENGTH, CONFIG.vocab_size)


@dataclasses.dataclass
class Step:
  """One optimizer step: its program, and what came of it. (Programs that are kept take memory maps, which run out.)"""

  mesh: jax.sharding.Mesh
  abstract: state_lib.TrainState
  text: str  # of the program
  memory: Any  # of a device, as XLA counts it
  state: state_lib.TrainState  # on the host
  metrics: dict[str, np.ndarray]

  def over(self, kind: str, *axes: str) -> list[collectives.Collective]:
    """Those of a kind that run over any of these axes (none given: over any)."""
    return [c for c in self.all if c.kind == kind and (not axes or {*axes} & {*c.axes})]

  @functools.cached_property
  def all(self) -> list[collectives.Collective]:
    return collectives.of(hlo.read(self.text), self.mesh)


@functools.cache
def first_state() -> state_lib.TrainState:
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1), jax.devices()[:1])
  tx = OPTIMIZER.make()
  return jax.device_get(state_lib.create(CONFIG, tx, 0, state_lib.abstract(CONFIG, tx, mesh)))


@functools.cache
def run(strategy: str, sizes: tuple[tuple[str, int], ...]) -> Step:
  mesh_config = mesh_lib.MeshConfig(**{"data": 1} | dict(sizes))
  mesh = mesh_lib.make_mesh(mesh_config, jax.devices()[: math.prod(dataclasses.astuple(mesh_config))])
  rules = partitioning.STRATEGIES[strategy]
  optimizer = dataclasses.replace(OPTIMIZER, epsilon=ADAM_EPSILON)
  tx = optimizer.make()
  recipe = step_lib.Recipe(optimizer, schedules.Constant(1e-2), schedules.Constant(0.5))
  layout = feed.Layout.make(mesh, rules, MICRO * ROWS, ROWS, LENGTH, CONFIG.position_kind, CONFIG.vocab_size)
  first = first_state()
  with partitioning.use(mesh, rules):
    abstract = state_lib.abstract(CONFIG, tx, mesh, rules)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    state = jax.device_put(first, shardings)
    arguments = state, layout.put(_rows()), step_lib.StepInfo(*map(jnp.uint32, (0, 0, MICRO * ROWS)))
    program = (
      step_lib.compile_train_step(objective_lib.Objective(CONFIG, chunk=20), recipe, tx, shardings)
      .lower(*arguments)
      .compile()
    )
    state, metrics = jax.device_get(program(*arguments))
  return Step(mesh, abstract, program.as_text(), program.memory_analysis(), state, metrics)


def of(strategy: str, sizes: dict[str, int]) -> Step:
  return run(strategy, tuple(sizes.items()))


@pytest.mark.parametrize("strategy, sizes", CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in LONG])
def test_trains_as_one_device(strategy, sizes):
  one, many = of("fsdp", {}), of(strategy, sizes)
  assert many.metrics["applied"] and many.metrics["loss_tokens"] == one.metrics["loss_tokens"]
  for name in ("loss", "losses", "grad_norm", "grad_norm_embedding", "grad_norm_norms"):
    np.testing.assert_allclose(many.metrics[name], one.metrics[name], rtol=2e-5, err_msg=name)
  for have, want in zip(jax.tree.leaves(many.state), jax.tree.leaves(one.state), strict=True):
    np.testing.assert_allclose(have, want, atol=1e-5 * max(1e-2, np.abs(want).max()))


def kernels(step: Step) -> set[int]:
  """Sizes of the stacked kernels, as they are split over tensor."""
  return {
    leaf.size // step.mesh.shape["tensor"]
    for path, leaf in jax.tree.leaves_with_path(step.abstract.params)
    if optimizer_lib.path_names(path)[-1] == "kernel"
  }


def sizes_of(found: list[collectives.Collective]) -> set[int]:
  return {math.prod(shape) for c in found for _, shape in c.arrays}


@pytest.mark.parametrize("sizes", [dict(fsdp=8), MIXES[0], MIXES[2]])
def test_fsdp_gathers_a_layer_at_a_time(sizes):
  step = of("fsdp", sizes)
  gathers = step.over("all-gather", "fsdp")
  layer = {size // CONFIG.num_layers for size in kernels(step)}
  table = CONFIG.vocab_size * CONFIG.embed_dim // step.mesh.shape["tensor"]
  biases = {CONFIG.embed_dim}
  assert layer <= sizes_of(gathers) <= layer | biases | {table}  # nothing of the optimizer's, no activations
  assert all(c.loops == (None, CONFIG.num_layers) for c in gathers if sizes_of([c]) & layer)
  assert not step.over("all-gather", "data")


@pytest.mark.parametrize("sizes", [dict(fsdp=8), *MIXES[:2]])
def test_zero1_gathers_and_sums_once(sizes):
  step = of("zero1", sizes)
  gathers = step.over("all-gather", "data", "fsdp")
  assert all(c.loops == () for c in gathers)
  assert kernels(step) <= sizes_of(gathers)
  table = CONFIG.vocab_size * CONFIG.embed_dim // step.mesh.shape["tensor"]
  assert sizes_of(gathers) <= kernels(step) | {table, CONFIG.num_layers * CONFIG.embed_dim}  # no moments
  assert sum(c.bytes for c in gathers) <= 4 * params_lib.count(CONFIG)
  shards = partitioning.batch_shards(step.mesh)
  summed = step.over("reduce-scatter", "data", "fsdp")
  assert all(c.loops == () for c in summed)
  assert sizes_of(summed) == {math.prod(shape) // shards for c in gathers for _, shape in c.arrays}
  inside = [c for c in step.all if c.loops and {"data", "fsdp"} & {*c.axes}]
  assert all(c.bytes <= 4 for c in inside), inside  # how many chunks of logits there are


@pytest.mark.parametrize("strategy", ["fsdp", "zero1"])
def test_state_is_split(strategy):
  """What lies on a device between steps: float32 weights and two moments, an eighth of each, and the batch."""
  step = of(strategy, MIXES[0] if strategy == "fsdp" else dict(fsdp=8))
  parts = 4 if strategy == "fsdp" else 8  # of the former's mesh, data holds copies of the state too
  vectors = sum(leaf.size for leaf in jax.tree.leaves(step.abstract.params) if leaf.ndim < 3)  # norms are not split
  batch = 7 * 4 * MICRO * ROWS * LENGTH
  assert step.memory.argument_size_in_bytes < 12 * (params_lib.count(CONFIG) / parts + vectors) + batch


def test_tensor_moves_activations_alone():
  step = of("fsdp", dict(tensor=8))
  assert not step.over("all-gather") and not step.over("all-to-all")
  assert not sizes_of(step.over("all-reduce")) & kernels(step)
  layer = [c for c in step.over("all-reduce") if CONFIG.num_layers in c.loops]
  assert [c.arrays for c in layer] == [(("f32", (ROWS, LENGTH, CONFIG.embed_dim)),)] * 4  # two sublayers, and back


def test_sequence_splits_what_layers_keep():
  """Between layers lies a part of the tokens on each device; products gather all of them, and no weights."""
  config, mesh = dataclasses.replace(CONFIG, remat="full"), mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, tensor=4))
  params, whole = glm.init_params(CONFIG, jax.random.key(0)), jnp.ones((ROWS, LENGTH), jnp.int32)

  def text(rules: partitioning.Rules) -> str:
    def loss(p):
      return glm.GLM(config).apply({"params": p}, whole, whole, whole * 0, whole * LENGTH, method="hidden")[0].sum()

    with partitioning.use(mesh, rules):
      boxed = jax.eval_shape(lambda: glm.init(config, jax.random.key(0)))
      return (
        jax.jit(jax.grad(loss))
        .lower(
          jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            params,
            partitioning.shardings(boxed, mesh, rules),
          )
        )
        .compile()
        .as_text()
      )

  kept = f"f32[{CONFIG.num_layers},{ROWS // 2},{{}},{CONFIG.embed_dim}]"
  plain, split = text(partitioning.FSDP), text(partitioning.SEQUENCE)
  assert kept.format(LENGTH) in plain and kept.format(LENGTH) not in split and kept.format(LENGTH // 4) in split
  gathers = [c for c in collectives.of(hlo.read(split), mesh) if c.kind == "all-gather"]
  assert CONFIG.vocab_size * CONFIG.embed_dim not in sizes_of(gathers)
  gathers = [c for c in gathers if c.loops]
  assert sizes_of(gathers) == {ROWS // 2 * LENGTH * CONFIG.embed_dim} and {c.axes for c in gathers} == {("tensor",)}


@pytest.mark.parametrize("sizes", [dict(context=8), *MIXES[1:3]])
def test_context_gathers_keys_and_values_alone(sizes):
  step = of("fsdp", sizes)
  gathers = step.over("all-gather", "context")
  rows, heads = ROWS // partitioning.batch_shards(step.mesh), CONFIG.num_heads // step.mesh.shape["tensor"]
  assert sizes_of(gathers) == {rows * LENGTH * heads * CONFIG.head_dim}  # not the scores, not the hidden states
  assert all(c.loops == (None, CONFIG.num_layers) for c in gathers) and len(gathers) <= 4


@pytest.mark.parametrize("strategy, sizes", CASES)
def test_rows_stay_where_they_are(strategy, sizes):
  """No device receives the activations of rows that are not its own."""
  step = of(strategy, sizes)
  assert not [c for kind in ("all-to-all", "collective-permute") for c in step.over(kind, "data", "fsdp")]
  row = LENGTH * CONFIG.embed_dim // step.mesh.shape["context"]
  gathered = sizes_of([c for c in step.over("all-gather", "data", "fsdp") if c.loops])
  assert ROWS * row not in gathered and ROWS * LENGTH not in gathered


def test_what_does_not_fit_is_told():
  with pytest.raises(errors.InputError, match="strategy is 'zero3': use one of fsdp, zero1"):
    partitioning.strategy("zero3")
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, context=8))
  with pytest.raises(errors.InputError, match="rows of 12 tokens do not divide over the mesh's context=8"):
    feed.Layout.make(mesh, partitioning.FSDP, 8, None, 12, CONFIG.position_kind, 80)
  with pytest.raises(errors.InputError, match="embed_dim 32 does not divide over data=3 x fsdp=1"):
    devices = jax.devices()[:3]
    state_lib.abstract(
      CONFIG, OPTIMIZER.make(), mesh_lib.make_mesh(mesh_lib.MeshConfig(data=3), devices), partitioning.ZERO1
    )
