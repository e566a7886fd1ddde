"""Products with weights that lie as CPUs read them, a row of inputs for each output (models/output_rows.py).

R rows, I inputs, O outputs, G groups of inputs that have scales of their own.
"""

import functools
from types import ModuleType

import jax

from glmjax import target as target_lib
from glmjax.kernels import registry
from glmjax.kernels.cpu import by_xla
from glmjax.kernels.cpu import product


def _run(
  way: ModuleType,
  target: target_lib.Target,
  x_RI: jax.Array,
  weight: jax.Array,
  scale_GO: jax.Array | None,
  bits: int | None,
  fast: bool,
) -> jax.Array:
  del target
  if scale_GO is None:
    return way.float_product(x_RI, weight)
  return way.product(x_RI, weight, scale_GO, bits, fast)


# Of (target, x, weight, scale, bits, fast), as cpu/product.py has them; without scales the weight is floats: float32.
PRODUCT = registry.Operation(
  "product with rows of weights, on one CPU",
  (
    registry.Implementation(
      "C++ library", "float32 and bfloat16", functools.partial(_run, product), needs=("cpu_library",)
    ),
    registry.Implementation("XLA, sums of integers and blocks of outputs", "all", functools.partial(_run, by_xla)),
  ),
)
