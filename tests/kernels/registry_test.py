"""How an implementation is chosen for a target."""

import dataclasses
import types

import jax.numpy as jnp
import pytest

from glmjax import target as target_lib
from glmjax.kernels import attention
from glmjax.kernels import flash
from glmjax.kernels import operations
from glmjax.kernels import quantized
from glmjax.kernels import registry

KINDS = {
  "cpu": ("cpu", "cpu"),
  "h100": ("gpu", "NVIDIA H100 80GB HBM3"),
  "v100": ("gpu", "Tesla V100-SXM2-16GB"),
  "rtx2080ti": ("gpu", "NVIDIA GeForce RTX 2080 Ti"),
  "v5e": ("tpu", "TPU v5 lite"),
  "v3": ("tpu", "TPU v3"),
}


@pytest.fixture(autouse=True)
def _compilers(monkeypatch):
  for name in ("triton", "mosaic"):
    found = getattr(target_lib, name)() or types.ModuleType(name)
    monkeypatch.setattr(target_lib, name, lambda found=found: found)


def target(name: str, **parts: int) -> target_lib.Target:
  platform, kind = KINDS[name]
  device = types.SimpleNamespace(platform=platform, device_kind=kind)
  return target_lib.Target.of(device, 1, parts)


def chosen(operation: registry.Operation, on: target_lib.Target, *arguments) -> tuple[str, ...]:
  return operation.choose(on, *arguments).needs


@pytest.mark.parametrize("operation", operations.ALL, ids=lambda operation: operation.computes)
def test_the_last_takes_everything_everywhere(operation: registry.Operation):
  last = operation.implementations[-1]
  assert not last.needs and last.fits is registry.always
  assert len({way.name for way in operation.implementations}) == len(operation.implementations)
  assert all(need in target_lib.FEATURES for way in operation.implementations for need in way.needs)


@pytest.mark.parametrize("operation", operations.ALL, ids=lambda operation: operation.computes)
@pytest.mark.parametrize("name", KINDS)
def test_every_way_is_explained_in_a_line(operation: registry.Operation, name: str):
  lines = operation.explain(target(name))
  assert [way for way, _ in lines] == [way.name for way in operation.implementations]
  assert all(why and "\n" not in why for _, why in lines)
  assert sum(why.startswith("chosen: ") for _, why in lines) == 1


def heads(length: int, keys: int, width: int, dtype: str) -> flash.Inputs:
  q, k = (jnp.zeros((2, size, 4, width), dtype) for size in (length, keys))
  places = jnp.zeros((2, length), jnp.int32)
  return flash.Inputs(q, k, k, places, places)


@pytest.mark.parametrize(
  "name, width, dtype, expected",
  [
    ("h100", 64, "bfloat16", ("triton",)),
    ("h100", 64, "float32", ()),
    ("h100", 80, "float16", ()),
    ("v100", 64, "float16", ()),
    ("v5e", 128, "float32", ("mosaic",)),
    ("v5e", 64, "bfloat16", ()),
    ("v3", 128, "bfloat16", ()),
    ("cpu", 128, "bfloat16", ()),
  ],
)
def test_attention(name: str, width: int, dtype: str, expected: tuple[str, ...]):
  assert chosen(attention.ATTENTION, target(name), heads(256, 256, width, dtype)) == expected


def test_attention_on_a_mesh_wants_whole_blocks_on_each_device():
  arguments = heads(256, 256, 64, "bfloat16")
  assert chosen(attention.ATTENTION, target("h100", length=2, act_heads=4), arguments) == ("triton",)
  assert chosen(attention.ATTENTION, target("h100", length=4), arguments) == ()
  assert chosen(attention.ATTENTION, target("h100", act_heads=8), arguments) == ()


def test_a_prefix_is_dense_and_one_query_has_a_kernel_of_its_own():
  arguments = heads(1, 256, 64, "bfloat16")
  prefix = (jnp.zeros((4, 3, 64)),) * 2
  assert chosen(attention.DECODE, target("h100"), arguments) == ("triton",)
  assert chosen(attention.DECODE, target("h100"), arguments._replace(prefix=prefix)) == ("gpu",)
  assert chosen(attention.DECODE, target("v100"), arguments) == ("gpu",)
  assert chosen(attention.DECODE, target("v100", act_heads=8), arguments) == ()
  assert chosen(attention.ATTENTION, target("h100"), heads(256, 256, 64, "bfloat16")._replace(prefix=prefix)) == ()


@pytest.mark.parametrize(
  "name, width, dtype", [("h100", 64, "float16"), ("h100", 128, "bfloat16"), ("v5e", 128, "bfloat16")]
)
def test_no_kernel_takes_a_softmax_of_less_than_float32(name: str, width: int, dtype: str):
  for length, operation, dense in ((256, attention.ATTENTION, ()), (1, attention.DECODE, ("gpu",) * (name == "h100"))):
    arguments = heads(length, 256, width, dtype)
    assert chosen(operation, target(name), arguments) != dense or name == "v5e" and length == 1
    assert chosen(operation, target(name), arguments._replace(scores_dtype=dtype)) == dense


def test_quantized_products():
  x, codes = jnp.zeros((2, 1, 256), "bfloat16"), jnp.zeros((256, 128), jnp.int8)
  arguments = ("BLF,FD->BLD", x, codes, 8, 1, None)
  assert chosen(quantized.PRODUCT, target("h100"), *arguments) == ("triton",)
  assert chosen(quantized.PRODUCT, target("cpu"), *arguments) == ("cpu",)
  many = ("BLF,FD->BLD", jnp.zeros((2, 9, 256), "bfloat16"), codes, 8, 1, None)
  assert chosen(quantized.PRODUCT, target("h100"), *many) == ()


@pytest.mark.parametrize("name", ["v100", "rtx2080ti"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_quantized_products_without_triton(name: str, dtype: str):
  """Few rows, as decoding has, are sums; a prompt's rows, and rows that the mesh splits, are XLA's products."""
  codes, axes = jnp.zeros((256, 128), jnp.int8), ("mlp", "embed")

  def needs(rows: tuple[int, int], **parts: int) -> tuple[str, ...]:
    x, devices = jnp.zeros((*rows, 256), dtype), dataclasses.replace(target(name, **parts), devices=4 if parts else 1)
    return chosen(quantized.PRODUCT, devices, "BLF,FD->BLD", x, codes, 8, 1, axes if parts else None)

  assert needs((1, 1)) == needs((8, 1)) == needs((2, 4)) == ("gpu",)
  assert needs((9, 1)) == needs((1, 2048)) == ()
  assert needs((1, 1), mlp=4) == needs((1, 1), embed=4) == ("gpu",)
  assert needs((4, 1), batch=4) == needs((4, 1), heads=4) == ()


def test_what_the_kernel_does_not_take_is_summed():
  x, codes = jnp.zeros((2, 1, 256), "float32"), jnp.zeros((256, 128), jnp.int8)
  assert chosen(quantized.PRODUCT, target("h100"), "BLF,FD->BLD", x, codes, 8, 1, None) == ("gpu",)


def test_without_the_compiler_there_is_still_a_way(monkeypatch):
  monkeypatch.setattr(target_lib, "triton", lambda: None)
  assert chosen(attention.ATTENTION, target("h100"), heads(256, 256, 64, "bfloat16")) == ()
  (_, why), *_ = attention.ATTENTION.explain(target("h100"))
  assert "has no Pallas Triton" in why and "Mosaic GPU" in why
