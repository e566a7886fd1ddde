"""Codes and scales: the original's bits, error bounds, packing, odd cases."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax.quantize import qarray

_GOLDEN = pathlib.Path(os.environ.get("GLMJAX_GOLDEN_DIR", pathlib.Path(__file__).parents[1] / "golden"))
_CASES = sorted(json.loads((_GOLDEN / "quantization.json").read_text())["info"])


def _reference(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
  """The original's formulas in numpy, in w's own dtype: codes before any wrapping, and fp16 scales."""
  scale = (np.abs(w).max(-1) / w.dtype.type(2 ** (bits - 1) - 1)).astype(np.float16)
  return np.rint(w / scale[:, None]).astype(np.int32), scale


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("case", _CASES)
def test_golden(case: str, jit: bool):
  arrays = np.load(_GOLDEN / "quantization.npz")
  name, kind = case.rstrip("/").split("/")
  bits, source = int(kind[3]), kind.split("_")[-1]
  w = arrays[f"{name}/weight_{source}"].astype({"fp16": np.float16, "fp32": np.float32}[source])

  def run(w: jax.Array) -> qarray.QuantizedArray:
    return qarray.quantize(w, bits, axes=(1,))

  q = (jax.jit(run) if jit else run)(w)
  np.testing.assert_array_equal(np.asarray(q.scale)[:, 0], arrays[case + "weight_scale_fp16"])
  wrapped = _reference(w, bits)[0] > 2 ** (bits - 1) - 1  # int8 made -128 of them, where we clamp to 127
  expected = np.where(wrapped, 127, arrays[case + "q_int"])
  assert wrapped.sum() <= 1
  np.testing.assert_array_equal(np.asarray(qarray.codes(q)), expected)
  if not wrapped.any():
    np.testing.assert_array_equal(np.asarray(q.values), arrays[case + "weight_packed"])
    dequantized = np.asarray(qarray.dequantize(q, jnp.float16)).astype(np.float32)
    np.testing.assert_array_equal(dequantized, arrays[case + "dequant_fp16"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("bits", qarray.BITS)
def test_matches_the_formulas_on_many_rows(bits: int, dtype: Any):
  rng = np.random.default_rng(bits)
  w = (rng.standard_normal((2000, 34)) * np.exp(rng.uniform(-4, 2, (2000, 1)))).astype(dtype)
  w[:500] = np.round(w[:500] * 64) / 64  # many ties
  codes, scale = _reference(w, bits)
  q = qarray.quantize(w, bits, axes=(-1,))
  np.testing.assert_array_equal(np.asarray(q.scale)[:, 0], scale)
  limit = 2 ** (bits - 1) - 1
  np.testing.assert_array_equal(np.asarray(qarray.codes(q)), codes.clip(-limit, limit))


@pytest.mark.parametrize(
  "shape, axes",
  [((32, 3, 4, 8), (0,)), ((4, 8, 32), (0, 1)), ((32, 2, 24), (0,)), ((24, 32), (0,)), ((32, 1, 5), (-3,))],
)
@pytest.mark.parametrize("bits", qarray.BITS)
def test_error_is_at_most_half_a_step(bits: int, shape: tuple[int, ...], axes: tuple[int, ...]):
  w = jax.random.normal(jax.random.key(0), shape)
  q = qarray.quantize(w, bits, axes, scale_dtype=jnp.float32)
  assert q.shape == shape and q.scale.shape == tuple(
    1 if i in (a % len(shape) for a in axes) else n for i, n in enumerate(shape)
  )
  assert q.values.size * 8 == w.size * bits and q.values.dtype == jnp.int8
  error = jnp.abs(qarray.dequantize(q) - w)
  assert bool(jnp.all(error <= q.scale * 0.5001))
  with_half_scales = qarray.quantize(w, bits, axes)
  assert with_half_scales.scale.dtype == jnp.float16
  error = jnp.abs(qarray.dequantize(with_half_scales) - w)
  clamped = 127 / 2**11  # at most: fp16 may round the scale down
  assert bool(jnp.all(error <= with_half_scales.scale.astype(jnp.float32) * (0.5001 + clamped)))


@pytest.mark.parametrize("bits", qarray.BITS)
def test_codes_survive_quantizing_again(bits: int):
  q = qarray.quantize(jax.random.normal(jax.random.key(1), (64, 10)), bits, (0,), jnp.float32)
  again = qarray.quantize(qarray.dequantize(q), bits, (0,), jnp.float32)
  np.testing.assert_array_equal(np.asarray(q.values), np.asarray(again.values))


@pytest.mark.parametrize("bits", qarray.BITS)
def test_rows_of_zeros_and_of_tiny_numbers_stay_finite(bits: int):
  w = jnp.zeros((8, 4)).at[:, 1].set(1e-12).at[0, 2].set(3.0)
  back = qarray.dequantize(qarray.quantize(w, bits, (0,)))
  assert bool(jnp.all(jnp.isfinite(back))) and bool(jnp.all(back[:, :2] == 0))
  assert abs(float(back[0, 2]) - 3) < 2e-3


def test_packing_is_even_input_high():
  q = qarray.quantize(jnp.array([[7.0], [-3.0], [1.0], [-7.0]]), 4, (0,))
  assert np.asarray(q.values).view(np.uint8).ravel().tolist() == [0x7D, 0x19]
  assert np.asarray(qarray.codes(q)).ravel().tolist() == [7, -3, 1, -7]


def test_mistakes_are_one_line():
  with pytest.raises(errors.InputError, match="bits is 3"):
    qarray.quantize(jnp.ones((4, 4)), 3, (0,))
  with pytest.raises(errors.InputError, match=r"\(5, 4\) has an odd number of them in axis 0"):
    qarray.quantize(jnp.ones((5, 4)), 4, (0,))


@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
def test_quotients_of_a_device_that_rounds_wrongly_are_mended(off: int):
  rng = np.random.default_rng(0)
  x = rng.standard_normal(200_000).astype(np.float32)
  y = np.abs(rng.standard_normal(200_000)).astype(np.float32) + np.float32(1e-3)
  wrong = ((x / y).view(np.int32) + off).view(np.float32)
  np.testing.assert_array_equal(jax.jit(qarray._mended)(wrong, x, y), x / y)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape, axes", [((6, 4), (0,)), ((3, 4, 8), (0, 1)), ((2, 6, 4, 8), (1,)), ((4, 8), (-1,))])
def test_abstract_is_what_quantize_gives(bits: int, shape: tuple[int, ...], axes: tuple[int, ...]):
  made = jax.eval_shape(lambda x: qarray.quantize(x, bits, axes), jax.ShapeDtypeStruct(shape, jnp.float32))
  assert qarray.abstract(shape, bits, axes) == made
