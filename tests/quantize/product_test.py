"""Products with quantized weights, and their gradients, are those with the weights that they stand for."""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import target as target_lib
from glmjax.kernels import matmul_gpu
from glmjax.kernels import quantized
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning
from glmjax.quantize import qarray

_KERNELS = [
  ("BLD,DTHK->BLTHK", (512, 3, 2, 8), (0,)),
  ("BLHK,HKD->BLD", (16, 32, 24), (0, 1)),
  ("BLD,DTF->BLTF", (384, 2, 20), (0,)),
  ("BLF,FD->BLD", (682, 12), (0,)),
  ("BLF,FD->BLD", (26, 12), (0,)),
  ("BLF,FD->BLD", (2 * 521, 4), (0,)),
]  # the last: no block divides it


def _case(
  spec: str, shape: tuple[int, ...], axes: tuple[int, ...], bits: int, rows: tuple[int, int] = (2, 3)
) -> tuple[jax.Array, qarray.QuantizedArray, jax.Array]:
  x = jax.random.normal(jax.random.key(0), rows + shape[: len(axes)])
  q = qarray.quantize(jax.random.normal(jax.random.key(1), shape), bits, axes)
  return x, q, jnp.einsum(spec, x, qarray.dequantize(q), precision="highest")


def _product(spec: str, x: jax.Array, q: qarray.QuantizedArray) -> jax.Array:
  return q.product(partitioning.target(), spec, x)


@pytest.mark.parametrize("spec, shape, axes", _KERNELS)
@pytest.mark.parametrize("bits", qarray.BITS)
def test_close_to_dequantized(spec: str, shape: tuple[int, ...], axes: tuple[int, ...], bits: int):
  x, q, expected = _case(spec, shape, axes, bits)
  for run in (_product, jax.jit(_product, static_argnums=0)):
    y = run(spec, x, q)
    assert y.dtype == x.dtype and y.shape == expected.shape
    np.testing.assert_allclose(y, expected, atol=2e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
@pytest.mark.parametrize("bits", qarray.BITS)
def test_half_types_do_not_overflow(bits: int, dtype: Any, tolerance: float):
  x, q, expected = _case("BLF,FD->BLD", (1024, 12), (0,), bits)
  scale = 20.0  # sums of codes times inputs pass fp16's 65504
  y = _product("BLF,FD->BLD", (x * scale).astype(dtype), q)
  assert y.dtype == dtype
  tolerance *= float(jnp.abs(expected).max())
  np.testing.assert_allclose(y.astype(jnp.float32) / scale, expected, atol=tolerance)


@pytest.mark.parametrize("bits", qarray.BITS)
def test_scan_and_vmap_over_layers(bits: int):
  w = jax.random.normal(jax.random.key(0), (5, 256, 256)) / 16
  stacked = jax.vmap(lambda w: qarray.quantize(w, bits, (0,)))(w)
  x = jax.random.normal(jax.random.key(1), (1, 3, 256))
  expected = x
  for layer in qarray.dequantize(stacked):
    expected = expected @ layer

  def layer(x, q):
    return (_product("BLF,FD->BLD", x, q), None)

  scanned = jax.jit(lambda x, q: jax.lax.scan(layer, x, q)[0])(x, stacked)
  np.testing.assert_allclose(scanned, expected, atol=1e-4)
  mapped = jax.vmap(lambda q: _product("BLF,FD->BLD", x, q))(stacked)
  np.testing.assert_allclose(mapped, jnp.einsum("BLF,NFD->NBLD", x, qarray.dequantize(stacked)), atol=1e-4)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
@pytest.mark.parametrize("where", [P("tensor", None), P(None, "tensor")])
@pytest.mark.parametrize("bits", qarray.BITS)
def test_sharded_over_inputs_or_outputs(bits: int, where: P):
  x, q, expected = _case("BLF,FD->BLD", (512, 64), (0,), bits)
  mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  scale_spec = P(*(None if n == 1 else name for n, name in zip(q.scale.shape, where)))
  shardings = (NamedSharding(mesh, spec) for spec in (where, scale_spec))
  q = jax.device_put(q, qarray.QuantizedArray(*shardings, bits, q.axis))
  x = jax.device_put(x, NamedSharding(mesh, P(None, None, where[0])))
  y = jax.jit(_product, static_argnums=0)("BLF,FD->BLD", x, q)
  np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("spec, shape, axes", _KERNELS)
@pytest.mark.parametrize("bits", qarray.BITS)
def test_gradient_of_the_input_is_the_dequantized_products(
  spec: str, shape: tuple[int, ...], axes: tuple[int, ...], bits: int
):
  x, q, y = _case(spec, shape, axes, bits)
  g = jax.random.normal(jax.random.key(2), y.shape)
  want = jax.vjp(lambda x: jnp.einsum(spec, x, qarray.dequantize(q), precision="highest"), x)[1](g)[0]
  got = jax.jit(lambda x, g: jax.vjp(lambda x: _product(spec, x, q), x)[1](g)[0])(x, g)
  assert got.dtype == x.dtype
  np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("bits", qarray.BITS)
def test_gradient_through_scales_of_each_group(bits: int):
  w = [jax.random.normal(jax.random.key(i), (128, 12)) * 10.0**i for i in range(2)]
  parts = [qarray.quantize(x, bits, (0,)) for x in w]
  both = qarray.QuantizedArray(
    *(jnp.concatenate([getattr(q, name) for q in parts]) for name in ("values", "scale")), bits, -2
  )
  x, g = jax.random.normal(jax.random.key(2), (2, 3, 256)), jax.random.normal(jax.random.key(3), (2, 3, 12))
  got = jax.vjp(lambda x: _product("BLF,FD->BLD", x, both), x)[1](g)[0]
  want = jnp.einsum("BLD,FD->BLF", g, qarray.dequantize(both), precision="highest")
  np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
@pytest.mark.parametrize("bits", qarray.BITS)
def test_gradient_in_half_types(bits: int, dtype: Any, tolerance: float):
  """Of a small weight and a small gradient, whose product with a scale float16 would lose."""
  q = qarray.quantize(jax.random.normal(jax.random.key(1), (256, 64)) * 1e-2, bits, (0,))
  x, g = jnp.ones((2, 3, 256), dtype), (jax.random.normal(jax.random.key(2), (2, 3, 64)) * 1e-3).astype(dtype)
  got = jax.vjp(lambda x: _product("BLF,FD->BLD", x, q), x)[1](g)[0]
  want = jnp.einsum("BLD,FD->BLF", g.astype(jnp.float32), qarray.dequantize(q), precision="highest")
  assert got.dtype == dtype
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=tolerance * float(jnp.abs(want).max()))


@pytest.mark.parametrize("bits", qarray.BITS)
def test_backward_keeps_codes_and_scales_alone(bits: int):
  x, q, _ = _case("BLF,FD->BLD", (256, 12), (0,), bits)
  kept = jax.tree.leaves(jax.vjp(lambda x: _product("BLF,FD->BLD", x, q), x)[1])
  assert sum(x.nbytes for x in kept) <= q.nbytes + 16


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU's way")
@pytest.mark.parametrize("bits", qarray.BITS)
def test_no_float_copy_of_the_weights_on_a_cpu(bits: int):
  q = qarray.quantize(jnp.ones((1024, 1024)), bits, (0,))
  x = jnp.ones((1, 1, 1024))

  def backward(spec, x, q):
    return jax.vjp(lambda x: _product(spec, x, q), x)[1](x)

  for run in (_product, backward):
    compiled = jax.jit(run, static_argnums=0).lower("BLF,FD->BLD", x, q).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 2**20  # all of them: 4 MiB


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("inputs, outputs", [(256, 128), (128, 512), (4096, 256)])
@pytest.mark.parametrize("bits", qarray.BITS)
def test_gpu_kernel_for_few_rows(bits: int, inputs: int, outputs: int, rows: int):
  """Interpreted; the sums of codes are exact, so that any order of adding gives the same."""
  rng = np.random.default_rng(0)
  q = qarray.quantize(jnp.asarray(rng.standard_normal((inputs, outputs)), jnp.float32), bits, (0,))
  x = jnp.asarray(rng.integers(-8, 8, (rows, inputs)), jnp.float32)
  assert matmul_gpu.fits(rows, q.values.shape[0], outputs, bits)
  got = matmul_gpu.product(x, q.values, bits, interpret=True)
  np.testing.assert_array_equal(got, np.asarray(x) @ np.asarray(qarray.codes(q), np.float32))


_GPU = frozenset({"gpu"})  # features of one that Triton does not serve


@pytest.mark.parametrize("spec, shape, axes", _KERNELS)
@pytest.mark.parametrize("rows", [(1, 1), (4, 2)])
@pytest.mark.parametrize("bits", qarray.BITS)
def test_sums_are_the_products(
  bits: int, rows: tuple[int, int], spec: str, shape: tuple[int, ...], axes: tuple[int, ...]
):
  """Of whole numbers, whose sums are exact in any order."""
  q = qarray.quantize(jax.random.normal(jax.random.key(1), shape), bits, axes)
  x = jnp.round(8 * jax.random.normal(jax.random.key(0), (*rows, *shape[: len(axes)]))).astype(jnp.float16)
  target = dataclasses.replace(partitioning.target(), platform="gpu", features=_GPU)
  way = quantized.PRODUCT.choose(target, spec, x, q.values, bits, len(axes), None)
  assert way.needs == ("gpu",)
  got = jax.jit(lambda x, codes: way.run(target, spec, x, codes, bits, len(axes), None))(x, q.values)
  want = jnp.einsum(spec, x, qarray.codes(q), preferred_element_type=jnp.float32)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bits", qarray.BITS)
def test_sums_of_a_stack_of_layers(bits: int):
  x, w = jax.random.normal(jax.random.key(0), (1, 3, 64)), jax.random.normal(jax.random.key(1), (5, 64, 12))
  stacked = jax.vmap(lambda w: qarray.quantize(w, bits, (0,)))(w)
  target = dataclasses.replace(partitioning.target(), platform="gpu", features=_GPU)
  mapped = jax.vmap(lambda q: q.product(target, "BLF,FD->BLD", x))(stacked)
  _, scanned = jax.jit(lambda: jax.lax.scan(lambda _, q: (None, q.product(target, "BLF,FD->BLD", x)), None, stacked))()
  for got in (mapped, scanned):
    np.testing.assert_allclose(got, jnp.einsum("BLF,NFD->NBLD", x, qarray.dequantize(stacked)), atol=1e-4)


_SPLIT = pytest.mark.parametrize(
  "spec, shape, axes, names",
  [
    ("BLD,DTHK->BLTHK", (256, 3, 8, 64), (0,), ("embed", "qkv", "heads", "kv")),  # outputs split
    ("BLHK,HKD->BLD", (8, 128, 256), (0, 1), ("heads", "kv", "embed")),
  ],
)  # inputs split: the devices' sums are added


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@_SPLIT
@pytest.mark.parametrize("bits", qarray.BITS)
def test_sums_on_a_mesh(bits: int, spec: str, shape: tuple[int, ...], axes: tuple[int, ...], names: tuple[str, ...]):
  rng = np.random.default_rng(0)
  q = qarray.quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), bits, axes)
  x = jnp.asarray(rng.integers(-8, 8, (3, 1, *shape[: len(axes)])), jnp.float16)
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, tensor=4), jax.devices()[:4])
  with partitioning.use(mesh):
    target = dataclasses.replace(partitioning.target(), platform="gpu", features=_GPU)
    way = quantized.PRODUCT.choose(target, spec, x, q.values, bits, len(axes), names)
    assert way.needs == ("gpu",)
    got = jax.jit(lambda x, codes: way.run(target, spec, x, codes, bits, len(axes), names))(x, q.values)
  want = jnp.einsum(spec, x, qarray.codes(q), preferred_element_type=jnp.float32)
  np.testing.assert_array_equal(got, want)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@_SPLIT
@pytest.mark.parametrize("bits", qarray.BITS)
def test_few_rows_on_a_mesh(
  monkeypatch, bits: int, spec: str, shape: tuple[int, ...], axes: tuple[int, ...], names: tuple[str, ...]
):
  """Each device's kernel (interpreted) multiplies its own part, as XLA's products of the whole."""
  rng = np.random.default_rng(0)
  q = qarray.quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), bits, axes)
  x = jnp.asarray(rng.integers(-8, 8, (2, 1, *shape[: len(axes)])), jnp.bfloat16)
  want = _product(spec, x, q)
  calls = []
  product = functools.partial(matmul_gpu.product, interpret=True)
  monkeypatch.setattr(matmul_gpu, "product", lambda *args: (calls.append(args[1].shape), product(*args))[1])
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, tensor=4), jax.devices()[:4])
  with partitioning.use(mesh):
    target = dataclasses.replace(partitioning.target(), platform="gpu", features=frozenset({"gpu", "triton"}))
    got = jax.jit(lambda x, q: q.product(target, spec, x, names))(x, q)
  np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-7, atol=1e-3)
  assert [math.prod(shape) for shape in calls] == [q.values.size // 4]


@pytest.mark.gpu
@pytest.mark.parametrize(
  "spec, shape, axes", [("BLD,DTHK->BLTHK", (512, 3, 4, 64), (0,)), ("BLHK,HKD->BLD", (8, 64, 512), (0, 1))]
)
@pytest.mark.parametrize("bits", qarray.BITS)
def test_few_rows_on_the_gpu(bits: int, spec: str, shape: tuple[int, ...], axes: tuple[int, ...]):
  rng = np.random.default_rng(0)
  q = qarray.quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), bits, axes)
  x = jnp.asarray(rng.standard_normal((2, 1, *shape[: len(axes)])), jnp.bfloat16)
  way = quantized.PRODUCT.choose(target_lib.Target.of(jax.devices()[0]), spec, x, q.values, bits, len(axes), None)
  assert way.needs == ("triton",)
  want = jnp.einsum(spec, x.astype(jnp.float32), qarray.dequantize(q), precision="highest")
  error = jnp.abs(jax.jit(_product, static_argnums=0)(spec, x, q).astype(jnp.float32) - want).max()
  assert error < 0.02 * jnp.std(want), error
