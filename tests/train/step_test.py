"""The step: micro-batches, meshes, dropout, EGS, fp16, and standing still on a gradient that is not finite."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pipelined
import pytest

from glmjax import errors
from glmjax import positions
from glmjax.models import config as config_lib
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.train import feed
from glmjax.train import objective as objective_lib
from glmjax.train import optimizer as optimizer_lib
from glmjax.train import schedules
from glmjax.train import state as state_lib
from glmjax.train import step as step_lib

ROWS = 16
ALPHA = schedules.PiecewiseLinear((10_000, 10_001), (1.0, 0.1))


@functools.cache
def compiled(config: config_lib.GLMConfig, mesh_config: mesh_lib.MeshConfig, optimizer) -> tuple:
  """(mesh, a maker of new states, the compiled step)."""
  devices = jax.devices()[: np.prod([abs(s) for s in dataclasses.astuple(mesh_config)])]
  mesh, tx = mesh_lib.make_mesh(mesh_config, devices), optimizer.make()
  recipe = step_lib.Recipe(optimizer, schedules.Constant(1e-2), ALPHA)
  with partitioning.use(mesh):
    abstract = state_lib.abstract(config, tx, mesh)
    fresh = jax.device_get(state_lib.create(config, tx, 0, abstract))
    objective = objective_lib.Objective(config, chunk=16)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    step = step_lib.compile_train_step(objective, recipe, tx, shardings)
  return mesh, lambda: jax.device_put(fresh, shardings), step


class Run:
  """A state, its compiled step, and the source's batches on one mesh."""

  def __init__(
    self,
    config: config_lib.GLMConfig,
    source,
    mesh_config: mesh_lib.MeshConfig,
    micro: int = 1,
    optimizer=optimizer_lib.AdamW(),
    room: int | None = None,
  ):
    self.mesh, make, self.compiled = compiled(config, mesh_config, optimizer)
    self.state, self.source, self.micro, self.room = make(), source, micro, room or micro

  def batch(self, first: int, size: int = ROWS) -> objective_lib.Batch:
    host = next(self.source.batches(iter([(first, size)])))
    host["rows"] = np.arange(size, dtype=np.int32)

    def place(a: np.ndarray) -> jax.Array:
      axes = (*[None] * (a.ndim - 2), "length") if a.ndim > 1 else ()
      sharding = partitioning.named(self.mesh, partitioning.FSDP, None, "batch", *axes)
      padded = np.zeros((self.room * (ROWS // self.micro), *a.shape[1:]), a.dtype)
      padded[:size] = a
      return jax.device_put(padded.reshape(self.room, ROWS // self.micro, *a.shape[1:]), sharding)

    return {name: place(a) for name, a in host.items()}

  def step(self, first: int, size: int = ROWS, batch: objective_lib.Batch | None = None) -> dict:
    info = step_lib.StepInfo(*map(jnp.uint32, (first, first, size)))
    with partitioning.use(self.mesh):
      self.state, metrics = self.compiled(self.state, self.batch(first, size) if batch is None else batch, info)
    return jax.device_get(metrics)

  def losses(self, steps: int = 4) -> list[float]:
    return [float(self.step(i * ROWS)["loss"]) for i in range(steps)]


ONE = mesh_lib.MeshConfig(data=1)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=8)])
def test_same_losses_on_any_mesh(tiny, source, sizes):
  np.testing.assert_allclose(
    Run(tiny, source, mesh_lib.MeshConfig(**sizes)).losses(), Run(tiny, source, ONE).losses(), rtol=2e-5
  )


def test_micro_batches_equal_the_full_batch(tiny, source):
  full, parts = Run(tiny, source, ONE), Run(tiny, source, ONE, micro=4, room=6)
  np.testing.assert_allclose(parts.losses(), full.losses(), rtol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), parts.state.params, full.state.params)


def test_mean_of_rows_is_the_mean_of_their_own_means(tiny, source):
  objective = objective_lib.Objective(tiny, chunk=16, mean_of="rows")
  params = Run(tiny, source, ONE).state.params
  host = next(source.batches(iter([(0, 4)])))
  host["loss_weights"][3] = 0  # a row that only fills the batch counts nothing
  loss = jax.jit(lambda batch: objective.sums(params, objective.weigh(batch)).mean())
  each = [float(loss({name: a[i : i + 1] for name, a in host.items()})) for i in range(3)]
  assert float(loss(host)) == pytest.approx(np.mean(each), rel=1e-5)
  by_token = objective_lib.Objective(tiny, chunk=16)
  assert by_token.weigh(host) is host
  assert float(jax.jit(by_token.sums)(params, host).mean()) != pytest.approx(np.mean(each))


def test_growing_batch_never_recompiles(tiny, source):
  run, full = Run(tiny, source, ONE, micro=4, room=6), Run(tiny, source, ONE)
  run.step(0, 5)
  before = run.compiled._cache_size()
  for size in (8, 16, 24):
    run.step(int(run.state.samples_seen), size)
  assert run.compiled._cache_size() == before
  assert int(run.state.samples_seen) == 53 and int(run.state.step) == 4
  fresh = Run(tiny, source, ONE, micro=4, room=6)
  assert float(fresh.step(0, 16)["loss"]) == pytest.approx(float(full.step(0, 16)["loss"]), rel=1e-5)


def test_learns_and_reports(tiny, source):
  run = Run(tiny, source, ONE)
  first = run.step(0)
  parts = {f"grad_norm_{part}" for part in ("embedding", "attention", "mlp", "norms")}
  assert set(first) >= {"loss", "grad_norm", *parts}
  parts = [float(v) for k, v in first.items() if k.startswith("grad_norm_")]
  assert np.linalg.norm(parts) == pytest.approx(float(first["grad_norm"]), rel=1e-5)
  assert first["losses"].sum() / first["weights"].sum() == pytest.approx(float(first["loss"]), rel=1e-5)
  for i in range(1, 40):
    last = run.step(i * ROWS)
  assert last["loss"] < 0.7 * first["loss"]


def test_muon_learns(tiny, source):
  run = Run(tiny, source, ONE, optimizer=optimizer_lib.Muon())
  losses = run.losses(30)
  assert losses[-1] < 0.75 * losses[0]


def test_embedding_shrink_touches_the_embedding_alone(tiny, source):
  run = Run(tiny, source, ONE)
  tenth, one = run.step(20_000, batch=run.batch(0)), run.step(0)  # the first is planned for another state
  assert tenth["grad_norm_embedding"] == pytest.approx(0.1 * one["grad_norm_embedding"], rel=1e-4)
  assert tenth["grad_norm_mlp"] == pytest.approx(one["grad_norm_mlp"], rel=1e-4)
  assert tenth["loss"] == pytest.approx(one["loss"])


def test_dropout_depends_on_the_step_alone(tiny, source):
  config = dataclasses.replace(tiny, hidden_dropout=0.1, attention_dropout=0.1)
  a, b = Run(config, source, ONE), Run(config, source, ONE)
  assert a.losses(2) == b.losses(2)
  assert float(Run(config, source, ONE).step(0)["loss"]) != float(Run(tiny, source, ONE).step(0)["loss"])


def test_dropout_does_not_depend_on_micro_batches(tiny, source):
  """Nor on the mesh: a row's number in the step's batch decides."""
  config = dataclasses.replace(tiny, hidden_dropout=0.3, attention_dropout=0.3)
  whole = Run(config, source, ONE).losses()
  assert not np.allclose(whole, Run(tiny, source, ONE).losses(), rtol=1e-3)
  np.testing.assert_allclose(Run(config, source, ONE, micro=4, room=6).losses(), whole, rtol=2e-5)
  sizes = mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2)
  np.testing.assert_allclose(Run(config, source, sizes, micro=2).losses(), whole, rtol=2e-5)


@pytest.mark.parametrize("parts, num_micro, size", [(1, 3, 24), (1, 3, 17), (2, 3, 24), (2, 3, 18), (4, 3, 20)])
def test_rows_bear_their_numbers_in_the_batch_whichever_host_reads_them(parts, num_micro, size):
  layout = feed.Layout(None, (), num_micro, 8, 16, positions.ROTARY, 64)
  layout.__dict__["part"] = 0, parts
  numbers = layout.row_numbers(size)
  assert numbers.shape == (num_micro, 8) and len(np.unique(numbers)) == numbers.size
  for part in range(parts):  # a host's rows, in the order in which it fills its micro-batches
    own = numbers[:, part * 8 // parts : (part + 1) * 8 // parts].ravel()
    share = size // parts
    np.testing.assert_array_equal(own[:share], part * share + np.arange(share))
    assert (own[share:] >= size).all()


def test_stands_still_when_not_finite(tiny, source):
  run = Run(tiny, source, ONE)
  run.step(0)
  before = jax.device_get(run.state)
  bad = run.batch(ROWS)
  bad["loss_weights"] = bad["loss_weights"].at[0, 3, 15].set(np.inf)
  assert not run.step(ROWS, batch=bad)["applied"]
  assert not run.step(2 * ROWS)["applied"]  # planned for a state that never came
  chex.assert_trees_all_equal(jax.device_get(run.state), before)
  assert run.step(ROWS)["applied"]


def test_fp16_scale_halves_and_goes_on(tiny, source):
  run = Run(dataclasses.replace(tiny, dtype="float16"), source, ONE)
  assert run.step(0)["applied"] and float(run.state.loss_scale.scale) == 65_536
  bad = run.batch(ROWS)
  bad["loss_weights"] = bad["loss_weights"].at[0, 3, 15].set(np.inf)
  params = jax.device_get(run.state.params)
  for i, scale in ((1, 65_536), (2, 32_768), (3, 16_384)):  # the first is forgiven: hysteresis 2
    assert not run.step(i * ROWS, batch=bad)["applied"]
    assert float(run.state.loss_scale.scale) == scale
  chex.assert_trees_all_equal(jax.device_get(run.state.params), params)
  assert run.step(4 * ROWS)["applied"] and int(run.state.step) == 5


def test_fp16_stands_still_where_no_smaller_scale_is_left(tiny, source):
  """So that the state, the step and its dropout are those that went wrong."""
  config = dataclasses.replace(tiny, dtype="float16")
  run = Run(config, source, ONE)
  run.step(0)
  run.state = dataclasses.replace(
    run.state, loss_scale=dataclasses.replace(run.state.loss_scale, scale=jnp.float32(2), patience=jnp.int32(1))
  )
  bad = run.batch(ROWS)
  bad["loss_weights"] = bad["loss_weights"].at[0, 3, 15].set(np.inf)
  halved = run.step(ROWS, batch=bad)
  assert halved["advanced"] and not halved["applied"] and float(run.state.loss_scale.scale) == 1
  before = jax.device_get(run.state)
  last = run.step(2 * ROWS, batch=bad)
  assert not last["advanced"] and not last["applied"]
  assert not run.step(3 * ROWS)["applied"]  # what was sent behind it is planned for a state that never came
  chex.assert_trees_all_equal(jax.device_get(run.state), before)


def test_loss_scale_doubles_after_its_window():
  scale, policy = state_lib.DynamicLossScale(window=3).init(), state_lib.DynamicLossScale(window=3)
  for _ in range(3):
    scale = policy.update(scale, jnp.bool_(True))
  assert (float(scale.scale), int(scale.good_steps)) == (131_072, 0)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"hysteresis": 0}, {"start": 0.5}, {"minimum": 0.0}])
def test_loss_scales_that_cannot_be(wrong):
  with pytest.raises(errors.InputError, match=f"DynamicLossScale.*{next(iter(wrong))}"):
    state_lib.DynamicLossScale(**wrong)


def test_decay_leaves_biases_and_norms_alone(tiny):
  tx = optimizer_lib.AdamW().make()
  params = jax.eval_shape(lambda: state_lib.init(tiny, tx, 0)).params
  names = {
    optimizer_lib.path_names(path)[-1]: optimizer_lib.decays(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  }
  assert names == {"table": True, "kernel": True, "bias": False, "scale": False}


@pytest.mark.parametrize("optimizer", [optimizer_lib.AdamW(), optimizer_lib.Muon()])
def test_unknown_parameters_are_named(tiny, optimizer):
  params = {"layers": {"attention": {"gate": {"kernel": jnp.ones((2, 4, 4))}}}}
  tx = optimizer.make()
  message = "layers/attention/gate/kernel is no parameter of any model"
  with pytest.raises(errors.InputError, match=message):
    jax.jit(lambda: tx.update(params, tx.init(params), params))()
  with pytest.raises(errors.InputError, match=message):
    jax.jit(step_lib.part_squares)(params)


def test_optimizer_state_is_sharded_like_its_parameters(tiny):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(fsdp=2, tensor=2))
  for optimizer in (optimizer_lib.AdamW(), optimizer_lib.Muon()):
    state = state_lib.abstract(tiny, optimizer.make(), mesh)
    wanted = {(x.shape, x.sharding.spec) for x in jax.tree.leaves(state.params)}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.size > 3]  # the others: counts, Muon's coefficients
    assert all((x.shape, x.sharding.spec) in wanted for x in moments)
    split = state.params["layers"]["attention"]["qkv"]["kernel"].sharding.spec
    assert "fsdp" in split and "tensor" in split


def test_what_is_read_of_a_step_is_whole_on_every_device():
  """Of several processes each reads it; no compiler is left to decide."""
  case = pipelined.Case((("data", 2), ("tensor", 2)))
  for sharding in jax.tree.leaves(pipelined.run(case).program.output_shardings[1]):
    assert sharding.is_fully_replicated
  with partitioning.use(case.mesh):
    state = case.stages.in_stages
    batch = {
      name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype, sharding=partitioning.named(case.mesh, partitioning.FSDP))
      for name, x in pipelined.rows().items()
    }
    evaluated = step_lib.compile_eval_step(objective_lib.Objective(case.config, chunk=case.chunk))
    lowered = evaluated.lower(state.params, state.frozen, batch)
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(lowered.compile().output_shardings))


def test_heads_that_do_not_divide_say_so(tiny):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, tensor=8))
  with pytest.raises(ValueError, match="num_heads 4 does not divide over tensor=8: "):
    state_lib.abstract(tiny, optimizer_lib.AdamW().make(), mesh)


def test_muon_makes_each_matrix_orthogonal(tiny):
  key = jax.random.key(0)
  for inputs, outputs, shape in (((1,), (3, 4), (2, 8, 3, 2, 6)), ((1, 2), (3,), (2, 3, 4, 8))):
    x = jax.random.normal(key, shape)
    y = optimizer_lib._orthogonal(x, inputs, outputs, 5)
    assert y.shape == x.shape and 0.7 < float(jnp.sqrt(jnp.square(y).mean())) < 1.3
    first = np.asarray(y[0, :, 0] if y.ndim == 5 else y[0]).reshape(np.prod([shape[i] for i in inputs]), -1)
    singular = np.linalg.svd(first, compute_uv=False)
    assert singular.max() / singular.min() < 3.5
