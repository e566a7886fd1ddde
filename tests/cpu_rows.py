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
