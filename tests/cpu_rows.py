"""Rows, codes and what they stand for, of the tests of products on CPUs."""

import ml_dtypes
import numpy as np

# (rows, inputs, outputs, groups): one vector and less, whole steps and parts of them, outputs that no tile divides.
# The longer ones are summed in several segments.
SIZES = [(1, 128, 4, 1), (3, 62, 9, 1), (8, 1036, 67, 2), (9, 30, 5, 3), (14, 516, 130, 1), (2, 4096, 36, 1)]
SIZES += [(1, 9002, 5, 1), (33, 9002, 6, 1)]
MODES = [(4, "float32"), (4, "bfloat16"), (4, "fast"), (8, "float32"), (8, "bfloat16"), (8, "fast")]


def codes_of(rng, bits, outputs, inputs):
  """Codes, and as they are stored."""
  codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, inputs)).astype(np.int8)
  return codes, packed(codes) if bits == 4 else codes


def packed(codes):
  return ((codes[:, 0::2] << 4) | (codes[:, 1::2] & 15)).astype(np.int8)


def rows_of(rng, rows, inputs, mode):
  x = rng.normal(size=(rows, inputs)).astype(np.float32)
  return x.astype(ml_dtypes.bfloat16) if mode == "bfloat16" else x


def as_bytes(x):
  """The rows that the fast mode multiplies in place of x."""
  largest = np.abs(x).max(1, keepdims=True)
  return np.rint(x * (np.float32(127) / largest)).astype(np.float64) * (largest / np.float32(127))


def check_rows_that_are_not_finite(multiplied, rows, inputs, bits, mode):
  """Asserts that rows of a NaN, an infinity and zeros spoil no other; returns all rows, and what they were multiplied
  with.
  """
  rng = np.random.default_rng(0)
  codes, _ = codes_of(rng, bits, 9, inputs)
  codes[codes == 0] = 1
  stored, scale = packed(codes) if bits == 4 else codes, np.ones((1, 9), np.float16)
  x = rows_of(rng, rows, inputs, mode)
  whole = multiplied(x, stored, scale, bits, mode)
  x[1, 7], x[2, 259], x[3] = np.nan, np.inf, 0
  got = multiplied(x, stored, scale, bits, mode)
  assert np.isnan(got[1]).all() and not np.isfinite(got[2]).any() and (got[3] == 0).all()
  rest = [r for r in range(rows) if r not in (1, 2, 3)]
  np.testing.assert_array_equal(got[rest], whole[rest])
  return x, stored, scale
