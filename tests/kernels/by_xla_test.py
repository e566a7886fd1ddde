"""Products with rows of weights by XLA alone, against sums in float64 and the C++ library."""

import itertools

import cpu_rows
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from glmjax.kernels.cpu import by_xla
from glmjax.kernels.cpu import library
from glmjax.kernels.cpu import product as product_lib

# (rows, inputs, outputs, groups); inputs of whole lines, which one row takes without a product, and others.
SIZES = [*cpu_rows.SIZES, (1, 1024, 7, 1), (1, 2048, 9, 2), (1, 9728, 5, 1), (1, 256 * 37, 5, 1), (8, 512, 3, 1)]
UNIT = {"float32": 127 * 255**2, "bfloat16": 127 * 255, "fast": np.inf}  # the largest magnitude is so many


def multiplied(x, stored, scale, bits, mode):
  run = jax.jit(by_xla.product, static_argnames=("bits", "fast"))
  return np.asarray(run(x, stored, scale, bits=bits, fast=mode == "fast"))


def check(got, x, weight, mode):
  """Each is within rounding of the sum of its products, rows rounded to whole numbers of their units."""
  exact = cpu_rows.as_bytes(x) if mode == "fast" else x.astype(np.float64)
  rounded = np.abs(exact).max(1, keepdims=True) / UNIT[mode]
  bound = 2e-6 * (np.abs(exact) @ np.abs(weight).T) + rounded * np.abs(weight).sum(1)
  assert (np.abs(got - exact @ weight.T) <= bound).all()


@pytest.mark.parametrize("bits, mode", cpu_rows.MODES)
def test_codes_of_all_sizes(bits, mode):
  rng = np.random.default_rng(bits)
  for (rows, inputs, outputs, groups), dtype in zip(SIZES, itertools.cycle((np.float16, np.float32))):
    codes, stored = cpu_rows.codes_of(rng, bits, outputs, inputs)
    scale = rng.uniform(0.5, 2, (groups, outputs)).astype(dtype)
    x = cpu_rows.rows_of(rng, rows, inputs, mode)
    weight = codes * np.repeat(scale.astype(np.float64), inputs // groups, 0).T
    got = multiplied(x, stored, scale, bits, mode)
    check(got, x, weight, mode)
    if library.status().available:
      expected = product_lib.product(x, stored, scale, bits, mode == "fast")
      np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint16"])
def test_floats_of_all_sizes(monkeypatch, dtype):
  """In blocks that divide the outputs and in others."""
  monkeypatch.setattr(by_xla, "_BLOCK", 4096)
  rng = np.random.default_rng(0)
  for (rows, inputs, outputs, _), mode in zip(SIZES, itertools.cycle(("float32", "bfloat16"))):
    weight = rng.normal(size=(outputs, inputs)).astype(np.float32)
    if dtype != "float32":
      weight = weight.astype(ml_dtypes.bfloat16)
    x = cpu_rows.rows_of(rng, rows, inputs, mode)
    got = np.asarray(jax.jit(by_xla.float_product)(x, weight.view(np.uint16) if dtype == "uint16" else weight))
    exact, weight = x.astype(np.float64), weight.astype(np.float64)
    assert (np.abs(got - exact @ weight.T) <= 2e-6 * (np.abs(exact) @ np.abs(weight).T)).all()


@pytest.mark.parametrize("bits, mode", cpu_rows.MODES)
def test_extreme_codes_and_scales(bits, mode):
  """All codes the least or the greatest, rows at their largest, scales from float16's smallest to its largest."""
  least, most, inputs = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 1024
  codes = np.array([[least] * inputs, [most] * inputs, [least, most] * (inputs // 2), [0] * inputs], np.int8)
  stored = cpu_rows.packed(codes) if bits == 4 else codes
  scale = np.array([[6e-8, 65504, 1, 6e-5]], np.float16)
  x = np.stack([np.ones(inputs), -np.ones(inputs), np.tile([1.0, -1.0], inputs // 2)]).astype(np.float32)
  x[:, 7] *= 0.49803  # half of a digit's range, below the other entries
  x = x.astype(ml_dtypes.bfloat16) if mode == "bfloat16" else x
  for rows in (1, 3, 12):
    some = np.tile(x, (4, 1))[:rows]
    check(multiplied(some, stored, scale, bits, mode), some, codes * scale.astype(np.float64).T, mode)


@pytest.mark.parametrize("bits, mode", cpu_rows.MODES)
def test_rows_that_are_not_finite_spoil_no_other(bits, mode):
  for rows in (4, 12):
    x, stored, scale = cpu_rows.check_rows_that_are_not_finite(multiplied, rows, 512, bits, mode)
    alone = [multiplied(x[r : r + 1], stored, scale, bits, mode) for r in (1, 2, 3)]
    assert np.isnan(alone[0]).all() and not np.isfinite(alone[1]).any() and (alone[2] == 0).all()


@pytest.mark.parametrize("bits, mode", cpu_rows.MODES)
def test_denormals_count_as_zeros_or_as_they_are(bits, mode):
  rng = np.random.default_rng(0)
  codes, stored = cpu_rows.codes_of(rng, bits, 5, 256)
  scale = np.full((1, 5), 6e-8, np.float16)
  for rows in (1, 9):
    x = np.full((rows, 256), 1e-40, np.float32)
    x = x.astype(ml_dtypes.bfloat16) if mode == "bfloat16" else x
    assert (np.abs(multiplied(x, stored, scale, bits, mode)) <= 256 * 128 * 1e-40).all()
    x = cpu_rows.rows_of(rng, rows, 256, mode)
    x[:, 5] = 1e-39
    check(multiplied(x, stored, scale, bits, mode), x, codes * scale.astype(np.float64).T, mode)


@pytest.mark.parametrize("bits, mode", cpu_rows.MODES)
def test_a_row_of_codes_is_the_same_among_a_few_others(bits, mode):
  """Bit for bit; in the fast mode among many."""
  rng = np.random.default_rng(0)
  for inputs, groups in ((1024, 1), (2048, 2), (780, 3)):
    x = cpu_rows.rows_of(rng, 40 if mode == "fast" else by_xla._FEW, inputs, mode)
    _, stored = cpu_rows.codes_of(rng, bits, 37, inputs)
    scale = rng.uniform(0.5, 2, (groups, 37)).astype(np.float32)
    whole = multiplied(x, stored, scale, bits, mode)
    for count in (1, 2, 5):
      np.testing.assert_array_equal(multiplied(x[:count], stored, scale, bits, mode), whole[:count])


@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("bits, mode", [*cpu_rows.MODES, (16, "bfloat16")])
def test_a_loop_over_tokens_holds_no_copy_of_weights(monkeypatch, bits, mode, rows):
  """Neither within the loop nor before it, where XLA moves what does not change."""
  monkeypatch.setattr(by_xla, "_BLOCK", 2**17)
  size = 2048
  weight = jnp.zeros((size, size * bits // 8 if bits < 16 else size), jnp.int8 if bits < 16 else jnp.uint16)
  x = jnp.zeros((rows, size), jnp.bfloat16 if mode == "bfloat16" else jnp.float32)

  @jax.jit
  def run(x, weight, scale):
    def step(_, x):
      if bits == 16:
        return by_xla.float_product(x, weight).astype(x.dtype)
      return by_xla.product(x, weight, scale, bits, mode == "fast").astype(x.dtype)

    return jax.lax.fori_loop(0, 3, step, x)

  compiled = run.lower(x, weight, jnp.ones((1, size), jnp.float16)).compile()
  block = 0 if rows == 1 and bits < 16 else 8 * by_xla._BLOCK
  most = 100 * x.size + block  # the rows, their digits and sums; some of the weights
  assert compiled.memory_analysis().temp_size_in_bytes < most < 4 * size * size
