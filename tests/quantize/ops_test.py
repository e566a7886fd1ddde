"""einsum over quantized kernels equals einsum over the weights that they stand for."""

import functools
import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import target
from glmjax.kernels import matmul_gpu
from glmjax.quantize import ops
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


@pytest.mark.parametrize("spec, shape, axes", _KERNELS)
@pytest.mark.parametrize("bits", qarray.BITS)
def test_close_to_dequantized(spec: str, shape: tuple[int, ...], axes: tuple[int, ...], bits: int):
  x, q, expected = _case(spec, shape, axes, bits)
  for run in (ops.einsum, jax.jit(ops.einsum, static_argnums=0)):
    y = run(spec, x, q)
    assert y.dtype == x.dtype and y.shape == expected.shape
    np.testing.assert_allclose(y, expected, atol=2e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
@pytest.mark.parametrize("bits", qarray.BITS)
def test_half_types_do_not_overflow(bits: int, dtype: Any, tolerance: float):
  x, q, expected = _case("BLF,FD->BLD", (1024, 12), (0,), bits)
  scale = 20.0  # sums of codes times inputs pass fp16's 65504
  y = ops.einsum("BLF,FD->BLD", (x * scale).astype(dtype), q)
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
  layer = lambda x, q: (ops.einsum("BLF,FD->BLD", x, q), None)
  scanned = jax.jit(lambda x, q: jax.lax.scan(layer, x, q)[0])(x, stacked)
  np.testing.assert_allclose(scanned, expected, atol=1e-4)
  mapped = jax.vmap(lambda q: ops.einsum("BLF,FD->BLD", x, q))(stacked)
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
  y = jax.jit(ops.einsum, static_argnums=0)("BLF,FD->BLD", x, q)
  np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("bits", qarray.BITS)
def test_gradient_reaches_the_input(bits: int):
  x, q, _ = _case("BLF,FD->BLD", (256, 12), (0,), bits)
  gradient = jax.grad(lambda x: ops.einsum("BLF,FD->BLD", x, q).sum())(x)
  np.testing.assert_allclose(gradient, jnp.broadcast_to(qarray.dequantize(q).sum(1), x.shape), atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU's way")
@pytest.mark.parametrize("bits", qarray.BITS)
def test_no_float_copy_of_the_weights_on_a_cpu(bits: int):
  q = qarray.quantize(jnp.ones((1024, 1024)), bits, (0,))
  compiled = jax.jit(ops.einsum, static_argnums=0).lower("BLF,FD->BLD", jnp.ones((1, 1, 1024)), q).compile()
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


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize(
  "spec, shape, axes, split",
  [
    ("BLD,DTHK->BLTHK", (256, 3, 8, 64), (0,), (None, None, "tensor")),  # outputs split
    ("BLHK,HKD->BLD", (8, 128, 256), (0, 1), ("tensor",)),
  ],
)  # inputs split: the devices' sums are added
@pytest.mark.parametrize("bits", qarray.BITS)
def test_few_rows_on_a_mesh(
  monkeypatch, bits: int, spec: str, shape: tuple[int, ...], axes: tuple[int, ...], split: tuple[str | None, ...]
):
  """Each device's kernel (interpreted) multiplies its own part, as XLA's products of the whole."""
  rng = np.random.default_rng(0)
  q = qarray.quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), bits, axes)
  x = jnp.asarray(rng.integers(-8, 8, (2, 1, *shape[: len(axes)])), jnp.bfloat16)
  want = ops.einsum(spec, x, q)
  calls = []
  product = functools.partial(matmul_gpu.product, interpret=True)
  monkeypatch.setattr(matmul_gpu, "product", lambda *args: (calls.append(args[1].shape), product(*args))[1])
  monkeypatch.setattr(target, "runs_triton", lambda: True)
  mesh = jax.make_mesh((1, 4), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    got = jax.jit(functools.partial(ops.einsum, spec, split=jax.sharding.PartitionSpec(*split)))(x, q)
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
  assert ops._takes_few_rows(x, q, len(axes), ops._parts(q, None))
  want = jnp.einsum(spec, x.astype(jnp.float32), qarray.dequantize(q), precision="highest")
  error = jnp.abs(jax.jit(ops.einsum, static_argnums=0)(spec, x, q).astype(jnp.float32) - want).max()
  assert error < 0.02 * jnp.std(want), error
