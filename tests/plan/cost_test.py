"""FLOPs of a jaxpr and traffic of a compiled program against arithmetic."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib
from glmjax.parallel import hlo
from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import cost
from glmjax.plan import estimate
from glmjax.plan import programs
from glmjax.plan import targets

TINY = config_lib.GLMConfig(vocab_size=256, num_layers=4, embed_dim=32, num_heads=4, mlp_dim=64, max_length=16)


def test_flops_count_every_turn_of_a_loop():
  def run(x: jax.Array, w: jax.Array) -> jax.Array:
    x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)
    with jax.named_scope("turns"):
      return jax.lax.while_loop(lambda c: c[0] < x[0, 0], lambda c: (c[0] + 1, c[1] @ w), (0.0, x))[1]

  jaxpr = jax.make_jaxpr(run)(jnp.ones((4, 8)), jnp.ones((8, 8))).jaxpr
  assert cost.flops(jaxpr, {"turns": 7}) == (5 + 7) * 2 * 4 * 8 * 8
  assert cost.flops(jaxpr, {}) == (5 + 1) * 2 * 4 * 8 * 8


@pytest.mark.parametrize("remat, passes", [("none", 3), ("full", 4)])
def test_flops_of_a_training_step(remat: str, passes: int):
  """Forward, twice as much backward, and forward again where nothing is kept; the head is not computed again."""
  config = dataclasses.replace(TINY, remat=remat)
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1), jax.devices()[:1])
  program = programs.Train(8, 16, micro_batch=4, predicted=1.0).program(config, mesh)
  layer = 2 * (params_lib.count_of_matmuls(config) - 256 * 32) + 4 * 4 * 32 * 16
  found = cost.flops(program.traced.jaxpr.jaxpr, program.trips)
  # Full remat computes a layer's last product, wo, only where backward needs it: nowhere.
  repeated = (passes - 3) * 2 * 4 * 64 * 32
  assert 8 * 16 * (passes * layer - repeated + 3 * 2 * 256 * 32) == pytest.approx(found, rel=0.02)
  assert program.model_flops == 8 * 16 * (3 * layer + 3 * 2 * 256 * 32)


def test_traffic_of_a_loop_counts_the_slice_that_a_turn_reads():
  stack = jnp.ones((50, 1 << 10, 16))
  compiled = (
    jax.jit(lambda s: jax.lax.fori_loop(0, 50, lambda i, t: t + jnp.sin(s[i]), jnp.zeros((1 << 10, 16))))
    .lower(stack)
    .compile()
  )
  moved = cost.traffic(hlo.read(compiled.as_text()), {})
  turn = (1 << 10) * 16 * 4
  assert 50 * 2 * turn <= moved <= 50 * 6 * turn  # a slice read, a sum read and written, or two of them apart


def test_traffic_of_what_is_called():
  """XLA for CPUs puts small loops into computations of their own; of branches, the most costly one counts."""
  text = """%twice (p.0: f32[4]) -> f32[4] {
  %p.0 = f32[4]{0} parameter(0)
  %a = f32[4]{0} add(%p.0, %p.0)
  ROOT %b = f32[4]{0} add(%a, %a)
}

%once (q.0: f32[4]) -> f32[4] {
  %q.0 = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} negate(%q.0)
}

ENTRY %main (x: f32[4], i: s32[]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[4]{0} call(%x), to_apply=%twice, frontend_attributes={xla_cpu_small_call="true"}
  ROOT %r = f32[4]{0} conditional(%i, %y, %y), branch_computations={%once, %twice}
}
"""
  assert cost.traffic(hlo.read(text), {}) == 2 * 2 * 3 * 16


def test_traffic_of_a_fusion_counts_the_slice_that_one_inside_it_takes():
  """As XLA for TPUs nests them: a stack of 50 arrays goes in, one of them is read."""
  text = """%inner (p.0: f32[50,4], p.1: s32[]) -> f32[1,4] {
  %p.0 = f32[50,4]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %d = f32[1,4]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,4}
}

%outer (q.0: f32[50,4], q.1: s32[]) -> f32[4] {
  %q.0 = f32[50,4]{1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %b = f32[50,4]{1,0} bitcast(%q.0)
  %f = f32[1,4]{1,0} fusion(%b, %q.1), kind=kLoop, calls=%inner
  ROOT %c = f32[4]{0} bitcast(%f)
}

ENTRY %main (x: f32[50,4], i: s32[]) -> f32[4] {
  %x = f32[50,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %r = f32[4]{0} fusion(%x, %i), kind=kLoop, calls=%outer
}
"""
  assert cost.traffic(hlo.read(text), {}) == 16 + 16 + 4


def test_traffic_of_a_fusion_that_adds_to_a_slice_in_place():
  text = """%add (p.0: f32[50,4], p.1: s32[], p.2: f32[1,4]) -> f32[50,4] {
  %p.0 = f32[50,4]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = f32[1,4]{1,0} parameter(2)
  %d = f32[1,4]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,4}
  %s = f32[1,4]{1,0} add(%d, %p.2)
  ROOT %u = f32[50,4]{1,0} dynamic-update-slice(%p.0, %s, %p.1, %p.1)
}

ENTRY %main (x: f32[50,4], i: s32[], y: f32[1,4]) -> f32[50,4] {
  %x = f32[50,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[1,4]{1,0} parameter(2)
  ROOT %r = f32[50,4]{1,0} fusion(%x, %i, %y), kind=kLoop, calls=%add
}
"""
  assert cost.traffic(hlo.read(text), {}) == 3 * 16 + 4  # the slice read and written, what is added, the place


def test_memory_is_what_the_arrays_take():
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, fsdp=4, tensor=2))
  program = programs.Train(8, 16).program(TINY, mesh)
  compiled = program.traced.lower().compile()
  memory = estimate.peak_memory(compiled, program.parts, targets.CHIPS["a100-40"])
  state = jax.tree.leaves(program.parts["parameters"])
  assert memory["memory"]["parameters"] == sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in state)
  assert memory["memory"]["parameters"] < params_lib.count(TINY) * 4 / 3  # split, but for norms and biases
  assert memory["fits"] and sum(memory["memory"].values()) == memory["peak_bytes_per_device"]


def test_what_decoding_reads_is_split_over_tensor():
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, fsdp=1, tensor=4), jax.devices()[:4])
  program = programs.Decode(context=64, bits=4).program(TINY, mesh)
  cache = sum(map(estimate.shard_bytes, jax.tree.leaves(program.parts["kv_cache"])))
  assert cache == 4 * 2 * 64 * 32 * 4 // 4  # layers, key and value, slots, width, float32
  text = program.traced.lower().compile().as_text()
  assert "256,32]" not in text.replace("f32[64,32]", ""), "the table is gathered"


@pytest.mark.parametrize(
  "work",
  [
    programs.Decode(context=64, prompt=32),
    programs.Decode(context=64),
    programs.Decode(batch=2, context=32, prompt=32, scored=4),
  ],
)
def test_flops_of_inference(work: programs.Decode):
  program = work.program(TINY, mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, tensor=4), jax.devices()[:4]))
  assert program.model_flops == cost.flops(program.traced.jaxpr.jaxpr, program.trips)


def test_a_softmax_in_the_compute_dtype_compiles():
  model = dataclasses.replace(TINY, num_layers=1, dtype="float16", softmax_dtype="compute")
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, tensor=2), jax.devices()[:2])
  program = programs.Decode(context=64).program(model, mesh)
  assert estimate.peak_memory(program.traced.lower().compile(), program.parts, targets.CHIPS["v100-32"])["fits"]


@pytest.mark.parametrize("name", ["a100", "a100-40:x", "a100-40:12", "v5p:8", "v5p:4x8x8x2", "b300:8", "v5e:0x4"])
def test_unknown_targets_are_told(name: str):
  with pytest.raises(errors.InputError, match="target") as error:
    targets.parse(name)
  assert "\n" not in str(error.value)


def test_targets():
  assert targets.parse("a100-40:768").shape == (96, 8) and targets.parse("v5p:4x8x8").devices == 256
  assert np.isclose(targets.CHIPS["h100"].peak_flops, 989.4e12)


def test_exchanges_around_a_ring():
  """What is sent at the link's rate, and the way of the messages; NCCL's microseconds on GPUs."""
  aim, seconds = targets.parse("a100-40:64"), estimate.exchange_seconds
  assert seconds("all-reduce", 3e9, 8, 1, aim) == pytest.approx(3 / 300 + (3.6 + 14 * 0.47) * 1e-6)
  assert seconds("all-gather", 1e9, 8, 8, aim) == pytest.approx(1 / 25 + (3.6 + 7 * 2.7) * 1e-6)  # one of each node
  assert seconds("all-gather", 0, 64, 1, aim) == pytest.approx((3.6 + 56 * 0.47 + 7 * 2.7) * 1e-6)
  assert seconds("collective-permute", 0, 8, 8, aim) == pytest.approx((3.6 + 2.7) * 1e-6)
  assert seconds("collective-permute", 0, 2, 4, aim) == pytest.approx((3.6 + 0.47) * 1e-6)
  assert seconds("all-gather", 3e9, 16, 16, targets.parse("v5p:4x8x8")) == pytest.approx(3 / 300 + 15e-6)


@pytest.mark.parametrize(
  "name",
  [
    "a100-40:0",
    "a100-40:-1",
    "a100-40:1e3",
    "a100-40:²",
    "a100-40:" + "9" * 5000,
    "v5p:4x4",
    "v5p:4xx8",
    "",
    ":",
    "h100:1.5",
    "a100-40:nan",
  ],
)
def test_targets_that_do_not_exist(name):
  with pytest.raises(errors.InputError, match="target"):
    targets.parse(name)


@pytest.mark.parametrize("make", [programs.Train, programs.Decode])
def test_ranges_of_programs(make):
  """Each number, below its range, and no number at all."""
  given = {"batch_size": 8} if make is programs.Train else {}
  for field in dataclasses.fields(make):
    if field.name in ("optimizer", "strategy", "pipeline", "trainable"):
      continue
    for value in (-1, float("nan"), float("inf"), "3", 1.5, 1 << 70):
      with pytest.raises(errors.InputError, match=f"{make.__name__}.{field.name} is "):
        make(**given | {field.name: value})
