"""What is read from a compiled program's text: kinds, sizes, axes, loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.parallel import collectives
from glmjax.parallel import hlo
from glmjax.parallel import mesh as mesh_lib

P = jax.sharding.PartitionSpec
MESH = functools.cache(lambda: mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, tensor=2, context=2)))


def of(body: str, before: str = "") -> list[collectives.Collective]:
  """The collectives of an entry computation with this line."""
  text = f"HloModule m\n\n{before}\nENTRY %main.1 (p: f32[4]) -> f32[4] {{\n  {body}\n}}\n"
  return collectives.of(hlo.read(text), MESH())


@pytest.mark.parametrize(
  "groups, axes",
  [
    ("{{0,1},{2,3},{4,5},{6,7}}", ("context",)),
    ("{{0,1,4,5},{2,3,6,7}}", ("data", "context")),
    ("{}", ("data", "tensor", "context")),
    ("[4,2]<=[8]", ("context",)),
    ("[4,2]<=[2,2,2]T(0,2,1)", ("tensor",)),
    ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "context")),
    ("mesh['a'=2,'b'=4] {'a'}", ("data",)),
    ("mesh['a'=2,'b'=4] {'b'}", ("tensor", "context")),
    ("mesh['a'=2,'b'=4] {'b':(1)2}", ("tensor",)),
    ("mesh['a'=8] {'a':(1)2,'a':(4)2}", ("data", "context")),
    ("mesh['a'=1,'b'=2,'c'=2,'d'=2], device_ids=([2,2,2]T(1,0,2)) {'b'}", ("tensor",)),
  ],
)
def test_axes_of_groups(groups, axes):
  (found,) = of(f"ROOT %r = f32[4,8]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add")
  assert found.axes == axes and found.group == 2 ** len(axes)
  assert (found.kind, found.arrays, found.bytes, found.loops) == ("all-reduce", (("f32", (4, 8)),), 128, ())


def test_sizes():
  (several,) = of(
    "%r = (bf16[4,8]{1,0}, /*index=1*/s32[], pred[3]{0}) all-reduce(%a, %b, %c), replica_groups=[1,8]<=[8]"
  )
  assert several.bytes == 64 + 4 + 3 and several.sent == 2 * 71 * 7 / 8
  (started,) = of("%s = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}")
  assert started.kind == "all-gather" and started.arrays == (("bf16", (8,)),) and started.sent == 8
  (sent,) = of("%s = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%p), source_target_pairs={{0,4},{4,0}}")
  assert sent.bytes == sent.sent == 16 and sent.axes == ("data",)
  (scattered,) = of("%s = f32[2]{0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}")
  assert scattered.bytes == scattered.sent == 8
  assert not of("%d = f32[8]{0} all-gather-done(%s)") and not of("%all-gather.3 = f32[8]{0} copy(%all-reduce.2)")


def test_loops_and_calls():
  """A known loop in one of unknown length, and a computation that is called twice."""
  before = """%inner (p: f32[4]) -> f32[4] {
  %g = f32[4]{0} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add, metadata={op_name="jit(f)/x"}
}

%outer (p: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
}
"""
  first, second = of(
    "%w = f32[4]{0} while(%p), condition=%c, body=%outer\n  %c.1 = f32[4]{0} call(%p), to_apply=%inner", before
  )
  assert first.loops == (None, 5) and first.times() == 5 and first.times(unknown=3) == 15
  assert second.loops == () and second.times() == 1 and second.source == "jit(f)/x"


def test_reduce_scatter_of_tpus():
  """A fusion of an all-reduce and the slice of it that a device keeps, which is what is exchanged."""
  before = """%all-reduce-scatter.1 (p.1: f32[8]) -> f32[4] {
  %all-reduce.1 = f32[8]{0:T(8)} all-reduce(%p.1), replica_groups=[4,2]<=[8], to_apply=%add
}
"""
  (found,) = of("%f = f32[4]{0:T(8)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", before)
  assert found.kind == "reduce-scatter" and found.arrays == (("f32", (4,)),) and found.sent == 16


def test_compiled_program():
  """A product over a split axis in a loop, then an array made whole."""
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, tensor=4))

  def sharding(*spec):
    return jax.sharding.NamedSharding(mesh, P(*spec))

  def f(x: jax.Array, w: jax.Array) -> jax.Array:
    x = jax.lax.scan(
      lambda x, _: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), sharding("data", "tensor")), None), x, length=3
    )[0]
    return jax.lax.with_sharding_constraint(x, sharding("data", None))

  shapes = [
    jax.ShapeDtypeStruct((8, 8), np.float32, sharding=sharding(*spec)) for spec in (("data", "tensor"), ("tensor",))
  ]
  found = collectives.of(hlo.read(jax.jit(f).lower(*shapes).compile().as_text()), mesh)
  assert {c.axes for c in found} == {("tensor",)}
  assert [c.loops for c in found if c.kind == "all-gather"] == [()] and {c.times() for c in found} == {1, 3}
